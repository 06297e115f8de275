"""Aggregates that keep values: their partial results are lists, merged as flat columns of (group, value).

Lists have offsets of 64 bits, because the lists of one run together may hold more than 2**31 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Ask, Column, Combining, Int64Array, flat, plain_key
from rayflow.operators.partials import Bound

_BITMAP_SHARE: Final = 8
"""A bitmap of so many bytes for each value costs less than sorting the values."""


def spread(lists: Column) -> tuple[pa.Array, Int64Array]:
    """(the values of all lists one after the other, how many each list has)."""
    array = flat(lists)
    lengths: Int64Array = pc.list_value_length(array).fill_null(0).to_numpy()
    return array.flatten(), lengths


def lists_of(values: pa.Array, lengths: Int64Array) -> pa.LargeListArray:
    """The inverse of `spread`."""
    return pa.LargeListArray.from_arrays(_offsets(lengths), values)


def at_most_one(values: Column) -> pa.LargeListArray:
    """Every value as a list of itself, every null as an empty list."""
    valid = values.is_valid()
    return lists_of(flat(values.drop_null()), flat(valid).to_numpy(zero_copy_only=False).astype(np.int64))


@dataclass(frozen=True, slots=True)
class DistinctCount(Bound):
    """How many different values there are, exactly: the partial result is the list of them.

    Equal means what it means for keys: one NaN, one zero.
    """

    kind: pa.DataType

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("values", pa.large_list(self.kind)),)

    @property
    def result_type(self) -> pa.DataType:
        return pa.int64()

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        return [at_most_one(plain_key(values))]

    def combine(self, parts: list[Column]) -> Combining:
        values, lengths = spread(parts[0])
        grouped = yield Ask(ids=True)
        assert grouped.ids is not None
        return [_distinct(np.repeat(grouped.ids, lengths), values, grouped.groups)]

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        keys = flat(plain_key(values))
        grouped = yield Ask(ids=True)
        assert grouped.ids is not None
        ids = grouped.ids
        if keys.null_count:
            ids = ids[keys.is_valid().to_numpy(zero_copy_only=False)]
        return [_distinct(ids, keys.drop_null(), grouped.groups)]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        return pa.array(spread(parts[0])[1], pa.int64())


@dataclass(frozen=True, slots=True)
class Collected(Bound):
    """The first ``limit`` values that are not null in order of their event time, those of one microsecond in order of
    their own: the result does not depend on the order in which rows arrive."""

    kind: pa.DataType
    limit: int

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field("values", pa.large_list(self.kind)), self._field("times_us", pa.large_list(pa.int64())))

    @property
    def result_type(self) -> pa.DataType:
        return pa.list_(self.kind)

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        lists = at_most_one(values)
        times = flat(times_us).filter(flat(values.is_valid())) if values.null_count else flat(times_us)
        return [lists, lists_of(times, spread(lists)[1])]

    def combine(self, parts: list[Column]) -> Combining:
        values, lengths = spread(parts[0])
        times = spread(parts[1])[0].to_numpy()
        grouped = yield Ask(ids=True)
        assert grouped.ids is not None
        ids = np.repeat(grouped.ids, lengths)
        order = _order(ids, times, values)
        counts = np.bincount(ids, minlength=grouped.groups)
        place = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = order[place < self.limit]
        counts = np.minimum(counts, self.limit)
        return [lists_of(values.take(pa.array(kept)), counts), lists_of(pa.array(times[kept]), counts)]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        values, lengths = spread(parts[0])
        offsets = _offsets(lengths).cast(pa.int32())
        return pa.ListArray.from_arrays(offsets, values, type=self.result_type, mask=pa.array(lengths == 0))


def _distinct(ids: Int64Array, values: pa.Array, groups: int) -> pa.LargeListArray:
    found = _distinct_integers(ids, values, groups)
    return _distinct_values(ids, values, groups) if found is None else found


def _distinct_integers(ids: Int64Array, values: pa.Array, groups: int) -> pa.LargeListArray | None:
    """For whole numbers, dates and times, with (group, value) as one word; None where a word is too narrow for it.

    Of 65,536 rows in 100 groups 1.4 ms, sorted or by the bitmap, where Arrow's hash table takes 15 ms.
    """
    kind = values.type
    if not _is_whole(kind) or not len(values):
        return None
    numbers = (
        values.view(pa.int32() if kind.bit_width == 32 else pa.int64()) if not pa.types.is_integer(kind) else values
    )
    extremes = pc.min_max(numbers)
    low, high = extremes["min"].as_py(), extremes["max"].as_py()
    width = high - low + 1
    if high >= 1 << 63 or width * groups >= 1 << 62:
        return None
    words = ids * width + (numbers.to_numpy().astype(np.int64) - low)
    if width * groups <= _BITMAP_SHARE * len(words):
        seen = np.zeros(width * groups, np.bool_)
        seen[words] = True
        words = np.flatnonzero(seen)
    else:
        words = np.sort(words)
        words = words[np.append(True, words[1:] != words[:-1])]
    owners = words // width
    kept = pa.array(words - owners * width + low, pa.int64()).cast(numbers.type)
    return lists_of(kept if numbers is values else kept.view(kind), np.bincount(owners, minlength=groups))


def _distinct_values(ids: Int64Array, values: pa.Array, groups: int) -> pa.LargeListArray:
    table = pa.table({"group": pa.array(ids), "value": values})
    found = pa.TableGroupBy(table, ["group", "value"], use_threads=False).aggregate([])
    owners, kept = flat(found.column("group")).to_numpy(), flat(found.column("value"))
    if np.any(owners[1:] < owners[:-1]):
        kept = kept.take(pa.array(np.argsort(owners, kind="stable")))
    return lists_of(kept, np.bincount(owners, minlength=groups))


def _order(ids: Int64Array, times: Int64Array, values: pa.Array) -> Int64Array:
    """Rows by (group, time, value)."""
    order = np.lexsort((times, ids))
    sorted_ids, sorted_times = ids[order], times[order]
    as_next = np.append((sorted_ids[1:] == sorted_ids[:-1]) & (sorted_times[1:] == sorted_times[:-1]), False)
    tied = np.flatnonzero(as_next | np.append(False, as_next[:-1])[: len(as_next)])
    if len(tied):
        rows = order[tied]
        columns = {"group": pa.array(ids[rows]), "time": pa.array(times[rows]), "value": values.take(pa.array(rows))}
        found = pc.sort_indices(pa.table(columns), sort_keys=[(name, "ascending") for name in columns])
        order[tied] = rows[found.to_numpy()]
    return order


def _is_whole(kind: pa.DataType) -> bool:
    checks = (pa.types.is_integer, pa.types.is_timestamp, pa.types.is_date, pa.types.is_time, pa.types.is_duration)
    return any(check(kind) for check in checks)


def _offsets(lengths: Int64Array) -> pa.Array:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.array(offsets)


__all__ = ["Collected", "DistinctCount", "at_most_one", "lists_of", "spread"]
