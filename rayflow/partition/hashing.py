"""Vectorised hashes of key columns that never change (rule K2).

A key's hash depends on the key's bytes alone: not on the process, the machine, the width of the column, its
null bitmap, its slicing or its encoding. Checkpoints are bucketed by it: **a change of any constant or step
below is a new `HASH_VERSION`** and needs an offline re-bucketing; the tests pin golden values.

Version 1. All arithmetic is modulo 2**64. ``mix`` is the finaliser of splitmix64 (Steele, Lea, Flood 2014):
``z ^= z >> 30; z *= 0xbf58476d1ce4e5b9; z ^= z >> 27; z *= 0x94d049bb133111eb; z ^= z >> 31``, and
``GOLDEN = 0x9e3779b97f4a7c15``. A value of a class with number c becomes ``mix(word + c * GOLDEN)``:

=============================  ==  =========================================================================
class                          c   word
=============================  ==  =========================================================================
integers of any width          1   two's complement, sign-extended to 64 bits
bool                           2   0 or 1
float16, float32, float64      3   bits of the float64; -0.0 is 0.0, every NaN is 0x7ff8000000000000
date32, date64                 4   days since the epoch (date64 is floored)
timestamp, any unit and zone   5   floor(microseconds since the epoch) + remaining nanoseconds * GOLDEN, so
                                   equal instants are equal; a time without zone counts as UTC
time32, time64                 6   as timestamp
duration                       7   as timestamp
decimal, any width and scale   8   unscaled * 10**-scale modulo 2**61 - 1 (the idea of Python's
                                   ``hash(Decimal)``), so 1.5 and 1.50 are equal
string, binary, their large,   9   byte length + sum over j of ``mix(word_j + (j + 1) * GOLDEN)`` where word_j
view and fixed-size forms          is the j-th group of eight bytes, little-endian, padded with zero bytes
=============================  ==  =========================================================================

A null of any type is `NULL_HASH`. Dictionary and run-end encoded columns hash as their values, extension
types as their storage. Several columns fold from the left: ``h = mix(h * GOLDEN + next)``, so their order
matters. The hash is not keyed: it spreads honest keys and does not defend against keys chosen to collide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import KeyHashError

type_checks = pa.types

HASH_VERSION: Final = 1
NULL_HASH: Final = 0x6E756C6C_9E3779B9

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = 0xFFFFFFFFFFFFFFFF
_MERSENNE: Final = 2**61 - 1
_INTEGER, _BOOL, _FLOAT, _DATE, _TIMESTAMP, _TIME, _DURATION, _DECIMAL, _BYTES = range(1, 10)
_MICROSECONDS: Final = {"s": 1_000_000, "ms": 1_000, "us": 1}
# Up to this many words a string is hashed word by word over all rows; the rest goes through one flat pass.
_SHORT_WORDS: Final = 16
# Rows hashed at a time: temporaries of 64 kB stay in the cache and below malloc's mmap threshold. Without, a
# batch of 65,536 rows spends most of its time in page faults (measured: int32 0.60 ms, with it 0.13 ms).
_BLOCK_ROWS: Final = 8192

UInt64Array = npt.NDArray[np.uint64]

HASHABLE: Final = (
    "integers, bool, floats, dates, times, timestamps, durations, decimals, strings, binary, "
    "and dictionary or extension types over these"
)


def hash_columns(columns: Sequence[pa.Array], names: Sequence[str] | None = None) -> UInt64Array:
    """Hash the key in every row of ``columns`` (equal lengths, at least one); ``names`` only serve the error.

    Returns one uint64 a row. Raises `KeyHashError` for a list, struct, map, union or interval column.
    """
    if not columns:
        raise KeyHashError("a key needs at least one column, got none; name the columns to key by")
    result: UInt64Array | None = None
    for index, column in enumerate(columns):
        name = names[index] if names is not None else f"#{index}"
        hashes = _hash_column(column, name)
        if result is None:
            result = hashes
        elif len(result) != len(hashes):
            raise KeyHashError(
                f"key columns must be of equal length, column {name!r} has {len(hashes)} rows where "
                f"the first has {len(result)}; pass the columns of one batch"
            )
        else:
            result *= np.uint64(_GOLDEN)
            result += hashes
            result = _mix(result)
    assert result is not None
    return result


def check_key_type(name: str, kind: pa.DataType) -> None:
    """Raise `KeyHashError` if a column ``name`` of this type cannot be a key; for use while building."""
    hash_columns([pa.nulls(0, kind)], [name])


def _mix(z: UInt64Array) -> UInt64Array:
    """The splitmix64 finaliser, in place."""
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= np.uint64(0x94D049BB133111EB)
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted
    return z


def _finish(words: UInt64Array, key_class: int) -> UInt64Array:
    return _mix(words + np.uint64(key_class * _GOLDEN & _MASK))


def _hash_column(column: pa.Array, name: str) -> UInt64Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _hash_column(column.storage, name)
    if type_checks.is_null(kind):
        return np.full(len(column), NULL_HASH, np.uint64)
    if type_checks.is_run_end_encoded(kind):
        return _hash_column(pc.run_end_decode(column), name)
    if type_checks.is_dictionary(kind):
        # Every value of the dictionary is hashed once, however often it is used; one more slot is for null.
        hashes = np.append(_hash_column(column.dictionary, name), np.uint64(NULL_HASH))
        indices = column.indices.cast(pa.int64()).fill_null(len(hashes) - 1)
        taken: UInt64Array = hashes[indices.to_numpy()]
        return taken
    rows = len(column)
    if rows <= _BLOCK_ROWS:
        hashes = _hash_values(column, name)
    else:
        hashes = np.empty(rows, np.uint64)
        for start in range(0, rows, _BLOCK_ROWS):
            hashes[start : start + _BLOCK_ROWS] = _hash_values(column.slice(start, _BLOCK_ROWS), name)
    if column.null_count:
        hashes[column.is_null().to_numpy(zero_copy_only=False)] = np.uint64(NULL_HASH)
    return hashes


def _hash_values(column: pa.Array, name: str) -> UInt64Array:
    """Hash the slots of a column; those of nulls hold anything and are replaced by the caller."""
    kind = column.type
    if type_checks.is_integer(kind):
        return _finish(_integers(column, kind.to_pandas_dtype()).view(np.uint64), _INTEGER)
    if type_checks.is_boolean(kind):
        return _finish(_integers(column.cast(pa.uint8()), np.uint8).view(np.uint64), _BOOL)
    if type_checks.is_floating(kind):
        return _finish(_float_words(column), _FLOAT)
    if type_checks.is_date32(kind):
        return _finish(_integers(column, np.int32).view(np.uint64), _DATE)
    if type_checks.is_date64(kind):
        return _finish((_integers(column, np.int64) // 86_400_000).view(np.uint64), _DATE)
    if type_checks.is_timestamp(kind):
        return _finish(_instants(column, np.int64), _TIMESTAMP)
    if type_checks.is_time(kind):
        return _finish(_instants(column, np.int32 if type_checks.is_time32(kind) else np.int64), _TIME)
    if type_checks.is_duration(kind):
        return _finish(_instants(column, np.int64), _DURATION)
    if type_checks.is_decimal(kind):
        return _finish(_decimal_words(column), _DECIMAL)
    if type_checks.is_fixed_size_binary(kind):
        width = kind.byte_width
        starts = np.arange(column.offset, column.offset + len(column), dtype=np.int64) * width
        return _hash_bytes(column.buffers()[1], starts, np.full(len(column), width, np.int64))
    if type_checks.is_string_view(kind) or type_checks.is_binary_view(kind):
        # Within its family: arbitrary bytes cast to a string would be checked as UTF-8.
        wide = pa.large_string() if type_checks.is_string_view(kind) else pa.large_binary()
        return _hash_values(column.cast(wide), name)
    wide_offsets = type_checks.is_large_string(kind) or type_checks.is_large_binary(kind)
    if wide_offsets or type_checks.is_string(kind) or type_checks.is_binary(kind):
        buffers = column.buffers()
        offset_type = np.int64 if wide_offsets else np.int32
        offsets = _slots(buffers[1], offset_type, column.offset, len(column) + 1 if len(column) else 0)
        offsets = offsets.astype(np.int64, copy=False)
        return _hash_bytes(buffers[2], offsets[:-1], np.diff(offsets))
    raise KeyHashError(
        f"key column {name!r} has type {kind}, which has no stable hash; "
        f"key by one of {HASHABLE}, or derive such a column first"
    )


def _slots(buffer: pa.Buffer | None, dtype: npt.DTypeLike, offset: int, length: int) -> npt.NDArray[Any]:
    """``length`` fixed-width slots of a buffer, without a copy; zeros where Arrow left the buffer out."""
    dtype = np.dtype(dtype)
    if buffer is None or length == 0:
        return np.zeros(length, dtype)
    return np.frombuffer(buffer, dtype, length, offset * dtype.itemsize)


def _integers(column: pa.Array, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The values sign-extended (or zero-extended) to 64 bits; without a copy where they are 64 bits wide."""
    values = _slots(column.buffers()[1], dtype, column.offset, len(column))
    return values if values.dtype.itemsize == 8 else values.astype(np.int64)


