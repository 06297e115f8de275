"""Sorting by event time: rows wait until the watermark has passed them and come out in the order of their time.

W1  what comes out is not behind the watermark that was passed on: rows below it are late.
A3  `SortOperator.snapshot` copies references to immutable runs.

Of rows with the same time the columns that were named decide, and then all others: the order in which they came does
not count, so it is the same at every parallelism. The rows are a `RunStore` in which every time is a window of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, PlanError, StateSchemaError
from rayflow.operators.base import FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.event_time import EventTimeReader, check_event_time
from rayflow.operators.grouping import Int64Array, flat, plain, plain_type
from rayflow.operators.ordering.order import order_of
from rayflow.operators.runs import Run, RunStore
from rayflow.operators.spill import RowOrder, Spill
from rayflow.partition import check_key_type

STATE: Final = "rows"
PROGRESS: Final = "progress"
"""State without rows, for its ``meta``: the watermark and the late rows of each subtask."""
LATE: Final = "late"
TIME: Final = "__time"
"""First column of the state: the event time, int64 us."""
OUTPUT_ROWS: Final = 65_536


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SortByTime:
    """Factory. Schema out: that of the input, dictionaries and other encodings decoded. Side output "late": rows
    behind the watermark, as they came.

    With ``keys`` the rows of each key are in order, without them those of each subtask; ``ties`` are the columns that
    decide between rows of one time, the first counts most.
    """

    event_time: str
    ties: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    batch_rows: int = OUTPUT_ROWS

    migrates_state: ClassVar[bool] = False
    """A column that is new would be missing in rows that wait."""

    @property
    def stateful(self) -> bool:
        return True

    @property
    def restores_order(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Raises `PlanError` for columns that are missing or named twice."""
        return None if schema is None else self.state_schema(schema).remove(0)

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        return None if schema is None else {STATE: self.state_schema(schema)}

    def state_schema(self, schema: pa.Schema) -> pa.Schema:
        check_event_time(schema, self.event_time, step="sort_by_event_time")
        if len({TIME, *schema.names}) != len(schema.names) + 1:
            raise PlanError(f"sort_by_event_time needs columns of different names, none {TIME!r}, got {schema.names}")
        for name in (*self.ties, *self.keys):
            if name not in schema.names:
                raise PlanError(f"sort_by_event_time({name!r}) needs a column of that name, got {schema.names}")
        for name in self.keys:
            check_key_type(name, schema.field(name).type)
        return pa.schema([(TIME, pa.int64()), *((each.name, plain_type(each.type)) for each in schema)])

    def build(self) -> Operator:
        return SortOperator(self)


