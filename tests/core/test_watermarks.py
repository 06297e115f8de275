"""Event time over several inputs (rules W1, W2)."""

from __future__ import annotations

import pytest

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, ChannelId, SubtaskId
from rayflow.core.watermarks import InputWatermarks
from rayflow.errors import ProtocolError

A, B = (ChannelId(0, SubtaskId("up", i), SubtaskId("down", 0)) for i in range(2))


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
