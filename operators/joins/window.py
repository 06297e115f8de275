"""Window joins: all pairs of a key whose event times lie in the same window, when the window closes.

W3  a window fires at most once: those fire that were the first open one at the watermark before, and on to the first
    open one now; which, follows from the watermark alone, and it is part of the snapshot.

A row of sliding windows is kept once. When some of them close, the rows of the left side are repeated for each of these
windows that they are in, and then looked up in the other side, as those of one window each are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.operators.base import Operator
from rayflow.operators.event_time import timestamp_type
from rayflow.operators.grouping import Int64Array
from rayflow.operators.joins.columns import LEFT, RIGHT
from rayflow.operators.joins.kernels import PAIRS, SortedRows, mark_matched, pairs
from rayflow.operators.joins.operator import Join, JoinOperator
from rayflow.operators.tumbling import WindowSpec
from rayflow.operators.windowing.sliding import Sliding

WINDOW: tuple[str, str] = ("window_start", "window_end")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowJoin(Join):
    """Factory. Schema out: see `JoinColumns`, and window_start and window_end (timestamp[us], in the zone of the left
    event time), of which the first is the event time of the result. Semi and anti: the left side and these two."""

    window: WindowSpec

    def __post_init__(self) -> None:
        Join.__post_init__(self)
        self.check_timed("window=")

    def description(self) -> dict[str, Any]:
        return {"kind": "window", "how": self.how, **self.window.cut()}

    def added(self, left: pa.Schema) -> Sequence[pa.Field]:
        assert self.left_time is not None
        kind = timestamp_type(left.field(self.left_time).type)
        return [pa.field(name, kind) for name in WINDOW]

    def build(self) -> Operator:
        return WindowJoinOperator(self)


@dataclass(frozen=True, slots=True)
class _InWindows:
    """Rows, each as often as there are windows to be looked at that it is in, and those windows [start, end)."""

    sorted: SortedRows
    starts: Int64Array
    ends: Int64Array

    def matched(self, others: Sequence[SortedRows]) -> Any:
        matched = np.zeros(len(self.sorted), bool)
        for other in others:
            mark_matched(matched, self.sorted, other, self.starts, self.ends - 1)
        return matched


class WindowJoinOperator(JoinOperator):
    """See `WindowJoin`."""

    def __init__(self, factory: WindowJoin) -> None:
        super().__init__(factory)
        self._window = factory.window
        how = factory.how
        self._decides = (how in ("left", "full", "semi", "anti"), how in ("right", "full"))
        self._kind = self.columns.schema.field(WINDOW[0]).type

    def bound(self) -> int:
        return self._first_open(self.watermark)

    def _first_open(self, watermark: int) -> int:
        """Windows that start before it have closed; rows before it are in no window that is open."""
        if watermark in (MIN_WATERMARK, MAX_WATERMARK):
            return watermark
        return max(MIN_WATERMARK, self._window.first_open(watermark))

    def passed_on(self) -> int:
        return self._first_open(self.watermark)

    def take(self, side: int, rows: SortedRows) -> None:
        self.buffers[side].append(rows)

    def alone(self, side: int, rows: pa.RecordBatch, times: Int64Array) -> None:
        if not rows.num_rows or not self._decides[side] or self.factory.how == "semi":
            return
        at, starts = windows_of(self._window, times, self.bound(), MAX_WATERMARK)
        self._emit_only(side, rows.take(pa.array(at)), starts, self._window.ends_of(starts))

    def _emit_only(self, side: int, rows: pa.RecordBatch, starts: Int64Array, ends: Int64Array) -> None:
        if rows.num_rows:
            only = self.columns.left_only if side == LEFT else self.columns.right_only
            self.emit(only(rows, *self._bounds(starts, ends)))

    def _bounds(self, starts: Int64Array, ends: Int64Array) -> tuple[pa.Array, pa.Array]:
        return pa.array(starts).view(self._kind), pa.array(ends).view(self._kind)

    def advance(self, before: int, now: int) -> None:
        begin, end = self._first_open(before), self._first_open(now)
        if begin == end:
            return
        # A window that closes now has no row that is not before now.
        due = [list(buffer.between(begin, now)) for buffer in self.buffers]
        how = self.factory.how
        if how not in ("semi", "anti"):
            for rows in due[LEFT]:
                for some in self._in_windows(rows, begin, end):
                    self._emit_pairs(some, due[RIGHT])
        for side in (LEFT, RIGHT):
            if self._decides[side]:
                for rows in due[side]:
                    for some in self._in_windows(rows, begin, end):
                        matched = some.matched(due[1 - side])
                        chosen = matched if how == "semi" else ~matched
                        alone = some.sorted.rows.filter(pa.array(chosen))
                        self._emit_only(side, alone, some.starts[chosen], some.ends[chosen])
        for buffer in self.buffers:
            if now == MAX_WATERMARK:
                buffer.clear()
            else:
                buffer.expire(end)

    def _in_windows(self, rows: SortedRows, begin: int, end: int) -> Iterator[_InWindows]:
        """The rows in windows with begin <= start < end, some at a time."""
        size = PAIRS if not isinstance(self._window, Sliding) else max(1, PAIRS // overlapping(self._window))
        for first in range(0, len(rows), size):
            at, starts = windows_of(self._window, rows.times[first : first + size], begin, end)
            if len(at):
                yield _InWindows(rows.at(at + first), starts, self._window.ends_of(starts))

    def _emit_pairs(self, some: _InWindows, others: Sequence[SortedRows]) -> None:
        for other in others:
            for mine, theirs in pairs(some.sorted, other, some.starts, some.ends - 1):
                left, right = some.sorted.rows.take(pa.array(mine)), other.rows.take(pa.array(theirs))
                self.emit(self.columns.pairs(left, right, *self._bounds(some.starts[mine], some.ends[mine])))


def overlapping(window: Sliding) -> int:
    """In how many windows a row is at most."""
    return -(-window.size_us // window.every_us)


def windows_of(window: WindowSpec, times: Int64Array, begin: int, end: int) -> tuple[Int64Array, Int64Array]:
    """(i, start) for every window with begin <= start < end that times[i] is in, in ascending order of i."""
    if not len(times):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    if isinstance(window, Sliding):
        every = window.every_us
        last = (times - window.offset_us) // every * every + window.offset_us
        starts = last[:, None] - np.arange(overlapping(window)) * every
        at, column = np.nonzero((starts > times[:, None] - window.size_us) & (starts >= begin) & (starts < end))
        return at, starts[at, column]
    found = window.window_starts(pa.array(times), int(times.min()), int(times.max()))
    starts = np.full(len(times), found) if isinstance(found, int) else found
    at = np.flatnonzero((starts >= begin) & (starts < end))
    return at, starts[at]


__all__ = ["WINDOW", "WindowJoin", "WindowJoinOperator", "windows_of"]
