"""Aggregates of the user's own, over Arrow arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.errors import PlanError, UserCodeError
from rayflow.operators.grouping import Ask, Column, Combining, Int64Array, flat
from rayflow.operators.partials import Bound


class UserAggregate(ABC):
    """An aggregate in three functions over whole columns, never row by row; give an instance to `rayflow.aggregate`.

    An accumulator is a row of a struct array; its fields are columns of checkpoints, so they may have every Arrow type,
    and nothing is pickled. ``groups`` says to which group each row belongs, from 0 to n - 1, and every group has a row.
    Which rows come together in one call is not defined: `merge` must be associative and commutative, and merging what
    `init` gives for single rows must be what it gives for all of them at once.

    The types of accumulators and results must not depend on the data: they are taken from a call with one row of zero
    (or of an empty string or list) while the flow is built. The functions are never called without a row, and they keep
    nothing between calls.

    ```python
    class GeometricMean(rf.UserAggregate):
        def init(self, values, groups, n):
            logs = np.log(values.to_numpy(zero_copy_only=False).astype(float))
            sums, counts = np.bincount(groups, logs, n), np.bincount(groups, minlength=n)
            return pa.StructArray.from_arrays([pa.array(sums), pa.array(counts)], ["sum", "count"])

        def merge(self, accumulators, groups, n):
            parts = [np.bincount(groups, part.to_numpy(), n) for part in accumulators.flatten()]
            return pa.StructArray.from_arrays([pa.array(parts[0]), pa.array(parts[1].astype(int))], ["sum", "count"])

        def finish(self, accumulators):
            sums, counts = (part.to_numpy() for part in accumulators.flatten())
            return pa.array(np.exp(sums / np.maximum(counts, 1)))
    ```
    """

    @abstractmethod
    def init(self, values: pa.Array, groups: Int64Array, n: int) -> pa.StructArray | pa.RecordBatch:
        """n accumulators from rows. ``values`` has their values, nulls too; structs if there are several columns."""

    @abstractmethod
    def merge(self, accumulators: pa.StructArray, groups: Int64Array, n: int) -> pa.StructArray | pa.RecordBatch:
        """n accumulators from others, of which each group has one or more."""

    @abstractmethod
    def finish(self, accumulators: pa.StructArray) -> pa.Array:
        """The result of each accumulator; it may be null."""


COUNTED: Final = "counted_rows"
"""Partial column of an aggregate with a condition."""


@dataclass(frozen=True, slots=True)
class UserBound(Bound):
    """A `UserAggregate` of known types, and what it returns is checked."""

    user: UserAggregate
    accumulator: pa.DataType
    """A struct."""
    kind: pa.DataType

    @staticmethod
    def of_rows(name: str, user: UserAggregate, kind: pa.DataType) -> UserBound:
        """For values of ``kind``. Raises `PlanError` if the functions do not work on a row of zero."""
        return _bound(name, user, lambda: user.init(_zero(kind), np.zeros(1, np.int64), 1))

    @staticmethod
    def of_partials(name: str, user: UserAggregate, schema: pa.Schema) -> UserBound:
        """From the columns ``<name>.<field>``. Raises `PlanError` if there is none, or if they are of another one."""
        prefix = f"{name}."
        fields = [field.with_name(field.name[len(prefix) :]) for field in schema if field.name.startswith(prefix)]
        if not fields:
            raise PlanError(f"aggregate {name!r} expects partial results with columns {prefix!r}*, got {schema.names}")
        given = _zero(pa.struct(fields))
        bound = _bound(name, user, lambda: user.merge(given, np.zeros(1, np.int64), 1))
        if not bound.accumulator.equals(given.type):
            raise PlanError(
                f"aggregate {name!r}: merge of {type(user).__name__} makes {bound.accumulator} of the partial results "
                f"{given.type}; return the fields and types that came in"
            )
        return bound

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return tuple(self._field(field.name, field.type) for field in self.accumulator)

    @property
    def result_type(self) -> pa.DataType:
        return self.kind

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        rows = np.arange(len(values), dtype=np.int64)
        return self.accumulators_of("init", flat(values), rows, len(values))

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        grouped = yield Ask(ids=True)
        return self.accumulators_of("init", flat(values), grouped.ids, grouped.groups)

    def combine(self, parts: list[Column]) -> Combining:
        accumulators = self.struct_of(parts)
        grouped = yield Ask(ids=True)
        return self.accumulators_of("merge", accumulators, grouped.ids, grouped.groups)

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        if len(rows) == 0:
            return pa.array([], self.kind)
        found = _call(self.name, self.user, "finish", self.struct_of(parts))
        if not isinstance(found, pa.Array) or not found.type.equals(self.kind) or len(found) != len(rows):
            raise self._wrong("finish", f"an array of {len(rows)} {self.kind}", _shape(found))
        return found

    def struct_of(self, parts: Sequence[Column]) -> pa.StructArray:
        return pa.StructArray.from_arrays([flat(part) for part in parts], fields=list(self.accumulator))

    def accumulators_of(self, function: str, column: pa.Array, groups: Any, n: int) -> list[Column]:
        if n == 0:
            return [pa.array([], field.type) for field in self.accumulator]
        found = _as_struct(_call(self.name, self.user, function, column, groups, n))
        if not isinstance(found, pa.StructArray) or not found.type.equals(self.accumulator) or len(found) != n:
            raise self._wrong(function, f"{n} of {self.accumulator}", _shape(found))
        if found.null_count:
            raise self._wrong(function, "accumulators that are not null (their fields may be)", _shape(found))
        return list(found.flatten())

    def _wrong(self, function: str, expected: str, got: str) -> UserCodeError:
        return UserCodeError(
            f"aggregate {self.name!r}: {type(self.user).__name__}.{function} must return {expected}, got {got}"
        )


@dataclass(frozen=True, slots=True)
class ConditionalBound(Bound):
    """A `UserAggregate` over the rows for which a condition is true, and over none of the others: the functions never
    see those, nor groups without a row. Values are structs of (condition, value).

    The partial result has one column more, the number of rows that count; where it is 0 the others are null.
    """

    inner: UserBound

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (*self.inner.parts, self._field(COUNTED, pa.int64()))

    @property
    def result_type(self) -> pa.DataType:
        return self.inner.result_type

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        return self._of_rows(values, np.arange(len(values), dtype=np.int64), len(values))

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        grouped = yield Ask(ids=True)
        assert grouped.ids is not None
        return self._of_rows(values, grouped.ids, grouped.groups)

    def combine(self, parts: list[Column]) -> Combining:
        grouped = yield Ask(ids=True)
        assert grouped.ids is not None
        counts = flat(parts[-1]).to_numpy()
        rows = np.flatnonzero(counts)
        some = pa.array(rows)
        accumulators = self.inner.struct_of([flat(part).take(some) for part in parts[:-1]])
        return self._scattered("merge", accumulators, grouped.ids[rows], counts[rows], grouped.groups)

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        """Null where no row counts."""
        counted = np.flatnonzero(flat(parts[-1]).to_numpy())
        some = pa.array(counted)
        found = self.inner.finalise([flat(part).take(some) for part in parts[:-1]], rows.take(some))
        return _spread_out([found], counted, len(rows))[0]

    def _of_rows(self, values: Column, ids: Int64Array, groups: int) -> list[Column]:
        wanted, column = flat(values).flatten()
        rows = np.flatnonzero(wanted.fill_null(False).to_numpy(zero_copy_only=False))
        ones = np.ones(len(rows), np.int64)
        return self._scattered("init", column.take(pa.array(rows)), ids[rows], ones, groups)

    def _scattered(
        self, function: str, column: pa.Array, ids: Int64Array, counts: Int64Array, groups: int
    ) -> list[Column]:
        present, compact = np.unique(ids, return_inverse=True)
        found = self.inner.accumulators_of(function, column, compact, len(present))
        totals = np.zeros(groups, np.int64)
        np.add.at(totals, ids, counts)
        return [*_spread_out(found, present, groups), pa.array(totals)]


def _spread_out(columns: Sequence[Column], places: Int64Array, rows: int) -> list[pa.Array]:
    """So many rows, in which row i of the columns stands at ``places[i]``, and null elsewhere."""
    at = np.full(rows, -1, np.int64)
    at[places] = np.arange(len(places))
    chosen = pa.array(at, mask=at < 0)
    return [flat(column).take(chosen) for column in columns]


def _bound(name: str, user: UserAggregate, first: Any) -> UserBound:
    """Types from what the functions make of one row. Not of none: NumPy's bincount changes its type then."""
    try:
        with np.errstate(all="ignore"):
            accumulators = _as_struct(first())
            if not isinstance(accumulators, pa.StructArray) or not accumulators.type.num_fields:
                raise TypeError(f"accumulators must be structs with fields, or a record batch, got {accumulators!r}")
            if any(pa.types.is_null(field.type) for field in accumulators.type):
                raise TypeError(f"give the fields of accumulators a type that is not null, got {accumulators.type}")
            merged = _as_struct(user.merge(accumulators, np.zeros(1, np.int64), 1))
            if not isinstance(merged, pa.StructArray) or not merged.type.equals(accumulators.type):
                raise TypeError(f"merge must return {accumulators.type} as came in, got {_shape(merged)}")
            results = user.finish(accumulators)
            if not isinstance(results, pa.Array):
                raise TypeError(f"finish must return an array, got {results!r}")
    except Exception as error:
        raise PlanError(
            f"aggregate {name!r}: {type(user).__name__} does not work on a row of zero, and its types are taken "
            f"from that: {error}"
        ) from error
    return UserBound(name, user, accumulators.type, results.type)


def _call(name: str, user: UserAggregate, function: str, *args: Any) -> Any:
    try:
        return getattr(user, function)(*args)
    except Exception as error:
        raise UserCodeError(
            f"aggregate {name!r}: {type(user).__name__}.{function} raised {type(error).__name__}: {error}"
        ) from error


def _zero(kind: pa.DataType) -> pa.Array:
    """One value of the type that is not null, where there is such a value."""
    if pa.types.is_struct(kind):
        return pa.StructArray.from_arrays([_zero(field.type) for field in kind], fields=list(kind))
    width = kind.byte_width if pa.types.is_fixed_size_binary(kind) else 0
    candidates: tuple[Any, ...] = (0, False, "", bytes(width), [])
    for value in candidates:
        with suppress(pa.ArrowException, TypeError, ValueError):
            return pa.array([value], kind)
    return pa.nulls(1, kind)


def _as_struct(found: Any) -> Any:
    return found.to_struct_array() if isinstance(found, pa.RecordBatch) else found


def _shape(found: Any) -> str:
    return f"{len(found)} of {found.type}" if isinstance(found, pa.Array) else repr(found)[:200]


__all__ = ["COUNTED", "ConditionalBound", "UserAggregate", "UserBound"]
