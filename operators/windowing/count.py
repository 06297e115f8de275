"""Windows of a number of rows of a key, in the order in which they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.core.ids import CheckpointId
from rayflow.errors import ConfigError, DataError, StateSchemaError
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.aggregates import max as latest
from rayflow.operators.aggregates import min as earliest
from rayflow.operators.base import MAIN, FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.event_time import EventTimeReader, check_event_time
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.keyed.keyed_operator import KeyedOperator
from rayflow.operators.keyed.segments import Segments
from rayflow.operators.preaggregate import ROWS, WINDOW_END, WINDOW_START, Preaggregation, check_names
from rayflow.operators.state.table import StateTable
from rayflow.operators.windows import OUTPUT_ROWS

STATE: Final = "counted"
PROGRESS: Final = "progress"
"""State without rows, for its ``meta``: the number of rows of a window."""
FIRST: Final = "__first"
LAST: Final = "__last"
"""Aggregates of every window of a stream with event time: what the columns ``window_start`` and ``window_end`` say."""


@dataclass(frozen=True, slots=True)
class CountWindow:
    """Every ``rows`` rows of a key are a window."""

    rows: int

    def __str__(self) -> str:
        return f"count {self.rows}"


def count_window(rows: int) -> CountWindow:
    """Windows of ``rows`` rows of a key each, in the order in which they come; a window that does not fill up gives
    nothing.

    Which rows meet in a window depends on their order alone. Rows of one split of a source keep theirs; those of
    several do not have one. Raises `ConfigError` for less than one row.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"count_window(rows) must be a whole number, 1 or more, got {rows!r}")
    return CountWindow(rows)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountAggregate:
    """Factory: aggregates by key and every ``spec.rows`` rows.

    Schema out: the keys, with event time also ``window_start`` and ``window_end`` (the earliest and the latest of the
    rows, in the type of the column), then one column an aggregate. ``first`` and ``last`` go by event time and, without
    one, by the order in which rows come. A null event time is a `DataError`.
    """

    keys: tuple[str, ...]
    spec: CountWindow
    aggregates: Mapping[str, Aggregate]
    event_time: str | None = None

    migrates_state: ClassVar[bool] = False
    """An aggregate that is new would know the rows of open windows in part only."""

    def __post_init__(self) -> None:
        check_names((*self.keys, FIRST, LAST), self.aggregates)

    @property
    def stateful(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """From the schema of the input; raises `PlanError` if it does not fit."""
        return None if schema is None else self.shown(self.plan(schema).output_schema.empty_table()).schema

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        if schema is None:
            return None
        plan = self.plan(schema)
        return {STATE: pa.schema([*list(plan.schema)[: len(self.keys)], *values_of(plan)])}

    def plan(self, schema: pa.Schema) -> Preaggregation:
        """For rows of ``schema``; raises `PlanError` for what does not fit. Its ``window_start`` is the number of the
        window among those that a batch has rows of, from 0 on."""
        aggregates = dict(self.aggregates)
        if self.event_time is not None:
            check_event_time(schema, self.event_time, step="window")
            aggregates |= {FIRST: earliest(self.event_time), LAST: latest(self.event_time)}
        return Preaggregation.of_rows(self.keys, aggregates, schema, pa.timestamp("us"))

    def shown(self, results: pa.Table) -> pa.Table:
        """What goes out of what `Preaggregation.finalise` gives."""
        results = results.drop_columns([WINDOW_START, WINDOW_END])
        if self.event_time is None:
            return results
        at = len(self.keys)
        for column, name in ((LAST, WINDOW_END), (FIRST, WINDOW_START)):
            values = results.column(column)
            results = results.drop_columns([column]).add_column(at, pa.field(name, values.type), values)
        return results

    def build(self) -> Operator:
        return CountOperator(self)


def values_of(plan: Preaggregation) -> list[pa.Field]:
    """Columns of the state beside the keys: partial results."""
    return list(plan.schema)[len(plan.keys) + 1 :]


class CountOperator(KeyedOperator):
    """See `CountAggregate`. The state has a row for each key with a window that is not full."""

    _plan: Preaggregation
    _table: StateTable

    def __init__(self, factory: CountAggregate) -> None:
        super().__init__(factory.keys)
        self._factory = factory

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        column = self._factory.event_time
        self._reader = None if column is None else EventTimeReader(column, on_error="fail", where=str(ctx))

    def bind(self, schema: pa.Schema) -> None:
        assert self.state is not None
        self._plan = self._factory.plan(schema)
        keys = pa.schema(list(self._plan.schema)[: len(self.keys)])
        self._table = self.state.table(STATE, keys, pa.schema(values_of(self._plan)))

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        plan, table, rows = self._plan, self._table, self._factory.spec.rows
        times = None if self._reader is None else self._reader.read(batch)[1]
        slots = table.slots(self.key_columns(batch), insert=True)
        segments = Segments.of(slots)
        seen = table.get(segments.heads, ROWS).fill_null(0).to_numpy()
        places = np.empty(batch.num_rows, np.int64)
        places[segments.order] = np.repeat(seen, segments.lengths) + segments.occurrence()
        partials = plan.combine_rows(batch, pa.array(places % rows) if times is None else times, places // rows)
        begun = segments.heads[seen > 0]
        if len(begun):
            partials = plan.merge(pa.concat_tables([self._open_windows(begun), partials]), None)
        full = pa.array(flat(partials.column(ROWS)).to_numpy() == rows)
        open_now = partials.filter(pc.invert(full))
        table.delete(segments.heads[(seen + segments.lengths) % rows == 0])
        self._keep(open_now)
        found = partials.filter(full)
        if not found.num_rows:
            return []
        order = np.argsort(_numbers(found), kind="stable")
        results = self._factory.shown(plan.finalise(found.take(pa.array(order)), 0)).combine_chunks()
        return [(part, MAIN) for part in results.to_batches(max_chunksize=OUTPUT_ROWS)]

    def _open_windows(self, slots: Int64Array) -> pa.Table:
        """The partial results of these keys, as the first windows of the batch."""
        width = len(self.keys)
        stored = self._table.gather(slots)
        number = pa.array(np.zeros(len(slots), np.int64)).view(self._plan.window_type)
        columns = [*stored.columns[:width], number, *stored.columns[width:]]
        return pa.Table.from_arrays(columns, schema=self._plan.schema)

    def _keep(self, windows: pa.Table) -> None:
        """Windows that are not full, one a key at most."""
        keys = [flat(windows.column(key)) for key in self.keys]
        slots = self._table.slots(keys, insert=True)
        for field in values_of(self._plan):
            self._table.set(slots, field.name, flat(windows.column(field.name)))

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        state = super().snapshot(checkpoint)
        progress = FrozenTable(PROGRESS, schema=pa.schema([]), meta={"rows": self._factory.spec.rows}, spread="union")
        return FrozenState((*state.tables, progress), state.prepare, state.folders)

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            if state.name not in (STATE, PROGRESS) and state.folder is None:
                raise DataError(f"{self.ctx} knows the state {STATE!r}, got {state.name!r}; restore a matching flow")
            was = (state.meta or {}).get("rows") if state.name == PROGRESS else None
            if was is not None and was != self._factory.spec.rows:
                raise StateSchemaError(
                    f"{self.ctx} has windows of {self._factory.spec.rows} rows, its checkpoint of {was}: open windows "
                    "cannot be cut anew; give the step another name= to begin without its state, or the rows it had"
                )
        super().restore([state for state in states if state.name != PROGRESS])


def _numbers(windows: pa.Table) -> Int64Array:
    numbers: Int64Array = flat(windows.column(WINDOW_START)).view(pa.int64()).to_numpy()
    return numbers


__all__ = ["CountAggregate", "CountOperator", "CountWindow", "count_window"]
