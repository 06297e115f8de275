"""Interval joins: rows of a key whose event times are not too far apart.

A left row l and a right row r of a key are a pair if ``l.time + lower <= r.time <= l.time + upper``. A pair comes out
when the later of the two comes in; a row that comes out by whether it has a partner (outer joins, semi, anti) when the
watermark says that no partner can come any more. Both depend on event times and the watermark alone: a row that comes
is probed against what has come before on the other side, and whether it ever had a partner is looked up again when it
is decided. So rows carry no marks that a restore could lose, or a second time find unset.

How long rows are kept, with W the watermark, ``hi`` the bound above the row's time in which partners lie (right rows
of a left row: upper, left rows of a right row: -lower), D = max(hi, 0):

- a row is decided when ``time + D < W``: no partner can come any more, and a row on time is never decided before;
- a row with ``time + hi < W`` has no partner to come; where rows of the other side are decided by whether they have
  one, those that still wait have a time from W - D of the other side on, so it is kept ``D of the other side`` longer.

Without bounds (``lower`` and ``upper`` None) everything is kept and decided at the end of both inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import PlanError
from rayflow.operators.base import Operator
from rayflow.operators.event_time import timestamp_type
from rayflow.operators.grouping import Int64Array
from rayflow.operators.joins.buffer import clipped, shifted
from rayflow.operators.joins.columns import LEFT, RIGHT
from rayflow.operators.joins.kernels import BoolArray, SortedRows, mark_matched, pairs
from rayflow.operators.joins.operator import Join, JoinOperator

BOUND_US: Final = 2**60
JOIN_TIME: Final = "join_time"
"""Column of the result: the later of the two event times, of a row without partner its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntervalJoin(Join):
    """Factory. Schema out: see `JoinColumns`; with bounds also `JOIN_TIME` (timestamp[us], in the zone of the left
    event time), which is the event time of the result. Semi and anti: that of the left side."""

    lower_us: int | None = None
    upper_us: int | None = None

    def __post_init__(self) -> None:
        Join.__post_init__(self)
        if (self.lower_us is None) != (self.upper_us is None):
            raise PlanError("within= needs both bounds or none")
        if self.lower_us is None or self.upper_us is None:
            return
        self.check_timed("within=")
        if self.lower_us > self.upper_us:
            raise PlanError(
                f"within= must go from the earlier to the later bound, got {self.lower_us} us to {self.upper_us} us"
            )
        if max(-self.lower_us, self.upper_us) >= BOUND_US:
            raise PlanError(f"within= must stay below {BOUND_US} us on either side")

    def description(self) -> dict[str, Any]:
        return {"kind": "interval", "how": self.how, "lower_us": self.lower_us, "upper_us": self.upper_us}

    def added(self, left: pa.Schema) -> Sequence[pa.Field]:
        if self.lower_us is None or self.left_time is None or self.how in ("semi", "anti"):
            return ()
        return (pa.field(JOIN_TIME, timestamp_type(left.field(self.left_time).type)),)

    def build(self) -> Operator:
        return IntervalJoinOperator(self)


class IntervalJoinOperator(JoinOperator):
    """See `IntervalJoin`."""

    def __init__(self, factory: IntervalJoin) -> None:
        super().__init__(factory)
        how = factory.how
        self._bounded = factory.lower_us is not None
        self.timed = self.timed and self._bounded
        lower, upper = factory.lower_us, factory.upper_us
        opposite = (None if upper is None else -upper), (None if lower is None else -lower)
        self._partners = ((lower, upper), opposite)
        """By side: where partners lie, from the row's own time on."""
        self._emits_pairs = how in ("inner", "left", "right", "full")
        self._decides = (how in ("left", "full", "semi", "anti"), how in ("right", "full"))
        delays = tuple(max(high or 0, 0) for _, high in self._partners)
        self._delays = delays
        self.hold_us = max((d for d, decides in zip(delays, self._decides, strict=True) if decides), default=0)
        self._kept_us = (self._keep(LEFT), self._keep(RIGHT))

    def _keep(self, side: int) -> int:
        """Up to how far behind the watermark rows of this side are needed (us)."""
        high, other = self._partners[side][1] or 0, 1 - side
        needed = [0]
        if self._emits_pairs:
            needed.append(high)
        if self._decides[side]:
            needed.append(self._delays[side])
        if self._decides[other]:
            needed.append(self._delays[other] + high)
        return max(needed)

    def take(self, side: int, rows: SortedRows) -> None:
        if self._emits_pairs:
            low, high = self._reach(side, rows)
            for others in self.buffers[1 - side].near(low, high):
                for mine, theirs in pairs(rows, others, low, high):
                    self._emit_pairs(side, rows, mine, others, theirs)
        self.buffers[side].append(rows)

    def _reach(self, side: int, rows: SortedRows) -> tuple[Int64Array | None, Int64Array | None]:
        low, high = self._partners[side]
        return shifted(rows.times, low), shifted(rows.times, high)

    def _emit_pairs(
        self, side: int, rows: SortedRows, mine: Int64Array, others: SortedRows, theirs: Int64Array
    ) -> None:
        here, there = rows.rows.take(pa.array(mine)), others.rows.take(pa.array(theirs))
        added = self._join_time(np.maximum(rows.times[mine], others.times[theirs]))
        self.emit(self.columns.pairs(*((here, there) if side == LEFT else (there, here)), *added))

    def _join_time(self, times: Int64Array) -> list[pa.Array]:
        if not self.factory.added(self.columns.sides[LEFT]):
            return []
        return [pa.array(times).view(self.columns.schema.field(JOIN_TIME).type)]

    def alone(self, side: int, rows: pa.RecordBatch, times: Int64Array) -> None:
        if self._decides[side]:
            self._emit_undecided(side, rows, times, np.zeros(rows.num_rows, bool))

    def _emit_undecided(self, side: int, rows: pa.RecordBatch, times: Int64Array, matched: BoolArray) -> None:
        chosen = matched if self.factory.how == "semi" else ~matched
        if not chosen.any():
            return
        if not chosen.all():
            rows, times = rows.filter(pa.array(chosen)), times[chosen]
        only = self.columns.left_only if side == LEFT else self.columns.right_only
        self.emit(only(rows, *self._join_time(times)))

    def advance(self, before: int, now: int) -> None:
        for side in (LEFT, RIGHT):
            if self._decides[side]:
                self._decide(side, self._decided(side, before), self._decided(side, now))
        for side, buffer in enumerate(self.buffers):
            if now == MAX_WATERMARK:
                buffer.clear()
            elif self.timed:
                buffer.expire(clipped(now - self._kept_us[side]))

    def _decided(self, side: int, watermark: int) -> int:
        """Rows with an event time below it are decided."""
        if watermark == MAX_WATERMARK:
            return MAX_WATERMARK
        return clipped(watermark - self._delays[side] if self.timed else -(2**63))

    def _decide(self, side: int, begin: int, end: int) -> None:
        for rows in self.buffers[side].between(begin, end):
            matched = np.zeros(len(rows), bool)
            low, high = self._reach(side, rows)
            for others in self.buffers[1 - side].near(low, high):
                mark_matched(matched, rows, others, low, high)
            self._emit_undecided(side, rows.rows, rows.times, matched)


__all__ = ["BOUND_US", "JOIN_TIME", "IntervalJoin", "IntervalJoinOperator"]
