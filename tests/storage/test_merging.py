"""Pieces of a state become one table: appended, or one row a key, the last."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import CorruptCheckpointError
from rayflow.operators.base import DELETED, EXPIRES
from rayflow.storage.merging import merge_pieces

SCHEMA = pa.schema([("k", pa.int64()), ("v", pa.int64()), (DELETED, pa.bool_())])
Row = tuple[int | None, int | None, bool | None]

rows = st.tuples(
    st.none() | st.integers(0, 5), st.none() | st.integers(0, 1000), st.sampled_from([None, False, False, True])
)


def piece(given_rows: list[Row]) -> pa.Table:
    columns = [pa.array([row[i] for row in given_rows], field.type) for i, field in enumerate(SCHEMA)]
    return pa.table(columns, schema=SCHEMA)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(rows, max_size=8), min_size=1, max_size=5))
def test_upsert_is_what_a_dict_would_do(pieces: list[list[Row]]) -> None:
    expected: dict[int | None, int | None] = {}
    for part in pieces:
        for key, value, gone in part:
            expected.pop(key, None)
            if not gone:
                expected[key] = value
    merged = merge_pieces([piece(p) for p in pieces], key_columns=["k"], mode="upsert")
    assert merged.column_names == ["k", "v"]
    assert list(zip(*merged.to_pydict().values(), strict=True)) == list(expected.items())


def test_append_keeps_all_rows_in_the_order_of_the_pieces() -> None:
    first, second = pa.table({"k": [1, 1]}), pa.table({"k": [0, 1]})
    for keys in (None, ["k"]):
        assert merge_pieces([first, second], key_columns=keys, mode="append").to_pydict() == {"k": [1, 1, 0, 1]}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (pa.float64(), [float("nan"), 0.0, -float("nan"), -0.0, None, None]),
        (pa.large_binary(), [b"a", b"b", b"a", b"b", None, None]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a", "b", None, None]),
        (pa.decimal128(5, 1), [1, 2, 1, 2, None, None]),
        (pa.timestamp("ns", "UTC"), [1, 2, 1, 2, None, None]),
        (pa.null(), [None] * 6),
    ],
    ids=str,
)
def test_keys_are_equal_as_their_hashes_are(kind: pa.DataType, keys: list[Any]) -> None:
    tables = [
        pa.table({"k": pa.array(keys[i : i + 2], kind), "v": [i, i + 1]}).replace_schema_metadata({"piece": str(i)})
        for i in (0, 2, 4)
    ]
    merged = merge_pieces(tables, key_columns=["k"], mode="upsert")
    assert merged["v"].to_pylist() == ([5] if kind == pa.null() else [2, 3, 5])
    assert merged.schema.field("k").type.equals(kind)


def test_keys_of_several_columns() -> None:
    older = pa.table({"a": [1, 1], "b": ["x", None], "v": [1, 2]})
    newer = pa.table({"a": [1, 2], "b": [None, "x"], "v": [3, 4]})
    merged = merge_pieces([older, newer], key_columns=["a", "b"], mode="upsert")
    assert merged.to_pydict() == {"a": [1, 1, 2], "b": ["x", None, "x"], "v": [1, 3, 4]}


def test_an_expired_row_hides_the_earlier_ones_of_its_key() -> None:
    older = pa.table({"k": [1, 2, 3], "v": [1, 2, 3], EXPIRES: [100, 100, None]})
    newer = pa.table({"k": [1], "v": [9], EXPIRES: [10]})
    both = {"key_columns": ["k"], "mode": "upsert"}
    alive = merge_pieces([older, newer], **both, now_us=10)  # type: ignore[arg-type]
    assert alive.to_pydict() == {"k": [2, 3], "v": [2, 3], EXPIRES: [100, None]}
    everything = merge_pieces([older, newer], **both)  # type: ignore[arg-type]
    assert everything["v"].to_pylist() == [2, 3, 9]


def test_pieces_from_before_a_migration_take_the_new_columns_wherever_they_stand() -> None:
    old = pa.table({"k": pa.array([1, 2], pa.int32()), "v": pa.array([1, 2], pa.int8())})
    new = pa.table({"k": [1], "w": [0.5], "v": [7], DELETED: [False]})
    for pieces, expected in (([old, new], [2, 7]), ([new, old], [1, 2])):
        merged = merge_pieces(pieces, key_columns=["k"], mode="upsert")
        assert merged.schema.equals(new.drop_columns([DELETED]).schema)
        assert merged["v"].to_pylist() == expected


def test_what_cannot_be_pieces_of_one_state() -> None:
    one = pa.table({"k": [1], "v": [1]})
    with pytest.raises(CorruptCheckpointError, match="^state 's' has pieces .* column 'v' was string"):
        merge_pieces([one, pa.table({"k": [1], "v": ["x"]})], key_columns=["k"], mode="append", where="state 's'")
    with pytest.raises(CorruptCheckpointError, match="key columns ..x.., but its columns are \\['k', 'v'\\]"):
        merge_pieces([one], key_columns=["x"], mode="upsert")
    with pytest.raises(CorruptCheckpointError, match="has mode 'later'"):
        merge_pieces([one], key_columns=["k"], mode="later")
    with pytest.raises(CorruptCheckpointError, match="no piece"):
        merge_pieces([], key_columns=["k"], mode="append")
