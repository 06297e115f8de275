"""Lookup joins: each row with what a table says of its key just now.

Every subtask has the whole table: the latest row of each key of the second stream, which all subtasks get. A row is
looked up when it comes and does not wait, so **what it finds depends on how far the table has come**: exact results
need `rayflow.operators.joins.asof`. What the table itself holds does not depend on the order of its rows if they have
an event time: the latest counts, of equal times the same one always. Without one the last to come counts.

As all subtasks have the same table, subtask 0 alone freezes it, and every subtask restores from that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.errors import DataError, PlanError, SchemaChangedError, StateSchemaError
from rayflow.operators.base import FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.event_time import EventTimeReader, event_times_us
from rayflow.operators.grouping import Int64Array, flat, plain_key
from rayflow.operators.joins.columns import RIGHT, SIDES, decode
from rayflow.operators.joins.kernels import SortedRows, latest, merged, same_as_next, sort_rows
from rayflow.operators.joins.operator import Join
from rayflow.partition import hash_columns

LOOKUP_HOWS: Final = ("inner", "left")
TABLE: Final = "table"
TABLE_INPUT: Final = RIGHT


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lookup(Join):
    """Factory. Input 0: rows; input 1: rows of the table, in every subtask. Schema out: see `JoinColumns`; rows keep
    their order. Null keys find nothing, and rows of the table with one are left out."""

    def __post_init__(self) -> None:
        Join.__post_init__(self)
        if self.how not in LOOKUP_HOWS:
            raise PlanError(f"how= must be one of {', '.join(LOOKUP_HOWS)} here, got {self.how!r}")

    @property
    def keys(self) -> tuple[str, ...]:
        """None: its state is not divided by key."""
        return ()

    def description(self) -> dict[str, Any]:
        return {"kind": "lookup"}

    def side_schema(self, tag: str) -> pa.Schema | None:
        return None

    def state_schemas(self, input_schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        return None

    def build(self) -> Operator:
        return LookupOperator(self)


class LookupOperator(Operator):
    """See `Lookup`."""

    def __init__(self, factory: Lookup) -> None:
        if factory.left_schema is None or factory.right_schema is None:
            raise PlanError("a lookup must be told the schemas of both sides; build it through a plan")
        self._factory = factory
        self._input_schemas = (factory.left_schema, factory.right_schema)
        self._columns = factory.columns(factory.left_schema, factory.right_schema)
        self._table: SortedRows | None = None
        """The latest row of every key, and where two keys have one hash maybe older ones."""
        self._new: list[SortedRows] = []
        """Not yet in the table."""
        self._arrived = 0

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        time = self._factory.right_time
        self._reader = None if time is None else EventTimeReader(time, on_error="fail", where=f"{ctx}, table")

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if batch.num_rows == 0:
            return
        expected = self._input_schemas[input_index]
        if batch.schema.names != expected.names or batch.schema.types != expected.types:
            raise SchemaChangedError(
                f"{self.ctx}: the {SIDES[input_index]} side was planned with {expected.names}: {expected.types}, its "
                f"rows have {batch.schema.names}: {batch.schema.types}; declare the schema that the step before makes"
            )
        rows = decode(batch, self._columns.sides[input_index])
        if input_index == TABLE_INPUT:
            self._learn(rows)
        else:
            self._look_up(rows)

    def _learn(self, rows: pa.RecordBatch) -> None:
        times = self._arrivals(rows) if self._reader is None else self._reader.read(rows)[1].to_numpy()
        known = _without_nulls(rows, self._factory.right_keys)
        if not known.all():
            rows, times = rows.filter(pa.array(known)), times[known]
        if rows.num_rows:
            self._new.append(_newest(self._sorted(rows, times)))

    def _arrivals(self, rows: pa.RecordBatch) -> Int64Array:
        first, self._arrived = self._arrived, self._arrived + rows.num_rows
        return np.arange(first, self._arrived)

    def _sorted(self, rows: pa.RecordBatch, times: Int64Array) -> SortedRows:
        return sort_rows(rows, self._factory.right_keys, times, ties=self._reader is not None)

    def _current(self) -> SortedRows | None:
        if self._new:
            self._table = _newest(merged([*([] if self._table is None else [self._table]), *self._new]))
            self._new = []
        return self._table

    def _look_up(self, rows: pa.RecordBatch) -> None:
        table = self._current()
        found = np.full(rows.num_rows, -1, np.int64)
        known = np.flatnonzero(_without_nulls(rows, self._factory.left_keys))
        if table is not None and len(known):
            asked = rows if len(known) == rows.num_rows else rows.take(pa.array(known))
            keys = tuple(flat(plain_key(asked.column(key))) for key in self._factory.left_keys)
            always = np.full(len(known), np.iinfo(np.int64).max)
            found[known] = latest(SortedRows(asked, keys, hash_columns(keys), always), table)
        none = found < 0
        if self._factory.how == "inner" and none.any():
            rows, found, none = rows.filter(pa.array(~none)), found[~none], none[~none]
        if not rows.num_rows:
            return
        if table is None:
            self.out.emit(self._columns.left_only(rows))
        else:
            self.out.emit(self._columns.pairs(rows, table.rows.take(pa.array(found, mask=none))))

    # ------------------------------------------------------------------------------------------------- checkpoints

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        """By subtask 0 alone. The table is small by contract, and written anew every time."""
        if self.ctx.subtask != 0:
            return FrozenState()
        parts = [*([] if self._table is None else [self._table]), *self._new]  # in the order in which they came
        batches = tuple(part.rows for part in parts)
        return FrozenState((FrozenTable(TABLE, batches, schema=self._columns.sides[RIGHT], spread="union"),))

    def restore(self, states: Sequence[RestoredState]) -> None:
        schema = self._columns.sides[RIGHT]
        for state in states:
            if state.name != TABLE:
                raise DataError(f"{self.ctx} knows the state {TABLE!r}, got {state.name!r}; restore a matching flow")
            if state.table.schema.names != schema.names or state.table.schema.types != schema.types:
                raise StateSchemaError(
                    f"{self.ctx}: the table has the columns {schema.names}: {schema.types}, in the checkpoint "
                    f"{state.table.schema.names}: {state.table.schema.types}; give the step another name= to begin anew"
                )
            for batch in state.table.replace_schema_metadata(None).cast(schema).combine_chunks().to_batches():
                column = self._factory.right_time
                times = self._arrivals(batch) if column is None else event_times_us(batch.column(column)).to_numpy()
                self._new.append(self._sorted(batch, times))


def _newest(rows: SortedRows) -> SortedRows:
    """The last row of every key; where two keys have one hash maybe older ones before it."""
    superseded = same_as_next(rows)
    return rows.take(~superseded) if superseded.any() else rows


def _without_nulls(rows: pa.RecordBatch, keys: Sequence[str]) -> Any:
    known = np.ones(rows.num_rows, bool)
    for key in keys:
        if rows.column(key).null_count:
            known &= rows.column(key).is_valid().to_numpy(zero_copy_only=False)
    return known


__all__ = ["LOOKUP_HOWS", "TABLE", "TABLE_INPUT", "Lookup", "LookupOperator"]
