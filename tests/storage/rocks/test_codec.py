"""Rows to bytes and back over all types; keys that are one key have one encoding, and others another."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import CorruptCheckpointError, StateSchemaError
from rayflow.storage.rocks.codec import RowCodec

I64 = st.integers(-(2**63), 2**63 - 1)
FLAT: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int8(): st.integers(-128, 127),
    pa.uint16(): st.integers(0, 65535),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): I64,
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.date32(): st.integers(-1000, 100_000),
    pa.timestamp("us", "UTC"): I64.map(lambda v: v // 10**6),
    pa.time64("ns"): st.integers(0, 86_399_999_999).map(lambda v: v * 1000),
    pa.duration("ms"): st.integers(-(2**40), 2**40),
    pa.decimal128(20, 3): st.decimals(-(10**9), 10**9, places=3),
    pa.decimal256(50, 0): st.integers(-(10**40), 10**40).map(Decimal),
    pa.binary(3): st.binary(min_size=3, max_size=3),
    pa.string(): st.text(max_size=20),
    pa.large_string(): st.text(max_size=20),
    pa.binary(): st.binary(max_size=20),
    pa.string_view(): st.text(max_size=20),
    pa.dictionary(pa.int8(), pa.string()): st.sampled_from(["a", "", "ccc"]),
    pa.null(): st.none(),
}
NESTED: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.list_(pa.int64()): st.lists(st.none() | I64, max_size=4),
    pa.struct([("x", pa.int32()), ("y", pa.string())]): st.fixed_dictionaries(
        {"x": st.none() | st.integers(0, 9), "y": st.none() | st.text(max_size=5)}
    ),
    pa.map_(pa.string(), pa.float64()): st.lists(
        st.tuples(st.text(max_size=3), st.floats(allow_nan=False)), max_size=3
    ),
    pa.list_(pa.list_(pa.string())): st.lists(st.lists(st.text(max_size=3), max_size=2), max_size=2),
}


@st.composite
def batches(draw: st.DrawFn, kinds: dict[pa.DataType, st.SearchStrategy[Any]]) -> pa.RecordBatch:
    chosen = draw(st.lists(st.sampled_from(sorted(kinds, key=str)), min_size=1, max_size=4))
    rows = draw(st.integers(0, 12))
    arrays = [pa.array(draw(st.lists(st.none() | kinds[kind], min_size=rows, max_size=rows)), kind) for kind in chosen]
    whole = pa.RecordBatch.from_arrays(arrays, names=[f"c{i}" for i in range(len(chosen))])
    start = draw(st.integers(0, rows))
    return whole.slice(start, draw(st.integers(0, rows - start)))


@settings(max_examples=60, deadline=None)
@given(batches(FLAT | NESTED))
def test_values_come_back(batch: pa.RecordBatch) -> None:
    codec = RowCodec(batch.schema, lead=(("version", "u1"),))
    encoded = codec.encode(batch, {"version": 7})
    assert all(row[0] == 7 for row in encoded)
    again = codec.decode(encoded)
    again.validate(full=True)
    assert again.to_pylist() == batch.to_pylist()
    assert again.schema == batch.schema
    rows = [codec.encode(batch.slice(i, 1), {"version": 7})[0] for i in range(batch.num_rows)]
    assert rows == encoded, "what a row's bytes are must not depend on the batch it stands in"


@settings(max_examples=60, deadline=None)
@given(batches(FLAT))
def test_keys_come_back_and_tell_rows_apart(batch: pa.RecordBatch) -> None:
    lead = (("group", ">u2"), ("table", "u1"))
    codec = RowCodec(batch.schema, lead=lead, key=True)
    groups = np.arange(batch.num_rows, dtype=np.uint16) % 2
    encoded = codec.encode(batch, {"group": groups, "table": 3})
    assert codec.decode(encoded).to_pylist() == batch.to_pylist()
    rows = [(int(g), *row.values()) for g, row in zip(groups, batch.to_pylist(), strict=True)]
    assert len(set(encoded)) == len(set(rows))
    first = RowCodec(pa.schema([batch.schema.field(0)]), lead=lead, key=True)
    starts = first.encode(batch.select([0]), {"group": groups, "table": 3})
    for start, of in zip(starts, rows, strict=True):
        assert [row.startswith(start) for row in encoded] == [row[:2] == of[:2] for row in rows]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_floats_that_are_one_key_have_one_encoding(kind: pa.DataType) -> None:
    codec = RowCodec(pa.schema([("k", kind)]), key=True)
    odd_nan = np.array([-1], f"i{kind.bit_width // 8}").view(f"f{kind.bit_width // 8}")
    values = [0.0, -0.0, math.nan, *odd_nan.tolist(), 1.5, None]
    zero, minus_zero, nan, other_nan, *rest = codec.encode(
        pa.record_batch([pa.array(values, kind)], schema=codec.schema)
    )
    assert zero == minus_zero
    assert nan == other_nan
    assert len({zero, nan, *rest}) == 4


def test_integers_sort_as_numbers() -> None:
    codec = RowCodec(pa.schema([("k", pa.int64())]), key=True)
    values = [-(2**63), -5, -1, 0, 1, 300, 2**63 - 1]
    encoded = codec.encode(pa.record_batch([pa.array(values)], schema=codec.schema))
    assert encoded == sorted(encoded)


def test_the_bytes_are_those_of_the_document() -> None:
    """Golden values: another result is another `FORMAT`."""
    key = RowCodec(
        pa.schema([("k", pa.int32()), ("s", pa.string())]), lead=(("group", ">u2"), ("table", "u1")), key=True
    )
    row = pa.record_batch([pa.array([1], pa.int32()), pa.array(["ab"])], schema=key.schema)
    assert key.encode(row, {"group": 258, "table": 4}) == [b"\x01\x02\x04\x01\x80\x00\x00\x01\x00\x00\x00\x03ab"]
    value = RowCodec(pa.schema([("a", pa.int16()), ("s", pa.string()), ("b", pa.bool_())]), lead=(("version", "u1"),))
    rows = pa.record_batch(
        [pa.array([1, None], pa.int16()), pa.array([None, ""]), pa.array([True, None])], schema=value.schema
    )
    assert value.encode(rows, {"version": 0}) == [
        b"\x00\x01\x01\x00\x00\x00\x00\x00\x01\x01",
        b"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00",
    ]


def test_torn_rows_are_refused() -> None:
    fixed = RowCodec(pa.schema([("a", pa.int64())]))
    with pytest.raises(CorruptCheckpointError):
        fixed.decode([b"\x01short"])
    text = RowCodec(pa.schema([("a", pa.string())]))
    for torn in (b"\x00\x00\x00\x09ab", b"\x00\x00", b"\x00\x00\x00\x01ab"):
        with pytest.raises(CorruptCheckpointError):
            text.decode([torn])


def test_a_key_of_lists_is_refused() -> None:
    with pytest.raises(StateSchemaError, match="list"):
        RowCodec(pa.schema([("k", pa.list_(pa.int64()))]), key=True)
