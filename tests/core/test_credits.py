"""Byte credits (rules F1, F2)."""

from __future__ import annotations

import random

import pytest

from rayflow.core.credits import OutputAccount
from rayflow.core.ids import ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import Barrier, Data, Element, Watermark
from rayflow.errors import ProtocolError

A = ChannelId(0, SubtaskId("up", 0), SubtaskId("down", 0))


def data(n: int) -> Data:
    return Data(None, n)


def test_sends_until_the_window_is_full() -> None:
    account = OutputAccount(A, 100)
    assert account.offer(data(60)) == [data(60)]
    assert account.offer(data(60)) == []
    assert account.waiting
    assert account.credit(60) == [data(60)]
    assert not account.waiting


def test_nothing_overtakes_what_waits() -> None:
    account = OutputAccount(A, 100)
    account.offer(data(80))
    barrier = Barrier(CheckpointId(1))
    assert account.offer(data(30)) == []
    assert account.offer(barrier) == []
    assert account.offer(data(10)) == []
    assert account.credit(80) == [data(30), barrier, data(10)]


def test_credit_is_cumulative_and_may_be_repeated_or_late() -> None:
    account = OutputAccount(A, 100)
    account.offer(data(50))
    account.offer(data(50))
    account.credit(100)
    account.credit(50)
    assert account.in_flight == 0


def test_credit_for_what_was_never_sent_is_refused() -> None:
    with pytest.raises(ProtocolError, match="F1"):
        OutputAccount(A, 100).credit(1)


def test_an_element_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="F1"):
        OutputAccount(A, 100).offer(data(101))


@pytest.mark.parametrize("seed", range(100))
def test_order_is_kept_and_the_bound_holds_on_any_schedule(seed: int) -> None:
    rng = random.Random(seed)
    account = OutputAccount(A, 100)
    offered: list[Element] = []
    sent: list[Element] = []
    taken = 0
    for i in range(200):
        if rng.random() < 0.5:
            element: Element = data(rng.randint(1, 100)) if rng.random() < 0.8 else Watermark(i)
            offered.append(element)
            sent += account.offer(element)
        elif account.in_flight:
            taken += rng.randint(1, account.in_flight)
            sent += account.credit(taken)
        account.check_invariants()
    assert sent == offered[: len(sent)]
    assert account.peak <= 100
