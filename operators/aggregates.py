"""What to compute for a window or a key.

As in SQL, nulls are skipped: an aggregate over no values is null, a count is 0. With ``where=`` only the rows count for
which the condition is true. The types of the results follow from the schema of the input, so that a wrong column is
found while the flow is built. `docs/aggregates.md` has all of them in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import PlanError
from rayflow.expressions import Expr, as_expr
from rayflow.operators.aggregate_kinds import RULES, Kind, Options
from rayflow.operators.grouping import Column, flat, plain, plain_type
from rayflow.operators.partials import Bound, CountRows
from rayflow.operators.user_aggregate import COUNTED, ConditionalBound, UserAggregate, UserBound

Input: TypeAlias = "str | Expr | Any"
"""A column name, an `Expr` or a `pyarrow.compute.Expression`."""

_NO_OPTIONS: Final = Options()


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """One aggregate, not yet bound to a schema. Immutable and picklable; made by the functions of this module."""

    kind: Kind
    inputs: tuple[Input, ...] = ()
    where: Input = None
    options: Options = _NO_OPTIONS
    user: UserAggregate | None = None

    def __repr__(self) -> str:
        shown = [repr(column) for column in self.inputs]
        if self.user is not None:
            shown.insert(0, type(self.user).__name__)
        if self.kind == "quantile":
            shown.append(repr(list(self.options.levels)) if self.options.as_list else repr(self.options.levels[0]))
        if self.where is not None:
            shown.append(f"where={self.where!r}")
        return f"{self.kind}({', '.join(shown)})"

    @property
    def reads(self) -> tuple[Input, ...]:
        """All it needs of a row."""
        return self.inputs if self.where is None else (*self.inputs, self.where)

    def evaluate(self, batch: pa.RecordBatch) -> Column | None:
        """The values to aggregate, decoded, null where ``where`` is not true; structs of them if there are several
        inputs. None for ``count()``."""
        wanted = None if self.where is None else _values(self.where, batch)
        if not self.inputs:
            return None if wanted is None else pc.if_else(wanted, True, pa.scalar(None, pa.bool_()))
        columns = [_values(column, batch) for column in self.inputs]
        if self.user is not None and wanted is not None:
            values = columns[0]
            if len(columns) > 1:
                values = pa.StructArray.from_arrays([flat(column) for column in columns], self._names())
            return pa.StructArray.from_arrays([flat(wanted), flat(values)], ["where", "value"])
        if wanted is not None:
            columns[0] = pc.if_else(wanted, columns[0], pa.scalar(None, columns[0].type))
        if len(columns) == 1:
            return columns[0]
        return pa.StructArray.from_arrays([flat(column) for column in columns], self._names())

    def bind(self, name: str, schema: pa.Schema) -> Bound:
        """For input rows of ``schema``. Raises `PlanError` for a missing column or a type that cannot be aggregated."""
        label = f"{name}={self!r}"
        if self.where is not None:
            found = self._type(label, self.where, schema)
            if not (pa.types.is_boolean(found) or pa.types.is_null(found)):
                raise PlanError(f"aggregate {label} needs a condition as where=, which is bool, got {found}")
        kinds = [self._type(label, column, schema) for column in self.inputs]
        if self.user is not None:
            several = pa.struct(list(zip(self._names(), kinds, strict=True)))
            user = UserBound.of_rows(name, self.user, kinds[0] if len(kinds) == 1 else several)
            if self.where is None:
                return user
            if user.accumulator.get_field_index(COUNTED) >= 0:
                raise PlanError(f"aggregate {label} with where= needs the field {COUNTED!r} itself; rename yours")
            return ConditionalBound(name, user)
        if not self.reads:
            return CountRows(name)
        rule = RULES[self.kind]
        return rule.build(name, [rule.keep(label, kind) for kind in kinds], self.options)

    def bind_partial(self, name: str, schema: pa.Schema) -> Bound:
        """For partial results with the columns of `Bound.parts`; raises `PlanError` if they are not there."""
        label = f"{name}={self!r}"
        if self.user is not None:
            if self.where is None:
                return UserBound.of_partials(name, self.user, schema)
            counted = schema.get_field_index(f"{name}.{COUNTED}")
            if counted < 0:
                raise PlanError(f"aggregate {label} expects a partial column {name}.{COUNTED}, got {schema.names}")
            return ConditionalBound(name, UserBound.of_partials(name, self.user, schema.remove(counted)))
        if not self.reads:
            return CountRows(name)
        rule = RULES[self.kind]
        bound = rule.build(name, rule.kept_in(name, label, schema), self.options)
        missing = [field.name for field in bound.parts if field.name not in schema.names]
        if missing:
            raise PlanError(f"aggregate {label} expects partial columns {missing}, got {schema.names}")
        return bound

    def _names(self) -> list[str]:
        """Of the fields of a struct of all inputs: of columns their own, of expressions their number."""
        return [column if isinstance(column, str) else str(i) for i, column in enumerate(self.inputs)]

    def _type(self, label: str, column: Input, schema: pa.Schema) -> pa.DataType:
        if not isinstance(column, str):
            return plain_type(as_expr(column).result_type(schema))
        if schema.names.count(column) != 1:
            raise PlanError(
                f"aggregate {label} needs a column {column!r}, the input has {schema.names}; name one of them"
            )
        return plain_type(schema.field(column).type)


def _values(column: Input, batch: pa.RecordBatch) -> Column:
    if isinstance(column, str) and column in batch.schema.names:
        return plain(batch.column(column))
    return plain(as_expr(column).evaluate(batch))


def count(column: Input = None, *, where: Input = None) -> Aggregate:
    """Number of rows, or of the values of ``column`` that are not null; int64."""
    return Aggregate("count", () if column is None else (column,), where)


def sum(column: Input, *, where: Input = None) -> Aggregate:
    """Sum; null if there is no value.

    Signed integers and booleans give int64, unsigned ones uint64, and a sum that does not fit raises `DataError`,
    whatever the order of the rows. Floats give float64. decimal(p, s) gives decimal128(38, s), or decimal256(76, s)
    if p > 28.
    """
    return Aggregate("sum", (column,), where)


def mean(column: Input, *, where: Input = None) -> Aggregate:
    """Arithmetic mean in float64; null if there is no value."""
    return Aggregate("mean", (column,), where)


def min(column: Input, *, where: Input = None) -> Aggregate:
    """Smallest value, of the type of the column; null if there is none. NaN is larger than every number."""
    return Aggregate("min", (column,), where)


def max(column: Input, *, where: Input = None) -> Aggregate:
    """Largest value, of the type of the column; null if there is none. NaN is larger than every number."""
    return Aggregate("max", (column,), where)


def first(column: Input, *, where: Input = None) -> Aggregate:
    """The value that is not null with the earliest event time; the smallest one if several share that microsecond."""
    return Aggregate("first", (column,), where)


def last(column: Input, *, where: Input = None) -> Aggregate:
    """The value that is not null with the latest event time; the largest one if several share that microsecond."""
    return Aggregate("last", (column,), where)


def arg_min(column: Input, by: Input, *, where: Input = None) -> Aggregate:
    """The value of ``column`` in the row with the smallest ``by``; rows with a null in either are skipped.

    The smallest value if several rows have that ``by``. So two of them with one ``by`` may come from different rows.
    """
    return Aggregate("arg_min", (column, by), where)


def arg_max(column: Input, by: Input, *, where: Input = None) -> Aggregate:
    """The value of ``column`` in the row with the largest ``by``; rows with a null in either are skipped.

    The largest value if several rows have that ``by``. NaN is larger than every number.
    """
    return Aggregate("arg_max", (column, by), where)


def stddev(column: Input, *, ddof: int = 1, where: Input = None) -> Aggregate:
    """Standard deviation in float64: of a sample by default, as SQL's ``stddev``; with ``ddof=0`` of a population.

    Null for groups of ``ddof`` values or fewer.
    """
    return Aggregate("stddev", (column,), where, Options(ddof=_ddof("stddev", ddof)))


def variance(column: Input, *, ddof: int = 1, where: Input = None) -> Aggregate:
    """The square of `stddev`, as SQL's ``var_samp``; with ``ddof=0`` ``var_pop``."""
    return Aggregate("variance", (column,), where, Options(ddof=_ddof("variance", ddof)))


