"""What all joins of two keyed streams share: rows in, late rows, null keys, checkpoints.

W1  an emitted watermark never decreases, and no row follows with an event time below it: `JoinOperator.hold_us`.
A3  `JoinOperator.snapshot` copies references to immutable runs.

A row is *late* if its event time is below the watermark, which is the lowest over both sides: what it belongs to may be
over. It is dropped, counted, and comes out of the side output ``late_left`` or ``late_right``. A row with a null in its
key has no partner, as in SQL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, PlanError, SchemaChangedError, StateSchemaError
from rayflow.operators.base import FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.event_time import EventTimeReader, check_event_time, event_times_us
from rayflow.operators.grouping import Int64Array
from rayflow.operators.joins.buffer import Buffer
from rayflow.operators.joins.columns import LEFT, RIGHT, SIDES, JoinColumns, JoinSpec, decode
from rayflow.operators.joins.files import RowFiles
from rayflow.operators.joins.kernels import SortedRows, sort_rows

PROGRESS: Final = "progress"
"""State without rows, for its ``meta``: the watermark and the late rows of each subtask."""
LATE_LEFT: Final = "late_left"
LATE_RIGHT: Final = "late_right"
OUTPUT_ROWS: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Join(JoinSpec, ABC):
    """Base of the factories. The plan gives them the schemas of both sides (`with_input_schemas`)."""

    batch_rows: int = OUTPUT_ROWS

    @property
    def keys(self) -> tuple[str, ...]:
        return self.left_keys

    @property
    def stateful(self) -> bool:
        return True

    @property
    def inputs_differ(self) -> bool:
        return True

    def check_timed(self, what: str) -> None:
        """Raises `PlanError` when a side has no event time."""
        for side, column in zip(SIDES, (self.left_time, self.right_time), strict=True):
            if column is None:
                raise PlanError(
                    f"{what} needs event time on both sides, the {side} one has none; pass event_time= to its source "
                    "or call .with_event_time(column) before key_by"
                )

    def with_input_schemas(self, schemas: Sequence[pa.Schema | None]) -> Join:
        """Raises `PlanError` where one is not known: rows without a partner need the columns of the other side."""
        for side, schema in zip(SIDES, schemas, strict=True):
            if schema is None:
                raise PlanError(
                    f"the columns of the {side} side are known only at run time; pass schema= to the step before the "
                    "join that makes them (map_batches, map, flat_map)"
                )
        left, right = schemas
        return replace(self, left_schema=left, right_schema=right)

    def output_schema_of(self, schemas: Sequence[pa.Schema | None]) -> pa.Schema | None:
        """From the schemas of both inputs; raises `PlanError` if they do not fit."""
        left, right = schemas
        if left is None or right is None:
            return None
        return self.columns(left, right).schema

    def side_schema(self, tag: str) -> pa.Schema | None:
        return self.schema_of(RIGHT if tag == LATE_RIGHT else LEFT)

    def state_schemas(self, input_schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        if self.left_schema is None or self.right_schema is None:
            return None
        left, right = self.columns(self.left_schema, self.right_schema).sides
        return {SIDES[LEFT]: left, SIDES[RIGHT]: right, PROGRESS: _no_rows(self.left_keys)}

    def columns(self, left: pa.Schema, right: pa.Schema) -> JoinColumns:
        """The output for rows of these schemas; raises `PlanError` for what does not fit."""
        for schema, column, side in ((left, self.left_time, "left"), (right, self.right_time, "right")):
            if column is not None:
                check_event_time(schema, column, step=f"the {side} side of the join")
        return JoinColumns(self, left, right, self.added(left))

    def added(self, left: pa.Schema) -> Sequence[pa.Field]:
        """Columns that the join adds."""
        return ()

    @abstractmethod
    def build(self) -> Operator:
        """The operator; the schemas of both sides must be known."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What must be as it was when state is restored, as JSON."""


