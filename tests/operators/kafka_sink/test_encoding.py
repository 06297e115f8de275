"""Rows as messages: JSON by column, keys, headers, times, Avro and Arrow."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.json_lines import json_texts
from rayflow.operators.kafka.avro import AvroFormat, RegistryAvroFormat
from rayflow.operators.kafka.encoding import Encoder, Encoding, Messages, avro_schema, fixed_headers
from rayflow.operators.kafka.formats import ArrowFormat, JsonFormat
from rayflow.operators.kafka.transactions import Marker, Owner, owner_of, transactional_id

UTC = dt.UTC


def encode(batch: pa.RecordBatch, **how: Any) -> Messages:
    return Encoder(Encoding(**how), batch.schema, "step 'out'").encode(batch)


def bytes_of(messages: Messages) -> list[bytes]:
    assert None not in messages.values
    return [value for value in messages.values if value is not None]


def test_json_of_every_kind_of_column() -> None:
    batch = pa.record_batch(
        {
            "i": pa.array([1, None], pa.int8()),
            "u": pa.array([2**64 - 1, 0], pa.uint64()),
            "f": pa.array([1.5, math.nan]),
            "g": pa.array([1e300, -math.inf]),
            "b": pa.array([True, None]),
            "s": pa.array(['quote " back \\ line \n bell \x07 é', None]),
            "d": pa.array(["a", "b"]).dictionary_encode(),
            "t": pa.array([dt.datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), None], pa.timestamp("ms", "UTC")),
            "n": pa.array([1_704_164_645_000_000, None], pa.timestamp("us")),
            "day": pa.array([dt.date(2024, 1, 2), None]),
            "dec": pa.array([decimal.Decimal("12345678901234567890.10"), None]),
            "bin": pa.array([b"\x00\xff", None]),
            "list": pa.array([[1, None], None]),
            "st": pa.array([{"a": math.inf, "day": dt.date(2024, 1, 2)}, None]),
            "wait": pa.array([90, None], pa.duration("s")),
            "null": pa.nulls(2),
        }
    )
    first, second = json_texts(batch).to_pylist()
    assert json.loads(first) == {
        "i": 1, "u": 2**64 - 1, "f": 1.5, "g": 1e300, "b": True, "s": 'quote " back \\ line \n bell \x07 é', "d": "a",
        "t": "2024-01-02T03:04:05.000Z", "n": "2024-01-02T03:04:05.000000", "day": "2024-01-02",
        "dec": 1.2345678901234567e19, "bin": "AP8=", "list": [1, None], "st": {"a": None, "day": "2024-01-02"},
        "wait": 90, "null": None,
    }  # fmt: skip
    assert '"dec":12345678901234567890.10' in first
    assert {k: v for k, v in json.loads(second).items() if v is not None} == {"u": 0, "d": "b"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False, allow_infinity=False)), min_size=1))
def test_json_says_what_the_standard_library_says(rows: list[tuple[str, float]]) -> None:
    batch = pa.record_batch({"a\"'\n": [s for s, _ in rows], "f": pa.array([f for _, f in rows], pa.float64())})
    found = [json.loads(each) for each in json_texts(batch).to_pylist()]
    assert found == [{"a\"'\n": s, "f": f} for s, f in rows]


def test_what_is_written_is_read_back() -> None:
    batch = pa.record_batch(
        {
            "i": pa.array([1, None, 3]),
            "f": pa.array([1.5, 2.0, None]),
            "s": pa.array(["x", 'é\n"', None]),
            "t": pa.array([1_704_070_923_000_004, None, None], pa.timestamp("us")),
            "day": pa.array([dt.date(2024, 1, 2), None, None]),
        }
    )
    assert JsonFormat(batch.schema).decode(bytes_of(encode(batch))).batch.equals(batch)
    assert ArrowFormat(batch.schema).decode(bytes_of(encode(batch, format="arrow"))).batch.equals(batch)
    avro = avro_schema(batch.schema)
    assert AvroFormat(avro).decode(bytes_of(encode(batch, format="avro"))).batch.to_pylist() == batch.to_pylist()
    framed = encode(batch, format="avro", avro_schema_id=7)
    assert framed.values[0] is not None
    assert framed.values[0][:5] == b"\x00\x00\x00\x00\x07"
    read = RegistryAvroFormat(avro, {7: avro}).decode(bytes_of(framed)).batch
    assert read.to_pylist() == batch.to_pylist()


def test_keys_times_partitions_and_headers() -> None:
    time = dt.datetime(2024, 1, 1, tzinfo=UTC)
    batch = pa.record_batch(
        {
            "k": ["a", None],
            "n": [1, None],
            "t": pa.array([time, None], pa.timestamp("us", "UTC")),
            "p": [1, 0],
            "h": pa.array([[("x", b"1")], None], pa.map_(pa.string(), pa.binary())),
        }
    )
    found = encode(batch, key=("k",), timestamp="t", partition="p", headers="h")
    assert found.values == [b'{"k":"a","n":1}', b'{"k":null,"n":null}']
    assert found.keys == [b"a", None]
    assert found.timestamps == [int(time.timestamp() * 1000), 0]
    assert found.partitions == [1, 0]
    assert found.headers == [[("x", b"1")], []]
    plain = batch.drop_columns(["h"])
    assert encode(plain, key=("n",)).keys == [b"1", None]
    assert encode(plain, key=("k", "n")).keys == [b'{"k":"a","n":1}', b'{"k":null,"n":null}']
    constant = encode(batch.select(["k"]), headers=fixed_headers({"app": "x"}))
    assert constant.headers == [[("app", b"x")]] * 2


def test_raw_values_and_tombstones() -> None:
    batch = pa.record_batch({"k": ["a", "b"], "v": pa.array([b"\x00", None])})
    found = encode(batch, format="raw", key=("k",))
    assert found.values == [b"\x00", None]
    assert found.keys == [b"a", b"b"]
    with pytest.raises(PlanError, match='one column beside the key, or one called "value"'):
        Encoding("raw").check(batch.schema)
    assert Encoding("raw").check(pa.schema([("a", pa.int64()), ("value", pa.string())])).names == ["value"]


def test_what_cannot_be_encoded_is_said() -> None:
    batch = pa.record_batch({"p": [1, None], "x": [1, 2]})
    with pytest.raises(DataError, match=r"step 'out' expected a partition number in column 'p', got null"):
        encode(batch, partition="p")
    with pytest.raises(ConfigError, match=r"no Avro type for column 'l' of type list"):
        avro_schema(pa.schema([("l", pa.list_(pa.int64()))]))
    strict = json.dumps({"type": "record", "name": "r", "fields": [{"name": "other", "type": "long"}]})
    with pytest.raises(DataError, match="step 'out' cannot encode"):
        encode(batch, format="avro", avro_schema=strict)


def test_transactional_ids_are_told_apart_whatever_names_are() -> None:
    names = ["a", "a:b", "b", "a%3Ab", "a-b", "ü x/1", ":0:0"]
    ids = {transactional_id(job, op, 1, 2): (job, op) for job in names for op in names}
    assert len(ids) == len(names) ** 2
    for name, (job, op) in ids.items():
        assert owner_of(name) == Owner(job, op, 1, 2)
    for foreign in ("rayflow-a:b:1", "a:b:1:2", "rayflow-x", "rayflow-a:b:1:2:3"):
        assert owner_of(foreign) is None


def test_the_marker_keeps_the_last_checkpoint_of_the_last_runs() -> None:
    marker = Marker()
    for n in range(20):
        marker = marker.after(f"run {n}", n).after(f"run {n}", n + 1)
    assert Marker.decode(marker.encode()) == marker
    assert [run for run, _ in marker.runs] == [f"run {n}" for n in range(4, 20)]
    assert dict(marker.runs)["run 19"] == 20
    assert len(Marker((("x" * 65, 10**9),) * 16).encode()) < 4096  # what brokers allow
