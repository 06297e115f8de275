"""Session windows with aggregates: windows that grow and merge as rows come.

W1  the watermark that is passed on is not behind the start of an open session: `SessionOperator.on_watermark`.
W3  a session that has fired is not opened again: rows that could extend it are late.

The state is a table of open sessions by key and start: partial results, the latest event time among them. The rows of
a batch are cut into sessions of their own first (rows sorted by key and time, cut where a row begins at or after the
highest end before it), then these and the open sessions of their keys are cut again in the same way and merged. A
session is complete when the watermark has reached its end.

A row behind the watermark joins the open session of its key that it lies in, if there is one; else it is late, because
a session that it would begin or extend to the front might have fired already. So sessions that begin behind the
watermark began before it came there, and those that have fired are never overlapped.

With allowed lateness the watermark of all this is behind the true one by that much. With ``update`` sessions that have
ended by the true one, which are those that have been told, stay until then. What a late row makes of them is told at
once if it has ended too; sessions that have been told and are no more, because they have become part of one with
another start or of one that goes on, are told once more as ``retracted``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, PlanError, ProtocolError, StateSchemaError
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.aggregates import max as latest
from rayflow.operators.base import MAIN, FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.combine import plan_of_rows
from rayflow.operators.event_time import EventTimeReader, OnNullTime, event_times_us
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.keyed.keyed_operator import KeyedOperator
from rayflow.operators.preaggregate import WINDOW_START, Preaggregation, check_names
from rayflow.operators.state.columns import BoolArray
from rayflow.operators.state.distinct import distinct, index_in
from rayflow.operators.state.table import StateTable
from rayflow.operators.state.timers import TimerQueue
from rayflow.operators.windowing.open_sessions import OpenSessions, SessionStarts
from rayflow.operators.windowing.progress import Emit, Progress, check_emit
from rayflow.operators.windowing.session import Session, Sessions
from rayflow.operators.windows import LATE, OUTPUT_ROWS

STATE: Final = "sessions"
PROGRESS: Final = "progress"
"""State without rows: its columns are those of the sessions, its ``meta`` says how far they have got."""

LAST: Final = "__last"
"""Aggregate of every session: its latest event time."""
RETRACTED: Final = "retracted"
"""Column of results with ``update``: true where there is no such session any more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionAggregate:
    """Factory: aggregates by key and session.

    Schema in: rows with the keys and the event time column. Schema out: keys, window_start and window_end
    (timestamp[us] in the zone of the event time), then one column an aggregate; with ``update`` also `RETRACTED`. Side
    output "late": the late rows as they came.
    """

    keys: tuple[str, ...]
    spec: Session
    aggregates: Mapping[str, Aggregate]
    event_time: str
    on_error: OnNullTime = "fail"
    batch_rows: int = OUTPUT_ROWS
    allowed_lateness_us: int = 0
    emit: Emit = "final"
    """See `rayflow.operators.windowing.progress`."""

    migrates_state: ClassVar[bool] = False
    """An aggregate that is new would know the rows of open sessions in part only."""

    def __post_init__(self) -> None:
        check_names(self.keys, self.aggregates)
        check_names((*self.keys, LAST, *([RETRACTED] if self.emit == "update" else [])), self.aggregates)
        check_emit(self.emit, None)

    @property
    def stateful(self) -> bool:
        return True

    @property
    def restores_order(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """From the schema of the input; raises `PlanError` if it does not fit."""
        if schema is None:
            return None
        output = self.plan(schema).output_schema
        output = output.remove(output.get_field_index(LAST))
        return output.append(pa.field(RETRACTED, pa.bool_())) if self.emit == "update" else output

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        return None if schema is None else {STATE: self.plan(schema).schema}

    def plan(self, schema: pa.Schema) -> Preaggregation:
        """For rows of ``schema``; raises `PlanError` for what does not fit."""
        return plan_of_rows(self.keys, self.all_aggregates, self.event_time, schema)

    @property
    def all_aggregates(self) -> Mapping[str, Aggregate]:
        """Those asked for, and the one that tells where a session ends."""
        return {**self.aggregates, LAST: latest(self.event_time)}

    def build(self) -> Operator:
        return SessionOperator(self)


class SessionOperator(KeyedOperator):
    """See `SessionAggregate`."""

    _plan: Preaggregation | None = None
    _table: StateTable

    def __init__(self, factory: SessionAggregate) -> None:
        super().__init__(factory.keys)
        self._factory = factory
        self._gap = factory.spec.gap_us
        self._progress = Progress(factory.allowed_lateness_us, factory.emit)
        self._updates = factory.emit == "update"
        self._forgotten = MIN_WATERMARK
        """Of sessions restored those that end behind this and before what is kept have been told, by updates that
        there are no more."""
        self._passed_on = MIN_WATERMARK
        self.late_rows = 0
        """Rows that were late; part of the snapshot."""

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        self._reader = EventTimeReader(self._factory.event_time, on_error=self._factory.on_error, where=str(ctx))

    @property
    def skipped_rows(self) -> int:
        """Rows dropped for a null event time."""
        return self._reader.skipped_rows

    def bind(self, schema: pa.Schema) -> None:
        self._use(self._factory.plan(schema))

    def _use(self, plan: Preaggregation) -> None:
        if self._plan is not None:
            if not self._plan.schema.equals(plan.schema):
                raise DataError(
                    f"{self.ctx}: the state has the columns {_brief(self._plan.schema)}, but the input now gives "
                    f"{_brief(plan.schema)}; restore with the aggregates and types of the checkpoint"
                )
            return
        assert self.state is not None
        self._plan = plan
        whole, at = list(plan.schema), len(plan.keys) + 1
        self._table = self.state.table(STATE, pa.schema(whole[:at]), pa.schema(whole[at:]), subkeys=1)
        self._open = OpenSessions(self._table)
        self._queue = TimerQueue(pa.schema(whole[:at]))
        """When to look at a session: its end, or one that it has grown beyond since; then it is put in again. Those
        that have gone are passed over."""
        self._told = TimerQueue(pa.schema(whole[:at]))
        """With updates: the same of every session that has been told."""
        self._starts = SessionStarts(self._table, self._gap)
        gone = []
        for batch in self._table.scan():
            ends = self._ends(batch)
            told = (ends > self._forgotten) & (ends <= self._progress.kept)
            gone.append(batch.filter(pa.array(told)))
            there = batch.filter(pa.array(~told))
            self._enqueue(there, np.ones(len(there), np.bool_), np.zeros(len(there), np.bool_))
        for batch in gone:
            self._table.delete(self._table.slots(batch.columns[:at], insert=False))

    def _ends(self, sessions: pa.RecordBatch | pa.Table) -> Int64Array:
        last: Int64Array = event_times_us(sessions.column(f"{LAST}.value")).to_numpy()
        return last + self._gap

    def _enqueue(self, sessions: pa.RecordBatch, new: BoolArray, waiting: BoolArray) -> None:
        """``new``: not in the table before; ``waiting``: in the queue already."""
        at = len(self.keys) + 1
        keys = sessions.select(range(at))
        ends = self._ends(sessions)
        if self._updates:
            told = ends <= self._progress.fired
            self._told.add(ends[told], keys.filter(pa.array(told)))
            waiting = waiting | told
        self._queue.add(ends[~waiting], keys.filter(pa.array(~waiting)))
        begun = keys.filter(pa.array(new))
        self._starts.added(_us(begun.column(at - 1)), begun)
        self._open.added(begun.columns[: at - 1], _us(begun.column(at - 1)))

    # ------------------------------------------------------------------------------------------------------- rows in

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        batch, column, earliest, _ = self._reader.read(batch)
        if batch.num_rows == 0:
            return []
        results: list[tuple[pa.RecordBatch, str]] = []
        if earliest < self._progress.kept:
            late = self._late(batch, column.to_numpy())
            if late.any():
                self.late_rows += int(late.sum())
                results.append((batch.filter(pa.array(late)), LATE))
                batch, column = batch.filter(pa.array(~late)), column.filter(pa.array(~late))
                if batch.num_rows == 0:
                    return results
        assert self._plan is not None
        times: Int64Array = column.to_numpy()
        found = Sessions.of(self.key_columns(batch), times, times + self._gap)
        partials = self._plan.combine_rows(batch, column, found.starts[found.of_row])
        before, now = self._merge(partials)
        if self._updates:
            ended = now.filter(pa.array(self._ends(now) <= self._progress.fired))
            results += [(part, MAIN) for part in self._results(before, retracted=True)]
            results += [(part, MAIN) for part in self._results(ended)]
        return results

    def _late(self, batch: pa.RecordBatch, times: Int64Array) -> BoolArray:
        """Rows behind the watermark that lie in no open session of their key."""
        late: BoolArray = times < self._progress.kept
        rows = np.flatnonzero(late)
        keys = [key.take(pa.array(rows)) for key in self.key_columns(batch)]
        first, _ = distinct(keys)
        keys_once = [key.take(pa.array(first)) for key in keys]
        sessions = self._open.of(keys_once)
        width = len(self.keys)
        # Of the open sessions of a key only one can begin behind the watermark, because that one goes on beyond it.
        begun = sessions.filter(pa.array(_us(sessions.column(width)) < self._progress.kept))
        starts = np.full(len(first), np.iinfo(np.int64).max)
        if begun.num_rows:
            starts[index_in(begun.columns[:width], keys_once)] = _us(begun.column(width))
        late[rows] = times[rows] < starts[index_in(keys, keys_once)]
        return late

    def _merge(self, new: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Take in sessions, of which those of one key do not overlap each other. Gives those that have been told and
        are no more what was told, and those that are new or have changed."""
        plan, width = self._plan, len(self.keys)
        assert plan is not None
        keys = [flat(new.column(i)) for i in range(width)]
        first, _ = distinct(keys)
        there = self._open.of([key.take(pa.array(first)) for key in keys])
        before = there.slice(0, 0)
        if there.num_rows:
            both = pa.concat_tables([pa.Table.from_batches([there]), new])
            starts, ends = _us(both.column(width)), self._ends(both)
            found = Sessions.of([flat(both.column(i)) for i in range(width)], starts, ends)
            session_starts = found.starts[found.of_row]
            several = found.members[found.of_row] > 1
            gone = several & (starts != session_starts)  # the others are written over
            if self._updates:
                fired = self._progress.fired
                goes_on = np.zeros(len(found.starts), np.bool_)
                goes_on[found.of_row[ends > fired]] = True
                untold = several & (ends <= fired) & ((starts != session_starts) | goes_on[found.of_row])
                before = there.filter(pa.array(untold[: there.num_rows]))
            self._remove(there.filter(pa.array(gone[: there.num_rows])))
            at = pa.array(session_starts[several]).view(plan.window_type)
            joined = both.filter(pa.array(several)).set_column(width, plan.schema.field(WINDOW_START), at)
            new = new.filter(pa.array(~several[there.num_rows :]))
            if joined.num_rows:
                new = pa.concat_tables([new, plan.merge(joined, None)])
        self._put(new)
        return pa.Table.from_batches([before]), new

    def _put(self, sessions: pa.Table) -> None:
        if sessions.num_rows == 0:
            return
        batch = pa.RecordBatch.from_arrays([flat(column) for column in sessions.columns], schema=sessions.schema)
        keys = batch.columns[: len(self.keys) + 1]
        before = self._table.slots(keys, insert=False)
        begun = before < 0
        ended = event_times_us(self._table.get(before, f"{LAST}.value")).fill_null(0).to_numpy() + self._gap
        waiting = ~begun & (ended > self._progress.fired)
        slots = self._table.slots(keys, insert=True)
        for name in self._table.values.names:
            self._table.set(slots, name, batch.column(name))
        self._enqueue(batch, begun, waiting)

    def _remove(self, sessions: pa.RecordBatch) -> None:
        if sessions.num_rows:
            self._table.delete(self._table.slots(sessions.columns[: len(self.keys) + 1], insert=False))
            self._open.removed(sessions.columns[: len(self.keys)])

    # -------------------------------------------------------------------------------------------------- sessions out

    def on_watermark(self, time: int) -> int:
        """Fire the sessions that end at ``time`` or before (behind it by the lateness, without updates), in order of
        their start, and then pass on the watermark: the start of the first session that is still there, if that is
        behind ``time``, because its result will have that time."""
        if time > self._progress.watermark:
            self._progress = self._progress.next(time)
            if self._plan is not None:
                self._fire()
        kept = self._progress.kept
        first = self._starts.first(kept) if self._plan is not None else None
        self._passed_on = max(self._passed_on, kept if first is None else min(first, kept))
        return self._passed_on

    def _fire(self) -> None:
        due = self._due(self._queue, self._progress.fired)
        if due is not None:
            sessions = due.take(pa.array(np.argsort(_us(due.column(WINDOW_START)), kind="stable")))
            if _us(sessions.column(WINDOW_START))[0] < self._passed_on:
                raise ProtocolError(
                    f"W1: {self.ctx} fires a session that begins before its watermark {self._passed_on}"
                )
            if self._updates:
                self._told.add(self._ends(due), due.select(range(len(self.keys) + 1)))
            else:
                self._remove(due)
            for batch in self._results(pa.Table.from_batches([sessions])):
                self.out.emit(batch, MAIN)
        if self._updates:
            gone = self._due(self._told, self._progress.kept)
            if gone is not None:
                self._remove(gone)

    def _due(self, queue: TimerQueue, until: int) -> pa.RecordBatch | None:
        """Sessions of the queue that are there and end at ``until`` or before."""
        taken = queue.take(until)
        if taken is None:
            return None
        keys = taken[1]
        slots = self._table.slots(keys.columns, insert=False)
        _, rows = np.unique(slots, return_index=True)
        rows = rows[slots[rows] >= 0]
        ends = event_times_us(self._table.get(slots[rows], f"{LAST}.value")).to_numpy() + self._gap
        later = ends > until
        queue.add(ends[later], keys.take(pa.array(rows[later])))
        due = slots[rows[~later]]
        return self._table.gather(due) if len(due) else None

    def _results(self, sessions: pa.Table, *, retracted: bool = False) -> list[pa.RecordBatch]:
        if not sessions.num_rows:
            return []
        assert self._plan is not None
        ends = self._ends(sessions)
        try:
            table = self._plan.finalise(sessions, lambda _: ends).drop_columns([LAST])
        except DataError as error:
            raise DataError(f"{self.ctx}: {error}") from error
        if self._updates:
            table = table.append_column(RETRACTED, pa.array(np.full(table.num_rows, retracted)))
        batches: list[pa.RecordBatch] = table.combine_chunks().to_batches(max_chunksize=self._factory.batch_rows)
        return batches

    # --------------------------------------------------------------------------------------------------- checkpoints

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        state = super().snapshot(checkpoint)
        schema = pa.schema([]) if self._plan is None else self._plan.schema
        meta = {
            **self._progress.meta(),
            "passed_on": self._passed_on,
            "gap_us": self._gap,
            "late_rows": self.late_rows,
            "first_group": self.ctx.key_groups.start,
        }
        progress = FrozenTable(PROGRESS, schema=schema, meta=meta, spread="union")
        return FrozenState((*state.tables, progress), state.prepare, state.folders)

    def restore(self, states: Sequence[RestoredState]) -> None:
        """The watermark becomes the lowest of the restored ones, as in `WindowOperator.restore`."""
        super().restore([state for state in states if state.name != PROGRESS])
        progress = [state for state in states if state.name == PROGRESS and state.meta]
        metas = [state.meta for state in progress if state.meta]
        for meta in metas:
            if meta.get("gap_us") != self._gap:
                raise StateSchemaError(
                    f"{self.ctx} has sessions with a gap of {self._gap} us, its checkpoint of {meta.get('gap_us')} us: "
                    "open sessions cannot be cut anew; give the step another name= to begin without its state, or the "
                    "gap it had"
                )
        self._progress = self._progress.restored(metas)
        self._forgotten = min((int(meta.get("kept", meta["watermark"])) for meta in metas), default=MIN_WATERMARK)
        self._passed_on = min((int(meta["passed_on"]) for meta in metas), default=MIN_WATERMARK)
        self.late_rows = sum(
            int(meta["late_rows"]) for meta in metas if int(meta["first_group"]) in self.ctx.key_groups
        )
        for state in progress:
            if state.table.schema.names:
                schema = state.table.schema.remove_metadata()
                try:
                    plan = Preaggregation.of_partials(self.keys, self._factory.all_aggregates, schema)
                except PlanError as error:
                    raise DataError(f"{self.ctx} cannot restore state {STATE!r}: {error}") from error
                self._use(plan)


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _us(column: pa.Array | pa.ChunkedArray) -> Int64Array:
    ticks: Int64Array = flat(column).view(pa.int64()).to_numpy()
    return ticks


__all__ = ["SessionAggregate", "SessionOperator"]
