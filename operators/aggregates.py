"""What to compute for a window or a key: `count`, `sum`, `mean`, `min`, `max`, `first`, `last`, `stddev`.

As in SQL, nulls are skipped: an aggregate over no values is null, a count is 0. The types of the results follow from
the schema of the input, so that a wrong column is found while the flow is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import pyarrow as pa

from rayflow.errors import PlanError
from rayflow.expressions import Expr, as_expr
from rayflow.operators.grouping import Column, plain, plain_type
from rayflow.operators.ordered_partials import Deviation, Edge
from rayflow.operators.partials import Bound, CountRows, CountValues, Extreme, IntegerSum, Mean, SimpleSum

Kind = Literal["count", "sum", "mean", "min", "max", "first", "last", "stddev"]
Input: TypeAlias = "str | Expr | Any"
"""A column name, an `Expr` or a `pyarrow.compute.Expression`."""

_DECIMAL128_DIGITS: Final = 38
_DECIMAL256_DIGITS: Final = 76
# Decimal sums are given so many more digits than their input, hence room for 10**10 rows.
_SPARE_DIGITS: Final = 10


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """One aggregate, not yet bound to a schema. Immutable and picklable; made by the functions of this module."""

    kind: Kind
    column: Input = None
    ddof: int = 1

    def __repr__(self) -> str:
        return f"{self.kind}({'' if self.column is None else repr(self.column)})"

    def evaluate(self, batch: pa.RecordBatch) -> Column | None:
        """The values to aggregate, decoded; None for ``count()``."""
        if self.column is None:
            return None
        if isinstance(self.column, str) and self.column in batch.schema.names:
            return plain(batch.column(self.column))
        return plain(as_expr(self.column).evaluate(batch))

    def bind(self, name: str, schema: pa.Schema) -> Bound:
        """For input rows of ``schema``. Raises `PlanError` for a missing column or a type that cannot be aggregated."""
        if self.column is None or (self.kind == "count" and isinstance(self.column, str)):
            if self.column is not None:
                self._check_column(name, schema)
            return self._build(name, pa.int64())
        if isinstance(self.column, str):
            self._check_column(name, schema)
            kind = schema.field(self.column).type
        else:
            kind = as_expr(self.column).result_type(schema)
        return self._build(name, self._partial_type(name, plain_type(kind)))

    def bind_partial(self, name: str, schema: pa.Schema) -> Bound:
        """For partial results with the columns of `Bound.parts`; raises `PlanError` if they are not there."""
        part = {"count": "", "stddev": "", "sum": "sum", "mean": "sum"}.get(self.kind, "value")
        column = f"{name}.{part}"
        if part and column not in schema.names:
            raise PlanError(
                f"aggregate {name}={self!r} expects partial results with a column {column!r}, got {schema.names}; "
                "the state or the upstream step belongs to another set of aggregates"
            )
        bound = self._build(name, schema.field(column).type if part else pa.int64())
        missing = [field.name for field in bound.parts if field.name not in schema.names]
        if missing:
            raise PlanError(f"aggregate {name}={self!r} expects partial columns {missing}, got {schema.names}")
        return bound

    def _check_column(self, name: str, schema: pa.Schema) -> None:
        if schema.names.count(self.column) != 1:
            raise PlanError(
                f"aggregate {name}={self!r} needs a column {self.column!r}, the input has {schema.names}; "
                "name one of them"
            )

    def _partial_type(self, name: str, kind: pa.DataType) -> pa.DataType:
        """The type in which values are kept, from the type of the input."""
        if self.kind == "count":
            return kind
        if self.kind in ("min", "max", "first", "last"):
            if pa.types.is_nested(kind) or pa.types.is_interval(kind):
                raise PlanError(f"aggregate {name}={self!r} needs values that have an order, got {kind}")
            return kind
        if pa.types.is_floating(kind) or pa.types.is_null(kind):
            return pa.float64()
        if pa.types.is_unsigned_integer(kind):
            return pa.uint64()
        if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
            return pa.int64()
        if pa.types.is_decimal(kind):
            if kind.precision + _SPARE_DIGITS <= _DECIMAL128_DIGITS:
                return pa.decimal128(_DECIMAL128_DIGITS, kind.scale)
            if kind.precision + _SPARE_DIGITS <= _DECIMAL256_DIGITS:
                return pa.decimal256(_DECIMAL256_DIGITS, kind.scale)
        raise PlanError(f"aggregate {name}={self!r} needs numbers, got {kind}; cast the column or choose another one")

    def _build(self, name: str, kind: pa.DataType) -> Bound:
        match self.kind:
            case "count":
                return CountRows(name) if self.column is None else CountValues(name)
            case "sum":
                return _sum(name, kind)
            case "mean":
                return Mean(name, _sum(name, kind), CountValues(name))
            case "min" | "max":
                return Extreme(name, kind, self.kind == "max")
            case "first" | "last":
                return Edge(name, kind, self.kind == "last")
            case "stddev":
                return Deviation(name, self.ddof)


def _sum(name: str, kind: pa.DataType) -> SimpleSum | IntegerSum:
    return IntegerSum(name, kind) if pa.types.is_integer(kind) else SimpleSum(name, kind)


def count(column: Input = None) -> Aggregate:
    """Number of rows, or of the values of ``column`` that are not null; int64."""
    return Aggregate("count", column)


def sum(column: Input) -> Aggregate:
    """Sum; null if there is no value.

    Signed integers and booleans give int64, unsigned ones uint64, and a sum that does not fit raises `DataError`,
    whatever the order of the rows. Floats give float64. decimal(p, s) gives decimal128(38, s), or decimal256(76, s)
    if p > 28.
    """
    return Aggregate("sum", column)


def mean(column: Input) -> Aggregate:
    """Arithmetic mean in float64; null if there is no value."""
    return Aggregate("mean", column)


def min(column: Input) -> Aggregate:
    """Smallest value, of the type of the column; null if there is none. NaN is larger than every number."""
    return Aggregate("min", column)


def max(column: Input) -> Aggregate:
    """Largest value, of the type of the column; null if there is none. NaN is larger than every number."""
    return Aggregate("max", column)


def first(column: Input) -> Aggregate:
    """The value that is not null with the earliest event time; the smallest one if several share that microsecond."""
    return Aggregate("first", column)


def last(column: Input) -> Aggregate:
    """The value that is not null with the latest event time; the largest one if several share that microsecond."""
    return Aggregate("last", column)


def stddev(column: Input, *, ddof: int = 1) -> Aggregate:
    """Standard deviation in float64: of a sample by default, as SQL's ``stddev``; with ``ddof=0`` of a population.

    Null for groups of ``ddof`` values or fewer.
    """
    if ddof < 0:
        raise PlanError(f"stddev(ddof) must not be negative, got {ddof}")
    return Aggregate("stddev", column, ddof)


__all__ = ["Aggregate", "count", "first", "last", "max", "mean", "min", "stddev", "sum"]
