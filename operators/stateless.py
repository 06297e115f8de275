"""Steps that look at one batch at a time: filter, select, with_columns, rename, drop, event time; and those that call
user code (`rayflow.operators.user_code`).

Factories are frozen and picklable. ``output_schema`` maps the schema of the input to that of the output while the flow
is built, None for unknown, and raises `PlanError` for columns and types that do not fit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import ConfigError, PlanError
from rayflow.expressions import Expr
from rayflow.operators.base import EventTime, Operator, OperatorContext, OperatorFactory, Output
from rayflow.operators.event_time import DERIVED_TYPE, OnNullTime, WatermarkTracker, check_event_time
from rayflow.operators.faults import UNLOCATED, located
from rayflow.operators.user_code import FlatMap, Map, MapBatches


class Transform(ABC):
    """A factory that is a function from batch to batch. Empty results are not passed on."""

    __slots__ = ()

    @property
    def stateful(self) -> bool:
        return False

    @abstractmethod
    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Schema of the output for that of the input; raises `PlanError`."""

    @abstractmethod
    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """One batch, without side effects."""

    def build(self) -> Operator:
        return TransformOperator(self)


class TransformOperator(Operator):
    """Applies a `Transform` to every batch."""

    def __init__(self, transform: Transform) -> None:
        self._transform = transform

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        try:
            result = self._transform.apply(batch)
        except UNLOCATED as error:
            raise located(error, self.ctx) from error
        if result.num_rows:
            self.out.emit(result)


@dataclass(frozen=True, slots=True)
class Identity(Transform):
    """Rows as they come: the target of union, rebalance and broadcast."""

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        return schema

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch


@dataclass(frozen=True, slots=True, eq=False)
class Filter(Transform):
    """Rows for which a boolean expression is true; null drops the row, as in SQL. Schema out: that of the input."""

    condition: Expr

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is not None:
            kind = self.condition.result_type(schema)
            if not (pa.types.is_boolean(kind) or pa.types.is_null(kind)):
                raise PlanError(
                    f"filter needs an expression that is true or false, {self.condition!r} is {kind}; compare it"
                )
        return schema

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        mask = self.condition.evaluate(batch)
        if pa.types.is_null(mask.type):
            return batch.slice(0, 0)
        if not pa.types.is_boolean(mask.type):
            raise PlanError(f"filter needs true or false, {self.condition!r} is {mask.type}; compare it")
        return batch if mask.null_count == 0 and mask.true_count == len(mask) else batch.filter(mask)


@dataclass(frozen=True, slots=True, eq=False)
class Select(Transform):
    """These expressions and nothing else, under their output names."""

    expressions: tuple[Expr, ...]

    def __post_init__(self) -> None:
        if not self.expressions:
            raise PlanError("select needs at least one column, got none")
        _check_unique("select", [e.output_name() for e in self.expressions])

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is None:
            return None
        return pa.schema([(e.output_name(), e.result_type(schema)) for e in self.expressions])

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        arrays = [e.evaluate(batch) for e in self.expressions]
        return pa.RecordBatch.from_arrays(arrays, names=[e.output_name() for e in self.expressions])


@dataclass(frozen=True, slots=True, eq=False)
class WithColumns(Transform):
    """All columns of the input; those named here are replaced in place or added at the end.

    Every expression sees the input, not the other new columns.
    """

    columns: Mapping[str, Expr]

    def __post_init__(self) -> None:
        if not self.columns:
            raise PlanError("with_columns needs at least one column, got none")

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is None:
            return None
        types = {field.name: field.type for field in schema}
        types.update({name: e.result_type(schema) for name, e in self.columns.items()})
        return pa.schema(list(types.items()))

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
        arrays.update({name: e.evaluate(batch) for name, e in self.columns.items()})
        return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


@dataclass(frozen=True, slots=True)
class Rename(Transform):
    """New names for some columns, ``{"old": "new"}``; order and types stay. Names may be swapped."""

    columns: Mapping[str, str]

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is None:
            return None
        return pa.schema([f.with_name(n) for f, n in zip(schema, self._names(schema.names), strict=True)])

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.rename_columns(self._names(batch.schema.names))

    def _names(self, names: Sequence[str]) -> list[str]:
        _check_present("rename", self.columns, names)
        renamed = [self.columns.get(name, name) for name in names]
        _check_unique("rename", renamed)
        return renamed