def count_distinct(column: Input, *, where: Input = None) -> Aggregate:
    """Number of different values that are not null, exactly; int64. All NaN are one value, and so are 0.0 and -0.0.

    All of these values are kept until the window closes: with very many of them see `approx_count_distinct`.
    """
    return Aggregate("count_distinct", (column,), where)


def approx_count_distinct(column: Input, *, where: Input = None) -> Aggregate:
    """Estimate of `count_distinct` that keeps 16 KiB at most (HyperLogLog); int64.

    The standard error is 1.6 % of the true number, and two of three results are closer than that; it is smaller for
    fewer than some thousand. The same values give the same estimate in any order and on any number of subtasks.
    """
    return Aggregate("approx_count_distinct", (column,), where)


def quantile(column: Input, q: float | Sequence[float], *, where: Input = None) -> Aggregate:
    """The value below which the share ``q`` (from 0 to 1) of the values lies, in float64; for a list of shares a list.

    Between two values it is interpolated, as by NumPy and DuckDB's ``quantile_cont``. It is approximate (DDSketch): off
    by 1 % at most of the larger magnitude of the two; the smallest and the largest value are exact. NaN is larger than
    every number; null if there is no value.
    """
    as_list = not isinstance(q, int | float)
    levels = tuple(float(level) for level in q) if not isinstance(q, int | float) else (float(q),)
    if not levels or not all(0.0 <= level <= 1.0 for level in levels):
        raise PlanError(f"quantile(q) must be a number from 0 to 1 or a list of such, got {q!r}")
    return Aggregate("quantile", (column,), where, Options(levels=levels, as_list=as_list))


