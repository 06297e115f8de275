"""Aggregates that are approximate, with a bound on their error, so that a partial result stays small.

Both keep a sparse sketch as lists of integers. Merging works on all lists at once, as flat columns of
(group << 32 | element): one sort, whatever the number of groups. Merging sketches of parts gives bit by bit the sketch
of the whole, so results do not depend on batches, parallelism or the order of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.operators.grouping import Ask, Column, Combining, Int64Array, flat
from rayflow.operators.list_partials import lists_of, spread
from rayflow.operators.partials import Bound
from rayflow.partition import hash_columns

FloatArray = npt.NDArray[np.float64]

PRECISION: Final = 12
REGISTERS: Final = 1 << PRECISION
"""Of a HyperLogLog sketch; its standard error is 1.04 / sqrt(REGISTERS) = 1.6 %."""
_HASH_BITS: Final = 64 - PRECISION
RANKS: Final = _HASH_BITS + 2
"""Of a register, from 0 on: not in use."""
_RANK_BITS: Final = 6
_RANK_MASK: Final = (1 << _RANK_BITS) - 1
_DENSE_SHARE: Final = 8
"""All registers of all groups, a byte each, are cheaper than sorting if they are at most so many for each element."""
_ESTIMATED_AT_ONCE: Final = 16_384

SLICES: Final = 35
"""Buckets for each power of two: those of a DDSketch whose gamma is 2**(1/35), a relative error below 0.991 %."""
RELATIVE_ERROR: Final = 0.01
_INFINITE: Final = 2047 * SLICES
_NAN: Final = _INFINITE + 1
_HALF: Final = 1 << 31
_LOW: Final = 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------------ distinct values


@dataclass(frozen=True, slots=True)
class DistinctEstimate(Bound):
    """HyperLogLog (Flajolet et al. 2007) with a 64-bit hash and the estimator of Ertl (2017, algorithm 6), which
    needs neither tables of bias nor another formula for small numbers.

    The partial result is the list of registers in use, each ``register << 6 | rank``, ascending.
    """

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (self._field(f"hll{PRECISION}", pa.large_list(pa.uint32())),)

    @property
    def result_type(self) -> pa.DataType:
        return pa.int64()

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        elements, valid = elements_of(values)
        return [lists_of(pa.array(elements.astype(np.uint32)), valid.astype(np.int64))]

    def combine(self, parts: list[Column]) -> Combining:
        elements, lengths = spread(parts[0])
        grouped = yield Ask(ids=True)
        assert grouped.ids is not None
        return [_highest(np.repeat(grouped.ids, lengths), elements.to_numpy(), grouped.groups)]

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        elements, valid = elements_of(values)
        grouped = yield Ask(ids=True)
        assert grouped.ids is not None
        return [_highest(grouped.ids[valid], elements, grouped.groups)]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        lists = flat(parts[0])
        steps = range(0, len(lists), _ESTIMATED_AT_ONCE)
        found = [_estimates(*spread(lists.slice(i, _ESTIMATED_AT_ONCE))) for i in steps]
        return pa.array(np.rint(np.concatenate(found)).astype(np.int64) if found else [], pa.int64())


def register_of(elements: Int64Array) -> Int64Array:
    return elements >> _RANK_BITS


def rank_of(elements: Int64Array) -> Int64Array:
    return elements & _RANK_MASK


def elements_of(values: Column) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(elements of the values that are not null, which are not null)."""
    column = flat(values)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    hashes = hash_columns([column.drop_null()])
    rest = hashes & np.uint64((1 << _HASH_BITS) - 1)
    # 52 bits are exact in a float64, whose exponent is then the number of the highest bit that is set.
    _, highest = np.frexp(rest.astype(np.float64))
    ranks = _HASH_BITS + 1 - highest
    registers = (hashes >> np.uint64(_HASH_BITS)).astype(np.int64)
    return registers << _RANK_BITS | ranks, valid


