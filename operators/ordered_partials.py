"""Aggregates that need more than one pass over a group: the value of its first, last, lowest or highest row, and how
far values lie apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Ask, Column, Combining, Grouped, Int64Array, finish, flat, group
from rayflow.operators.partials import Bound, extreme


@dataclass(frozen=True, slots=True)
class Edge(Bound):
    """The value with the earliest or latest event time, nulls skipped.

    Among values of the same microsecond first takes the smallest and last the largest: the result does not depend on
    the order in which rows arrive.
    """

    kind: pa.DataType
    latest: bool

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("value", self.kind), self._field("time_us", pa.int64()))

    @property
    def result_type(self) -> pa.DataType:
        return self.kind

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        if values.null_count == 0:
            return [values, times_us]
        return [values, pc.if_else(values.is_valid(), times_us, pa.scalar(None, pa.int64()))]

    def combine(self, parts: list[Column]) -> Combining:
        values, times = flat(parts[0]), flat(parts[1])
        grouped = yield Ask(((times, "max" if self.latest else "min"),), ids=True)
        best, ids = grouped.results[0], pa.array(_ids(grouped))
        tied = pc.equal(times, best.take(ids))
        return [_winners(values, ids, tied, grouped.groups, largest=self.latest), best]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        return flat(parts[0])


@dataclass(frozen=True, slots=True)
class Champion(Bound):
    """The value of the row in which another column, ``by``, is smallest or largest; rows with a null in either are
    skipped.

    Among rows that tie in ``by`` the smallest value is taken by the smallest, the largest by the largest. NaN is larger
    than every number.
    """

    kind: pa.DataType
    by: pa.DataType
    largest: bool

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("value", self.kind), self._field("by", self.by))

    @property
    def result_type(self) -> pa.DataType:
        return self.kind

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        """``values`` are structs of (value, by)."""
        columns = flat(values).flatten()
        if not any(column.null_count for column in columns):
            return list(columns)
        both = pc.and_(*(column.is_valid() for column in columns))
        return [pc.if_else(both, column, pa.scalar(None, column.type)) for column in columns]

    def combine(self, parts: list[Column]) -> Combining:
        values, by = flat(parts[0]), flat(parts[1])
        inner = extreme(by, largest=self.largest)
        grouped = yield Ask(next(inner).kernels, ids=True)
        (best,) = finish(inner, grouped)
        ids = pa.array(_ids(grouped))
        highest = best.take(ids)
        tied = pc.equal(by, highest)
        if pa.types.is_floating(self.by):
            tied = pc.or_(tied, pc.and_(pc.is_nan(by), pc.is_nan(highest)))
        return [_winners(values, ids, tied, grouped.groups, largest=self.largest), best]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        return flat(parts[0])


@dataclass(frozen=True, slots=True)
class Deviation(Bound):
    """Standard deviation with ``ddof`` degrees of freedom taken off; null for groups of ddof values or fewer. Or its
    square, the variance, from the same partial results.

    Partial results are (count, mean, M2), merged by the formula of Chan, Golub and LeVeque (1979) in two passes with
    the rounding error of the mean taken out, so that a spread of 1 around 10**9 is still right.
    """

    ddof: int
    squared: bool = False

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (
            self._field("count", pa.int64()),
            self._field("mean", pa.float64()),
            self._field("m2", pa.float64()),
        )

    @property
    def result_type(self) -> pa.DataType:
        return pa.float64()

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        means = flat(values).cast(pa.float64(), safe=False)
        counts = means.is_valid().cast(pa.int64())
        return [counts, means.fill_null(0.0), pa.array(np.zeros(len(means)))]

    def combine(self, parts: list[Column]) -> Combining:
        counts, means, squares = (flat(part).to_numpy() for part in parts)
        grouped = yield Ask(ids=True)
        ids, groups = grouped.ids, grouped.groups
        assert ids is not None
        total = np.bincount(ids, counts, groups)
        divisor = np.maximum(total, 1.0)
        rough = np.bincount(ids, counts * means, groups) / divisor
        away = np.where(counts > 0, means - rough[ids], 0.0)
        weighted = counts * away
        shift = np.bincount(ids, weighted, groups) / divisor
        m2 = np.bincount(ids, squares + weighted * away, groups) - total * shift * shift
        return [
            pa.array(total.astype(np.int64)),
            pa.array(rough + shift),
            pa.array(np.maximum(m2, 0.0)),
        ]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        counts, _, m2 = (flat(part).to_numpy() for part in parts)
        free = counts - self.ddof
        variance = m2 / np.maximum(free, 1)
        return pa.array(variance if self.squared else np.sqrt(variance), mask=free <= 0)


def _ids(grouped: Grouped) -> Int64Array:
    assert grouped.ids is not None
    return grouped.ids


def _winners(values: pa.Array, ids: pa.Array, tied: pa.Array, groups: int, *, largest: bool) -> pa.Array:
    """The smallest or largest of the ``tied`` values of each group; null for a group without one."""
    if not pc.any(tied).as_py():
        return pa.nulls(groups, values.type)
    (owners,), ((chosen,),) = group([ids.filter(tied)], [extreme(values.filter(tied), largest=largest)])
    place = np.full(groups, -1, np.int64)
    place[owners.to_numpy()] = np.arange(len(owners))
    return chosen.take(pa.array(place, mask=place < 0))


__all__ = ["Champion", "Deviation", "Edge"]
