"""Tumbling windows over event time, with aggregates.

W1  an emitted watermark never decreases, and no result follows that starts before it: `WindowOperator.on_watermark`.
W3  a window fires at most once per key: it is dropped when it fires, rows that come for it later are late, and the
    watermark is part of the snapshot, so that a closed window does not open again after a restore.
A3  `WindowOperator.snapshot` copies references to immutable runs; what comes later goes into other runs.
    What of a run has closed stays closed after a restore by the same watermark (W3).

A window [start, end) is complete when the watermark w >= end, because no row with event time < w follows w.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, PlanError, ProtocolError
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.base import FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.combine import CombineOperator, Combiner, LocalCombine, plan_of_rows
from rayflow.operators.event_time import EventTimeReader, OnNullTime
from rayflow.operators.faults import UNLOCATED, located
from rayflow.operators.grouping import Int64Array
from rayflow.operators.preaggregate import ROWS, WINDOW_START, Preaggregation, check_names
from rayflow.operators.runs import Frozen, Run, RunStore
from rayflow.operators.spill import RowOrder, Spill
from rayflow.operators.tumbling import Tumbling, WindowSpec, tumbling
from rayflow.operators.windowing.panes import Firing, PaneIsWindow, TwoStacks
from rayflow.operators.windowing.progress import Emit, Progress, check_cut, check_emit
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windowing.triggers import Clock, ClockTimer
from rayflow.operators.windowing.updates import current, updated, windows_of

LATE = "late"
"""Tag of the side output of rows whose window had closed."""
STATE: Final = "windows"
PROGRESS: Final = "progress"
"""Name of the state without rows whose meta says how far the windows have got."""
OUTPUT_ROWS: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowAggregate:
    """Factory: aggregates by key and tumbling window.

    Schema in: rows with the keys and the event time column, or the partial results of `LocalCombine` with the same
    keys and aggregates (``input_is_partial``). Schema out: keys, window_start and window_end (timestamp[us] in the
    zone of the event time), then one column an aggregate. Side output "late": the late rows as they came; late
    partial results are only counted. ``schema`` is that of the rows, where known, so that mistakes are found while
    building.
    """

    keys: tuple[str, ...]
    spec: WindowSpec
    aggregates: Mapping[str, Aggregate]
    event_time: str
    schema: pa.Schema | None = None
    input_is_partial: bool = False
    on_error: OnNullTime = "fail"
    batch_rows: int = OUTPUT_ROWS
    allowed_lateness_us: int = 0
    emit: Emit = "final"
    """See `rayflow.operators.windowing.progress`."""
    early_us: int | None = None
    """With ``update``: all windows that are open give what they have when event time passes a multiple of this; with
    ``early_clock="processing"`` those that have changed do, when the clock of the machine passes one."""
    early_clock: Clock = "event"

    def __post_init__(self) -> None:
        check_names(self.keys, self.aggregates)
        check_emit(self.emit, self.early_us)
        if self.schema is not None:
            self.output_schema(self.schema)

    migrates_state: ClassVar[bool] = False
    """An aggregate that is new would know the rows of open windows in part only."""

    @property
    def stateful(self) -> bool:
        return True

    @property
    def restores_order(self) -> bool:
        """Results of one subtask come in the order of their time, whatever was mixed before (see `Plan`)."""
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """From the schema of the input, rows or partial results; raises `PlanError` if it does not fit."""
        if schema is None:
            return None
        if self.input_is_partial and ROWS in schema.names:
            return Preaggregation.of_partials(self.keys, self.aggregates, schema).output_schema
        return self.plan(schema).output_schema

    def state_schemas(self, input_schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        """What `WindowOperator.snapshot` freezes, for rows or partial results of ``input_schema``."""
        known = input_schema if input_schema is not None else self.schema
        if known is None:
            return None
        if self.input_is_partial and ROWS in known.names:
            plan = Preaggregation.of_partials(self.keys, self.aggregates, known)
        else:
            plan = self.plan(known)
        return {STATE: plan.schema, PROGRESS: _no_rows(self.keys)}

    def plan(self, schema: pa.Schema) -> Preaggregation:
        """For rows of ``schema``; raises `PlanError` for what does not fit."""
        return plan_of_rows(self.keys, self.aggregates, self.event_time, schema)

    def plan_of_state(self, schema: pa.Schema) -> Preaggregation:
        """For the state of a checkpoint; raises `PlanError` for what does not fit."""
        return Preaggregation.of_partials(self.keys, self.aggregates, schema)

    def build(self) -> Operator:
        return WindowOperator(self)


class WindowOperator(Operator):
    """See `WindowAggregate`. The state is a `RunStore` of partial results of the open windows."""

    def __init__(self, factory: WindowAggregate) -> None:
        self._factory = factory
        self._spec = factory.spec
        self._progress = Progress(factory.allowed_lateness_us, factory.emit)
        self._plan: Preaggregation | None = None
        self._bound_to = pa.schema([])
        """Schema of the last batch, which is known to fit ``_plan``."""
        self._combiner: Combiner | None = None
        self._runs: RunStore | None = None
        self._firing: Firing = TwoStacks(factory.spec) if isinstance(factory.spec, Sliding) else PaneIsWindow()
        by_clock = factory.early_us is not None and factory.early_clock == "processing"
        self._by_clock = ClockTimer(factory.early_us or 1) if by_clock else None
        self.late_rows = 0
        """Rows whose windows were gone; part of the snapshot."""

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        self._reader = EventTimeReader(self._factory.event_time, on_error=self._factory.on_error, where=str(ctx))

    @property
    def skipped_rows(self) -> int:
        """Rows dropped for a null event time."""
        return self._reader.skipped_rows

    # ------------------------------------------------------------------------------------------------------- rows in

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if self._factory.input_is_partial:
            self._take_partials(pa.Table.from_batches([batch]))
        else:
            self._take_rows(batch)

    def _take_rows(self, batch: pa.RecordBatch) -> None:
        batch, times, earliest, latest = self._reader.read(batch)
        if batch.num_rows == 0:
            return
        starts = self._spec.window_starts(times, earliest, latest)
        if self._closed(self._spec.start_of(earliest)):
            late = self._late(starts, batch.num_rows)
            self.late_rows += int(late.sum())
            rows = batch.filter(pa.array(late))
            self.out.emit(rows, LATE)
            if rows.num_rows == batch.num_rows:
                return
            on_time = pa.array(~late)
            batch, times = batch.filter(on_time), times.filter(on_time)
            assert not isinstance(starts, int)
            starts = starts[~late]
        low, high = (starts, starts) if isinstance(starts, int) else (int(starts.min()), int(starts.max()))
        try:
            if not batch.schema.equals(self._bound_to):
                self._bind(self._factory.plan(batch.schema))
                self._bound_to = batch.schema
            assert self._plan is not None
            assert self._runs is not None
            if self._combiner is None:
                self._combiner = Combiner(self._plan)
            partials = self._combiner.combine(batch, times, starts)
            if partials.num_rows == 0:
                return
            if low < high:  # rows that are not ranked may have been all of the first or last window
                left = self._runs.starts_of(partials)
                low, high = int(left.min()), int(left.max())
            self._append(Run(partials, low, high, merged=False))
        except UNLOCATED as error:
            raise located(error, self.ctx) from error

    def _take_partials(self, partials: pa.Table) -> None:
        if partials.num_rows == 0:
            return
        if not partials.schema.equals(self._bound_to):
            try:
                self._bind(Preaggregation.of_partials(self._factory.keys, self._factory.aggregates, partials.schema))
            except UNLOCATED as error:
                raise located(error, self.ctx) from error
            self._bound_to = partials.schema
        assert self._runs is not None
        starts = self._runs.starts_of(partials)
        low, high = int(starts.min()), int(starts.max())
        if self._closed(low):
            late = self._late(starts, len(starts))
            self.late_rows += pc.sum(partials.column(ROWS).filter(pa.array(late))).as_py() or 0
            partials, starts = partials.filter(pa.array(~late)), starts[~late]
            if len(starts) == 0:
                return
            low, high = int(starts.min()), int(starts.max())
        self._append(Run(partials, low, high, merged=False))

    def _append(self, run: Run) -> None:
        assert self._runs is not None
        self._runs.append(run)
        self._firing.touched(run.low)
        if self._by_clock is not None:
            self._by_clock.changed(np.unique(self._runs.starts_of(run.table)).tolist(), self.ctx.wall_time())
        fired = self._spec.first_open(self._progress.fired)
        if self._factory.emit == "update" and self._spec.first_open(run.low) < fired:
            kept = self._spec.first_open(self._progress.kept)
            assert self._plan is not None
            starts = windows_of(self._runs.starts_of(run.table), self._spec, kept, fired)
            self._emit(updated(self._runs, self._plan, self._spec, run.table, starts))

    def _closed(self, start: int) -> bool:
        """Whether all windows of the pane are gone."""
        return start < self._spec.first_open(self._progress.kept)

    def _late(self, starts: Int64Array | int, rows: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        if isinstance(starts, int):
            return np.full(rows, self._closed(starts))
        return starts < self._spec.first_open(self._progress.kept)

    def _bind(self, preaggregation: Preaggregation) -> None:
        """Types are known: from a snapshot or from rows; all that come later must agree with the first."""
        if self._plan is None:
            self._plan = preaggregation
            self._runs = RunStore(preaggregation.merge, WINDOW_START, self._spill())
        elif not self._plan.schema.equals(preaggregation.schema):
            raise DataError(
                f"{self.ctx}: the state has the columns {_brief(self._plan.schema)}, but the input now gives "
                f"{_brief(preaggregation.schema)}; restore with the aggregates and types of the checkpoint, and do not "
                "change the types of a stream"
            )

    def _spill(self) -> Spill | None:
        """Under ``rocksdb``: where runs go that do not fit into memory."""
        backend = self.ctx.backend
        if backend.kind != "rocksdb" or backend.scratch is None:
            return None
        return Spill(backend.scratch, backend.memory_bytes, RowOrder(WINDOW_START, self._factory.keys), self.ctx)

    # ------------------------------------------------------------------------------------------------- windows out

    def on_watermark(self, time: int) -> int:
        """Fire all windows that end at ``time`` or before, in order of their start, and then pass the watermark on.

        What is passed on speaks of the event time of the results, which is their window start: the start of the first
        window that is still there, because no later result starts before it.
        """
        if time > self._progress.watermark:
            before, self._progress = self._progress, self._progress.next(time)
            self._fire(before, self._progress)
        kept = self._progress.kept
        return kept if kept in (MIN_WATERMARK, MAX_WATERMARK) else max(MIN_WATERMARK, self._spec.first_open(kept))

    def _fire(self, before: Progress, now: Progress) -> None:
        low = None if self._runs is None else self._runs.low
        if low is None:
            return
        if low < self._spec.first_open(before.kept):
            raise ProtocolError(
                f"W3: {self.ctx} holds a window from {low} us that had closed by its watermark {before.watermark}"
            )
        assert self._runs is not None
        assert self._plan is not None
        until, keep = self._spec.first_open(now.fired), self._spec.first_open(now.kept)
        since = self._spec.first_open(max(before.fired, low))
        if since < until or low < keep:
            self._emit(self._firing.due(self._runs, self._plan, min(since, until), until, keep))
        early_us = self._factory.early_us if self._by_clock is None else None
        if early_us is not None and now.watermark // early_us > before.watermark // early_us:
            begun = windows_of(self._runs.starts_from(until), self._spec, until, now.watermark + 1)
            self._emit(current(self._runs, self._plan, self._spec, begun))

    def next_timer(self) -> float | None:
        return None if self._by_clock is None else self._by_clock.due

    def on_time(self, now: float) -> None:
        """Early results by the clock, of the windows that have changed since the last ones. Those that have fired have
        told of their changes themselves."""
        panes = np.array([] if self._by_clock is None else self._by_clock.take(now), np.int64)
        if len(panes) and self._runs is not None and self._plan is not None:
            first = self._spec.first_open(self._progress.fired)
            starts = windows_of(panes, self._spec, first, MAX_WATERMARK)
            self._emit(current(self._runs, self._plan, self._spec, starts))

    def _emit(self, due: Iterable[pa.Table]) -> None:
        """Partial results of whole windows, in order of their start."""
        assert self._plan is not None
        for partials in due:
            try:
                table = self._plan.finalise(partials, self._spec.ends_of)
            except DataError as error:
                raise DataError(f"{self.ctx}: {error}") from error
            for batch in table.combine_chunks().to_batches(max_chunksize=self._factory.batch_rows):
                self.out.emit(batch)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        """The runs, uploaded once each, and how far they have got, in a table of its own without rows.

        A run that was uploaded before some of its windows closed still has their rows: those with a ``window_start``
        before ``open_from`` are no state.
        """
        runs = Frozen((), (), (), ()) if self._runs is None else self._runs.freeze()
        keys = self._factory.keys or None
        progress = FrozenTable(
            PROGRESS,
            schema=_no_rows(self._factory.keys),
            key_columns=keys,
            meta={
                **self._progress.meta(),
                **self._spec.cut(),
                "open_from": max(MIN_WATERMARK, self._spec.first_open(self._progress.kept)),
                "late_rows": self.late_rows,
                "first_group": self.ctx.key_groups.start,
                "base": list(runs.base),
                "merged": list(runs.merged),
            },
        )
        if self._plan is None:  # nothing has come, so the types are not known
            return FrozenState((progress,))
        windows = FrozenTable(STATE, runs.small, schema=self._plan.schema, key_columns=keys, pieces=runs.pieces)
        return FrozenState((windows, progress))

    def restore(self, states: Sequence[RestoredState]) -> None:
        """Take back the runs of one or, after a change of parallelism, several subtasks.

        The watermark becomes the lowest of the restored ones. In exactly-once mode they are all equal: watermarks are
        sent to all channels, and the barrier stands behind the same ones on each. They can differ in at-least-once
        mode, where a row may count twice but must not be lost: the lowest can at worst fire a window again, a higher
        one would drop rows as late that are not.
        """
        for state in states:
            if state.name not in (STATE, PROGRESS):
                raise DataError(f"{self.ctx} knows the state {STATE!r}, got {state.name!r}; restore a matching flow")
            if state.meta:
                check_cut(state.meta, self._spec.cut(), str(self.ctx))
        # By old subtask; version 1 of the format had it beside the rows.
        progress = {int(state.meta["first_group"]): state.meta for state in states if state.meta}
        self._progress = self._progress.restored(list(progress.values()))
        # Each old subtask's counter goes on in one new subtask, so that the sum over subtasks stays right.
        self.late_rows = sum(int(meta["late_rows"]) for group, meta in progress.items() if group in self.ctx.key_groups)
        base, merged = (
            {_whole(piece) for meta in progress.values() for piece in meta.get(kind, ())} for kind in ("base", "merged")
        )
        for state in states:
            if state.name == STATE and state.table.num_rows:
                self._restore_rows(state, base=_whole(state.piece) in base, merged=_whole(state.piece) in merged)

    def _restore_rows(self, state: RestoredState, *, base: bool, merged: bool) -> None:
        table = state.table.replace_schema_metadata(None)
        try:
            plan = self._factory.plan_of_state(table.schema)
        except PlanError as error:
            raise DataError(f"{self.ctx} cannot restore state {STATE!r}: {error}") from error
        self._bind(plan)
        assert self._runs is not None
        closed = None if self._progress.kept == MIN_WATERMARK else self._spec.first_open(self._progress.kept) - 1
        self._runs.restore(table.select(plan.schema.names), piece=state.piece, base=base, merged=merged, closed=closed)
        if self._by_clock is not None:
            self._by_clock.changed(self._runs.starts_from(MIN_WATERMARK).tolist(), self.ctx.wall_time())

    def close(self) -> None:
        if self._runs is not None:
            self._runs.close()


def _no_rows(keys: Sequence[str]) -> pa.Schema:
    return pa.schema([(key, pa.null()) for key in keys])


def _whole(piece: str) -> str:
    """The piece that this one may be a part of, after a change of parallelism (`rayflow.core.restore.clip`)."""
    return piece.partition("@")[0]


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


__all__ = [
    "LATE",
    "CombineOperator",
    "Combiner",
    "LocalCombine",
    "Tumbling",
    "WindowAggregate",
    "WindowOperator",
    "tumbling",
]
