"""Numbered messages in order again (rules C6, F3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayflow.core.ids import Attempt
from rayflow.core.resequence import Arrival, Resequencer

ONE, TWO, THREE = Attempt(1), Attempt(2), Attempt(3)


def test_in_order_early_twice() -> None:
    r = Resequencer[str](ONE)
    assert r.offer(ONE, 0, "a") == (Arrival.ACCEPTED, ("a",))
    assert r.offer(ONE, 2, "c") == (Arrival.HELD, ())
    assert r.offer(ONE, 2, "c") == (Arrival.DUPLICATE, ())
    assert r.offer(ONE, 1, "b") == (Arrival.ACCEPTED, ("b", "c"))
    assert r.offer(ONE, 0, "a") == (Arrival.DUPLICATE, ())
    assert r.held == 0


def test_messages_of_another_attempt_are_stale() -> None:
    r = Resequencer[str](TWO)
    assert r.offer(ONE, 0, "old") == (Arrival.STALE, ())
    assert r.offer(THREE, 0, "new") == (Arrival.STALE, ())
    r.advance(THREE)
    assert r.offer(THREE, 0, "new") == (Arrival.ACCEPTED, ("new",))
    assert r.offer(TWO, 0, "late") == (Arrival.STALE, ())
    r.advance(ONE)
    assert r.attempt == THREE


def test_a_follower_moves_on_with_the_first_message_of_a_newer_attempt() -> None:
    r = Resequencer[str](ONE, follow=True)
    r.offer(ONE, 5, "lost with its attempt")
    assert r.offer(TWO, 1, "b") == (Arrival.HELD, ())
    assert r.offer(ONE, 0, "old") == (Arrival.STALE, ())
    assert r.offer(TWO, 0, "a") == (Arrival.ACCEPTED, ("a", "b"))


def test_the_buffer_has_a_bound() -> None:
    r = Resequencer[int](ONE, limit=2)
    outcomes = [r.offer(ONE, n, n)[0] for n in (1, 2, 3)]
    assert outcomes == [Arrival.HELD, Arrival.HELD, Arrival.OVERFLOW]
    assert r.offer(ONE, 0, 0) == (Arrival.ACCEPTED, (0, 1, 2))
    r.check_invariants()


@pytest.mark.parametrize("follow", [False, True])
@given(data=st.data())
def test_any_order_with_repeats_gives_each_once_in_order(follow: bool, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 12))
    numbers = list(range(count))
    order = data.draw(st.permutations(numbers + data.draw(st.lists(st.sampled_from(numbers or [0]), max_size=8))))
    r = Resequencer[int](ONE, follow=follow)
    released = [m for n in order if n < count for m in r.offer(ONE, n, n)[1]]
    r.check_invariants()
    assert released == numbers
