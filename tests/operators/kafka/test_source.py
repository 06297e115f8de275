"""Partitions as splits against a real broker: positions, ends, gaps, events, and what is wrong with a message."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import ConfigError, ConnectorError, DataError
from rayflow.operators.kafka.client import Trouble
from rayflow.operators.kafka.consumer import SharedConsumer
from rayflow.operators.kafka.formats import JsonFormat
from rayflow.operators.kafka.source import TopicPattern
from tests.kafka_server import KafkaServer, Message, records, write
from tests.operators.helpers import context
from tests.operators.kafka.reading import SCHEMA, drain, json_source, read_all, read_split, rows, rows_of, until


@pytest.fixture(scope="module")
def filled(kafka: KafkaServer) -> str:
    """Two partitions of 50 rows, those of the first with gaps and a transaction that was given up."""
    topic = kafka.topic(2)
    kafka.produce(topic, records(rows(40)))
    aborted = kafka.producer(transactional_id=f"aborted-{topic}")
    aborted.init_transactions(10)
    aborted.begin_transaction()
    write(aborted, topic, [b"rubbish"] * 5)
    aborted.abort_transaction(10)
    kafka.produce(topic, records(rows(10, 40)), transactional_id=f"committed-{topic}")
    kafka.produce(topic, [Message(m.value, partition=1) for m in records(rows(50, 50))])
    return topic


def test_every_row_of_every_partition_comes_once(kafka: KafkaServer, filled: str) -> None:
    source = json_source(kafka, filled, stop="latest")
    assert [name for name, _ in source.discover()] == [f"{filled}[0]", f"{filled}[1]"]
    assert read_all(source) == rows(100)


@settings(deadline=None, max_examples=8)
@given(data=st.data())
def test_every_position_yields_exactly_the_rest(kafka: KafkaServer, filled: str, data: st.DataObject) -> None:
    source = json_source(kafka, filled, stop="latest")
    split = source.discover()[0][1]
    batches = read_split(source, split)
    at = data.draw(st.integers(0, len(batches) - 1))
    before = sum(batch.num_rows for batch, _ in batches[: at + 1])
    assert rows_of(source, read_split(source, split, batches[at][1])) == rows(50)[before:]


def test_the_end_is_reached_through_the_gaps_that_transactions_leave(kafka: KafkaServer, filled: str) -> None:
    (_, split), _ = json_source(kafka, filled, stop="latest").discover()
    assert split["stop"] > 50  # marks of two transactions and what was given up
    source = json_source(kafka, filled, stop="latest")
    assert read_split(source, split)[-1][1] == split["stop"]


def test_an_open_transaction_is_not_read_and_not_waited_for(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    kafka.produce(topic, records(rows(3)))
    producer = kafka.producer(transactional_id=f"open-{topic}")
    producer.init_transactions(10)
    producer.begin_transaction()
    write(producer, topic, records(rows(2, 3)))
    assert read_all(json_source(kafka, topic, stop="latest")) == rows(3)
    assert read_all(json_source(kafka, topic, stop="latest", isolation="read_uncommitted")) == rows(5)
    producer.commit_transaction(10)
    assert read_all(json_source(kafka, topic, stop="latest")) == rows(5)


def test_starts_and_stops(kafka: KafkaServer) -> None:
    topic = kafka.topic(2)
    noon = datetime(2026, 11, 1, 12, tzinfo=UTC)
    ms = int(noon.timestamp() * 1000)
    kafka.produce(
        topic,
        [
            Message(m.value, partition=i % 2, timestamp=ms + 1000 * (i - 5))
            for i, m in enumerate(records(rows(10)))
        ],
    )  # fmt: skip

    def ids(**options: Any) -> list[int]:
        return sorted(row["id"] for row in read_all(json_source(kafka, topic, **options)))

    assert ids(start=noon, stop="latest") == [5, 6, 7, 8, 9]
    assert ids(stop=noon) == [0, 1, 2, 3, 4]
    assert ids(start=noon.replace(tzinfo=None), stop=noon.replace(second=2)) == [5, 6]
    assert ids(start=noon.replace(microsecond=1), stop="latest") == [6, 7, 8, 9]
    assert ids(start=noon.replace(year=2030), stop="latest") == []
    assert ids(start="latest", stop="latest") == []
    assert ids(start={(topic, 0): 3}, stop={(topic, 0): 4, (topic, 1): 2}) == [1, 3, 6]


def test_a_stop_ahead_of_the_end_is_waited_for(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    source = json_source(kafka, topic, start="latest", stop={(topic, 0): 3})
    ((_, split),) = source.discover()
    reader = source.reader(split, None, context())
    kafka.produce(topic, records(rows(2)))
    drain(reader, rows=2)
    assert not reader.poll().done
    kafka.produce(topic, records(rows(4, 2)))
    assert rows_of(source, drain(reader)) == rows(1, 2)
    reader.close()


def test_topics_by_pattern_and_partitions_found_later_begin_at_their_beginning(kafka: KafkaServer) -> None:
    first = kafka.topic(1, name="orders-de")
    prefix = first[len("orders-de-") :]  # of this test alone
    other = kafka.topic(1, name="other")
    for pattern in (f"^orders-.*{prefix}", TopicPattern(f"orders-de-{prefix}")):
        assert [name for name, _ in json_source(kafka, pattern).discover()] == [f"{first}[0]"]
    source = json_source(kafka, [first, other], start="latest")
    assert source.discovery_interval_s == 30.0
    kafka.produce(first, records(rows(2)))
    kafka.grow(first, 2)
    kafka.produce(first, [Message(b"{}", partition=1)])
    found = dict(source.discover_again())
    assert [found[f"{first}[{i}]"]["start"] for i in (0, 1)] == [0, 0]
    assert dict(source.discover())[f"{first}[0]"]["start"] == 2


def test_a_position_that_the_broker_no_longer_has_is_an_error(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    kafka.produce(topic, records(rows(10)))
    kafka.truncate(topic, 0, 6)
    source = json_source(kafka, topic, stop="latest")
    ((_, split),) = source.discover()
    assert rows_of(source, read_split(source, split)) == rows(4, 6)
    for position in (3, 11):
        reader = source.reader(split | {"stop": 20}, position, context())
        with pytest.raises(DataError, match=rf"{topic}\[0\] from offset {position}.*offsets 6 to 10.*start="):
            drain(reader)
        reader.close()


def test_a_position_behind_the_last_row_moves_over_the_gap_so_that_retention_takes_nothing_unread(
    kafka: KafkaServer,
) -> None:
    topic = kafka.topic()
    kafka.produce(topic, records(rows(3)), transactional_id=f"gap-{topic}")
    source = json_source(kafka, topic)
    ((_, split),) = source.discover()
    reader = source.reader(split, None, context())
    position = 0

    def over_the_gap() -> bool:
        nonlocal position
        polled = reader.poll()
        position = polled.position if polled.batch is not None else position
        return position == 4

    until(over_the_gap)
    reader.close()
    kafka.truncate(topic, 0, 4)
    kafka.produce(topic, records(rows(1, 3)))
    reader = source.reader(split, position, context())
    assert rows_of(source, drain(reader, rows=1)) == rows(1, 3)
    reader.close()


def test_offsets_of_complete_checkpoints_are_written_to_the_group_and_never_read(
    kafka: KafkaServer, filled: str
) -> None:
    from confluent_kafka import Consumer, TopicPartition

    group = f"watch-{filled}"
    source = json_source(kafka, filled, stop="latest", group=group)
    split = source.discover()[0][1]
    reader = source.reader(split, None, context())
    drain(reader, rows=14)
    reader.checkpointed(14)
    watcher = Consumer({"bootstrap.servers": kafka.bootstrap_servers, "group.id": group})
    until(lambda: bool(watcher.committed([TopicPartition(filled, 0)], 10)[0].offset == 14))
    watcher.close()
    reader.close()
    assert len(rows_of(source, read_split(source, split))) == 50


def test_partitions_of_a_subtask_share_one_consumer(kafka: KafkaServer, filled: str) -> None:
    source = json_source(kafka, filled, stop="latest")
    splits = [split for _, split in source.discover()]
    readers = [source.reader(split, None, context()) for split in splits]
    assert len(source._consumers) == 1
    other = source.reader(splits[0], None, context(1, 2))
    assert len(source._consumers) == 2
    # One is not asked until the other has ended: what waits for it is paused, not lost.
    assert [rows_of(source, drain(reader)) for reader in readers] == [rows(50), rows(50, 50)]
    for reader in [*readers, other]:
        reader.close()
    assert not source._consumers


def test_a_partition_that_is_not_asked_waits_in_bounds(kafka: KafkaServer) -> None:
    topic = kafka.topic(2)
    quiet = [Message(m.value, partition=1) for m in records(rows(9_000))]
    kafka.produce(topic, quiet)
    source = json_source(kafka, topic, format=JsonFormat(SCHEMA))
    held, asked = (source.reader(split, None, context()) for _, split in reversed(source.discover()))
    feed = held._feed  # type: ignore[attr-defined]

    def paused() -> bool:
        asked.poll()
        return bool(feed.paused)

    until(paused)
    assert 2_000 <= feed.messages <= 4_000
    kafka.produce(topic, records(rows(3)))
    assert rows_of(source, drain(asked, rows=3)) == rows(3)
    assert rows_of(source, drain(held, rows=9_000)) == rows(9_000)
    held.close()
    asked.close()


def test_a_source_travels_without_its_connections(kafka: KafkaServer, filled: str) -> None:
    source = json_source(kafka, filled, stop="latest", options={"sasl.password": "secret"})
    reader = source.reader(source.discover()[0][1], None, context())
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._consumers
    assert "secret" not in repr(source)
    assert read_all(copy) == rows(100)
    reader.close()


def test_topics_that_are_not_there(kafka: KafkaServer, filled: str) -> None:
    with pytest.raises(ConfigError, match=f"expected topic 'nope' at {kafka.bootstrap_servers}.*create it"):
        json_source(kafka, ["nope", filled]).discover()
    with pytest.raises(ConfigError, match="got none; mend the pattern"):
        json_source(kafka, "^nope-.*").discover()
    with pytest.raises(ConfigError, match="expected topic 'nope'"):
        json_source(kafka, filled, on_error="dead_letter", dead_letter="nope").discover()
    with pytest.raises(ConfigError, match=r"stop\) names .*\[9\]"):
        json_source(kafka, filled, stop={(filled, 9): 1}).discover()
    with pytest.raises(ConfigError, match=rf"must name every partition, {filled}\[1\]"):
        json_source(kafka, filled, stop={(filled, 0): 1}).discover()


def test_a_broker_that_is_not_there_is_no_fault_of_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayflow.operators.kafka.client.CALL_TIMEOUT_S", 0.3)
    nowhere = KafkaServer("127.0.0.1:1", None)  # type: ignore[arg-type]
    with pytest.raises(ConnectorError, match="could not list topics at 127.0.0.1:1: .*Connection refused"):
        json_source(nowhere, "topic").discover()


def test_options_that_the_client_does_not_know(kafka: KafkaServer) -> None:
    with pytest.raises(ConfigError, match='No such configuration property: "nonsense"'):
        json_source(kafka, "topic", options={"nonsense": 1}).discover()
    with pytest.raises(ConfigError, match="must not set 'enable.auto.commit'"):
        json_source(kafka, "topic", options={"enable.auto.commit": True})


class Error:
    """What the client tells of its connections."""

    def __init__(self, name: str) -> None:
        self._name = name

    def name(self) -> str:
        return self._name

    def str(self) -> Any:
        return f"told {self._name}"


def trouble_of(consumer: SharedConsumer) -> Trouble:
    return consumer._trouble


def test_refused_credentials_are_fatal_and_brokers_away_are_waited_for(
    kafka: KafkaServer, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = kafka.topic()
    source = json_source(kafka, topic)
    reader = source.reader(source.discover()[0][1], None, context())
    (consumer,) = source._consumers.values()
    trouble_of(consumer)(Error("_ALL_BROKERS_DOWN"))
    assert reader.poll().batch is None  # patience
    monkeypatch.setattr("rayflow.operators.kafka.consumer.PATIENCE_S", -1.0)
    until(lambda: reader.poll().batch is None and trouble_of(consumer).since is None)  # it is there, when asked
    trouble_of(consumer)(Error("_AUTHENTICATION"))
    with pytest.raises(ConfigError, match="told _AUTHENTICATION; check credentials"):
        drain(reader)
    reader.close()


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_compressed_topics(kafka: KafkaServer, codec: str) -> None:
    topic = kafka.topic()
    kafka.produce(topic, records(rows(200)), compression_type=codec)
    assert read_all(json_source(kafka, topic, stop="latest")) == rows(200)


def test_a_topic_that_is_deleted_while_it_is_read_is_told(kafka: KafkaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from confluent_kafka.admin import AdminClient

    topic = kafka.topic()
    kafka.produce(topic, records(rows(2)))
    # Believed at once: by default it may be, for half a minute, a new topic that is not known everywhere.
    monkeypatch.setattr("rayflow.operators.kafka.client.MISSING_S", 0.0)
    soon = {"topic.metadata.refresh.interval.ms": 100, "topic.metadata.propagation.max.ms": 0}
    source = json_source(kafka, topic, options=soon)
    reader = source.reader(source.discover()[0][1], None, context())
    drain(reader, rows=2)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.delete_topics([topic])[topic].result(10)
    with pytest.raises(ConnectorError, match=rf"not there any more .*{topic} \[0\]: .*make the topic again"):
        drain(reader)
    reader.close()


def test_a_broker_that_goes_away_and_comes_back(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    kafka.produce(topic, records(rows(2)))
    source = json_source(kafka, topic)
    reader = source.reader(source.discover()[0][1], None, context())
    drain(reader, rows=2)
    with kafka.away():
        polled = [reader.poll().batch for _ in range(100)]
    assert not any(batch is not None and batch.num_rows for batch in polled)
    kafka.produce(topic, records(rows(1, 2)))
    assert rows_of(source, drain(reader, rows=1)) == rows(1, 2)
    reader.close()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"start": "now"}, r"start\) must be \"earliest\", \"latest\", a datetime or a dict"),
        ({"stop": "earliest"}, r"stop\) must be \"latest\""),
        ({"start": {"t": 1}}, "must map"),
        ({"start": {("t", 0): -1}}, "offset of 0 or more"),
        ({"isolation": "none"}, "isolation"),
        ({"on_error": "ignore"}, "on_error"),
        ({"on_error": "dead_letter"}, "belong together"),
        ({"dead_letter": "t"}, "belong together"),
        ({"metadata": ["offset"]}, "among _topic, _partition"),
        ({"format": JsonFormat(pa.schema([("_key", pa.string())])), "metadata": ["_key"]}, "adds '_key'"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        json_source(KafkaServer("127.0.0.1:1", None), "t", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("topics", ["", [], ["a", "^b"], TopicPattern])
def test_topics_that_mean_nothing(topics: Any) -> None:
    with pytest.raises(ConfigError):
        json_source(KafkaServer("h:1", None), TopicPattern("(") if topics is TopicPattern else topics)  # type: ignore[arg-type]
