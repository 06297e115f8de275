"""Growable columns addressed by slot: numbers as numpy arrays, everything else as immutable Arrow values in a heap.

A `FixedColumn` holds integers, floats, bool and temporal types, one number a slot. A `HeapColumn` holds any other type:
values are appended to a heap of Arrow arrays and a slot says where its value lies, so nothing is ever turned into
Python objects. Values nobody points at any more are dropped when they are the larger part.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Column as AnyColumn
from rayflow.operators.grouping import Int64Array, flat, plain, plain_type

BoolArray: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[Any]

_HEAP_MIN: Final = 65_536
"""A heap of fewer values is not cleaned,"""
_HEAP_BYTES_MIN: Final = 32 * 1024 * 1024
"""unless so many bytes have come since it was looked at: values may be large and few."""
_CHUNK_BYTES: Final = 512 * 1024 * 1024
"""Chunks of a heap are not joined beyond this: the offsets of strings have 32 bits."""


def number_type(kind: pa.DataType) -> np.dtype[Any] | None:
    """The numpy type of a `FixedColumn` of this type; None if it needs a heap."""
    if pa.types.is_boolean(kind):
        return np.dtype(np.bool_)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
        return dtype
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        return np.dtype("i4") if kind.bit_width == 32 else np.dtype("i8")
    return None


def as_type(array: AnyColumn, kind: pa.DataType) -> pa.Array:
    """``array`` as one array of the type, cast safely where it has another."""
    array = flat(array)
    if array.type.equals(kind):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, as_type(plain(array), kind.storage_type))
    if pa.types.is_dictionary(kind):
        return flat(plain(array)).cast(kind.value_type).dictionary_encode().cast(kind)
    if pa.types.is_run_end_encoded(kind):
        return pc.run_end_encode(flat(plain(array)).cast(kind.value_type), run_end_type=kind.run_end_type)
    return flat(plain(array)).cast(kind)


def numbers_of(array: pa.Array) -> tuple[Numbers, BoolArray | None]:
    """(values, which are not null or None for all) of an array of a `number_type`; without a copy where possible."""
    kind = array.type
    valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
    if pa.types.is_boolean(kind):
        return array.fill_null(False).to_numpy(zero_copy_only=False), valid
    dtype = number_type(kind)
    assert dtype is not None
    buffer = array.buffers()[1]
    if buffer is None or len(array) == 0:
        return np.zeros(len(array), dtype), valid
    return np.frombuffer(buffer, dtype, len(array), array.offset * dtype.itemsize), valid


def array_of(kind: pa.DataType, data: Numbers, valid: BoolArray | None) -> pa.Array:
    """The opposite of `numbers_of`. ``data`` must not be changed afterwards."""
    bitmap, nulls = None, 0
    if valid is not None:
        nulls = len(valid) - int(np.count_nonzero(valid))
        bitmap = pa.py_buffer(np.packbits(valid, bitorder="little")) if nulls else None
    if pa.types.is_boolean(kind):
        data = np.packbits(data, bitorder="little")
        return pa.Array.from_buffers(kind, _length(valid, data), [bitmap, pa.py_buffer(data)], nulls)
    return pa.Array.from_buffers(kind, len(data), [bitmap, pa.py_buffer(np.ascontiguousarray(data))], nulls)


def _length(valid: BoolArray | None, data: Numbers) -> int:
    return len(data) if valid is None else len(valid)


class FixedColumn:
    """One number a slot. As a key, floats are made canonical first: one zero and one NaN, as the hash has them."""

    def __init__(self, kind: pa.DataType, *, key: bool = False) -> None:
        dtype = number_type(kind)
        assert dtype is not None
        self.kind = kind
        self.data: Numbers = np.zeros(0, dtype)
        self.valid: BoolArray = np.zeros(0, np.bool_)
        self._canonical = key and dtype.kind == "f"
        self._nulls = False
        """A null was ever put."""
        self._bits = np.dtype(f"u{dtype.itemsize}") if dtype.kind == "f" else dtype

    def grow(self, capacity: int) -> None:
        self.data = grown(self.data, capacity)
        self.valid = grown(self.valid, capacity)

    def prepare(self, array: pa.Array) -> tuple[Numbers, BoolArray | None]:
        """What `put` and `same` take; ``array`` is of the column's type."""
        data, valid = numbers_of(array)
        if self._canonical:
            data = data + data.dtype.type(0)
            data[np.isnan(data)] = np.nan
        if valid is not None:
            data = np.where(valid, data, data.dtype.type(0))
        return data, valid

    def put(self, slots: Int64Array, prepared: tuple[Numbers, BoolArray | None], rows: Int64Array | None) -> None:
        """Row ``rows[i]`` (None: i) of what was prepared goes to ``slots[i]``; of equal slots the last counts."""
        data, valid = prepared
        self.data[slots] = data if rows is None else data[rows]
        if valid is None:
            self.valid[slots] = True
        else:
            self._nulls = True
            self.valid[slots] = valid if rows is None else valid[rows]

    def same(self, slots: Int64Array, prepared: tuple[Numbers, BoolArray | None], rows: Int64Array | None) -> BoolArray:
        """Whether slot and row hold the same; null is the same as null."""
        data, valid = prepared
        if rows is not None:
            data, valid = data[rows], None if valid is None else valid[rows]
        equal: BoolArray = self.data[slots].view(self._bits) == data.view(self._bits)
        if self._nulls or valid is not None:
            stored = self.valid[slots]
            equal &= stored if valid is None else stored == valid
        return equal

    def get(self, slots: Int64Array) -> pa.Array:
        """Null where the slot is -1."""
        if len(self.data) == 0:
            return pa.nulls(len(slots), self.kind)
        valid = self.valid[slots]
        data = self.data[slots]
        if len(slots) and slots.min() < 0:
            valid &= slots >= 0
        return array_of(self.kind, data, valid)

    def clear(self, slots: Int64Array) -> None:
        self.data[slots] = 0
        self.valid[slots] = False

    @property
    def slot_bytes(self) -> int:
        return self.data.nbytes + self.valid.nbytes

    @property
    def heap_bytes(self) -> int:
        return 0


