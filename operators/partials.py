"""Aggregates bound to a type: partial results that can be merged in any order and grouping.

For every kind: ``finalise(combine(singles(rows)))`` is the aggregate, and combine is associative and commutative
(sums of floats up to rounding). Partial columns are named ``<aggregate>.<part>`` and are ordinary Arrow columns, so
that whoever opens a checkpoint can read them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import DataError
from rayflow.operators.grouping import Ask, Column, Combining, flat

_LOW = 0xFFFFFFFF
_SIGN = 0x80000000


@dataclass(frozen=True, slots=True)
class Bound(ABC):
    """One aggregate of a step, of known types."""

    name: str

    @property
    @abstractmethod
    def parts(self) -> tuple[pa.Field, ...]:
        """Columns of a partial result."""

    @property
    @abstractmethod
    def result_type(self) -> pa.DataType: ...

    @abstractmethod
    def singles(self, values: Column, times_us: Column) -> list[Column]:
        """Every row as a partial result of its own."""

    @abstractmethod
    def combine(self, parts: list[Column]) -> Combining:
        """Merge partial results by group."""

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        """Partial results of the rows by group; the same as combining the singles."""
        return self.combine(self.singles(values, times_us))

    @abstractmethod
    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        """Results; ``rows`` is the number of rows of each group. Raises `DataError` if one does not fit its type."""

    def _field(self, part: str, kind: pa.DataType) -> pa.Field:
        return pa.field(f"{self.name}.{part}", kind)


@dataclass(frozen=True, slots=True)
class CountRows(Bound):
    """Rows of a group, from the row count that every partial result carries anyway."""

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return ()

    @property
    def result_type(self) -> pa.DataType:
        return pa.int64()

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        return []

    def combine(self, parts: list[Column]) -> Combining:
        yield Ask()
        return []

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        return rows


@dataclass(frozen=True, slots=True)
class CountValues(Bound):
    """Values that are not null."""

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("count", pa.int64()),)

    @property
    def result_type(self) -> pa.DataType:
        return pa.int64()

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        return [values.is_valid().cast(pa.int64())]

    def combine(self, parts: list[Column]) -> Combining:
        grouped = yield Ask(((parts[0], "sum"),))
        return [grouped.results[0]]

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        grouped = yield Ask(((values, "count"),))
        return [grouped.results[0]]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        return flat(parts[0])


@dataclass(frozen=True, slots=True)
class SimpleSum(Bound):
    """Sum of floats (in float64) or decimals (in a type so wide that 10**10 rows fit)."""

    kind: pa.DataType

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("sum", self.kind),)

    @property
    def result_type(self) -> pa.DataType:
        return self.kind

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        return [values if values.type.equals(self.kind) else values.cast(self.kind)]

    def combine(self, parts: list[Column]) -> Combining:
        grouped = yield Ask(((parts[0], "sum"),))
        return [grouped.results[0]]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        return flat(parts[0])

    def as_float(self, parts: list[Column]) -> Any:
        return _floats(parts[0])


@dataclass(frozen=True, slots=True)
class IntegerSum(Bound):
    """Exact sum of integers: ``sum + carry * 2**64``, so that overflow is found whatever the order of the rows.

    Arrow's hash_sum wraps silently. It is used as long as ``max(|min|, |max|) * rows`` proves that no group can wrap
    (0.013 ms for 65,536 rows); otherwise the halves of 32 bits are summed apart.
    """

    kind: pa.DataType
    """int64 or uint64."""

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("sum", self.kind), self._field("carry", pa.int32()))

    @property
    def result_type(self) -> pa.DataType:
        return self.kind

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        wide = values if values.type.equals(self.kind) else values.cast(self.kind)
        return [wide, pa.array(np.zeros(len(wide), np.int32))]

    def combine(self, parts: list[Column]) -> Combining:
        values, carries = parts
        if self._cannot_wrap(values):
            if _all_zero(carries):
                grouped = yield Ask(((values, "sum"),))
                return [grouped.results[0], pa.array(np.zeros(grouped.groups, np.int32))]
            grouped = yield Ask(((values, "sum"), (carries, "sum")))
            return [grouped.results[0], grouped.results[1].cast(pa.int32())]
        # Scalars of the same type: uint64 with a Python int would be cast to int64, which does not hold it.
        shift, mask = pa.scalar(32, self.kind), pa.scalar(_LOW, self.kind)
        halves = pc.shift_right(values, shift), pc.bit_wise_and(values, mask)
        grouped = yield Ask(((halves[0], "sum"), (halves[1], "sum"), (carries, "sum")))
        return self.joined(*grouped.results)

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        if not _all_zero(parts[1]):
            raise DataError(
                f"sum {self.name!r} does not fit in {self.kind}; sum a float64 or a decimal instead, for example "
                'col("x").cast("float64")'
            )
        return flat(parts[0])

    def as_float(self, parts: list[Column]) -> Any:
        return _floats(parts[0]) + _floats(parts[1]) * 2.0**64

    def _cannot_wrap(self, values: Column) -> bool:
        extremes = pc.min_max(values)
        low, high = extremes["min"].as_py(), extremes["max"].as_py()
        if low is None:
            return True
        bound = 2**63 if pa.types.is_signed_integer(self.kind) else 2**64
        return bool(max(-low, high) * len(values) < bound)

    def joined(self, high_sum: pa.Array, low_sum: pa.Array, carry_sum: pa.Array) -> list[pa.Array]:
        """From sums of the high and low 32 bits to (sum modulo 2**64, carry)."""
        missing = low_sum.is_null().to_numpy(zero_copy_only=False)
        low = low_sum.fill_null(0).cast(pa.int64()).to_numpy()
        high = high_sum.fill_null(0).cast(pa.int64()).to_numpy() + (low >> 32)
        word = high & _LOW
        if pa.types.is_signed_integer(self.kind):
            word = (word ^ _SIGN) - _SIGN
            total = (word << 32) | (low & _LOW)
        else:
            total = (word.astype(np.uint64) << np.uint64(32)) | (low & _LOW).astype(np.uint64)
        carry = ((high - word) >> 32) + carry_sum.to_numpy()
        return [pa.array(total, self.kind, mask=missing), pa.array(carry.astype(np.int32))]


@dataclass(frozen=True, slots=True)
class Mean(Bound):
    """Mean in float64, from the exact sum for integers and decimals."""

    total: SimpleSum | IntegerSum
    count: CountValues

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (*self.total.parts, *self.count.parts)

    @property
    def result_type(self) -> pa.DataType:
        return pa.float64()

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        return [*self.total.singles(values, times_us), *self.count.singles(values, times_us)]

    def combine(self, parts: list[Column]) -> Combining:
        return _both(self.total.combine(parts[:-1]), self.count.combine(parts[-1:]))

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        return _both(self.total.from_rows(values, times_us), self.count.from_rows(values, times_us))

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        counts = _floats(parts[-1])
        with np.errstate(invalid="ignore", divide="ignore"):
            return pa.array(self.total.as_float(parts[:-1]) / counts, mask=counts == 0)


@dataclass(frozen=True, slots=True)
class Extreme(Bound):
    """Smallest or largest value. NaN counts as larger than every number, as in DuckDB and PostgreSQL."""

    kind: pa.DataType
    largest: bool

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("value", self.kind),)

    @property
    def result_type(self) -> pa.DataType:
        return self.kind

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        return [values]

    def combine(self, parts: list[Column]) -> Combining:
        return extreme(parts[0], largest=self.largest)

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        found = flat(parts[0])
        if pa.types.is_float32(self.kind) or pa.types.is_float64(self.kind):
            # Which of two zeros was kept depends on how rows were cut into batches.
            return pc.add(found, pa.scalar(0.0, self.kind))
        return found


def extreme(values: Column, *, largest: bool) -> Combining:
    """Smallest or largest value of each group, nulls skipped."""
    kind, function = values.type, "max" if largest else "min"
    if pa.types.is_duration(kind):
        grouped = yield Ask(((values.cast(pa.int64()), function),))
        return [grouped.results[0].cast(kind)]
    # Arrow skips NaN, which would make a group of NaN alone an infinity; rare, so only looked for here.
    nan = pc.is_nan(values).fill_null(False) if pa.types.is_floating(kind) else None
    if nan is None or not pc.any(nan).as_py():
        grouped = yield Ask(((values, function),))
        return [grouped.results[0]]
    numbers = pc.if_else(nan, pa.scalar(None, kind), values)
    grouped = yield Ask(((numbers, function), (nan, "max")))
    found, has_nan = grouped.results
    replaced = has_nan if largest else pc.and_(has_nan, found.is_null())
    return [pc.if_else(replaced, pa.scalar(float("nan"), kind), found)]


def _both(first: Combining, second: Combining) -> Combining:
    """Two combinings as one."""
    one, two = next(first), next(second)
    grouped = yield Ask(one.kernels + two.kernels, one.ids or two.ids)
    at = len(one.kernels)
    columns: list[pa.Array] = []
    for combining, results in ((first, grouped.results[:at]), (second, grouped.results[at:])):
        try:
            combining.send(type(grouped)(results, grouped.groups, grouped.ids))
        except StopIteration as stop:
            columns.extend(stop.value)
    return columns


def _all_zero(values: Column) -> bool:
    extremes = pc.min_max(values)
    return not extremes["min"].as_py() and not extremes["max"].as_py()


def _floats(values: Column) -> Any:
    """float64 of numbers or decimals; null is 0."""
    return flat(values).cast(pa.float64(), safe=False).fill_null(0.0).to_numpy()


__all__ = ["Bound", "CountRows", "CountValues", "Extreme", "IntegerSum", "Mean", "SimpleSum", "extreme"]