def _float_words(column: pa.Array) -> UInt64Array:
    values = _slots(column.buffers()[1], column.type.to_pandas_dtype(), column.offset, len(column))
    with np.errstate(invalid="ignore"):  # signalling NaNs, and whatever stands in the slots of nulls
        doubles = values.astype(np.float64) + 0.0  # the addition turns -0.0 into 0.0
    doubles[np.isnan(doubles)] = np.nan
    words: UInt64Array = doubles.view(np.uint64)
    words[np.isnan(doubles)] = np.uint64(0x7FF8000000000000)
    return words


def _instants(column: pa.Array, dtype: npt.DTypeLike) -> UInt64Array:
    """Wrapping microseconds: a function of the instant alone, whatever the unit, with no overflow to fear."""
    ticks = _integers(column, dtype)
    if column.type.unit == "ns":
        micros, rest = np.divmod(ticks, 1_000)
        return micros.view(np.uint64) + rest.view(np.uint64) * np.uint64(_GOLDEN)
    words: UInt64Array = ticks.view(np.uint64)
    return words * np.uint64(_MICROSECONDS[column.type.unit])


def _decimal_words(column: pa.Array) -> UInt64Array:
    """unscaled * 10**-scale modulo the Mersenne prime 2**61 - 1.

    2**64 is 8 in that field, so the limbs fold by Horner's rule.
    """
    width = column.type.bit_width // 8
    limb_type: npt.DTypeLike = np.int32 if width == 4 else np.int64
    limb_count = max(1, width // 8)
    flat = _slots(column.buffers()[1], limb_type, column.offset * limb_count, len(column) * limb_count)
    limbs = flat.reshape(len(column), limb_count)
    prime = np.uint64(_MERSENNE)
    residue = np.mod(limbs[:, -1].astype(np.int64), _MERSENNE).view(np.uint64)
    for position in range(limb_count - 2, -1, -1):
        low = np.ascontiguousarray(limbs[:, position]).view(np.uint64)
        # 8 * residue < 2**64, so it is reduced before the low limb, itself reduced, is added.
        residue = ((residue * np.uint64(8)) % prime + low % prime) % prime
    factor = pow(10, -column.type.scale, _MERSENNE)
    return _multiply_mod(residue, factor)


def _multiply_mod(a: UInt64Array, b: int) -> UInt64Array:
    """``a * b`` modulo 2**61 - 1 for a, b below it, by halves of 32 bits so that nothing passes 2**64."""
    a_high, a_low = a >> np.uint64(32), a & np.uint64(0xFFFFFFFF)
    b_high, b_low = np.uint64(b >> 32), np.uint64(b & 0xFFFFFFFF)
    middle = a_high * b_low + a_low * b_high
    low = a_low * b_low
    prime = np.uint64(_MERSENNE)
    total = a_high * b_high * np.uint64(8)
    total += (middle >> np.uint64(29)) + ((middle & np.uint64(0x1FFFFFFF)) << np.uint64(32))
    total += (low & prime) + (low >> np.uint64(61))
    return total % prime


def _hash_bytes(buffer: pa.Buffer | None, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> UInt64Array:
    """Hash byte strings given by where they start in ``buffer`` and how long they are.

    The sum over words may be taken in any order: short strings go word by word over all rows, so the loop is
    as long as the words of a short string; the rest of long ones takes one flat pass of some 50 bytes a word.
    """
    sums = lengths.astype(np.uint64)
    if len(sums) == 0 or buffer is None:
        return _finish(sums, _BYTES)
    words, starts = _overlapping_words(buffer, starts, lengths)
    longest = int(lengths.max())
    for position in range(min(_SHORT_WORDS, -(-longest // 8))):
        if int(lengths.min()) > position * 8:
            sums += _mixed_words(words, starts, lengths, position)
        else:
            rows = np.flatnonzero(lengths > position * 8)
            sums[rows] += _mixed_words(words, starts[rows], lengths[rows], position)
    if longest > _SHORT_WORDS * 8:
        rows = np.flatnonzero(lengths > _SHORT_WORDS * 8)
        counts = (lengths[rows] + 7) // 8 - _SHORT_WORDS
        first_words = np.cumsum(counts) - counts
        positions = np.arange(int(counts.sum()), dtype=np.int64)
        positions += np.repeat(_SHORT_WORDS - first_words, counts)
        mixed = _mixed_words(words, np.repeat(starts[rows], counts), np.repeat(lengths[rows], counts), positions)
        sums[rows] += np.add.reduceat(mixed, first_words)
    return _finish(sums, _BYTES)


_TAIL_MASKS: Final = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)


def _mixed_words(
    words: UInt64Array,
    starts: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    positions: int | npt.NDArray[np.int64],
) -> UInt64Array:
    """``mix(word_j + (j + 1) * GOLDEN)`` for word j = ``positions`` of each string; j must lie inside it."""
    taken = words[starts + positions * 8]
    taken &= _TAIL_MASKS[np.minimum(lengths - positions * 8, 8)]
    if isinstance(positions, int):
        taken += np.uint64((positions + 1) * _GOLDEN & _MASK)
    else:
        taken += (positions + 1).astype(np.uint64) * np.uint64(_GOLDEN)
    return _mix(taken)


def _overlapping_words(
    buffer: pa.Buffer, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[UInt64Array, npt.NDArray[np.int64]]:
    """A view with the little-endian word at *every* byte, and the starts within it.

    The bytes in use are copied once behind a padding of eight, because a buffer may end with its last value.
    """
    first = int(starts.min())
    size = max(0, int((starts + lengths).max()) - first)
    padded = np.zeros(size + 8, np.uint8)
    if size:
        padded[:size] = np.frombuffer(buffer, np.uint8, size, first)
    words: UInt64Array = np.ndarray((size + 1,), "<u8", padded.data, strides=(1,))
    return words, starts - first
