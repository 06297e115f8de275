"""Deduplicate: of the rows of a key the first passes, for ever or for some time.

With ``within`` a row passes if its event time is at least ``within`` later than that of the last row of its key that
passed, or if none has passed. This depends on the order of the rows of the key alone. A key may be forgotten as soon
as the watermark is ``within`` behind its last row: whatever comes later passes anyway. So that nothing else can come,
rows behind the watermark never pass; they are counted and go to the side output ``late``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, PlanError
from rayflow.operators.base import MAIN, FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.event_time import TIME_BOUND_US, EventTimeReader, check_event_time
from rayflow.operators.grouping import Int64Array
from rayflow.operators.keyed.cells import BoolArray, seeds_of, store
from rayflow.operators.keyed.keyed_operator import KeyedOperator, key_schema
from rayflow.operators.keyed.segments import Segments
from rayflow.operators.state.table import StateTable
from rayflow.operators.windows import LATE

STATE: Final = "seen"
PASSED: Final = "passed_us"
"""Event time of the last row of the key that passed."""
PROGRESS: Final = "progress"
"""State without rows, for its ``meta``: the watermark and the late rows of each subtask."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Deduplicate:
    """Factory. Schema out: that of the input. Null is a key like any other.

    ``within_us`` None: the first row of each key passes and no other ever does. Else see this module; a null event
    time is a `DataError`.
    """

    keys: tuple[str, ...]
    within_us: int | None = None
    event_time: str | None = None

    def __post_init__(self) -> None:
        if self.within_us is not None and self.within_us <= 0:
            raise PlanError(f"deduplicate(within) must be longer than zero, got {self.within_us} us")
        if self.within_us is not None and self.within_us >= TIME_BOUND_US:
            raise PlanError(f"deduplicate(within) must be below {TIME_BOUND_US} us, got {self.within_us}; leave it out")
        if self.within_us is not None and self.event_time is None:
            raise PlanError(
                "deduplicate(within) needs event time; pass event_time= to the source or call "
                ".with_event_time(column) before key_by, or leave within out"
            )

    @property
    def stateful(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is not None:
            key_schema(schema, self.keys)
            if self.within_us is not None and self.event_time is not None:
                check_event_time(schema, self.event_time, step="deduplicate")
        return schema

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        return None if schema is None else {STATE: pa.schema([*key_schema(schema, self.keys), *self.values()])}

    def values(self) -> pa.Schema:
        return pa.schema([] if self.within_us is None else [(PASSED, pa.int64())])

    def build(self) -> Operator:
        return DeduplicateOperator(self) if self.within_us is None else DeduplicateWithinOperator(self)


class DeduplicateOperator(KeyedOperator):
    """Without ``within``."""

    _table: StateTable

    def __init__(self, factory: Deduplicate) -> None:
        super().__init__(factory.keys)
        self._factory = factory

    def bind(self, schema: pa.Schema) -> None:
        assert self.state is not None
        self._table = self.state.table(STATE, key_schema(schema, self.keys), self._factory.values())

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        keys = self.key_columns(batch)
        new = np.flatnonzero(self._table.slots(keys, insert=False) < 0)
        if len(new) == 0:
            return []
        rows = pa.array(new)
        segments = Segments.of(self._table.slots([key.take(rows) for key in keys], insert=True))
        self._table.touch(segments.heads)
        if segments.distinct and len(new) == batch.num_rows:
            return [(batch, MAIN)]
        firsts = np.sort(new[segments.order[segments.starts]])
        return [(batch.take(pa.array(firsts)), MAIN)]


class DeduplicateWithinOperator(DeduplicateOperator):
    """With ``within``. Expired keys are looked for when the watermark has gone far enough and rows enough have come
    for the search to be worth it; in between up to about as many expired keys as live ones are kept."""

    def __init__(self, factory: Deduplicate) -> None:
        super().__init__(factory)
        assert factory.within_us is not None
        self._within = factory.within_us
        self._watermark = MIN_WATERMARK
        self._swept_at = MIN_WATERMARK
        self._new_rows = 0
        """Rows that passed since the last sweep: an upper bound of the keys that came."""
        self.late_rows = 0

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        assert self._factory.event_time is not None
        self._reader = EventTimeReader(self._factory.event_time, on_error="fail", where=str(ctx))

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        batch, column, earliest, _ = self._reader.read(batch)
        times: Int64Array = column.to_numpy()
        results: list[tuple[pa.RecordBatch, str]] = []
        if earliest < self._watermark:
            late = times < self._watermark
            self.late_rows += int(late.sum())
            results.append((batch.filter(pa.array(late)), LATE))
            batch, times = batch.filter(pa.array(~late)), times[~late]
            if batch.num_rows == 0:
                return results
        table = self._table
        slots = table.slots(self.key_columns(batch), insert=True)
        last, known = seeds_of(table, PASSED, slots, 0)
        # What has passed only moves forward, so who is too early now will not pass after another row of this batch.
        rows = np.flatnonzero(~known | (times >= last + self._within))
        if len(rows) == 0:
            return results
        segments = Segments.of(slots[rows])
        sorted_times = times[rows][segments.order]
        passing = passing_rows(segments, sorted_times, self._within)
        # The last row that passes has the latest time of all that pass.
        latest = np.maximum.reduceat(np.where(passing, sorted_times, np.iinfo(np.int64).min), segments.starts)
        store(table, PASSED, segments.heads, latest)
        table.touch(segments.heads)
        passed = np.sort(rows[segments.order[passing]])
        self._new_rows += len(passed)
        results.append((batch if len(passed) == batch.num_rows else batch.take(pa.array(passed)), MAIN))
        return results

    def on_watermark(self, time: int) -> int:
        if time > self._watermark:
            self._watermark = time
            if self._sweep_is_due():
                self._sweep()
        return time

    def _sweep_is_due(self) -> bool:
        if self._schema is None:
            return False
        gone = self._watermark - self._swept_at
        enough = self._new_rows * 2 >= self._table.rows and gone * 4 >= self._within
        return self._watermark == MAX_WATERMARK or enough or gone >= self._within

    def _sweep(self) -> None:
        """Forget the keys of which the next row passes in any case."""
        self._swept_at, self._new_rows = self._watermark, 0
        horizon = self._watermark - self._within
        expired = []
        for rows in self._table.scan():
            gone = rows.column(PASSED).fill_null(MIN_WATERMARK).to_numpy() <= horizon
            if gone.any():
                expired.append(rows.select(list(self.keys)).filter(pa.array(gone)))
        for keys in expired:
            self._table.delete(self._table.slots(keys.columns, insert=False))

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        state = super().snapshot(checkpoint)
        meta = {"watermark": self._watermark, "late_rows": self.late_rows, "first_group": self.ctx.key_groups.start}
        progress = FrozenTable(PROGRESS, schema=pa.schema([]), meta=meta, spread="union")
        return FrozenState((*state.tables, progress), state.prepare, state.folders)

    def restore(self, states: Sequence[RestoredState]) -> None:
        """The watermark becomes the lowest of the restored ones: as in windows, they differ only in at-least-once mode,
        where a row may pass twice but must not be lost."""
        super().restore([state for state in states if state.name != PROGRESS])
        metas = [state.meta for state in states if state.name == PROGRESS and state.meta]
        for meta in metas:
            if not {"watermark", "late_rows", "first_group"} <= set(meta):
                raise DataError(f"{self.ctx} cannot restore state {PROGRESS!r} from {meta!r}; restore a matching flow")
        self._watermark = self._swept_at = min((int(meta["watermark"]) for meta in metas), default=MIN_WATERMARK)
        self.late_rows = sum(
            int(meta["late_rows"]) for meta in metas if int(meta["first_group"]) in self.ctx.key_groups
        )


def passing_rows(segments: Segments, times: Int64Array, within: int) -> BoolArray:
    """Which of the rows (sorted) pass, when the first of each segment does.

    The row that passes after row i is the first one whose time is ``within`` later; as all before it are earlier, it is
    found by bisection in the running maximum of the times. Who lies on the way that begins at the first row is then
    marked by following 1, 2, 4, ... such steps at once: no loop over rows, however many of one key pass.
    """
    passing = np.zeros(len(times), np.bool_)
    passing[segments.starts] = True
    if segments.distinct:
        return passing
    lowest = np.full(len(segments.starts), np.iinfo(np.int64).min)
    highest = segments.scan(np.maximum, lowest, times)
    ends = np.repeat(segments.starts + segments.lengths, segments.lengths)
    low, high = np.arange(1, len(times) + 1, dtype=np.int64), ends.copy()
    goal = times + within
    for _ in range(int(segments.lengths.max()).bit_length()):
        middle = (low + high) // 2
        here = np.minimum(middle, len(times) - 1)
        before = (middle < high) & (highest[here] < goal)
        low = np.where(before, middle + 1, low)
        high = np.where(before, high, np.maximum(middle, low))
    nowhere = len(times)
    step = np.append(np.where(low < ends, low, nowhere), nowhere)
    marked = np.append(passing, False)
    while (step[:-1][marked[:-1]] < nowhere).any():
        marked[step[marked]] = True
        marked[nowhere] = False
        step = step[step]
    return marked[:-1]


__all__ = ["PASSED", "PROGRESS", "STATE", "Deduplicate", "DeduplicateOperator", "DeduplicateWithinOperator"]