class JoinOperator(Operator):
    """Subclasses say what happens with rows (`take`), when the watermark rises (`advance`), and to rows that can have
    no partner (`alone`)."""

    hold_us: int = 0
    """How far behind the watermark the event time of results may be, at most (us)."""

    def __init__(self, factory: Join) -> None:
        self.factory = factory
        if factory.left_schema is None or factory.right_schema is None:
            raise PlanError("a join must be told the schemas of both sides; build it through a plan")
        self._input_schemas = (factory.left_schema, factory.right_schema)
        self.columns = factory.columns(factory.left_schema, factory.right_schema)
        self.buffers: tuple[Buffer, ...] = (Buffer(), Buffer())
        self.watermark = MIN_WATERMARK
        self.timed = factory.left_time is not None and factory.right_time is not None
        self._late = [0, 0]
        self._ties = (False, False)

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        self._readers = tuple(
            None if column is None else EventTimeReader(column, on_error="fail", where=f"{ctx}, {side} side")
            for column, side in zip((self.factory.left_time, self.factory.right_time), SIDES, strict=True)
        )

        backend = ctx.backend
        if backend.kind == "rocksdb" and backend.scratch is not None:
            self.buffers = tuple(
                Buffer(RowFiles(backend.scratch, backend.memory_bytes, self.factory.keys_of(side), ctx))
                for side in range(len(SIDES))
            )

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.clear()

    @property
    def late_rows(self) -> int:
        return sum(self._late)

    # ------------------------------------------------------------------------------------------------------- rows in

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if batch.num_rows == 0:
            return
        side = input_index
        self._check_schema(batch.schema, side)
        times = self._times(batch, side)
        if self.timed and int(times.min()) < self.bound():
            late = times < self.bound()
            self._late[side] += int(late.sum())
            self.out.emit(batch.filter(pa.array(late)), (LATE_LEFT, LATE_RIGHT)[side])
            batch, times = batch.filter(pa.array(~late)), times[~late]
        rows = decode(batch, self.columns.sides[side])
        for key in self.factory.keys_of(side):
            if rows.column(key).null_count:
                null = rows.column(key).is_null().to_numpy(zero_copy_only=False)
                self.alone(side, rows.filter(pa.array(null)), times[null])
                rows, times = rows.filter(pa.array(~null)), times[~null]
        if rows.num_rows:
            self.take(side, sort_rows(rows, self.factory.keys_of(side), times, ties=self._ties[side]))

    def _times(self, batch: pa.RecordBatch, side: int) -> Int64Array:
        reader = self._readers[side]
        if not self.timed or reader is None:
            return np.zeros(batch.num_rows, np.int64)
        times: Int64Array = reader.read(batch)[1].to_numpy()
        return times

    def _check_schema(self, schema: pa.Schema, side: int) -> None:
        expected = self._input_schemas[side]
        if schema.names != expected.names or schema.types != expected.types:
            raise SchemaChangedError(
                f"{self.ctx}: the {SIDES[side]} side was planned with {_brief(expected)}, its rows have "
                f"{_brief(schema)}; declare the schema that the step before really makes"
            )

    def bound(self) -> int:
        """Rows with an event time below it are late."""
        return self.watermark

    @abstractmethod
    def take(self, side: int, rows: SortedRows) -> None:
        """Rows of one side that are on time and have no null in their key."""

    @abstractmethod
    def alone(self, side: int, rows: pa.RecordBatch, times: Int64Array) -> None:
        """Rows that have no partner; emit them if they come out alone."""

    # ---------------------------------------------------------------------------------------------------- rows out

    def on_watermark(self, time: int) -> int:
        """Emit what is decided, forget what is not needed any more, and pass on a watermark that results do not
        fall behind."""
        if time > self.watermark:
            before, self.watermark = self.watermark, time
            self.advance(before, time)
            for buffer in self.buffers:
                buffer.release()
        return self.passed_on()

    def passed_on(self) -> int:
        if self.watermark in (MIN_WATERMARK, MAX_WATERMARK):
            return self.watermark
        return max(MIN_WATERMARK, self.watermark - self.hold_us) if self.timed else MIN_WATERMARK

    @abstractmethod
    def advance(self, before: int, now: int) -> None:
        """The watermark has risen from ``before`` to ``now``."""

    def emit(self, rows: pa.RecordBatch) -> None:
        for start in range(0, rows.num_rows, self.factory.batch_rows):
            self.out.emit(rows.slice(start, self.factory.batch_rows))

    # ------------------------------------------------------------------------------------------------- checkpoints

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        tables = tuple(
            buffer.freeze(name, schema, self.factory.keys_of(side))
            for side, (name, buffer, schema) in enumerate(zip(SIDES, self.buffers, self.columns.sides, strict=True))
        )
        keys = self.factory.left_keys
        meta = {
            "join": self.factory.description(),
            "watermark": self.watermark,
            "late_rows": list(self._late),
            "first_group": self.ctx.key_groups.start,
        }
        return FrozenState((*tables, FrozenTable(PROGRESS, schema=_no_rows(keys), key_columns=keys, meta=meta)))

    def restore(self, states: Sequence[RestoredState]) -> None:
        """Of one or, after a change of parallelism, several subtasks. The watermark becomes the lowest of theirs; in
        exactly-once mode they are equal, because barriers stand behind the same watermarks on every channel."""
        progress = {int(state.meta["first_group"]): state.meta for state in states if state.name == PROGRESS}
        for meta in progress.values():
            if meta["join"] != self.factory.description():
                raise StateSchemaError(
                    f"{self.ctx} joins by {self.factory.description()}, its checkpoint by {meta['join']}: rows that it "
                    "needs may be gone; give the step another name= to begin without its state, or join as it did"
                )
        self.watermark = min((int(meta["watermark"]) for meta in progress.values()), default=MIN_WATERMARK)
        for group, meta in progress.items():
            if group in self.ctx.key_groups:
                self._late = [mine + int(theirs) for mine, theirs in zip(self._late, meta["late_rows"], strict=True)]
        for state in states:
            if state.name in SIDES:
                self._restore_rows(SIDES.index(state.name), state)
            elif state.name != PROGRESS:
                raise DataError(f"{self.ctx} knows the states {SIDES}, got {state.name!r}; restore a matching flow")

    def _restore_rows(self, side: int, state: RestoredState) -> None:
        schema = self.columns.sides[side]
        if state.table.schema.names != schema.names or state.table.schema.types != schema.types:
            raise StateSchemaError(
                f"{self.ctx}: rows of the {SIDES[side]} side have {_brief(schema)}, in the checkpoint they have "
                f"{_brief(state.table.schema)}; give the step another name= to begin without its state"
            )
        batches = state.table.replace_schema_metadata(None).cast(schema).combine_chunks().to_batches()
        for batch in batches:
            column = self.factory.time_of(side)
            times = (
                np.zeros(batch.num_rows, np.int64)
                if column is None or not self.timed
                else event_times_us(batch.column(column)).to_numpy()
            )
            rows = sort_rows(batch, self.factory.keys_of(side), times, ties=self._ties[side])
            self.buffers[side].restore(rows, state.piece if len(batches) == 1 else "")


def _no_rows(keys: Sequence[str]) -> pa.Schema:
    return pa.schema([(key, pa.null()) for key in keys])


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


__all__ = ["LATE_LEFT", "LATE_RIGHT", "OUTPUT_ROWS", "PROGRESS", "Join", "JoinOperator"]
