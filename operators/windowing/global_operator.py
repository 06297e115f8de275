"""Aggregates of a global window: `Totals` in keyed state, and the three kinds of triggers.

By rows and by the clock the state is the totals alone. By event time rows wait in the runs of a tumbling window until
their period is over, so that results do not depend on the order in which rows come within the delay; then the period is
added to the totals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, PlanError, StateSchemaError
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.base import MAIN, FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.event_time import EventTimeReader, check_event_time
from rayflow.operators.grouping import flat
from rayflow.operators.keyed.keyed_operator import KeyedOperator
from rayflow.operators.keyed.segments import Segments
from rayflow.operators.preaggregate import ROWS, WINDOW_END, WINDOW_START, Preaggregation, check_names
from rayflow.operators.state.distinct import distinct
from rayflow.operators.state.keyed import KeyedState
from rayflow.operators.windowing import totals as totals_module
from rayflow.operators.windowing.global_window import GlobalWindow, Periods
from rayflow.operators.windowing.totals import Totals, totals_schema
from rayflow.operators.windowing.triggers import ClockTimer
from rayflow.operators.windows import OUTPUT_ROWS, PROGRESS, STATE, WindowAggregate, WindowOperator

GLOBAL: Final = "global"
"""In the meta of the progress of periods."""
_CHANGED: Final = 64
"""Batches whose keys are kept as they are until the clock strikes; then they are made distinct."""


# --------------------------------------------------------------------------------------------- by rows and by the clock


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GlobalAggregate:
    """Factory: totals by key, for triggers by rows and by the clock.

    Schema out: the keys, then a column an aggregate. ``first`` and ``last`` go by event time and, without one, by the
    order in which rows come. A null event time is a `DataError`.
    """

    keys: tuple[str, ...]
    spec: GlobalWindow
    aggregates: Mapping[str, Aggregate]
    event_time: str | None = None

    migrates_state: ClassVar[bool] = False
    """An aggregate that is new would know the rows of open windows in part only."""

    def __post_init__(self) -> None:
        check_names((*self.keys, totals_module.TOLD), self.aggregates)

    @property
    def stateful(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """From the schema of the input; raises `PlanError` if it does not fit."""
        return None if schema is None else _shown(self.plan(schema).output_schema.empty_table()).schema

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        return None if schema is None else {totals_module.STATE: totals_schema(self.plan(schema))}

    def plan(self, schema: pa.Schema) -> Preaggregation:
        """For rows of ``schema``; raises `PlanError` for what does not fit. ``window_start`` is a number."""
        if self.event_time is not None:
            check_event_time(schema, self.event_time, step="window")
        return Preaggregation.of_rows(self.keys, self.aggregates, schema, pa.timestamp("us"))

    def build(self) -> Operator:
        return GlobalOperator(self)


class GlobalOperator(KeyedOperator):
    """See `GlobalAggregate`."""

    _plan: Preaggregation
    _totals: Totals | None = None

    def __init__(self, factory: GlobalAggregate) -> None:
        super().__init__(factory.keys)
        self._factory = factory
        trigger = factory.spec.trigger
        self._rows = trigger.rows
        self._clock = None if trigger.period_us is None else ClockTimer(trigger.period_us)
        self._changed: list[list[pa.Array]] = []
        """By the clock: keys that have changed since the last results."""

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        column = self._factory.event_time
        self._reader = None if column is None else EventTimeReader(column, on_error="fail", where=str(ctx))

    def bind(self, schema: pa.Schema) -> None:
        plan = self._factory.plan(schema)
        if self._totals is None:
            self._use(plan)
        elif not plan.schema.equals(self._plan.schema):
            raise StateSchemaError(
                f"{self.ctx}: the totals have the columns {self._plan.schema.names} of {self._plan.schema.types}, but "
                f"the input now gives {plan.schema.names} of {plan.schema.types}; restore with the aggregates and "
                "types of the checkpoint"
            )

    def _use(self, plan: Preaggregation) -> None:
        assert self.state is not None
        self._plan = plan
        self._totals = Totals(self.state, plan)
        if self._clock is not None:  # after a restore
            for totals in self._totals.untold():
                self._note([flat(totals.column(key)) for key in self.keys])

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        assert self._totals is not None
        plan, table = self._plan, self._totals.table
        times = None if self._reader is None else self._reader.read(batch)[1]
        if self._rows is None and times is not None:
            for _ in self._totals.add(partials := plan.combine_rows(batch, times, 0)):
                pass
        else:
            slots = table.slots(self.key_columns(batch), insert=True)
            segments = Segments.of(slots)
            seen = table.get(segments.heads, ROWS).fill_null(0).to_numpy()
            places = np.empty(batch.num_rows, np.int64)
            places[segments.order] = np.repeat(seen, segments.lengths) + segments.occurrence()
            times = pa.array(places) if times is None else times
            partials = plan.combine_rows(batch, times, 0 if self._rows is None else places // self._rows)
            added = self._totals.add(partials)
            if self._rows is not None:
                every = self._rows
                return self._results(t.filter(pa.array(flat(t.column(ROWS)).to_numpy() % every == 0)) for t in added)
            for _ in added:
                pass
        self._note([flat(partials.column(key)) for key in self.keys])
        return []

    def _results(self, found: Iterable[pa.Table]) -> list[tuple[pa.RecordBatch, str]]:
        assert self._totals is not None
        results = []
        for totals in found:
            if totals.num_rows:
                self._totals.told(totals)
                try:
                    table = _shown(self._plan.finalise(totals, 0)).combine_chunks()
                except DataError as error:
                    raise DataError(f"{self.ctx}: {error}") from error
                results += [(part, MAIN) for part in table.to_batches(max_chunksize=OUTPUT_ROWS)]
        return results

    def _note(self, keys: list[pa.Array]) -> None:
        assert self._clock is not None
        self._clock.changed([0], self.ctx.wall_time())
        self._changed.append(keys)
        if len(self._changed) >= _CHANGED:
            self._changed = [self._changed_keys()]

    def _changed_keys(self) -> list[pa.Array]:
        together = [pa.concat_arrays(columns) for columns in zip(*self._changed, strict=True)]
        first, _ = distinct(together)
        return [column.take(pa.array(first)) for column in together]

    def next_timer(self) -> float | None:
        return None if self._clock is None else self._clock.due

    def on_time(self, now: float) -> None:
        if self._clock is not None and self._clock.take(now):
            assert self._totals is not None
            keys, self._changed = self._changed_keys(), []
            for batch, tag in self._results([self._totals.of(keys)]):
                self.out.emit(batch, tag)

    def on_end(self) -> None:
        """What has changed since it was told: the last result of each key is about all its rows."""
        if self._totals is not None:
            for batch, tag in self._results(self._totals.untold()):
                self.out.emit(batch, tag)

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            if state.name not in (totals_module.STATE, PROGRESS) and state.folder is None:
                raise DataError(
                    f"{self.ctx} knows the state {totals_module.STATE!r}, got {state.name!r}; restore a matching flow"
                )
        super().restore([state for state in states if state.name != PROGRESS])
        for state in states:  # the types: there may be something to tell, even if no more rows come
            if state.name == PROGRESS and state.table.schema.names and self._totals is None:
                schema = state.table.schema.remove_metadata()
                try:
                    self._use(Preaggregation.of_partials(self.keys, self._factory.aggregates, schema))
                except PlanError as error:
                    raise DataError(f"{self.ctx} cannot restore its totals: {error}") from error

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        """The totals, and a state without rows that has the columns of partial results."""
        state = super().snapshot(checkpoint)
        schema = pa.schema([]) if self._totals is None else self._plan.schema
        progress = FrozenTable(PROGRESS, schema=schema, meta={GLOBAL: True}, spread="union")
        return FrozenState((*state.tables, progress), state.prepare, state.folders)


def _shown(results: pa.Table) -> pa.Table:
    return results.drop_columns([WINDOW_START, WINDOW_END])


# ------------------------------------------------------------------------------------------------------- by event time


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GlobalTimeAggregate:
    """Factory: totals by key at the end of every period of event time in which the key had rows.

    Schema out: the keys, ``window_end`` (the end of the period: the total is that of all rows before it), then a column
    an aggregate. No row is late.
    """

    keys: tuple[str, ...]
    period_us: int
    aggregates: Mapping[str, Aggregate]
    event_time: str

    migrates_state: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_names((*self.keys, totals_module.TOLD), self.aggregates)

    @property
    def stateful(self) -> bool:
        return True

    @property
    def restores_order(self) -> bool:
        return True

    def windows(self, periods: Periods) -> WindowAggregate:
        """Aggregates of the periods by themselves."""
        return WindowAggregate(keys=self.keys, spec=periods, aggregates=self.aggregates, event_time=self.event_time)

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """From the schema of the input; raises `PlanError` if it does not fit."""
        if schema is None:
            return None
        output = self.windows(Periods(self.period_us)).plan(schema).output_schema
        return output.remove(output.get_field_index(WINDOW_START))

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        windows = self.windows(Periods(self.period_us))
        found = windows.state_schemas(schema)
        if found is None or schema is None:
            return None
        return {**found, totals_module.STATE: totals_schema(windows.plan(schema))}

    def build(self) -> Operator:
        return GlobalTimeOperator(self)


class GlobalTimeOperator(WindowOperator):
    """See `GlobalTimeAggregate`."""

    def __init__(self, factory: GlobalTimeAggregate) -> None:
        self._periods = Periods(factory.period_us)
        super().__init__(factory.windows(self._periods))
        self._keys = factory.keys
        self._totals: Totals | None = None

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        self._state = KeyedState(ctx, self._keys)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        kept = self._progress.kept
        self._periods.floor = None if kept == MIN_WATERMARK else self._periods.first_open(kept)
        super().process(batch, input_index)

    def _bind(self, preaggregation: Preaggregation) -> None:
        super()._bind(preaggregation)
        if self._totals is None:
            self._totals = Totals(self._state, preaggregation)

    def _emit(self, due: Iterable[pa.Table]) -> None:
        assert self._plan is not None
        assert self._totals is not None
        for totals in (totals for partials in due for totals in self._totals.add(partials)):
            try:
                table = self._plan.finalise(totals, self._spec.ends_of).drop_columns([WINDOW_START])
            except DataError as error:
                raise DataError(f"{self.ctx}: {error}") from error
            for batch in table.combine_chunks().to_batches(max_chunksize=OUTPUT_ROWS):
                self.out.emit(batch)

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        totals = self._state.freeze()
        windows = [
            replace(table, meta={**table.meta, GLOBAL: True}) if isinstance(table.meta, dict) else table
            for table in super().snapshot(checkpoint).tables
        ]
        return FrozenState((*windows, *totals.tables), totals.prepare, totals.folders)

    def restore(self, states: Sequence[RestoredState]) -> None:
        windows = [state for state in states if state.name in (STATE, PROGRESS) and state.folder is None]
        self._state.restore([state for state in states if not any(state is other for other in windows)])
        if any(isinstance(state.meta, dict) and not state.meta.get(GLOBAL) for state in windows):
            raise StateSchemaError(
                f"{self.ctx} has a global window, its checkpoint windows that close: what they had is not in it; give "
                "the step another name= to begin without its state"
            )
        super().restore(windows)

    def close(self) -> None:
        super().close()
        self._state.close()


__all__ = ["GlobalAggregate", "GlobalOperator", "GlobalTimeAggregate", "GlobalTimeOperator"]
