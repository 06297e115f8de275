"""What is in a message besides its value, tombstones, and messages that cannot be read, against a real broker."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest

from rayflow.errors import DataError
from rayflow.operators.kafka.formats import ArrowFormat, JsonFormat, RawFormat
from tests.kafka_server import KafkaServer, Message, records
from tests.operators.helpers import context
from tests.operators.kafka.reading import SCHEMA, drain, json_source, read_all, rows, rows_of


def test_metadata_columns(kafka: KafkaServer) -> None:
    topic = kafka.topic(2)
    headers = (("trace", b"1"), ("trace", None))
    kafka.produce(
        topic, [Message(b'{"id": 1}', b"k", 1, 1_793_500_000_123, headers), Message(b'{"id": 2}', partition=1)]
    )
    source = json_source(kafka, topic, stop="latest", metadata=True)
    first, second = read_all(source)
    assert first == {
        "id": 1,
        "name": None,
        "_topic": topic,
        "_partition": 1,
        "_offset": 0,
        "_timestamp": datetime.fromtimestamp(1_793_500_000.123, UTC),
        "_key": b"k",
        "_headers": [{"name": "trace", "value": b"1"}, {"name": "trace", "value": None}],
    }
    assert (second["_key"], second["_headers"], second["_offset"]) == (None, [], 1)
    some = json_source(kafka, topic, stop="latest", metadata=["_offset", "_key"])
    assert some.schema().names == ["id", "name", "_offset", "_key"]
    assert [row["_offset"] for row in read_all(some)] == [0, 1]


def test_metadata_of_messages_with_many_rows(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    batches = [pa.RecordBatch.from_pylist(rows(n, n), schema=SCHEMA) for n in (2, 0, 3)]
    kafka.produce(topic, [bytes(batch.serialize()) for batch in batches])
    source = json_source(kafka, topic, format=ArrowFormat(SCHEMA), stop="latest", metadata=["_offset"])
    assert [(row["id"], row["_offset"]) for row in read_all(source)] == [(2, 0), (3, 0), (3, 2), (4, 2), (5, 2)]


def test_tombstones_are_rows_where_their_key_is_told(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    kafka.produce(topic, [Message(None, b"a"), Message(b'{"id": 1}', b"b"), Message(None, b"c"), Message(None, b"d")])
    keyed = json_source(kafka, topic, stop="latest", metadata=["_key"])
    assert [(r["id"], r["_key"]) for r in read_all(keyed)] == [(None, b"a"), (1, b"b"), (None, b"c"), (None, b"d")]
    raw = json_source(kafka, topic, format=RawFormat(), stop="latest")
    assert [row["value"] for row in read_all(raw)] == [None, b'{"id": 1}', None, None]
    source = json_source(kafka, topic, stop="latest")
    reader = source.reader(source.discover()[0][1], None, context())
    assert [row["id"] for row in rows_of(source, drain(reader))] == [1]
    assert reader.skipped == 3
    reader.close()


BAD = [b"{", b'{"id": "x"}', b"", b"{}{}"]


@pytest.fixture(scope="module")
def spoilt(kafka: KafkaServer) -> str:
    topic = kafka.topic()
    values = [m.value for m in records(rows(20))]
    for at, bad in zip((0, 5, 6, 23), BAD, strict=True):
        values.insert(at, bad)
    kafka.produce(topic, values)
    return topic


def test_a_malformed_message_is_named(kafka: KafkaServer, spoilt: str) -> None:
    source = json_source(kafka, spoilt, start={(spoilt, 0): 1}, stop="latest")
    with pytest.raises(
        DataError, match=rf"step 'under test' subtask 0/1 cannot read offset 5 of {spoilt}\[0\]: .*on_err"
    ):
        read_all(source)


@pytest.mark.parametrize("format", [JsonFormat(SCHEMA), None], ids=["one batch", "many batches"])
def test_malformed_messages_are_skipped_and_counted(kafka: KafkaServer, spoilt: str, format: Any) -> None:
    source = json_source(kafka, spoilt, format=format, stop="latest", on_error="skip", metadata=["_offset"])
    reader = source.reader(source.discover()[0][1], None, context())
    found = rows_of(source, drain(reader))
    assert [{"id": row["id"], "name": row["name"]} for row in found] == rows(20)
    assert sorted(set(range(24)) - {row["_offset"] for row in found}) == [0, 5, 6, 23]
    assert reader.skipped == 4
    reader.close()


def test_dead_letters_are_with_the_broker_before_the_position_moves(kafka: KafkaServer, spoilt: str) -> None:
    letters = kafka.topic()
    source = json_source(kafka, spoilt, stop="latest", on_error="dead_letter", dead_letter=letters)
    reader = source.reader(source.discover()[0][1], None, context())
    seen = 0
    for _, position in drain(reader):
        bad = [at for at in (0, 5, 6, 23) if at < position]
        if len(bad) > seen:
            seen = len(bad)
            assert len(kafka.read(letters)) >= seen
    assert reader.skipped == 4
    reader.close()
    found = kafka.read(letters)
    assert [message.value for message in found] == BAD
    headers = dict(found[1].headers)
    assert (headers["rayflow.topic"], headers["rayflow.offset"]) == (spoilt.encode(), b"5")
    assert b"string" in (headers["rayflow.error"] or b"")


def test_columns_that_nobody_reads_are_not_decoded(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    kafka.produce(topic, [Message(b'{"id": "no number", "name": "n"}', b"k"), Message(None, b"l")])
    source = json_source(kafka, topic, stop="latest", metadata=["_key", "_offset"])
    projected = source.project(["name", "_offset"])
    assert projected.schema().names == ["name", "_offset"]
    assert read_all(projected) == [{"name": "n", "_offset": 0}, {"name": None, "_offset": 1}]
    assert source.project(["_offset"]) is source
    strict = json_source(kafka, topic, stop="latest", on_error="skip").project(["name"])
    assert read_all(strict) == []
