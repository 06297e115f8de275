"""Running aggregates: an updated row of every key for every row that comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pyarrow as pa

from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.base import MAIN, Operator
from rayflow.operators.event_time import check_event_time, event_times_us
from rayflow.operators.grouping import flat
from rayflow.operators.keyed.keyed_operator import KeyedOperator, key_schema
from rayflow.operators.keyed.scan import Scan, count
from rayflow.operators.keyed.scans import scan_of
from rayflow.operators.keyed.segments import Numbers, Segments
from rayflow.operators.ordered_partials import Edge
from rayflow.operators.partials import Bound, CountRows, CountValues
from rayflow.operators.preaggregate import ROWS
from rayflow.operators.state.table import StateTable

STATE: Final = "running"
Emit = Literal["every", "batch"]


@dataclass(frozen=True, slots=True)
class RunningPlan:
    """Keys and aggregates bound to types."""

    passed: tuple[str, ...]
    """Columns that go out as they came: keys and event time."""
    aggregates: tuple[Aggregate, ...]
    bounds: tuple[Bound, ...]
    """How what the scans give becomes results."""
    scans: tuple[Scan, ...]
    keys: pa.Schema
    values: pa.Schema
    output: pa.Schema
    counted: bool
    """Rows a key are counted: for count(), and as the time of first and last where there is no event time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunningAggregate:
    """Factory. Schema out: the keys and the event time column as they came, then a column an aggregate.

    ``emit="every"``: a row for every row, in the order they came, with the aggregates of its key up to this row.
    ``emit="batch"``: of the rows of a key that come in one batch only the last; which rows these are depends on how
    the stream happens to be cut, but not what they say.

    Aggregates, their types and their treatment of nulls are those of windows. ``first`` and ``last`` go by event time
    and, without one, by the order in which rows come. Late rows count like all others. An aggregate that a restored
    state does not have begins with the first row after the restore.
    """

    keys: tuple[str, ...]
    aggregates: Mapping[str, Aggregate]
    event_time: str | None = None
    emit: Emit = "every"

    def __post_init__(self) -> None:
        if self.emit not in ("every", "batch"):
            raise ConfigError(f'agg(emit) must be "every" or "batch", got {self.emit!r}')
        if not self.aggregates:
            raise PlanError("agg() needs at least one aggregate, for example agg(n=rf.count())")
        for name, aggregate in self.aggregates.items():
            if not isinstance(aggregate, Aggregate):
                raise PlanError(f"agg({name}=...) needs an aggregate such as rf.count(), got {aggregate!r}")
        twice = sorted({*self.aggregates} & {*self.keys, ROWS, *filter(None, [self.event_time])})
        if twice:
            raise PlanError(
                f"the output would have more than one column named {twice}; rename the aggregates "
                f"(keys and event time go on under their names, {ROWS!r} is reserved)"
            )

    @property
    def stateful(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """From the schema of the input; raises `PlanError` if it does not fit."""
        return None if schema is None else self.plan(schema).output

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        if schema is None:
            return None
        plan = self.plan(schema)
        sides = {scan.side[0].name: pa.schema([*plan.keys, *scan.side]) for scan in plan.scans if scan.side}
        return {STATE: pa.schema([*plan.keys, *plan.values])} | sides

    def plan(self, schema: pa.Schema) -> RunningPlan:
        """For rows of ``schema``; raises `PlanError` for what does not fit."""
        keys = key_schema(schema, self.keys)
        if self.event_time is not None:
            check_event_time(schema, self.event_time, step="agg")
        bounds = tuple(aggregate.bind(name, schema) for name, aggregate in self.aggregates.items())
        counted = any(
            isinstance(bound, CountRows) or (isinstance(bound, Edge) and self.event_time is None) for bound in bounds
        )
        values = [pa.field(ROWS, pa.int64())] if counted else []
        scans = tuple(scan_of(bound) for bound in bounds)
        values += [field for scan in scans for field in scan.fields]
        names = [*self.keys, *(part.name for part in values), *(part.name for scan in scans for part in scan.side)]
        if len(set(names)) != len(names):
            raise PlanError(f"columns of the state meet: {names}; rename the aggregates or keys with a dot in them")
        passed = tuple(dict.fromkeys([*self.keys, *filter(None, [self.event_time])]))
        output = [pa.field(name, schema.field(name).type) for name in passed]
        output += [pa.field(bound.name, bound.result_type) for bound in bounds]
        aggregates = tuple(self.aggregates.values())
        bounds = tuple(CountValues(b.name) if scan.side else b for b, scan in zip(bounds, scans, strict=True))
        return RunningPlan(passed, aggregates, bounds, scans, keys, pa.schema(values), pa.schema(output), counted)

    def build(self) -> Operator:
        return RunningOperator(self)


class RunningOperator(KeyedOperator):
    """See `RunningAggregate`."""

    _plan: RunningPlan
    _table: StateTable
    _sides: list[StateTable | None]

    def __init__(self, factory: RunningAggregate) -> None:
        super().__init__(factory.keys)
        self._factory = factory

    def bind(self, schema: pa.Schema) -> None:
        assert self.state is not None
        self._plan = self._factory.plan(schema)
        keys = self._plan.keys
        self._table = self.state.table(STATE, keys, self._plan.values)
        self._sides = [self._side(keys, scan.side) if scan.side else None for scan in self._plan.scans]

    def _side(self, keys: pa.Schema, fields: Sequence[pa.Field]) -> StateTable:
        assert self.state is not None
        return self.state.table(str(fields[0].name), pa.schema([*keys, fields[0]]), pa.schema(fields[1:]), subkeys=1)

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        plan, table = self._plan, self._table
        values = [aggregate.evaluate(batch) for aggregate in plan.aggregates]
        keys = self.key_columns(batch)
        segments = Segments.of(table.slots(keys, insert=True))
        order = pa.array(segments.order)
        if any(side is not None for side in self._sides):
            keys = [key.take(order) for key in keys]
        counts = count(segments, table, ROWS, None) if plan.counted else None
        times = self._times(batch, segments, counts)
        every = self._factory.emit == "every"
        chosen = segments.inverse() if every else self._last_rows(segments)
        places = pa.array(chosen)
        rows = pa.array([] if counts is None else counts, pa.int64())
        columns = self._passed(batch, segments, chosen)
        for aggregate, bound, scan, side in zip(values, plan.bounds, plan.scans, self._sides, strict=True):
            column = rows if aggregate is None else flat(aggregate).take(order)
            if side is None:
                parts = scan.advance(segments, table, column, times)
            else:
                parts = scan.advance_side(segments, table, side, keys, column)
            if every:
                columns.append(bound.finalise(parts, rows).take(places))
            else:
                # A sum that does not fit matters only where it goes out.
                here = rows.take(places) if counts is not None else rows
                columns.append(bound.finalise([part.take(places) for part in parts], here))
        table.touch(segments.heads)
        return [(pa.RecordBatch.from_arrays(columns, schema=plan.output), MAIN)]

    def _times(self, batch: pa.RecordBatch, segments: Segments, counts: Numbers | None) -> Numbers:
        """What `first` and `last` go by (sorted); nothing where there is none of them."""
        column = self._factory.event_time
        if not any(isinstance(bound, Edge) for bound in self._plan.bounds):
            return segments.order[:0]
        if column is None:
            assert counts is not None
            return counts
        times = event_times_us(batch.column(column))
        if times.null_count:
            raise DataError(
                f"the event time {column!r} is null in {times.null_count} of {len(times)} rows, but first and last go "
                "by it; filter these rows out before agg"
            )
        ticks: Numbers = times.to_numpy()
        return ticks[segments.order]

    def _last_rows(self, segments: Segments) -> Numbers:
        """Sorted positions of the last row of each key, in the order in which these rows came."""
        ends = segments.ends
        return ends[np.argsort(segments.order[ends])]

    def _passed(self, batch: pa.RecordBatch, segments: Segments, chosen: Numbers) -> list[pa.Array]:
        columns = [batch.column(name) for name in self._plan.passed]
        if self._factory.emit == "every":
            return columns
        rows = pa.array(segments.order[chosen])
        return [column.take(rows) for column in columns]


__all__ = ["STATE", "Emit", "RunningAggregate", "RunningOperator"]
