"""Keys of all types are found, told apart and freed, whatever their hashes are."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from rayflow.operators.state.index import Hasher, KeyIndex
from rayflow.partition import hash_columns


def _constant(columns: Sequence[pa.Array], names: Sequence[str]) -> npt.NDArray[np.uint64]:
    return np.full(len(columns[0]), 0xFFFF_FFFF_FFFF_FFFF, np.uint64)


def _weak(columns: Sequence[pa.Array], names: Sequence[str]) -> npt.NDArray[np.uint64]:
    """Four hashes in all; whole entries of different keys are equal."""
    return hash_columns(columns, names) % np.uint64(4) * np.uint64(0x1_0000_0001_0000_0001 & (2**64 - 1))


WHEN = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
VALUES: dict[str, tuple[pa.DataType, list[Any]]] = {
    "int64": (pa.int64(), [0, 1, -1, 2**63 - 1, -(2**63)]),
    "uint8": (pa.uint8(), [0, 1, 255]),
    "bool": (pa.bool_(), [True, False]),
    "double": (pa.float64(), [0.0, 1.5, float("inf"), -1.5]),
    "float16": (pa.float16(), [0.0, 1.5]),
    "date32": (pa.date32(), [datetime.date(2024, 1, 1), datetime.date(1969, 1, 1)]),
    "timestamp": (pa.timestamp("us", "UTC"), [WHEN, WHEN + datetime.timedelta(microseconds=1)]),
    "time32": (pa.time32("ms"), [datetime.time(1), datetime.time(2)]),
    "duration": (pa.duration("s"), [datetime.timedelta(1), datetime.timedelta(2)]),
    "decimal": (pa.decimal128(10, 2), [decimal.Decimal("1.50"), decimal.Decimal("-1.50")]),
    "string": (pa.string(), ["", "a", "a\0", "long " * 100, "ä"]),
    "large_string": (pa.large_string(), ["", "b"]),
    "string_view": (pa.string_view(), ["", "b", "c" * 50]),
    "binary": (pa.binary(), [b"", b"\0", b"\xff" * 20]),
    "fixed": (pa.binary(3), [b"abc", b"abd"]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["x", "y"]),
}


@pytest.mark.parametrize("hasher", [hash_columns, _weak, _constant], ids=["real", "weak", "constant"])
@pytest.mark.parametrize("name", VALUES)
def test_keys_of_every_type_are_told_apart_and_given_back(name: str, hasher: Hasher) -> None:
    kind, values = VALUES[name]
    values = [*values, None]
    index = KeyIndex(pa.schema([("k", kind)]), hasher)
    slots, new = index.insert([pa.array(values + values[::-1], kind)])
    assert len(set(slots.tolist())) == len(values) == index.count == len(new)
    assert slots.tolist()[: len(values)] == slots.tolist()[len(values) :][::-1]
    given = index.keys(slots[: len(values)])[0]
    assert given.type == kind
    assert given.to_pylist() == values
    assert index.find([pa.array(values, kind)]).tolist() == slots.tolist()[: len(values)]
    index.remove(slots[:1])
    assert index.find([pa.array(values, kind)]).tolist() == [-1, *slots.tolist()[1 : len(values)]]


def test_all_nans_are_one_key_and_so_are_both_zeros() -> None:
    other_nan = np.frombuffer(np.uint64(0xFFF8_0000_0000_0001).tobytes(), np.float64)[0]
    index = KeyIndex(pa.schema([("k", pa.float64())]))
    slots, new = index.insert([pa.array(np.array([np.nan, other_nan, 0.0, -0.0]))])
    assert slots[0] == slots[1]
    assert slots[2] == slots[3]
    assert len(new) == 2


def test_a_null_is_no_zero() -> None:
    index = KeyIndex(pa.schema([("k", pa.int64())]), _constant)
    slots, _ = index.insert([pa.array([0])])
    assert index.find([pa.array([None, 0], pa.int64())]).tolist() == [-1, slots[0]]
    index.insert([pa.array([None], pa.int64())])
    assert index.count == 2


def test_keys_of_several_columns_are_compared_in_all_of_them() -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.string())])
    index = KeyIndex(schema, _constant)
    keys = [pa.array([1, 1, 2, None]), pa.array(["x", "y", "x", None])]
    slots, _ = index.insert(keys)
    assert len(set(slots.tolist())) == 4
    assert index.find([pa.array([2, None]), pa.array(["y", None])]).tolist() == [-1, slots[3]]


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()], ids=str)
def test_growing_removing_and_reusing_agree_with_a_dict(kind: pa.DataType) -> None:
    rng = np.random.default_rng(7)
    index = KeyIndex(pa.schema([("k", kind)]))
    model: dict[Any, int] = {}
    for _ in range(60):
        batch = pa.array(rng.integers(0, 20_000, 1_500)).cast(kind)
        slots, new = index.insert([batch])
        for key, slot in zip(batch.to_pylist(), slots.tolist(), strict=True):
            assert model.setdefault(key, slot) == slot
        assert len(np.unique(new)) == len(new)
        gone = pa.array(rng.integers(0, 20_000, 1_200)).cast(kind)
        found = index.find([gone])
        assert found.tolist() == [model.get(key, -1) for key in gone.to_pylist()]
        index.remove(index.distinct(found[found >= 0]))
        for key in gone.to_pylist():
            model.pop(key, None)
        assert index.count == len(model) == int(np.count_nonzero(index.alive))
    assert index.high < 25_000, "slots are reused"


def test_a_column_of_nulls_alone_is_one_key() -> None:
    index = KeyIndex(pa.schema([("k", pa.null())]))
    slots, new = index.insert([pa.nulls(3)])
    assert len(new) == 1
    assert slots.tolist() == index.find([pa.nulls(3)]).tolist()
