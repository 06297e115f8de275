"""For each kind of aggregate: which types it takes, in which type it keeps them, and its bound form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import pyarrow as pa

from rayflow.errors import PlanError
from rayflow.operators.list_partials import Collected, DistinctCount
from rayflow.operators.ordered_partials import Champion, Deviation, Edge
from rayflow.operators.partials import Bound, CountValues, Extreme, IntegerSum, Mean, SimpleSum
from rayflow.operators.sketches import DistinctEstimate, Quantiles
from rayflow.partition import check_key_type

Kind = Literal[
    "count",
    "sum",
    "mean",
    "min",
    "max",
    "first",
    "last",
    "stddev",
    "variance",
    "count_distinct",
    "approx_count_distinct",
    "quantile",
    "collect",
    "arg_min",
    "arg_max",
    "aggregate",
]

_DECIMAL128_DIGITS: Final = 38
_DECIMAL256_DIGITS: Final = 76
# Decimal sums are given so many more digits than their input, hence room for 10**10 rows.
_SPARE_DIGITS: Final = 10


@dataclass(frozen=True, slots=True)
class Options:
    """What an aggregate is told beside its columns."""

    ddof: int = 1
    levels: tuple[float, ...] = ()
    """Of quantiles, from 0 to 1."""
    as_list: bool = False
    limit: int = 0
    """Values that `collect` keeps."""


Types: TypeAlias = Sequence[pa.DataType]


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind."""

    parts: tuple[str, ...]
    """Partial columns whose types tell in which types the inputs are kept; none: the bound form needs no types."""
    keep: Callable[[str, pa.DataType], pa.DataType]
    """(what the aggregate is called, plain type of an input) -> the type in which it is kept. Raises `PlanError`."""
    build: Callable[[str, Types, Options], Bound]

    def kept_in(self, name: str, label: str, schema: pa.Schema) -> list[pa.DataType]:
        """Types from a schema of partial results; raises `PlanError` if the columns are not there."""
        kinds = []
        for part in self.parts:
            column = f"{name}.{part}"
            if column not in schema.names:
                raise PlanError(
                    f"aggregate {label} expects partial results with a column {column!r}, got {schema.names}; "
                    "the state or the upstream step belongs to another set of aggregates"
                )
            kind = schema.field(column).type
            kinds.append(kind.value_type if pa.types.is_large_list(kind) else kind)
        return kinds


def _anything(label: str, kind: pa.DataType) -> pa.DataType:
    return kind


def _ordered(label: str, kind: pa.DataType) -> pa.DataType:
    if pa.types.is_nested(kind) or pa.types.is_interval(kind):
        raise PlanError(f"aggregate {label} needs values that have an order, got {kind}")
    return kind


def _comparable(label: str, kind: pa.DataType) -> pa.DataType:
    try:
        check_key_type(label, kind)
    except Exception as error:
        raise PlanError(f"aggregate {label} needs values that can be told apart as keys can, got {kind}") from error
    return kind


def _number(label: str, kind: pa.DataType) -> pa.DataType:
    """The type in which sums are kept."""
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
    raise PlanError(f"aggregate {label} needs numbers, got {kind}; cast the column or choose another one")


def _count(name: str, kinds: Types, options: Options) -> Bound:
    return CountValues(name)


def _sum(name: str, kinds: Types, options: Options) -> SimpleSum | IntegerSum:
    return IntegerSum(name, kinds[0]) if pa.types.is_integer(kinds[0]) else SimpleSum(name, kinds[0])


def _mean(name: str, kinds: Types, options: Options) -> Bound:
    return Mean(name, _sum(name, kinds, options), CountValues(name))


def _extreme(largest: bool) -> Callable[[str, Types, Options], Bound]:
    return lambda name, kinds, options: Extreme(name, kinds[0], largest)


def _edge(latest: bool) -> Callable[[str, Types, Options], Bound]:
    return lambda name, kinds, options: Edge(name, kinds[0], latest)


def _champion(largest: bool) -> Callable[[str, Types, Options], Bound]:
    return lambda name, kinds, options: Champion(name, kinds[0], kinds[1], largest)


def _deviation(squared: bool) -> Callable[[str, Types, Options], Bound]:
    return lambda name, kinds, options: Deviation(name, options.ddof, squared)


RULES: Final[dict[str, Rule]] = {
    "count": Rule((), _anything, _count),
    "sum": Rule(("sum",), _number, _sum),
    "mean": Rule(("sum",), _number, _mean),
    "min": Rule(("value",), _ordered, _extreme(False)),
    "max": Rule(("value",), _ordered, _extreme(True)),
    "first": Rule(("value",), _ordered, _edge(False)),
    "last": Rule(("value",), _ordered, _edge(True)),
    "stddev": Rule((), _number, _deviation(False)),
    "variance": Rule((), _number, _deviation(True)),
    "count_distinct": Rule(("values",), _comparable, lambda name, kinds, _: DistinctCount(name, kinds[0])),
    "approx_count_distinct": Rule((), _comparable, lambda name, kinds, _: DistinctEstimate(name)),
    "quantile": Rule((), _number, lambda name, kinds, options: Quantiles(name, options.levels, options.as_list)),
    "collect": Rule(("values",), _ordered, lambda name, kinds, options: Collected(name, kinds[0], options.limit)),
    "arg_min": Rule(("value", "by"), _ordered, _champion(False)),
    "arg_max": Rule(("value", "by"), _ordered, _champion(True)),
}

__all__ = ["RULES", "Kind", "Options", "Rule"]
