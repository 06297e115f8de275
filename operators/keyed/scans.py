"""Running aggregates: the partial result of each key after each of its rows.

A `Scan` belongs to one `Bound` aggregate and keeps the columns of its partial results (`Bound.parts`) in a
`StateTable`, one row a key. What it gives is finalised by the same `Bound` as the results of windows, so both agree.
Rows are in the order of `Segments` throughout ("sorted").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import PlanError
from rayflow.operators.grouping import Column, flat
from rayflow.operators.keyed.cells import array_of, integers_of, is_number, numbers_of, seeds_of, store
from rayflow.operators.keyed.scan import Scan, count
from rayflow.operators.keyed.segments import Numbers, Segments
from rayflow.operators.keyed.set_scans import DistinctScan, EstimateScan
from rayflow.operators.list_partials import DistinctCount
from rayflow.operators.ordered_partials import Champion, Deviation, Edge
from rayflow.operators.partials import Bound, CountRows, CountValues, Extreme, IntegerSum, Mean, SimpleSum
from rayflow.operators.sketches import DistinctEstimate
from rayflow.operators.state.table import StateTable

_LOW: Final = 0xFFFFFFFF


class NoScan(Scan):
    """`CountRows`: from the count of rows that the step keeps."""

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        return []


class CountScan(Scan):
    """`CountValues`."""

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        return [pa.array(count(segments, table, self._name(0), flat(values)))]


class FloatSumScan(Scan):
    """`SimpleSum` of floats, added up row after row: no other key and no batch boundary touches the rounding."""

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        numbers, valid = numbers_of(flat(values).cast(pa.float64()), 0.0)
        # -0.0 is the zero that leaves every number as it is, itself included.
        seeds, seeded = seeds_of(table, self._name(0), segments.heads, -0.0)
        with np.errstate(all="ignore"):
            sums = segments.scan(np.add, seeds, numbers)
        seen = _seen(segments, seeded, valid)
        last = segments.ends
        store(table, self._name(0), segments.heads, sums[last], None if seen is None else seen[last])
        return [array_of(sums, pa.float64(), seen)]


class IntegerSumScan(Scan):
    """`IntegerSum`: exact, ``sum + carry * 2**64``. Sums in 64 bits as long as bounds prove that none can wrap."""

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        kind, heads = self.fields[0].type, segments.heads
        column = flat(values)
        numbers, valid = numbers_of(column if column.type.equals(kind) else column.cast(kind), 0)
        seeds, seeded = seeds_of(table, self._name(0), heads, 0)
        carries, _ = seeds_of(table, self._name(1), heads, 0)
        if not carries.any() and _cannot_wrap(seeds, numbers):
            sums = segments.add(seeds, numbers)
            carried = np.zeros(len(sums), np.int32)
        else:
            high = (seeds >> 32).astype(np.int64) + (carries.astype(np.int64) << 32)
            highs = segments.add(high, (numbers >> 32).astype(np.int64))
            lows = segments.add((seeds & _LOW).astype(np.int64), (numbers & _LOW).astype(np.int64))
            none = pa.array(np.zeros(len(highs), np.int32))
            bound = IntegerSum(self._name(0), kind)
            joined, more = bound.joined(pa.array(highs), pa.array(lows), none)
            sums, carried = joined.to_numpy(), more.to_numpy()
        seen = _seen(segments, seeded, valid)
        last = segments.ends
        store(table, self._name(0), heads, sums[last], None if seen is None else seen[last])
        store(table, self._name(1), heads, carried[last])
        return [array_of(sums, kind, seen), pa.array(carried)]


class DecimalSumScan(Scan):
    """`SimpleSum` of decimals: integers of 128 or 256 bits, added as limbs of 32 bits, modulo their width."""

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        kind, name = self.fields[0].type, self._name(0)
        column = flat(values).cast(kind)
        stored = table.get(segments.heads, name)
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        seeds, numbers = _limbs(stored), _limbs(column)
        sums = np.stack([segments.add(seeds[:, i], numbers[:, i]) for i in range(seeds.shape[1])], axis=1)
        for i in range(seeds.shape[1] - 1):
            sums[:, i + 1] += sums[:, i] >> 32
        seeded = stored.is_valid().to_numpy(zero_copy_only=False)
        seen = _seen(segments, seeded, valid)
        words = np.ascontiguousarray((sums & _LOW).astype(np.uint32))
        found = pa.Array.from_buffers(kind, len(words), [None, pa.py_buffer(words)])
        if seen is not None:
            found = pc.if_else(pa.array(seen), found, pa.scalar(None, kind))
        table.set(segments.heads, name, found.take(pa.array(segments.ends)))
        return [found]


@dataclass(frozen=True, slots=True)
class MeanScan(Scan):
    """`Mean`: a sum and a count."""

    total: Scan

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        sums = self.total.advance(segments, table, values, times)
        return [*sums, pa.array(count(segments, table, self._name(-1), flat(values)))]


@dataclass(frozen=True, slots=True)
class NumberExtremeScan(Scan):
    """`Extreme` of numbers, dates and times. NaN is larger than every number."""

    largest: bool

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        kind, name = self.fields[0].type, self._name(0)
        least = self._neutral(np.dtype(integers_of(pa.nulls(0, kind)).type.to_pandas_dtype()))
        numbers, valid = numbers_of(values, least)
        seeds, seeded = seeds_of(table, name, segments.heads, least)
        # maximum takes NaN whenever it meets one; fmin only where there is nothing else.
        found = segments.scan(np.maximum if self.largest else np.fmin, seeds, numbers)
        seen = _seen(segments, seeded, valid)
        last = segments.ends
        store(table, name, segments.heads, found[last], None if seen is None else seen[last])
        return [array_of(found, kind, seen)]

    def _neutral(self, dtype: np.dtype[Any]) -> int | float:
        """What every value wins against. NaN is the largest value, so the smallest of all wins against it."""
        if np.issubdtype(dtype, np.floating):
            return -np.inf if self.largest else np.nan
        limits = np.iinfo(dtype)
        return int(limits.min if self.largest else limits.max)


@dataclass(frozen=True, slots=True)
class RankedScan(Scan):
    """`Edge`, and `Extreme` of types that are no numbers: a scan over ranks instead of values."""

    largest: bool

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        name, timed = self._name(0), len(self.fields) == 2
        column = pa.concat_arrays([table.get(segments.heads, name), flat(values)])
        columns, kinds = {"value": integers_of(column)}, [("value", "ascending")]
        if timed:
            before, _ = seeds_of(table, self._name(1), segments.heads, 0)
            columns["time"] = pa.array(np.concatenate([before, times]))
            kinds.insert(0, ("time", "ascending"))
        missing = column.is_null().to_numpy(zero_copy_only=False)
        chosen = _best_so_far(segments, columns, kinds, missing, largest=self.largest)
        found = [column.take(chosen)]
        if timed:
            found.append(columns["time"].take(chosen))
        return _kept(self, segments, table, found)


@dataclass(frozen=True, slots=True)
class ChampionScan(Scan):
    """`Champion`: a scan over ranks by (by, value), of rows in which neither is null."""

    largest: bool

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        pairs = zip(self.fields, flat(values).flatten(), strict=True)
        value, by = (pa.concat_arrays([table.get(segments.heads, field.name), column]) for field, column in pairs)
        columns = {"by": integers_of(by), "value": integers_of(value)}
        missing = pc.or_(value.is_null(), by.is_null()).to_numpy(zero_copy_only=False)
        kinds = [("by", "ascending"), ("value", "ascending")]
        chosen = _best_so_far(segments, columns, kinds, missing, largest=self.largest)
        return _kept(self, segments, table, [value.take(chosen), by.take(chosen)])


class DeviationScan(Scan):
    """`Deviation`: (count, mean, M2) merged by the formula of Chan, Golub and LeVeque (1979), in doubling steps."""

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        numbers, valid = numbers_of(flat(values).cast(pa.float64(), safe=False), 0.0)
        ones = np.ones(len(numbers)) if valid is None else valid.astype(np.float64)
        seeds = [seeds_of(table, str(f.name), segments.heads, 0)[0].astype(np.float64) for f in self.fields]
        rows = [ones, numbers, np.zeros(len(numbers))]
        with np.errstate(all="ignore"):
            first = _merged(seeds, [part[segments.starts] for part in rows])
            out = [np.append(part, 0.0) for part in rows]
            for part, new in zip(out, first, strict=True):
                part[segments.starts] = new
            for places in segments.ladders():
                ladder = [part[places] for part in out]
                reach = 1
                while reach < len(places):
                    later = _merged([part[:-reach] for part in ladder], [part[reach:] for part in ladder])
                    ladder = [np.concatenate([part[:reach], new]) for part, new in zip(ladder, later, strict=True)]
                    reach *= 2
                for part, new in zip(out, ladder, strict=True):
                    part[places] = new
        found = [out[0][:-1].astype(np.int64), out[1][:-1], out[2][:-1]]
        for field, part in zip(self.fields, found, strict=True):
            store(table, str(field.name), segments.heads, part[segments.ends])
        return [pa.array(part) for part in found]


def scan_of(bound: Bound) -> Scan:
    """The running form of an aggregate; raises `PlanError` if there is none."""
    parts = bound.parts
    match bound:
        case CountRows():
            return NoScan(parts)
        case CountValues():
            return CountScan(parts)
        case SimpleSum():
            return DecimalSumScan(parts) if pa.types.is_decimal(bound.kind) else FloatSumScan(parts)
        case IntegerSum():
            return IntegerSumScan(parts)
        case Mean():
            return MeanScan(parts, scan_of(bound.total))
        case Extreme():
            return (NumberExtremeScan if is_number(bound.kind) else RankedScan)(parts, bound.largest)
        case Edge():
            return RankedScan(parts, bound.latest)
        case Deviation():
            return DeviationScan(parts)
        case Champion():
            return ChampionScan(parts, bound.largest)
        case DistinctCount():
            return DistinctScan.of(bound)
        case DistinctEstimate():
            return EstimateScan.of(bound)
    raise PlanError(
        f"the aggregate {bound.name!r} has no running form: every row would need a walk over all that quantile, "
        "median, collect and aggregates of your own keep of its key; put .window(...) before agg, or use a KeyedProcess"
    )


def _best_so_far(
    segments: Segments,
    columns: Mapping[str, pa.Array],
    by: Sequence[tuple[str, str]],
    missing: Numbers,
    *,
    largest: bool,
) -> pa.Array:
    """Which row of ``columns`` is the largest or smallest one after each row; null: none yet. First come the seeds, one
    a segment, then the rows, sorted; ``missing`` ones do not count."""
    by_rank = pc.sort_indices(pa.table(dict(columns)), sort_keys=list(by)).to_numpy()
    rank = np.empty(len(by_rank), np.int64)
    rank[by_rank] = np.arange(len(by_rank))
    worst = -1 if largest else len(by_rank)
    rank[missing] = worst
    seeds = len(segments.heads)
    scanned = segments.scan(np.maximum if largest else np.minimum, rank[:seeds], rank[seeds:])
    none = scanned == worst
    return pa.array(by_rank[np.where(none, 0, scanned)].astype(np.int64), mask=none if none.any() else None)


def _kept(scan: Scan, segments: Segments, table: StateTable, found: list[pa.Array]) -> list[pa.Array]:
    """``found``, of which the table has the last of each key."""
    last = pa.array(segments.ends)
    for part, field in zip(found, scan.fields, strict=True):
        table.set(segments.heads, field.name, part.take(last))
    return found


def _seen(segments: Segments, seeded: Numbers, valid: Numbers | None) -> Numbers | None:
    """Where there has been a value yet; None: everywhere."""
    if valid is None:
        return None
    found = segments.add(seeded.astype(np.int64), valid.astype(np.int64)) > 0
    return None if found.all() else found


def _cannot_wrap(seeds: Numbers, values: Numbers) -> bool:
    limit = 2**63 if values.dtype == np.int64 else 2**64
    # Through Python's integers: abs(int64 minimum) is no int64.
    reach = max(-int(values.min()), int(values.max())) * len(values)
    return max(-int(seeds.min()), int(seeds.max())) + reach < limit


def _limbs(column: pa.Array) -> Numbers:
    """Decimals as int64 of their 32-bit limbs, the lowest first, a row each; null is 0."""
    plain = column.fill_null(pa.scalar(0).cast(column.type)) if column.null_count else column
    width = column.type.bit_width // 32
    words = np.frombuffer(plain.buffers()[1], np.uint32, len(plain) * width, plain.offset * width * 4)
    return words.reshape(-1, width).astype(np.int64)


def _merged(one: Sequence[Numbers], two: Sequence[Numbers]) -> list[Numbers]:
    total = one[0] + two[0]
    divisor = np.maximum(total, 1.0)
    delta = two[1] - one[1]
    # A side without values has mean 0, which says nothing: its delta must not count, not even as infinity times 0.
    share = two[0] / divisor
    mean = np.where(one[0] == 0, two[1], np.where(two[0] == 0, one[1], one[1] + delta * share))
    spread = np.where((one[0] == 0) | (two[0] == 0), 0.0, delta * delta * one[0] * share)
    return [total, mean, one[2] + two[2] + spread]


__all__ = ["Scan", "count", "scan_of"]
