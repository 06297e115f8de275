"""Rows to bytes and back, whole batches at a time. **These bytes are in checkpoints**: a change is a new `FORMAT`.

A row is the encoding of its columns, one after the other, behind fields that the caller puts first (`lead`):

=====================================  =================================================================================
column                                 bytes
=====================================  =================================================================================
fixed width: integers, floats, bool    1 byte, 1 or 0 for null, then the value, zeros for null. Little-endian; bool is a
and temporal types                     byte. **In keys** big-endian, integers with the sign bit turned over, so that
                                       they sort as numbers; -0.0 is 0.0 and every NaN 0x7ff8... (as keys are hashed)
decimals, fixed-size binary, month-    1 byte as above, then the bytes that Arrow has
day-nano intervals
null                                   1 byte 0
strings, binary, their large and view  4 bytes big-endian: 0 for null, else the length + 1; then the bytes
forms
dictionary                             as its values
extension                              as its storage
all others (list, struct, map, ...)    as binary: one Arrow IPC record batch message of one row and one column, without
                                       the schema. Slow: one row at a time, some 30 thousand a second
=====================================  =================================================================================

Every column tells its own end, so the encoding is injective, and that of the first columns is a prefix of that of all.
Nothing depends on slicing, on what stands in the slots of nulls, or on the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import CorruptCheckpointError, StateSchemaError

FORMAT: Final = 1
"""Of keys, values and of the ``meta`` of a folder."""

Lead = tuple[tuple[str, str], ...]
"""Leading fields: (name, numpy type)."""
AnyArray = npt.NDArray[Any]
_types = pa.types
_LENGTH: Final = ">u4"

if sys.byteorder != "little":
    raise ImportError("local state reads Arrow's buffers as they are in memory, which must be little-endian")


@dataclass(frozen=True, slots=True)
class _Column:
    """How one column is laid out. ``width`` None: its bytes follow the header it ends."""

    position: int
    kind: pa.DataType
    dtype: str
    """numpy type of the payload, or of the length; "" for no payload at all."""
    variable: bool = False
    nested: bool = False


class RowCodec:
    """Encodes and decodes rows of ``schema``; ``key`` chooses the form that sorts and identifies."""

    def __init__(self, schema: pa.Schema, *, lead: Lead = (), key: bool = False) -> None:
        self.schema = schema
        self.key = key
        self.lead = lead
        columns = [_column(index, field.type, key) for index, field in enumerate(schema)]
        self._segments: list[tuple[np.dtype[Any], list[_Column]]] = []
        fields: list[tuple[str, str]] = list(lead)
        members: list[_Column] = []
        for column in columns:
            members.append(column)
            if not column.variable:
                fields.append((f"n{column.position}", "u1"))
            if column.dtype:
                fields.append((f"v{column.position}", column.dtype))
            if column.variable:
                self._segments.append((np.dtype(fields), members))
                fields, members = [], []
        if fields or not self._segments:
            self._segments.append((np.dtype(fields), members))
        last = self._segments[-1][1]
        self._fixed = len(self._segments) == 1 and not (last and last[-1].variable)

    def encode(self, batch: pa.RecordBatch, lead: Mapping[str, Any] | None = None) -> list[bytes]:
        """One byte string a row; ``lead`` are the leading fields, arrays or constants."""
        rows = batch.num_rows
        parts: list[pa.Array] = []
        for dtype, members in self._segments:
            header = np.zeros(rows, dtype)
            for name, value in (lead or {}).items() if not parts else ():
                header[name] = value
            tail: pa.Array | None = None
            for column in members:
                array = _plain(batch.column(column.position))
                if column.variable:
                    tail = _binary(array, nested=column.nested)
                    lengths = np.diff(_offsets(tail)) + 1
                    if array.null_count:
                        lengths[~_valid(array)] = 0
                    header[f"v{column.position}"] = lengths
                else:
                    _put_fixed(header, column, array, self.key)
            if self._fixed:
                found: list[bytes] = header.view(f"V{dtype.itemsize}").tolist()
                return found
            parts.append(_from_fixed(header))
            if tail is not None:
                parts.append(tail)
        joined = pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.large_binary()))
        return _to_list(joined)

    def decode(self, rows: Sequence[bytes]) -> pa.RecordBatch:
        """The rows again. Raises `CorruptCheckpointError` if they cannot be rows of this schema."""
        data = b"".join(rows)
        count = len(rows)
        if self._fixed:
            (dtype, members) = self._segments[0]
            if len(data) != count * dtype.itemsize:
                raise CorruptCheckpointError(
                    f"rows of local state have {len(data)} bytes where {count} rows of {dtype.itemsize} were expected; "
                    "the files are not those of this table: start from another checkpoint"
                )
            header = np.frombuffer(data, dtype, count)
            arrays = [_get_fixed(header, column, self.key) for column in members]
            return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        lengths = np.fromiter(map(len, rows), np.int64, count)
        ends = np.cumsum(lengths)
        at = ends - lengths
        flat = np.frombuffer(data, np.uint8)
        arrays = []
        for dtype, members in self._segments:
            header = _gather(flat, at, dtype)
            at = at + dtype.itemsize
            for column in members:
                if not column.variable:
                    arrays.append(_get_fixed(header, column, self.key))
                    continue
                sizes = header[f"v{column.position}"].astype(np.int64) - 1
                valid = sizes >= 0
                np.maximum(sizes, 0, out=sizes)
                if bool((at + sizes > ends).any()):
                    raise _torn()
                arrays.append(_from_binary(flat, at, sizes, valid, column))
                at = at + sizes
        if bool((at != ends).any()):
            raise _torn()
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def _torn() -> CorruptCheckpointError:
    return CorruptCheckpointError(
        "rows of local state do not have the lengths that they say; "
        "the files are not those of this table: start from another checkpoint"
    )


def _column(position: int, kind: pa.DataType, key: bool) -> _Column:
    storage = _storage_type(kind)
    if _types.is_null(storage):
        return _Column(position, kind, "")
    if _is_bytes(storage):
        return _Column(position, kind, _LENGTH, variable=True)
    if _types.is_boolean(storage):
        return _Column(position, kind, "u1")
    if _types.is_integer(storage) or _types.is_floating(storage) or _is_temporal(storage):
        width = storage.bit_width // 8
        return _Column(position, kind, f"{'>' if key else '<'}u{width}")
    if _types.is_decimal(storage) or _types.is_fixed_size_binary(storage) or _types.is_interval(storage):
        width = storage.bit_width // 8
        return _Column(position, kind, f"V{width}" if width else "")
    if key:
        raise StateSchemaError(
            f"a key of state cannot have a column of type {kind}; use a number, a string, bytes, or a date or time"
        )
    return _Column(position, kind, _LENGTH, variable=True, nested=True)


def _is_bytes(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            _types.is_string,
            _types.is_binary,
            _types.is_large_string,
            _types.is_large_binary,
            _types.is_string_view,
            _types.is_binary_view,
        )
    )


def _is_temporal(kind: pa.DataType) -> bool:
    return bool(_types.is_date(kind) or _types.is_time(kind) or _types.is_timestamp(kind) or _types.is_duration(kind))


def _storage_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        return _storage_type(kind.storage_type)
    if _types.is_dictionary(kind) or _types.is_run_end_encoded(kind):
        return _storage_type(kind.value_type)
    return kind


def _plain(array: pa.Array) -> pa.Array:
    """Extension types as their storage, encoded columns as their values."""
    if isinstance(array.type, pa.BaseExtensionType):
        return _plain(array.storage)
    if _types.is_dictionary(array.type):
        return _plain(array.dictionary_decode())
    if _types.is_run_end_encoded(array.type):
        return _plain(pc.run_end_decode(array))
    return array


def _restore_kind(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type.equals(kind):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _restore_kind(array, kind.storage_type))
    if _types.is_dictionary(kind):
        return _restore_kind(array, kind.value_type).dictionary_encode().cast(kind)
    if _types.is_run_end_encoded(kind):
        return pc.run_end_encode(_restore_kind(array, kind.value_type), run_end_type=kind.run_end_type)
    return array.cast(kind)


def _valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
    return found


# ------------------------------------------------------------------------------------------------------- fixed width


def _put_fixed(header: AnyArray, column: _Column, array: pa.Array, key: bool) -> None:
    valid = _valid(array) if array.null_count else None
    header[f"n{column.position}"] = 1 if valid is None else valid
    if not column.dtype or not len(array):
        if _types.is_null(array.type):
            header[f"n{column.position}"] = 0
        return
    values = _payload(array, key)
    if valid is not None:
        values = values.copy()
        values[~valid] = np.zeros((), values.dtype)
    header[f"v{column.position}"] = values


def _payload(array: pa.Array, key: bool) -> AnyArray:
    """The values as unsigned integers or raw bytes of the same width."""
    kind = array.type
    if _types.is_boolean(kind):
        array = array.cast(pa.uint8())
        kind = array.type
    width = kind.bit_width // 8
    raw = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    if _types.is_decimal(kind) or _types.is_fixed_size_binary(kind) or _types.is_interval(kind):
        return raw.view(f"V{width}")
    if key and _types.is_floating(kind):
        floats = raw.view(f"f{width}") + np.zeros((), f"f{width}")  # the addition turns -0.0 into 0.0
        floats[np.isnan(floats)] = np.nan
        bits: AnyArray = floats.view(f"u{width}")
        bits[np.isnan(floats)] = np.array(np.nan, f"f{width}").view(f"u{width}")
        return bits
    words: AnyArray = raw.view(f"u{width}")
    if key and not (_types.is_unsigned_integer(kind)):
        words = words ^ np.array(1 << (8 * width - 1), words.dtype)
    return words


def _get_fixed(header: AnyArray, column: _Column, key: bool) -> pa.Array:
    flags = header[f"n{column.position}"]
    rows = len(header)
    kind = _storage_type(column.kind)
    if not column.dtype and _types.is_null(kind):
        return _restore_kind(pa.nulls(rows), column.kind)
    validity = None
    if not flags.all():
        validity = pa.py_buffer(np.packbits(flags, bitorder="little"))
    if not column.dtype:
        data = pa.py_buffer(b"")
    else:
        values = header[f"v{column.position}"]
        if _types.is_boolean(kind):
            data = pa.py_buffer(np.packbits(values, bitorder="little"))
        else:
            if key and values.dtype.kind == "u":
                values = values.astype(values.dtype.newbyteorder("="))
                if not (_types.is_unsigned_integer(kind) or _types.is_floating(kind)):
                    values ^= np.array(1 << (8 * values.itemsize - 1), values.dtype)
                    if validity is not None:
                        values[flags == 0] = 0
            data = pa.py_buffer(np.ascontiguousarray(values))
    return _restore_kind(pa.Array.from_buffers(kind, rows, [validity, data]), column.kind)


# ---------------------------------------------------------------------------------------------------- variable width


def _binary(array: pa.Array, *, nested: bool) -> pa.Array:
    """As large binary without nulls, empty where there was one."""
    if nested:
        return _serialize(array)
    if _types.is_string(array.type) or _types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    wide = array if _types.is_large_binary(array.type) else array.cast(pa.large_binary())
    return wide.fill_null(b"") if wide.null_count else wide


def _serialize(array: pa.Array) -> pa.Array:
    schema = pa.schema([pa.field("", array.type)])
    valid = _valid(array)
    # `take` gives every row buffers of its own, without what its neighbours or a slice left in them.
    rows = [
        pa.RecordBatch.from_arrays([array.take(pa.array([row]))], schema=schema).serialize().to_pybytes()
        if valid[row]
        else b""
        for row in range(len(array))
    ]
    return pa.array(rows, pa.large_binary())


def _offsets(array: pa.Array) -> npt.NDArray[np.int64]:
    """Of a large binary array."""
    if not len(array):
        return np.zeros(1, np.int64)
    return np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8)


def _from_fixed(header: AnyArray) -> pa.Array:
    width = header.dtype.itemsize
    offsets = np.arange(len(header) + 1, dtype=np.int64) * width
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(header.view(np.uint8))]
    return pa.Array.from_buffers(pa.large_binary(), len(header), buffers)


def _to_list(array: pa.Array) -> list[bytes]:
    """Faster than `to_pylist`, which makes a scalar of every value."""
    offsets = _offsets(array)
    base, end = int(offsets[0]), int(offsets[-1])
    data = array.buffers()[2]
    flat = b"" if data is None else data.slice(base, end - base).to_pybytes()
    bounds = (offsets - base).tolist()
    return list(map(flat.__getitem__, map(slice, bounds[:-1], bounds[1:])))


def _gather(flat: AnyArray, at: npt.NDArray[np.int64], dtype: np.dtype[Any]) -> AnyArray:
    """Records of ``dtype`` at any offsets: a view that has one at every byte, indexed."""
    if not len(at):
        return np.zeros(0, dtype)
    last = len(flat) - dtype.itemsize
    if last < 0 or int(at.max()) > last:
        raise _torn()
    everywhere: AnyArray = np.ndarray((last + 1,), f"V{dtype.itemsize}", flat.data, 0, (1,))
    found: AnyArray = everywhere[at].view(dtype)
    return found


def _from_binary(
    flat: AnyArray,
    at: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    valid: npt.NDArray[np.bool_],
    column: _Column,
) -> pa.Array:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    places = np.repeat(at - offsets[:-1], sizes)
    places += np.arange(len(places), dtype=np.int64)
    data = pa.py_buffer(flat[places])
    validity = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    kind = _storage_type(column.kind)
    if column.nested:
        return _deserialize(data, offsets, valid, kind, column.kind)
    text = _types.is_string(kind) or _types.is_large_string(kind) or _types.is_string_view(kind)
    wide = pa.large_string() if text else pa.large_binary()
    array = pa.Array.from_buffers(wide, len(sizes), [validity, pa.py_buffer(offsets), data])
    return _restore_kind(array.cast(kind), column.kind)


def _deserialize(
    data: pa.Buffer, offsets: AnyArray, valid: npt.NDArray[np.bool_], kind: pa.DataType, whole: pa.DataType
) -> pa.Array:
    schema = pa.schema([pa.field("", kind)])
    arrays = [
        pa.ipc.read_record_batch(data.slice(start, end - start), schema).column(0) if there else pa.nulls(1, kind)
        for start, end, there in zip(offsets[:-1].tolist(), offsets[1:].tolist(), valid.tolist(), strict=True)
    ]
    array = pa.concat_arrays(arrays) if arrays else pa.nulls(0, kind)
    return _restore_kind(array, whole)