def median(column: Input, *, where: Input = None) -> Aggregate:
    """`quantile` of 0.5, hence within 1 %: null if there is no value."""
    return quantile(column, 0.5, where=where)


def collect(column: Input, *, max: int, where: Input = None) -> Aggregate:
    """The values in order of their event time as a list; of more than ``max`` the earliest; null if there is none.

    Values of one microsecond are in their own order, so the list does not depend on how rows arrive.
    """
    if isinstance(max, bool) or not isinstance(max, int) or max < 1:
        raise PlanError(f"collect(max) must be a number of values, 1 or more, got {max!r}")
    return Aggregate("collect", (column,), where, Options(limit=max))


def aggregate(user: UserAggregate, *columns: Input, where: Input = None) -> Aggregate:
    """An aggregate of your own over one column or, as structs, over several; nulls are not skipped. See
    `UserAggregate`. With ``where=`` it sees only the rows for which the condition is true, and where there is none the
    result is null."""
    if not isinstance(user, UserAggregate):
        raise PlanError(f"aggregate() needs an instance of rf.UserAggregate, got {user!r}")
    if not columns:
        raise PlanError(f"aggregate({type(user).__name__}) needs a column to work on, got none")
    return Aggregate("aggregate", columns, where, user=user)


def _ddof(name: str, ddof: int) -> int:
    if ddof < 0:
        raise PlanError(f"{name}(ddof) must not be negative, got {ddof}")
    return ddof


__all__ = [
    "Aggregate",
    "aggregate",
    "approx_count_distinct",
    "arg_max",
    "arg_min",
    "collect",
    "count",
    "count_distinct",
    "first",
    "last",
    "max",
    "mean",
    "median",
    "min",
    "quantile",
    "stddev",
    "sum",
    "variance",
]