def _highest(ids: Int64Array, elements: npt.NDArray[Any], groups: int) -> pa.LargeListArray:
    """The highest rank of each register of each group."""
    if groups * REGISTERS <= _DENSE_SHARE * len(elements):
        ranks = np.zeros(groups * REGISTERS, np.uint8)
        places = ids * REGISTERS + register_of(elements)
        np.maximum.at(ranks, places, rank_of(elements).astype(np.uint8))
        used = np.flatnonzero(ranks)
        keys = (used // REGISTERS) << 32 | (used % REGISTERS) << _RANK_BITS | ranks[used]
    else:
        keys = np.sort(ids << 32 | elements)
        registers = keys >> _RANK_BITS
        keys = keys[np.append(registers[1:] != registers[:-1], True)[: len(keys)]]
    return lists_of(pa.array((keys & _LOW).astype(np.uint32)), np.bincount(keys >> 32, minlength=groups))


def _estimates(elements: pa.Array, lengths: Int64Array) -> FloatArray:
    groups = len(lengths)
    owners = np.repeat(np.arange(groups), lengths)
    of_rank = rank_of(elements.to_numpy().astype(np.int64))
    return estimates_of(np.bincount(owners * RANKS + of_rank, minlength=groups * RANKS).reshape(groups, RANKS))


def estimates_of(counts: Int64Array) -> FloatArray:
    """From how many registers of a sketch have each rank; a row a sketch. Registers not in use have rank 0 and are not
    counted."""
    sums = REGISTERS * _tau(1.0 - counts[:, -1] / REGISTERS)
    for rank in range(_HASH_BITS, 0, -1):
        sums = 0.5 * (sums + counts[:, rank])
    sums = sums + REGISTERS * _sigma(1.0 - counts.sum(axis=1) / REGISTERS)
    estimates: FloatArray = REGISTERS * REGISTERS / (2.0 * np.log(2.0)) / sums
    return estimates


def _sigma(x: FloatArray) -> FloatArray:
    """x + the sum over k > 0 of x**(2**k) * 2**(k-1); infinite at 1, where no register is in use."""
    inside = np.where(x < 1.0, x, 0.0)
    power, factor, total = inside.copy(), 1.0, inside.copy()
    while True:
        power = power * power
        after = total + power * factor
        if np.array_equal(after, total):
            return np.where(x < 1.0, total, np.inf)
        factor, total = 2.0 * factor, after


def _tau(x: FloatArray) -> FloatArray:
    """(1 - x - the sum over k > 0 of (1 - x**(2**-k))**2 * 2**-k) / 3."""
    inside = (x > 0.0) & (x < 1.0)
    root = np.where(inside, x, 1.0)
    factor, total = 1.0, 1.0 - root
    while True:
        root = np.sqrt(root)
        factor *= 0.5
        after = total - (1.0 - root) ** 2 * factor
        if np.array_equal(after, total):
            return total / 3.0
        total = after


# ------------------------------------------------------------------------------------------------------------ quantiles


@dataclass(frozen=True, slots=True)
class Quantiles(Bound):
    """DDSketch (Masson, Rim, Lee 2019): how many values there are in each of many buckets of one relative width.

    The partial result is the list of buckets in use, ascending, and how many values each has; and the smallest and the
    largest value, so that those are exact. A bucket is ``35 * exponent + slice`` with the sign of the value, 0 for
    zero, found with integers alone from the bits of the number: no logarithm whose last digit depends on the machine.
    """

    levels: tuple[float, ...]
    as_list: bool

    @property
    def parts(self) -> tuple[pa.Field, ...]:
        return (
            self._field("buckets", pa.large_list(pa.int32())),
            self._field("counts", pa.large_list(pa.int64())),
            self._field("low", pa.float64()),
            self._field("high", pa.float64()),
        )

    @property
    def result_type(self) -> pa.DataType:
        return pa.list_(pa.float64()) if self.as_list else pa.float64()

    def singles(self, values: Column, times_us: Column) -> list[Column]:
        numbers = _floats(values)
        lengths = numbers.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
        buckets = pa.array(buckets_of(numbers.drop_null().to_numpy()), pa.int32())
        counts = pa.array(np.ones(len(buckets), np.int64))
        return [lists_of(buckets, lengths), lists_of(counts, lengths), numbers, numbers]

    def combine(self, parts: list[Column]) -> Combining:
        buckets, lengths = spread(parts[0])
        counts = spread(parts[1])[0].to_numpy()
        grouped = yield Ask(((parts[2], "min"), (parts[3], "max")), ids=True)
        assert grouped.ids is not None
        keys = _keys(np.repeat(grouped.ids, lengths), buckets.to_numpy())
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        totals = np.add.reduceat(counts[order], first) if len(first) else counts
        return [*_lists(keys[first], totals, grouped.groups), *grouped.results]

    def from_rows(self, values: Column, times_us: Column) -> Combining:
        numbers = _floats(values)
        grouped = yield Ask(((numbers, "min"), (numbers, "max")), ids=True)
        ids = grouped.ids
        assert ids is not None
        if numbers.null_count:
            ids = ids[numbers.is_valid().to_numpy(zero_copy_only=False)]
        keys, totals = np.unique(_keys(ids, buckets_of(numbers.drop_null().to_numpy())), return_counts=True)
        return [*_lists(keys, totals, grouped.groups), *grouped.results]

    def finalise(self, parts: list[Column], rows: pa.Array) -> pa.Array:
        buckets, lengths = spread(parts[0])
        heights = np.cumsum(np.append(0, spread(parts[1])[0].to_numpy()))
        ends = np.cumsum(lengths)
        below = heights[ends - lengths]
        totals = heights[ends] - below
        found, numbers = np.flatnonzero(totals > 0), buckets.to_numpy()
        limits = [flat(part).fill_null(0.0).to_numpy()[found] for part in parts[2:]]
        results = np.full((len(totals), len(self.levels)), np.nan)
        for i, level in enumerate(self.levels):
            ranks = level * (totals[found] - 1)
            floors = np.floor(ranks).astype(np.int64)
            sides = []
            for at in (floors, np.minimum(floors + 1, totals[found] - 1)):
                bucket = numbers[np.searchsorted(heights, below[found] + at, side="right") - 1]
                value = _values(bucket, *limits)
                for edge, exact in zip((0, totals[found] - 1), limits, strict=True):
                    value = np.where((at == edge) & (bucket != _NAN), exact, value)
                sides.append(value)
            results[found, i] = _between(sides[0], sides[1], ranks - floors)
        if not self.as_list:
            return pa.array(results[:, 0], mask=totals == 0)
        offsets = pa.array(np.arange(len(totals) + 1, dtype=np.int32) * np.int32(len(self.levels)))
        return pa.ListArray.from_arrays(offsets, pa.array(results.ravel()), mask=pa.array(totals == 0))


def _bounds() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], FloatArray]:
    """(lower bounds of slices as mantissas of 52 bits, slice of each first ten bits of a mantissa, middles)."""
    edges = np.array([2.0 ** (i / SLICES) for i in range(SLICES)] + [2.0])
    mantissas = np.append(((edges[:-1] - 1.0) * 2.0**52).astype(np.int64), 1 << 52)
    exact = 1.0 + mantissas / 2.0**52
    guess = np.searchsorted(mantissas, np.arange(1024, dtype=np.int64) << 42, side="right") - 1
    return mantissas, guess, 2.0 * exact[:-1] * exact[1:] / (exact[:-1] + exact[1:])


