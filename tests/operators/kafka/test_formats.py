"""Formats decode lists of messages as each message alone would be, and no malformed one passes unnoticed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pyarrow as pa
import pyruhvro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import ConfigError, ConnectorError
from rayflow.operators.kafka.avro import AvroFormat, RegistryAvroFormat
from rayflow.operators.kafka.formats import ArrowFormat, Format, JsonFormat, Malformed, RawFormat

SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.string())])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "a": st.none() | st.integers(-(2**63), 2**63 - 1),
            "b": st.none() | st.text(st.characters(codec="utf-8")),
        }
    ),
    min_size=1,
    max_size=20,
)
AVRO = json.dumps(
    {
        "type": "record",
        "name": "r",
        "fields": [{"name": "a", "type": ["null", "long"]}, {"name": "b", "type": ["null", "string"]}],
    }
)


def record(*fields: dict[str, Any]) -> str:
    return json.dumps({"type": "record", "name": "r", "fields": list(fields)})


def avro(rows: Sequence[dict[str, Any]], schema: str = AVRO) -> list[bytes]:
    batch = pa.RecordBatch.from_pylist(list(rows), schema=pyruhvro.deserialize_array([], schema).schema)
    return [bytes(value) for array in pyruhvro.serialize_record_batch(batch, schema, 1) for value in array.to_pylist()]


def as_stream(rows: Sequence[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA))
    return bytes(sink.getvalue())


def bare(rows: Sequence[dict[str, Any]]) -> bytes:
    return bytes(pa.RecordBatch.from_pylist(list(rows), schema=SCHEMA).serialize())


ENCODERS: dict[str, tuple[Format, Callable[[Sequence[dict[str, Any]]], list[bytes]]]] = {
    "json": (JsonFormat(SCHEMA), lambda rows: [json.dumps(row).encode() for row in rows]),
    "pretty json": (
        JsonFormat(SCHEMA),
        lambda rows: [json.dumps(r, indent=1, ensure_ascii=False).encode() for r in rows],
    ),
    "avro": (AvroFormat(AVRO), avro),
    "framed avro": (
        RegistryAvroFormat(AVRO, {7: AVRO}),
        lambda rows: [struct.pack(">bI", 0, 7) + value for value in avro(rows)],
    ),
    "arrow streams": (ArrowFormat(SCHEMA), lambda rows: [as_stream([row]) for row in rows]),
    "arrow batches": (ArrowFormat(SCHEMA), lambda rows: [bare([row]) for row in rows]),
}


@pytest.mark.parametrize("name", ENCODERS)
@settings(deadline=None, max_examples=40)
@given(rows=ROWS)
def test_what_was_encoded_comes_back(name: str, rows: list[dict[str, Any]]) -> None:
    format, encode = ENCODERS[name]
    decoded = format.decode(encode(rows))
    assert decoded.batch.schema.equals(format.schema)
    assert decoded.batch.to_pylist() == rows


@settings(deadline=None, max_examples=60)
@given(rows=ROWS, cut=st.integers(0, 100), at=st.integers(0, 19))
@pytest.mark.parametrize("name", ["json", "pretty json", "avro", "arrow streams", "arrow batches"])
def test_a_torn_message_is_malformed_or_whole(name: str, rows: list[dict[str, Any]], cut: int, at: int) -> None:
    format, encode = ENCODERS[name]
    values = encode(rows)
    at %= len(values)
    values[at] = values[at][: cut % len(values[at])]
    try:
        decoded = format.decode(values).batch
    except Malformed:
        return
    alone = format.decode([values[at]]).batch
    assert decoded.slice(at, 1).equals(alone) or name.startswith("arrow")
    assert decoded.slice(0, at).to_pylist() == rows[:at]


BAD_JSON = {
    "empty": b"",
    "blank": b"  \n",
    "null": b"null",
    "a number": b"5",
    "a list": b'[{"a": 1}]',
    "two objects": b'{"a": 1}{"a": 2}',
    "two lines": b'{"a": 1}\n{"a": 2}',
    "another row": b'{"a": 1}}\n{"v":{"a": 2}',
    "half": b'{"a": 1',
    "the other half": b"}",
    "a name twice": b'{"a": 1, "a": 2}',
    "another type": b'{"a": "x"}',
    "too large": b'{"a": 99999999999999999999}',
    "no integer": b'{"a": 1.5}',
    "no text": b'{"b": "\xff\xfe"}',
    "a raw newline": b'{"b": "x\ny"}',
    "rubbish": b"\x00\x01\x02",
}


@pytest.mark.parametrize("bad", BAD_JSON.values(), ids=BAD_JSON.keys())
@pytest.mark.parametrize("at", [0, 1, 2])
def test_bad_json_does_not_pass_among_good(bad: bytes, at: int) -> None:
    values = [b'{"a": 1}', b'{"a": 2}']
    values.insert(at, bad)
    with pytest.raises(Malformed):
        JsonFormat(SCHEMA).decode(values)


def test_bad_messages_do_not_make_up_for_each_other() -> None:
    """Joined by newlines alone these would be as many rows as messages."""
    for values in (
        [b"", b'{"a": 1}{"a": 2}'],
        [b'{"a":', b"1}", b'{"a": 1}{"a": 2}'],
        [b'{"a": 1, "x": "', b'"}', b"{}{}"],
    ):
        with pytest.raises(Malformed):
            JsonFormat(SCHEMA).decode(values)


def test_json_schema_drift() -> None:
    found = JsonFormat(SCHEMA).decode([b'{"a": 1, "new": {"deep": [1, "x"]}}', b'{"new": 5}', b"{}"])
    assert found.batch.to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": None}, {"a": None, "b": None}]


def test_json_types() -> None:
    schema = pa.schema(
        [
            ("day", pa.date32()),
            ("at", pa.timestamp("us", "UTC")),
            ("deep", pa.struct([("day", pa.date32()), ("n", pa.list_(pa.float32()))])),
            ("price", pa.decimal128(10, 2)),
        ]
    )
    deep = b'{"day": "2026-01-01", "n": [1, 2.5]}'
    value = b'{"day": "2026-11-22", "at": "2026-11-22T10:00:00+02:00", "price": "1.25", "deep": ' + deep + b"}"
    (row,) = JsonFormat(schema).decode([value]).batch.to_pylist()
    assert (row["day"], row["at"]) == (date(2026, 11, 22), datetime(2026, 11, 22, 8, tzinfo=UTC))
    assert row["deep"] == {"day": date(2026, 1, 1), "n": [1.0, 2.5]}
    assert str(row["price"]) == "1.25"
    with pytest.raises(ConfigError, match="cannot read columns"):
        JsonFormat(pa.schema([("m", pa.map_(pa.string(), pa.int64()))]))


def test_raw_is_the_value() -> None:
    assert RawFormat().decode([b"", b"\xff"]).batch.to_pydict() == {"value": [b"", b"\xff"]}


def test_arrow_messages_hold_many_rows_and_other_columns() -> None:
    wider = pa.Table.from_pylist(
        [{"x": 1, "a": 1}, {"x": 2, "a": 2}], schema=pa.schema([("x", pa.int8()), ("a", pa.int32())])
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, wider.schema) as writer:
        writer.write_table(wider)
    decoded = ArrowFormat(SCHEMA).decode([as_stream([]), bytes(sink.getvalue()), bare([{"a": 3, "b": "c"}])])
    assert list(decoded.rows or ()) == [0, 2, 1]
    assert decoded.batch.to_pydict() == {"a": [1, 2, 3], "b": [None, None, "c"]}
    with pytest.raises(Malformed, match="'b' is int64, expected string"):
        ArrowFormat(pa.schema([("b", pa.string())])).decode([
            _stream_of(pa.table({"b": [1]})),
        ])  # fmt: skip


def _stream_of(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


OLD = record({"name": "a", "type": "int"})
NEW = record(
    {"name": "b", "type": "string", "default": "?"},
    {"name": "a", "type": "long"},
    {"name": "c", "type": ["null", "int"]},
)


def framed(schema_id: int, values: Sequence[bytes]) -> list[bytes]:
    return [struct.pack(">bI", 0, schema_id) + value for value in values]


def test_framed_avro_is_read_as_it_was_written_and_given_as_the_reader_wants() -> None:
    old, new = avro([{"a": 1}, {"a": 2}], OLD), avro([{"a": 3, "b": "x", "c": 5}], NEW)
    values = framed(1, old[:1]) + framed(2, new) + framed(1, old[1:])
    decoded = RegistryAvroFormat(NEW, {1: OLD, 2: NEW}).decode(values).batch
    assert decoded.to_pylist() == [
        {"b": "?", "a": 1, "c": None},
        {"b": "x", "a": 3, "c": 5},
        {"b": "?", "a": 2, "c": None},
    ]


def test_framed_avro_of_an_unknown_schema_or_without_frame_is_malformed() -> None:
    format = RegistryAvroFormat(OLD, {1: OLD})
    with pytest.raises(Malformed, match="schema 9; registry= has \\[1\\]"):
        format.decode(framed(9, avro([{"a": 1}], OLD)))
    for value in (b"", b"\x00\x00", b"\x01\x00\x00\x00\x01\x02"):
        with pytest.raises(Malformed, match="framing"):
            format.decode([value])


def test_a_registry_is_asked_once_for_each_schema() -> None:
    asked: list[str] = []

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            known = self.path.endswith("/1")
            body = json.dumps({"schema": OLD} if known else {"error_code": 40403}).encode()
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Registry)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        format = RegistryAvroFormat(OLD, url)
        for _ in range(2):
            assert format.decode(framed(1, avro([{"a": 4}], OLD))).batch.to_pylist() == [{"a": 4}]
        with pytest.raises(Malformed, match="schema 2, which the registry does not have"):
            format.decode(framed(2, avro([{"a": 4}], OLD)))
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/schemas/ids/1", "/schemas/ids/2"]
    with pytest.raises(ConnectorError, match="schema registry did not give"):
        RegistryAvroFormat(OLD, url).decode(framed(1, avro([{"a": 4}], OLD)))


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ("{", "no JSON"),
        ('"long"', "must be a record"),
        (record({"name": "x", "type": "bytes"}), "'r.x' is of type bytes"),
        (record({"name": "x", "type": ["int", "string"]}), "union of 2 types"),
        (
            record({"name": "x", "type": {"type": "array", "items": {"type": "fixed", "name": "F", "size": 2}}}),
            "of type fixed",
        ),
        (record({"name": "x", "type": {"type": "bytes", "logicalType": "decimal", "precision": 3}}), "decimal"),
    ],
)
def test_avro_schemas_that_cannot_be_read_are_refused_while_building(schema: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        AvroFormat(schema)
