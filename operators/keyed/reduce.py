"""Reduce: the rows of a key so far as one row, put together by a function of the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.errors import PlanError, RayflowError, UserCodeError
from rayflow.operators.base import MAIN, Operator
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.keyed.keyed_operator import KeyedOperator, key_schema
from rayflow.operators.keyed.segments import Segments
from rayflow.operators.state.table import StateTable

STATE: Final = "reduced"
ReduceFn = Callable[[pa.RecordBatch, pa.RecordBatch], Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reduce:
    """Factory. Schema out: that of the input; for every row the updated row of its key, in the order they came.

    ``fn(state, rows)`` gets two record batches of the input's schema, row i of both of the same key, every key once:
    what its key has been reduced to, and its next row. It returns the new state: a RecordBatch, a Table or a mapping
    of column name to array, with one row for each. The key columns may be left out; they stay what they are. The first
    row of a key goes out as it is.

    A key that has n rows in a batch takes n calls, each for all keys that have so many rows: few calls where many
    keys share the rows, many where one key has most of them (use `agg` there).
    """

    keys: tuple[str, ...]
    fn: ReduceFn

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise PlanError(f"reduce needs a function of (state, rows), got {self.fn!r}")

    @property
    def stateful(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """That of the input; raises `PlanError` when nothing is left to be reduced."""
        if schema is not None:
            self.columns(schema)
        return schema

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        if schema is None:
            return None
        keys, values = self.columns(schema)
        return {STATE: pa.schema([*keys, *values])}

    def columns(self, schema: pa.Schema) -> tuple[pa.Schema, pa.Schema]:
        """(key columns, all others) as they are kept."""
        keys = key_schema(schema, self.keys)
        # Dictionaries differ from batch to batch, so their values are kept.
        kinds = [(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema]
        values = pa.schema([(name, kind) for name, kind in kinds if name not in self.keys])
        if not len(values):
            raise PlanError(f"reduce needs columns beside the keys, got only {schema.names}")
        return keys, values

    def build(self) -> Operator:
        return ReduceOperator(self)


class ReduceOperator(KeyedOperator):
    """See `Reduce`. Calls go by rounds: the r-th takes the r-th row of every key of the batch that has so many."""

    _table: StateTable
    _values: pa.Schema
    _rows: pa.Schema

    def __init__(self, factory: Reduce) -> None:
        super().__init__(factory.keys)
        self._factory = factory

    def bind(self, schema: pa.Schema) -> None:
        assert self.state is not None
        keys, self._values = self._factory.columns(schema)
        self._rows = pa.schema([(f.name, f.type) for f in schema])
        self._table = self.state.table(STATE, keys, self._values)

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        batch = pa.RecordBatch.from_arrays(batch.columns, schema=self._rows)
        table, keys = self._table, self.key_columns(batch)
        known = table.slots(keys, insert=False) >= 0
        segments = Segments.of(table.slots(keys, insert=True))
        # The keys with the most rows first, so that those of every round stand at the beginning.
        by_length = np.argsort(-segments.lengths, kind="stable")
        starts, lengths = segments.starts[by_length], segments.lengths[by_length]
        slots = segments.heads[by_length]
        firsts = segments.order[starts]
        current = self._first_round(batch.take(pa.array(firsts)), slots, known[firsts])
        rounds, rows = [current], [firsts]
        for number in range(1, int(lengths[0])):
            active = int(np.searchsorted(-lengths, -number, side="left"))
            rows.append(segments.order[starts[:active] + number])
            current = self._call(current.slice(0, active), batch.take(pa.array(rows[-1])))
            rounds.append(current)
        results = pa.Table.from_batches(rounds).combine_chunks()
        place = np.empty(batch.num_rows, np.int64)
        place[np.concatenate(rows)] = np.arange(batch.num_rows)
        last = pa.array(place[segments.order[segments.ends[by_length]]])
        for name in self._values.names:
            table.set(slots, name, flat(results.column(name)).take(last).cast(self._values.field(name).type))
        (out,) = results.take(pa.array(place)).combine_chunks().to_batches()
        return [(out, MAIN)]

    def _first_round(self, rows: pa.RecordBatch, slots: Int64Array, known: np.ndarray[Any, Any]) -> pa.RecordBatch:
        """Keys that have a state are reduced with it; the first row of the others is their state."""
        old = np.flatnonzero(known)
        if len(old) == 0:
            return rows
        mine = rows.take(pa.array(old))
        state = [
            mine.column(f.name) if f.name in self.keys else self._table.get(slots[old], f.name).cast(f.type)
            for f in self._rows
        ]
        reduced = self._call(pa.RecordBatch.from_arrays(state, schema=self._rows), mine)
        if len(old) == rows.num_rows:
            return reduced
        new = np.flatnonzero(~known)
        place = np.empty(rows.num_rows, np.int64)
        place[np.concatenate([old, new])] = np.arange(rows.num_rows)
        both = pa.Table.from_batches([reduced, rows.take(pa.array(new))]).combine_chunks()
        (mixed,) = both.take(pa.array(place)).combine_chunks().to_batches()
        return mixed

    def _call(self, state: pa.RecordBatch, rows: pa.RecordBatch) -> pa.RecordBatch:
        where, name = f"{self.ctx}: the function", getattr(self._factory.fn, "__name__", repr(self._factory.fn))
        try:
            result = self._factory.fn(state, rows)
            columns = [self._column(result, state, field) for field in self._rows]
        except RayflowError:
            raise
        except Exception as error:
            raise UserCodeError(
                f"{where} {name} of reduce raised {type(error).__name__}: {error} on {rows.num_rows} keys; it must "
                f"return the columns {self._values.names}, in their types"
            ) from error
        wrong = [len(column) for column in columns if len(column) != rows.num_rows]
        if wrong:
            raise UserCodeError(
                f"{where} {name} of reduce returned {wrong[0]} rows for {rows.num_rows} keys; return one row for each"
            )
        return pa.RecordBatch.from_arrays(columns, schema=self._rows)

    def _column(self, result: Any, state: pa.RecordBatch, field: pa.Field) -> pa.Array:
        if field.name in self.keys:
            return state.column(field.name)
        found = result[field.name]
        if not isinstance(found, pa.Array | pa.ChunkedArray):
            return pa.array(found, field.type)
        return flat(found) if found.type.equals(field.type) else flat(found).cast(field.type)


__all__ = ["STATE", "Reduce", "ReduceFn", "ReduceOperator"]
