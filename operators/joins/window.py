"""Window joins: all pairs of a key whose event times lie in the same window, when the window closes.

W3  a window fires at most once: what fires lies between the bounds of the watermark before and that of now, by event
    time alone, and the watermark is part of the snapshot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.operators.base import Operator
from rayflow.operators.event_time import timestamp_type
from rayflow.operators.grouping import Int64Array
from rayflow.operators.joins.columns import LEFT, RIGHT
from rayflow.operators.joins.kernels import SortedRows, mark_matched, pairs
from rayflow.operators.joins.operator import Join, JoinOperator
from rayflow.operators.tumbling import Tumbling

WINDOW: tuple[str, str] = ("window_start", "window_end")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowJoin(Join):
    """Factory. Schema out: see `JoinColumns`, and window_start and window_end (timestamp[us], in the zone of the left
    event time), of which the first is the event time of the result. Semi and anti: the left side and these two."""

    window: Tumbling

    def __post_init__(self) -> None:
        Join.__post_init__(self)
        self.check_timed("window=")

    def description(self) -> dict[str, Any]:
        return {
            "kind": "window",
            "how": self.how,
            "size_us": self.window.size_us,
            "offset_us": self.window.offset_us,
        }

    def added(self, left: pa.Schema) -> Sequence[pa.Field]:
        assert self.left_time is not None
        kind = timestamp_type(left.field(self.left_time).type)
        return [pa.field(name, kind) for name in WINDOW]

    def build(self) -> Operator:
        return WindowJoinOperator(self)


class WindowJoinOperator(JoinOperator):
    """See `WindowJoin`."""

    def __init__(self, factory: WindowJoin) -> None:
        super().__init__(factory)
        self._window = factory.window
        how = factory.how
        self._decides = (how in ("left", "full", "semi", "anti"), how in ("right", "full"))
        self._kind = self.columns.schema.field(WINDOW[0]).type

    def bound(self) -> int:
        return self._closed(self.watermark)

    def _closed(self, watermark: int) -> int:
        """Windows that start before it have closed."""
        if watermark in (MIN_WATERMARK, MAX_WATERMARK):
            return watermark
        return max(MIN_WATERMARK, self._window.start_of(watermark))

    def passed_on(self) -> int:
        return self._closed(self.watermark)

    def take(self, side: int, rows: SortedRows) -> None:
        self.buffers[side].append(rows)

    def alone(self, side: int, rows: pa.RecordBatch, times: Int64Array) -> None:
        if self._decides[side] and self.factory.how != "semi":
            self._emit_only(side, rows, times)

    def _emit_only(self, side: int, rows: pa.RecordBatch, times: Int64Array) -> None:
        if rows.num_rows:
            only = self.columns.left_only if side == LEFT else self.columns.right_only
            self.emit(only(rows, *self._bounds(times)))

    def _bounds(self, times: Int64Array) -> tuple[pa.Array, pa.Array]:
        starts = self._window.starts_of(times)
        return pa.array(starts).view(self._kind), pa.array(starts + self._window.size_us).view(self._kind)

    def advance(self, before: int, now: int) -> None:
        begin, end = self._closed(before), self._closed(now)
        if begin == end:
            return
        due = [list(buffer.between(begin, end)) for buffer in self.buffers]
        how = self.factory.how
        if how not in ("semi", "anti"):
            for rows in due[LEFT]:
                self._emit_pairs(rows, due[RIGHT])
        for side in (LEFT, RIGHT):
            if self._decides[side]:
                for rows in due[side]:
                    self._decide(side, rows, due[1 - side])
        for buffer in self.buffers:
            if now == MAX_WATERMARK:
                buffer.runs.clear()
            else:
                buffer.expire(end)

    def _reach(self, rows: SortedRows) -> tuple[Int64Array, Int64Array]:
        starts = self._window.starts_of(rows.times)
        return starts, starts + (self._window.size_us - 1)

    def _emit_pairs(self, rows: SortedRows, others: Sequence[SortedRows]) -> None:
        low, high = self._reach(rows)
        for other in others:
            for mine, theirs in pairs(rows, other, low, high):
                left, right = rows.rows.take(pa.array(mine)), other.rows.take(pa.array(theirs))
                self.emit(self.columns.pairs(left, right, *self._bounds(rows.times[mine])))

    def _decide(self, side: int, rows: SortedRows, others: Sequence[SortedRows]) -> None:
        matched = np.zeros(len(rows), bool)
        low, high = self._reach(rows)
        for other in others:
            mark_matched(matched, rows, other, low, high)
        chosen = matched if self.factory.how == "semi" else ~matched
        self._emit_only(side, rows.rows.filter(pa.array(chosen)), rows.times[chosen])


__all__ = ["WINDOW", "WindowJoin", "WindowJoinOperator"]