@dataclass(frozen=True, slots=True)
class Drop(Transform):
    """All columns but these, of which each must be there and one must remain."""

    columns: tuple[str, ...]

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is None:
            return None
        kept = self._kept(schema.names)
        return pa.schema([schema.field(name) for name in kept])

    def apply(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.select(self._kept(batch.schema.names))

    def _kept(self, names: Sequence[str]) -> list[str]:
        _check_present("drop", self.columns, names)
        kept = [name for name in names if name not in self.columns]
        if not kept:
            raise PlanError(f"drop would leave no column of {list(names)}; keep at least one")
        return kept


def _check_present(step: str, wanted: Sequence[str] | Mapping[str, str], names: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise PlanError(f"{step} names columns that are not there: {missing}; the input has {list(names)}")


def _check_unique(step: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PlanError(f"{step} would give several columns the same name {twice}; choose other names")


@dataclass(frozen=True, slots=True)
class AssignEventTime:
    """Makes a column the event time: from here on the watermark is that of the rows seen. Schema out: as in; with a
    function that makes the column (`EventTime.derive`) this is added at the end.

    Rows with a null time raise `DataError` (``on_error="fail"``) or are dropped and counted (``"skip"``).
    """

    event_time: EventTime
    on_error: OnNullTime = "fail"

    def __post_init__(self) -> None:
        if self.on_error not in ("fail", "skip"):
            raise ConfigError(f'with_event_time needs on_error "fail" or "skip", got {self.on_error!r}')

    @property
    def stateful(self) -> bool:
        return False

    @property
    def needs_order(self) -> bool:
        """Whether rows must come in reading order; planning sees to it."""
        return self.event_time.max_delay_us is not None

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        column = self.event_time.column
        if schema is None:
            return None
        if self.event_time.derive is not None:
            if column in schema.names:
                raise PlanError(
                    f"with_event_time(function) adds a column {column!r}, but the input has one already; name another "
                    "with into="
                )
            return schema.append(pa.field(column, DERIVED_TYPE))
        check_event_time(schema, column, step="with_event_time")
        return schema

    @property
    def needs_source(self) -> bool:
        """Whether this step can only be done by a source; planning sees to it."""
        return self.event_time.max_drift_us is not None

    def at_source(self) -> tuple[EventTime, OperatorFactory] | None:
        """What the source in front of this step may do in its place, split by split, and what is left to do here."""
        return (self.event_time, Identity()) if self.on_error == "fail" else None

    def build(self) -> Operator:
        return EventTimeOperator(self)


class EventTimeOperator(Operator):
    """See `AssignEventTime`. Watermarks from upstream mean another time and end here, except that of the end (W1)."""

    def __init__(self, factory: AssignEventTime) -> None:
        self._factory = factory
        self._ended = False

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        self._tracker = WatermarkTracker(
            self._factory.event_time, on_error=self._factory.on_error, where=str(ctx), wall_time=ctx.wall_time
        )
        self._rows_at = ctx.now()

    @property
    def skipped_rows(self) -> int:
        """Rows dropped for a null event time."""
        return self._tracker.skipped_rows

    def current_watermark(self) -> int:
        """What may be passed on now; the loop asks for it from time to time, because no upstream watermark may come."""
        return MAX_WATERMARK if self._ended else self._tracker.watermark

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        batch = self._tracker.observe(batch)
        if batch.num_rows:
            self.out.emit(batch)
        self._rows_at = self.ctx.now()  # the rest of the chain may have taken its time

    def on_idle(self, inputs_idle: bool) -> bool:
        timeout_us = self._factory.event_time.idle_timeout_us
        return inputs_idle or (timeout_us is not None and (self.ctx.now() - self._rows_at) * 1e6 >= timeout_us)

    def on_watermark(self, time: int) -> int:
        self._ended = self._ended or time == MAX_WATERMARK
        return self.current_watermark()


__all__ = [
    "AssignEventTime",
    "Drop",
    "EventTimeOperator",
    "Filter",
    "FlatMap",
    "Identity",
    "Map",
    "MapBatches",
    "Rename",
    "Select",
    "Transform",
    "WithColumns",
]