_MANTISSAS, _GUESS, _MIDDLES = _bounds()


def buckets_of(numbers: FloatArray) -> npt.NDArray[np.int32]:
    """The bucket of each number: ascending as the numbers are, NaN highest. Below 2.3e-308 all is zero."""
    bits = np.ascontiguousarray(numbers).view(np.int64)
    exponent, mantissa = (bits >> 52) & 0x7FF, bits & ((1 << 52) - 1)
    guess = _GUESS[mantissa >> 42]
    # Ten bits of the mantissa leave two slices to choose from: a slice is wider than 1/1024.
    buckets = exponent * SLICES + guess + (mantissa >= _MANTISSAS[guess + 1])
    buckets = np.where(exponent == 0, 0, np.where(exponent == 2047, _INFINITE, buckets))
    buckets = np.where(bits < 0, -buckets, buckets)
    return np.where((exponent == 2047) & (mantissa != 0), _NAN, buckets).astype(np.int32)


def _values(buckets: npt.NDArray[np.int32], low: FloatArray, high: FloatArray) -> FloatArray:
    """A number less than `RELATIVE_ERROR` from every one of the bucket, and none beyond ``low`` and ``high``."""
    size = np.abs(buckets.astype(np.int64))
    with np.errstate(over="ignore"):
        middle = np.ldexp(_MIDDLES[size % SLICES], size // SLICES - 1023)
    middle = np.clip(np.where(buckets < 0, -middle, middle), low, high)
    middle = np.where(size == 0, np.clip(0.0, low, high), middle)
    middle = np.where(size == _INFINITE, np.copysign(np.inf, buckets), middle)
    return np.where(buckets == _NAN, np.nan, middle)


def _between(lower: FloatArray, upper: FloatArray, share: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore"):
        mixed = lower * (1.0 - share) + upper * share
    return np.where((share == 0.0) | (lower == upper), lower, mixed)


def _keys(ids: Int64Array, buckets: npt.NDArray[np.int32]) -> Int64Array:
    return ids << 32 | (buckets.astype(np.int64) + _HALF)


def _lists(keys: Int64Array, counts: npt.NDArray[Any], groups: int) -> list[pa.Array]:
    lengths = np.bincount(keys >> 32, minlength=groups)
    buckets = ((keys & _LOW) - _HALF).astype(np.int32)
    return [lists_of(pa.array(buckets), lengths), lists_of(pa.array(counts.astype(np.int64)), lengths)]


def _floats(values: Column) -> pa.Array:
    return flat(values).cast(pa.float64(), safe=False)


__all__ = ["PRECISION", "REGISTERS", "RELATIVE_ERROR", "DistinctEstimate", "Quantiles", "buckets_of"]
