"""Aggregates of the user's own, over Arrow arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    All three are called once with no rows while the flow is built: their types, and those of the accumulator's fields,
    must not depend on the data. The functions keep nothing between calls.

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


@dataclass(frozen=True, slots=True)
class UserBound(Bound):
    """A `UserAggregate` of known types, and what it returns is checked."""

    user: UserAggregate
    accumulator: pa.DataType
    """A struct."""
    kind: pa.DataType

    @staticmethod
    def of_rows(name: str, user: UserAggregate, kind: pa.DataType) -> UserBound:
        """For values of ``kind``. Raises `PlanError` if the functions do not work on no rows."""
        return _bound(name, user, lambda: user.init(pa.array([], kind), np.zeros(0, np.int64), 0))

    @staticmethod
    def of_partials(name: str, user: UserAggregate, schema: pa.Schema) -> UserBound:
        """From the columns ``<name>.<field>``. Raises `PlanError` if there is none, or if they are of another one."""
        prefix = f"{name}."
        fields = [field.with_name(field.name[len(prefix) :]) for field in schema if field.name.startswith(prefix)]
        if not fields:
            raise PlanError(f"aggregate {name!r} expects partial results with columns {prefix!r}*, got {schema.names}")
        given = pa.array([], pa.struct(fields))
        bound = _bound(name, user, lambda: user.merge(given, np.zeros(0, np.int64), 0))
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
        return self._accumulators("init", flat(values), rows, len(values))

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        grouped = yield Ask(ids=True)
        return self._accumulators("init", flat(values), grouped.ids, grouped.groups)

    def combine(self, parts: list[Column]) -> Combining:
        accumulators = self._struct(parts)
        grouped = yield Ask(ids=True)
        return self._accumulators("merge", accumulators, grouped.ids, grouped.groups)

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        found = _call(self.name, self.user, "finish", self._struct(parts))
        if not isinstance(found, pa.Array) or not found.type.equals(self.kind) or len(found) != len(rows):
            raise self._wrong("finish", f"an array of {len(rows)} {self.kind}", _shape(found))
        return found

    def _struct(self, parts: Sequence[Column]) -> pa.StructArray:
        return pa.StructArray.from_arrays([flat(part) for part in parts], fields=list(self.accumulator))

    def _accumulators(self, function: str, column: pa.Array, groups: Any, n: int) -> list[Column]:
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


def _bound(name: str, user: UserAggregate, first: Any) -> UserBound:
    """Types from what the functions make of no rows."""
    try:
        accumulators = _as_struct(first())
        if not isinstance(accumulators, pa.StructArray) or not accumulators.type.num_fields:
            raise TypeError(f"accumulators must be a struct array with fields or a record batch, got {accumulators!r}")
        if any(pa.types.is_null(field.type) for field in accumulators.type):
            raise TypeError(f"give the fields of accumulators a type that is not null, got {accumulators.type}")
        merged = _as_struct(user.merge(accumulators, np.zeros(0, np.int64), 0))
        if not isinstance(merged, pa.StructArray) or not merged.type.equals(accumulators.type):
            raise TypeError(f"merge must return {accumulators.type} as came in, got {_shape(merged)}")
        results = user.finish(accumulators)
        if not isinstance(results, pa.Array):
            raise TypeError(f"finish must return an array, got {results!r}")
    except Exception as error:
        raise PlanError(
            f"aggregate {name!r}: {type(user).__name__} does not work on no rows, and its types are taken from what it "
            f"makes of none: {error}"
        ) from error
    return UserBound(name, user, accumulators.type, results.type)


def _call(name: str, user: UserAggregate, function: str, *args: Any) -> Any:
    try:
        return getattr(user, function)(*args)
    except Exception as error:
        raise UserCodeError(
            f"aggregate {name!r}: {type(user).__name__}.{function} raised {type(error).__name__}: {error}"
        ) from error


def _as_struct(found: Any) -> Any:
    return found.to_struct_array() if isinstance(found, pa.RecordBatch) else found


def _shape(found: Any) -> str:
    return f"{len(found)} of {found.type}" if isinstance(found, pa.Array) else repr(found)[:200]


__all__ = ["UserAggregate", "UserBound"]
