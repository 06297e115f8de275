"""Event time over several inputs (rules W1, W2)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, ChannelId, SubtaskId
from rayflow.core.watermarks import InputWatermarks
from rayflow.errors import ProtocolError

A, B = (ChannelId(0, SubtaskId("up", i), SubtaskId("down", 0)) for i in range(2))


def all_idle(marks: InputWatermarks[Any]) -> bool:
    return marks.all_idle


def test_the_combined_watermark_is_the_minimum() -> None:
    marks = InputWatermarks([A, B])
    assert marks.advance(A, 10) is None
    assert marks.current == MIN_WATERMARK
    assert marks.advance(B, 5) == 5
    assert marks.advance(B, 20) == 10
    assert marks.advance(B, 30) is None


def test_an_ended_channel_holds_nothing_back() -> None:
    marks = InputWatermarks([A, B])
    marks.advance(A, 10)
    assert marks.end(B) == 10
    assert marks.end(A) == MAX_WATERMARK


def test_an_idle_channel_is_left_out_and_comes_back_without_lowering_it() -> None:
    marks = InputWatermarks([A, B])
    marks.advance(A, 10)
    assert marks.set_idle(B) == 10
    assert marks.advance(B, 3) is None
    assert marks.current == 10
    marks.check_invariants()
    assert marks.advance(A, 20) is None
    assert marks.advance(B, 12) == 12


def test_a_falling_watermark_is_refused() -> None:
    marks = InputWatermarks([A])
    marks.advance(A, 10)
    with pytest.raises(ProtocolError, match="W1"):
        marks.advance(A, 9)


def test_an_ended_channel_does_not_speak_for_idle_ones() -> None:
    marks = InputWatermarks([A, B])
    marks.advance(A, 10)
    assert marks.set_idle(B) == 10
    assert marks.end(A) is None, "B may come back: nothing is known of what it will bring"
    assert marks.current == 10
    assert all_idle(marks)
    assert marks.advance(B, 12) == 12
    assert marks.end(B) == MAX_WATERMARK


def test_when_all_are_idle_the_watermark_stays() -> None:
    marks = InputWatermarks([A, B])
    marks.advance(A, 10)
    marks.advance(B, 5)
    assert marks.set_idle(A) is None
    assert not all_idle(marks)
    assert marks.set_idle(B) is None
    assert all_idle(marks)
    assert marks.current == 5
    assert marks.advance(A, 10) == 10, "the same watermark again says that the channel is back"
    assert not all_idle(marks)


def test_news_of_an_ended_channel_changes_nothing() -> None:
    marks = InputWatermarks([A, B])
    marks.advance(B, 7)
    assert marks.end(A) == 7
    assert marks.set_idle(A) is None
    assert not all_idle(marks)
    marks.check_invariants()
    with pytest.raises(ProtocolError, match="W1"):
        marks.advance(A, 9)


def test_inputs_that_come_and_go_never_lower_it() -> None:
    marks: InputWatermarks[str] = InputWatermarks(["a"])
    assert marks.advance("a", 10) == 10
    marks.add("b", 3)
    assert marks.current == 10
    assert marks.advance("b", 4) is None
    assert marks.advance("a", 20) is None
    assert marks.forget("b") == 20
    assert marks.forget("a") is None
    assert marks.current == 20, "a split that is done says nothing of those to come"
    assert not all_idle(marks)


# -------------------------------------------------------------------------------------------------- any order of events

STEPS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["advance", "idle", "end"]), st.integers(0, 9)))


def follow(marks: InputWatermarks[str], steps: list[tuple[str, str, int]]) -> None:
    """Raises when W1 or W2 is broken, told by a model that keeps everything."""
    reached = dict.fromkeys("abc", MIN_WATERMARK)
    idle: set[str] = set()
    said = MIN_WATERMARK
    for key, what, by in steps:
        if key not in reached:
            continue
        if what == "advance":
            reached[key] = max(reached[key], 0) + by
            idle.discard(key)
            risen = marks.advance(key, reached[key])
        elif what == "idle":
            idle.add(key)
            risen = marks.set_idle(key)
        else:
            del reached[key]
            idle.discard(key)
            risen = marks.end(key)
        marks.check_invariants()
        assert risen is None or risen > said, f"W1: {risen} was emitted after {said}"
        live = [time for k, time in reached.items() if k not in idle]
        before, said = said, said if risen is None else risen
        expected = max(before, min(live, default=before)) if reached else MAX_WATERMARK
        assert said == expected, f"W2: {said} instead of {expected}"
        assert marks.current == said
        if not reached:
            break


@given(STEPS)
def test_any_order_of_news_keeps_both_rules(steps: list[tuple[str, str, int]]) -> None:
    follow(InputWatermarks("abc"), steps)


class ReAdmittedBelow(InputWatermarks[str]):
    """Broken: the minimum is followed wherever it goes, so an input that comes back lowers what was emitted."""

    def _combine(self) -> int | None:
        live = [time for key, time in self._of.items() if key not in self._idle]
        self.current = min(live, default=self.current)
        return self.current


class EndedSpeaks(InputWatermarks[str]):
    """Broken: an ended input counts as one at the end of time, also where the others are idle."""

    def end(self, key: str) -> int | None:
        risen = super().end(key)
        if self.all_idle:
            self.current = MAX_WATERMARK
            return MAX_WATERMARK
        return risen


@pytest.mark.parametrize(
    ("broken", "steps", "rule"),
    [
        (ReAdmittedBelow, [("a", "advance", 9), ("b", "idle", 0), ("c", "idle", 0), ("b", "advance", 3)], "W1"),
        (EndedSpeaks, [("a", "advance", 9), ("b", "idle", 0), ("c", "idle", 0), ("a", "end", 0)], "W2"),
    ],
)
def test_broken_combinations_are_caught(
    broken: type[InputWatermarks[str]], steps: list[tuple[str, str, int]], rule: str
) -> None:
    with pytest.raises(AssertionError, match=rule):
        follow(broken("abc"), steps)