class HeapColumn:
    """Values of any Arrow type. ``where[slot]`` is the place of its value in the heap."""

    def __init__(self, kind: pa.DataType) -> None:
        self.kind = kind
        self._stored = plain_type(kind)
        self.where: Int64Array = np.zeros(0, np.int64)
        self.valid: BoolArray = np.zeros(0, np.bool_)
        self._chunks: list[pa.Array] = []
        """Each at least twice as long as the next (unless large): their number is a logarithm."""
        self._length = 0
        self._clean_at = _HEAP_MIN
        self._appended_bytes = 0
        """Since the heap was looked at last."""
        self._look_at_bytes = _HEAP_BYTES_MIN

    def grow(self, capacity: int) -> None:
        self.where = grown(self.where, capacity)
        self.valid = grown(self.valid, capacity)

    def prepare(self, array: pa.Array) -> pa.Array:
        return flat(plain(array))

    def put(self, slots: Int64Array, prepared: pa.Array, rows: Int64Array | None) -> None:
        values = prepared if rows is None else prepared.take(pa.array(rows))
        if len(values) == 0:
            return
        self.where[slots] = np.arange(self._length, self._length + len(values))
        self.valid[slots] = True if values.null_count == 0 else values.is_valid().to_numpy(zero_copy_only=False)
        if rows is None and values.get_total_buffer_size() > 2 * values.nbytes:
            values = values.take(pa.array(np.arange(len(values))))  # a slice would keep the memory of the whole
        self._append(values)
        self._appended_bytes += values.nbytes
        if self._length > self._clean_at or self._appended_bytes > self._look_at_bytes:
            self._clean()

    def same(self, slots: Int64Array, prepared: pa.Array, rows: Int64Array | None) -> BoolArray:
        if pa.types.is_null(self._stored):
            return np.ones(len(slots), np.bool_)
        stored = self._take(slots)
        wanted = prepared if rows is None else prepared.take(pa.array(rows))
        equal: BoolArray = pc.equal(stored, wanted).fill_null(False).to_numpy(zero_copy_only=False)
        if stored.null_count and wanted.null_count:
            both = pc.and_(stored.is_null(), wanted.is_null()).to_numpy(zero_copy_only=False)
            equal = equal | both
        return equal

    def get(self, slots: Int64Array) -> pa.Array:
        return as_type(self._take(slots), self.kind)

    def clear(self, slots: Int64Array) -> None:
        self.valid[slots] = False

    @property
    def slot_bytes(self) -> int:
        return self.where.nbytes + self.valid.nbytes

    @property
    def heap_bytes(self) -> int:
        return sum(int(chunk.nbytes) for chunk in self._chunks)

    def _take(self, slots: Int64Array) -> pa.Array:
        if not self._chunks:
            return pa.nulls(len(slots), self._stored)
        places = self.where[slots]
        missing = ~self.valid[slots]
        if len(slots) and slots.min() < 0:
            missing |= slots < 0
        if missing.any():
            return self._values(np.where(missing, 0, places), missing)
        return self._values(places, None)

    def _values(self, places: Int64Array, missing: BoolArray | None) -> pa.Array:
        if len(self._chunks) == 1:
            return self._chunks[0].take(pa.array(places, mask=missing))
        starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks[:-1])])
        chunk_of = np.searchsorted(starts, places, side="right") - 1
        order = np.argsort(chunk_of, kind="stable")
        bounds = np.searchsorted(chunk_of[order], np.arange(len(self._chunks) + 1))
        parts = [
            chunk.take(pa.array(places[order[low:high]] - start))
            for chunk, start, low, high in zip(self._chunks, starts, bounds[:-1], bounds[1:], strict=True)
            if high > low
        ]
        back = np.empty(len(places), np.int64)
        back[order] = np.arange(len(places))
        if not parts:
            return pa.nulls(0, self._stored)
        return pa.concat_arrays(parts).take(pa.array(back, mask=missing))

    def _append(self, values: pa.Array) -> None:
        self._length += len(values)
        chunks = self._chunks
        chunks.append(values)
        while len(chunks) > 1 and len(chunks[-2]) < 2 * len(chunks[-1]):
            if chunks[-2].nbytes + chunks[-1].nbytes > _CHUNK_BYTES:
                break
            chunks[-2:] = [pa.concat_arrays(chunks[-2:])]

    def _clean(self) -> None:
        """Drop what no slot points at, if that is more than half of the values or of the bytes."""
        slots = np.flatnonzero(self.valid)
        live_bytes = self._live_bytes(slots)
        if 2 * len(slots) < self._length or 2 * live_bytes < self.heap_bytes:
            chunks = [self._take(slots[low : low + _HEAP_MIN]) for low in range(0, len(slots), _HEAP_MIN)]
            self._chunks, self._length = [], 0
            for chunk in chunks:
                self._append(chunk)
            self.where[slots] = np.arange(len(slots))
            live_bytes = self.heap_bytes
        self._clean_at = max(_HEAP_MIN, 4 * len(slots))
        self._appended_bytes, self._look_at_bytes = 0, max(_HEAP_BYTES_MIN, live_bytes)

    def _live_bytes(self, slots: Int64Array) -> int:
        """About so many, as if the values of a chunk were equally long: old and new ones are in different chunks. Of
        many slots some are looked at, which is what keeps it cheap."""
        if len(slots) == self._length:
            return self.heap_bytes
        step = 1 + len(slots) // _HEAP_MIN
        lengths = np.array([len(chunk) for chunk in self._chunks])
        places = self.where[slots[::step]]
        live = np.bincount(np.searchsorted(np.cumsum(lengths), places, side="right"), minlength=len(lengths)) * step
        shares = np.minimum(live / lengths, 1.0)
        return int(sum(chunk.nbytes * share for chunk, share in zip(self._chunks, shares.tolist(), strict=True)))


SlotColumn: TypeAlias = FixedColumn | HeapColumn


def slot_column(kind: pa.DataType, *, key: bool = False) -> SlotColumn:
    """An empty column for values of this type."""
    return HeapColumn(kind) if number_type(kind) is None else FixedColumn(kind, key=key)


def grown(array: npt.NDArray[Any], capacity: int) -> npt.NDArray[Any]:
    """A longer copy, zeros at the end."""
    longer = np.zeros(capacity, array.dtype)
    longer[: len(array)] = array
    return longer
