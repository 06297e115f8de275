"""Temporal joins: for each left row the version of its key that was valid at its event time.

A right row is a version of its key, valid from its event time until that of the next. A left row gets the latest
version with an event time not after its own, and waits until the watermark has passed it: then no such version can come
any more, and the result is exact, in whatever order rows came. Of versions of one key and time the same one is taken
always (by a hash of what is in them). A version is forgotten when a later one is not after the watermark, or when it is
older than the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import PlanError
from rayflow.operators.base import Operator
from rayflow.operators.grouping import Int64Array
from rayflow.operators.joins.buffer import clipped
from rayflow.operators.joins.columns import LEFT, RIGHT
from rayflow.operators.joins.interval import BOUND_US
from rayflow.operators.joins.kernels import SortedRows, latest
from rayflow.operators.joins.operator import Join, JoinOperator

ASOF_HOWS: Final = ("inner", "left")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AsofJoin(Join):
    """Factory. Schema out: see `JoinColumns`; event time is that of the left side."""

    tolerance_us: int | None = None

    def __post_init__(self) -> None:
        Join.__post_init__(self)
        self.check_timed("join_asof")
        if self.how not in ASOF_HOWS:
            raise PlanError(f"how= must be one of {', '.join(ASOF_HOWS)} here, got {self.how!r}")
        if self.tolerance_us is not None and not 0 <= self.tolerance_us < BOUND_US:
            raise PlanError(f"tolerance= must lie between 0 and {BOUND_US} us, got {self.tolerance_us}")

    def description(self) -> dict[str, Any]:
        return {"kind": "asof", "how": self.how, "tolerance_us": self.tolerance_us}

    def build(self) -> Operator:
        return AsofJoinOperator(self)


class AsofJoinOperator(JoinOperator):
    """See `AsofJoin`."""

    def __init__(self, factory: AsofJoin) -> None:
        super().__init__(factory)
        self._tolerance_us = factory.tolerance_us
        self._ties = (False, True)

    def take(self, side: int, rows: SortedRows) -> None:
        self.buffers[side].append(rows)

    def alone(self, side: int, rows: pa.RecordBatch, times: Int64Array) -> None:
        if side == LEFT and self.factory.how == "left" and rows.num_rows:
            self.emit(self.columns.left_only(rows))

    def advance(self, before: int, now: int) -> None:
        for rows in self.buffers[LEFT].between(before, now):
            self._decide(rows)
        if now == MAX_WATERMARK:
            for buffer in self.buffers:
                buffer.clear()
            return
        self.buffers[LEFT].expire(now)
        if self._tolerance_us is not None:
            self.buffers[RIGHT].expire(clipped(now - self._tolerance_us))
        self.buffers[RIGHT].prune(now)

    def _decide(self, rows: SortedRows) -> None:
        runs = [run.sorted for run in self.buffers[RIGHT].runs]
        best = np.full(len(rows), -1, np.int64)
        """Row number of the version, in the run that ``source`` tells; -1: none."""
        source = np.zeros(len(rows), np.int64)
        time, tie = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.uint64)
        for index, run in enumerate(runs):
            found = latest(rows, run)
            some = np.flatnonzero(found >= 0)
            at = found[some]
            assert run.ties is not None
            newer = (best[some] < 0) | (run.times[at] > time[some])
            newer |= (run.times[at] == time[some]) & (run.ties[at] > tie[some])
            some, at = some[newer], at[newer]
            best[some], source[some], time[some], tie[some] = at, index, run.times[at], run.ties[at]
        if self._tolerance_us is not None:
            best[time < rows.times - self._tolerance_us] = -1
        for index, run in enumerate(runs):
            some = np.flatnonzero((best >= 0) & (source == index))
            if len(some):
                left, right = rows.rows.take(pa.array(some)), run.rows.take(pa.array(best[some]))
                self.emit(self.columns.pairs(left, right))
        none = best < 0
        if self.factory.how == "left" and none.any():
            self.emit(self.columns.left_only(rows.rows.filter(pa.array(none))))


__all__ = ["ASOF_HOWS", "AsofJoin", "AsofJoinOperator"]