class SortOperator(Operator):
    """See `SortByTime`."""

    def __init__(self, factory: SortByTime) -> None:
        self._factory = factory
        self._watermark = MIN_WATERMARK
        self._schema: pa.Schema | None = None
        self._bound_to = pa.schema([])
        """Schema of the last batch, which is known to fit."""
        self._rows: RunStore | None = None
        self.late_rows = 0
        """Rows that came behind the watermark; part of the snapshot."""

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        self._reader = EventTimeReader(self._factory.event_time, on_error="fail", where=str(ctx))

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        batch, column, earliest, _ = self._reader.read(batch)
        if batch.num_rows == 0:
            return
        if not batch.schema.equals(self._bound_to):
            self._bind(self._factory.state_schema(batch.schema))
            self._bound_to = batch.schema
        times: Int64Array = column.to_numpy()
        if earliest < self._watermark:
            late = times < self._watermark
            self.late_rows += int(late.sum())
            self.out.emit(batch.filter(pa.array(late)), LATE)
            batch, times = batch.filter(pa.array(~late)), times[~late]
            if batch.num_rows == 0:
                return
        columns = [pa.array(times), *(plain(each) for each in batch.columns)]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        if np.any(times[1:] < times[:-1]):
            order = np.argsort(times, kind="stable")
            table, times = table.take(pa.array(order)), times[order]
        assert self._rows is not None
        self._rows.append(Run(table, int(times[0]), int(times[-1]), merged=False, ordered=True))

    def _bind(self, schema: pa.Schema) -> None:
        if self._schema is not None:
            if not self._schema.equals(schema):
                raise DataError(
                    f"{self.ctx} holds rows with the columns {_brief(self._schema)}, the input now gives "
                    f"{_brief(schema)}; do not change the columns of a stream"
                )
            return
        self._schema = schema
        backend = self.ctx.backend
        spill = None
        if backend.kind == "rocksdb" and backend.scratch is not None:
            spill = Spill(backend.scratch, backend.memory_bytes, RowOrder(TIME, ()), self.ctx)
        self._rows = RunStore(lambda table, _: table.combine_chunks(), TIME, spill)

    def on_watermark(self, time: int) -> int:
        """Rows below ``time`` come out: no row below it follows, but one at exactly ``time`` may."""
        if time > self._watermark:
            self._watermark = time
            if self._rows is not None:
                for rows in self._rows.take(time - 1):
                    self._emit(rows)
        return self._watermark

    def _emit(self, rows: pa.Table) -> None:
        times: Int64Array = flat(rows.column(TIME)).to_numpy()
        order = order_of(rows, [times], self._factory.ties)
        sorted_rows = rows.select(rows.column_names[1:])
        if np.any(order[1:] < order[:-1]):
            sorted_rows = sorted_rows.take(pa.array(order))
        for batch in sorted_rows.combine_chunks().to_batches(max_chunksize=self._factory.batch_rows):
            self.out.emit(batch)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        """Runs may hold rows that came out already: those below the ``watermark`` in the meta of the rows."""
        keys, own = self._factory.keys or None, {"watermark": self._watermark}
        meta = {
            **own,
            "late_rows": self.late_rows,
            "subtask": self.ctx.subtask,
            "parallelism": self.ctx.parallelism,
        }
        progress = FrozenTable(PROGRESS, schema=pa.schema([]), meta=meta, spread="union")
        if self._schema is None or self._rows is None:
            return FrozenState((progress,))
        held = self._rows.freeze()
        rows = FrozenTable(
            STATE, held.small, schema=self._schema, key_columns=keys, meta=own, pieces=held.pieces, spread="list"
        )
        return FrozenState((rows, progress))

    def restore(self, states: Sequence[RestoredState]) -> None:
        """At the same parallelism this subtask goes on from its own watermark, else from the lowest of all: then rows
        that are late may come out as if they were not, but those that come in time are not lost."""
        metas = [state.meta for state in states if state.name == PROGRESS and state.meta]
        same = [
            meta for meta in metas if (meta["subtask"], meta["parallelism"]) == (self.ctx.subtask, self.ctx.parallelism)
        ]
        self._watermark = min((int(meta["watermark"]) for meta in same or metas), default=MIN_WATERMARK)
        mine = [meta for meta in metas if meta["subtask"] % self.ctx.parallelism == self.ctx.subtask]
        self.late_rows = sum(int(meta["late_rows"]) for meta in mine)
        for state in states:
            if state.name == STATE:
                self._restore_rows(state)
            elif state.name != PROGRESS:
                raise DataError(f"{self.ctx} knows the state {STATE!r}, got {state.name!r}; restore a matching flow")

    def _restore_rows(self, state: RestoredState) -> None:
        table, piece = state.table.replace_schema_metadata(None), state.piece
        if not table.num_rows:
            return
        if table.column_names[0] != TIME or self._factory.event_time not in table.column_names:
            raise StateSchemaError(
                f"{self.ctx} needs rows with {TIME!r} and {self._factory.event_time!r}, its checkpoint has "
                f"{table.column_names}; give the step another name= to begin without its state"
            )
        self._bind(table.schema)
        assert self._rows is not None
        came_out_below = int(state.meta["watermark"])
        if came_out_below != self._watermark:
            # Of a subtask that was further: what it had emitted cannot be told by this one's watermark.
            table, piece = table.filter(pa.array(flat(table.column(TIME)).to_numpy() >= came_out_below)), ""
        closed = None if self._watermark == MIN_WATERMARK else self._watermark - 1
        self._rows.restore(table, piece=piece, closed=closed)

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


__all__ = ["LATE", "PROGRESS", "STATE", "TIME", "SortByTime", "SortOperator"]
