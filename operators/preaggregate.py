"""From rows to partial results by (key, window start), from partial results to fewer of them, and to final rows.

Schema of partial results: the key columns, ``window_start`` (timestamp[us] in the zone of the event time), ``__rows``
(int64, how many rows went in), then the columns of each aggregate (`Bound.parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayflow.errors import PlanError
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.event_time import timestamp_type
from rayflow.operators.grouping import (
    Ask,
    Column,
    Combining,
    Int64Array,
    flat,
    group,
    plain_key,
    plain_type,
)
from rayflow.operators.partials import Bound
from rayflow.partition import check_key_type

WINDOW_START = "window_start"
WINDOW_END = "window_end"
ROWS = "__rows"


@dataclass(frozen=True, slots=True)
class Preaggregation:
    """Keys and aggregates bound to types; used by the combiner and by the window operator."""

    keys: tuple[str, ...]
    aggregates: tuple[Aggregate, ...]
    bounds: tuple[Bound, ...]
    schema: pa.Schema
    """Of partial results."""

    @staticmethod
    def of_rows(
        keys: Sequence[str], aggregates: Mapping[str, Aggregate], schema: pa.Schema, time_type: pa.DataType
    ) -> Preaggregation:
        """For rows of ``schema``. Raises `PlanError`, or `KeyHashError` for a key column without a stable hash."""
        check_names(keys, aggregates)
        for key in keys:
            if schema.names.count(key) != 1:
                raise PlanError(f"the key column {key!r} is not among the columns {schema.names}; key by one of them")
            check_key_type(key, schema.field(key).type)
        bounds = tuple(aggregate.bind(name, schema) for name, aggregate in aggregates.items())
        types = [plain_type(schema.field(key).type) for key in keys]
        return _preaggregation(keys, types, aggregates, bounds, timestamp_type(time_type))

    @staticmethod
    def of_partials(keys: Sequence[str], aggregates: Mapping[str, Aggregate], schema: pa.Schema) -> Preaggregation:
        """For partial results, from an upstream combiner or from a snapshot. Raises `PlanError` if they do not fit."""
        check_names(keys, aggregates)
        missing = [name for name in (*keys, WINDOW_START, ROWS) if name not in schema.names]
        if missing:
            raise PlanError(f"partial results need the columns {missing}, got {schema.names}")
        bounds = tuple(aggregate.bind_partial(name, schema) for name, aggregate in aggregates.items())
        types = [schema.field(key).type for key in keys]
        return _preaggregation(keys, types, aggregates, bounds, schema.field(WINDOW_START).type)

    @property
    def output_schema(self) -> pa.Schema:
        """Keys, window_start, window_end, then the aggregates."""
        fields = [self.schema.field(i) for i in range(len(self.keys) + 1)]
        fields.append(pa.field(WINDOW_END, self.window_type))
        fields.extend(pa.field(bound.name, bound.result_type) for bound in self.bounds)
        return pa.schema(fields)

    @property
    def window_type(self) -> pa.DataType:
        return self.schema.field(WINDOW_START).type

    def combine_rows(self, batch: pa.RecordBatch, times_us: pa.Array, starts: Int64Array | int) -> pa.Table:
        """Partial results of the rows, one for each (key, window start).

        ``starts`` is the window start of each row, or one for all: then the rows are grouped by key alone.
        """
        keys = [plain_key(batch.column(key)) for key in self.keys]
        values = [aggregate.evaluate(batch) for aggregate in self.aggregates]
        combinings = [
            bound.from_rows(batch if value is None else value, times_us)
            for bound, value in zip(self.bounds, values, strict=True)
        ]
        by = [*keys, self._start_column(starts, batch.num_rows)] if self._by_start(starts) else keys
        return self._grouped(by, [_count_rows(), *combinings], starts if isinstance(starts, int) else None)

    def singles(self, batch: pa.RecordBatch, times_us: pa.Array, starts: Int64Array | int) -> pa.Table:
        """Every row as a partial result of its own: for batches in which keys do not repeat."""
        rows = batch.num_rows
        columns: list[Column] = [plain_key(batch.column(key)) for key in self.keys]
        columns += [self._start_column(starts, rows), pa.array(np.ones(rows, np.int64))]
        for bound, aggregate in zip(self.bounds, self.aggregates, strict=True):
            value = aggregate.evaluate(batch)
            columns.extend(bound.singles(batch if value is None else value, times_us))
        return pa.Table.from_arrays(columns, schema=self.schema)

    def merge(self, partials: pa.Table, start: int | None) -> pa.Table:
        """Partial results with the same (key, window start) become one; ``start`` if it is the same in all."""
        bound_parts = zip(self.bounds, self._parts(partials), strict=True)
        combinings = [bound.combine(parts) for bound, parts in bound_parts]
        by = [partials.column(key) for key in self.keys]
        if start is None or not by:
            by.append(partials.column(WINDOW_START))
        return self._grouped(by, [_sum_rows(partials.column(ROWS)), *combinings], start)

    def finalise(self, partials: pa.Table, size: int | Callable[[Int64Array], Int64Array]) -> pa.Table:
        """Output rows from merged partial results; ``size`` of the windows, or their ends from their starts. Raises
        `DataError` for a result that does not fit its type."""
        starts = flat(partials.column(WINDOW_START))
        starts_us = starts.view(pa.int64()).to_numpy()
        ends = pa.array(starts_us + size if isinstance(size, int) else size(starts_us)).view(self.window_type)
        columns = [*(partials.column(key) for key in self.keys), starts, ends]
        rows = flat(partials.column(ROWS))
        for bound, parts in zip(self.bounds, self._parts(partials), strict=True):
            columns.append(bound.finalise(parts, rows))
        return pa.Table.from_arrays(columns, schema=self.output_schema)

    def _parts(self, partials: pa.Table) -> list[list[Column]]:
        return [[partials.column(field.name) for field in bound.parts] for bound in self.bounds]

    def _by_start(self, starts: Int64Array | int) -> bool:
        return not self.keys or not isinstance(starts, int)

    def _start_column(self, starts: Int64Array | int, rows: int) -> pa.Array:
        array = np.full(rows, starts, np.int64) if isinstance(starts, int) else starts
        return pa.array(array).view(self.window_type)

    def _grouped(self, by: list[Column], combinings: list[Combining], start: int | None) -> pa.Table:
        keys, columns = group(by, combinings)
        if len(keys) == len(self.keys):
            assert start is not None
            keys.append(self._start_column(start, len(keys[0])))
        arrays = [*keys, *(column for part in columns for column in part)]
        return pa.Table.from_arrays(arrays, schema=self.schema)


def check_names(keys: Sequence[str], aggregates: Mapping[str, Aggregate]) -> None:
    """Raise `PlanError` for names that meet in the output, and for an aggregate that is none."""
    names = [*keys, WINDOW_START, WINDOW_END, ROWS, *aggregates]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(
            f"the output would have more than one column named {twice}; rename the key columns or aggregates "
            f"(a window adds {WINDOW_START!r} and {WINDOW_END!r}; {ROWS!r} is reserved)"
        )
    if not aggregates:
        raise PlanError("agg() needs at least one aggregate, for example agg(n=rf.count())")
    for name, aggregate in aggregates.items():
        if not isinstance(aggregate, Aggregate):
            raise PlanError(f"agg({name}=...) needs an aggregate such as rf.count(), got {aggregate!r}")


def _preaggregation(
    keys: Sequence[str],
    key_types: Sequence[pa.DataType],
    aggregates: Mapping[str, Aggregate],
    bounds: tuple[Bound, ...],
    window_type: pa.DataType,
) -> Preaggregation:
    fields = [pa.field(key, kind) for key, kind in zip(keys, key_types, strict=True)]
    fields += [pa.field(WINDOW_START, window_type), pa.field(ROWS, pa.int64())]
    fields += [field for bound in bounds for field in bound.parts]
    names = [field.name for field in fields]
    if len(set(names)) != len(names):
        raise PlanError(f"columns of partial results meet: {names}; rename the aggregates or keys with a dot in them")
    return Preaggregation(tuple(keys), tuple(aggregates.values()), bounds, pa.schema(fields))


def _count_rows() -> Combining:
    grouped = yield Ask(((None, "count_all"),))
    return [grouped.results[0]]


def _sum_rows(rows: Column) -> Combining:
    grouped = yield Ask(((rows, "sum"),))
    return [grouped.results[0]]


__all__ = ["ROWS", "WINDOW_END", "WINDOW_START", "Preaggregation", "check_names"]
