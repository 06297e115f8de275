"""Flows that read Kafka, in this process, against a real broker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.errors import ConfigError, JobFailedError, PlanError
from rayflow.operators.kafka.formats import JsonFormat
from rayflow.operators.kafka.source import KafkaSource
from tests.failing import FailsOnce, rows_of, run_with_checkpoints
from tests.kafka_server import KafkaServer, Message, records

SCHEMA = pa.schema([("id", pa.int64()), ("at", pa.timestamp("s")), ("who", pa.string())])
RESTARTS = rf.JobConfig(restart=rf.Restart.fixed(delay="0s"))


class SmallBatches(JsonFormat):
    """So that a flow fails in the middle of a partition."""

    messages_max = 50


def event(i: int, second: int | None = None) -> dict[str, Any]:
    second = i if second is None else second
    return {"id": i, "at": f"2026-11-22T10:{second // 60 % 60:02d}:{second % 60:02d}", "who": f"w{i % 7}"}


def read(kafka: KafkaServer, topics: Any, **options: Any) -> rf.Stream:
    return rf.read_kafka(
        topics, bootstrap_servers=kafka.bootstrap_servers, **{"schema": SCHEMA, "stop": "latest"} | options
    )  # fmt: skip


@pytest.fixture(scope="module")
def filled(kafka: KafkaServer) -> str:
    topic = kafka.topic(4)
    kafka.produce(topic, records([event(i) for i in range(1_000)], partitions=4), transactional_id=f"t-{topic}")
    return topic


class ReadsOn(KafkaSource):
    """A broken source: after a failure it goes on behind what was read, not behind what was checkpointed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reached: dict[str, int] = {}

    def reader(self, split: Any, position: Any, ctx: Any) -> Any:
        name = f"{split['topic']}[{split['partition']}]"
        reader = super().reader(split, self.reached.get(name, position), ctx)
        poll = reader.poll

        def noting() -> Any:
            polled = poll()
            if polled.batch is not None:
                self.reached[name] = polled.position
            return polled

        reader.poll = noting  # type: ignore[method-assign]
        return reader


def collected(source: KafkaSource, folder: Path) -> list[dict[str, Any]]:
    rows = rf.read_source(source, event_time="at", max_delay="0s")
    failing = rows.map_batches(FailsOnce, fn_constructor_args=(str(folder / "failed"), 400), schema=SCHEMA)
    counts = failing.key_by("who").window(rf.tumbling("1m")).agg(n=rf.count(), total=rf.sum("id"))
    return run_with_checkpoints(rf.Flow("kafka", counts.select("who", "n", "total").collect()), folder, RESTARTS)


def expected() -> list[dict[str, Any]]:
    data = pa.Table.from_pylist([{"id": i, "who": f"w{i % 7}"} for i in range(1_000)])
    query = "SELECT who, count(*) AS n, sum(id)::BIGINT AS total FROM data GROUP BY who, id // 60"
    return rows_of(query, data)


def source_of(kind: type[KafkaSource], kafka: KafkaServer, topic: str) -> KafkaSource:
    return kind(topic, bootstrap_servers=kafka.bootstrap_servers, format=SmallBatches(SCHEMA), stop="latest")


def test_after_a_failure_the_result_is_that_of_a_run_without(kafka: KafkaServer, filled: str, tmp_path: Path) -> None:
    assert collected(source_of(KafkaSource, kafka, filled), tmp_path) == expected()


def test_a_source_that_does_not_go_back_is_found_out(kafka: KafkaServer, filled: str, tmp_path: Path) -> None:
    assert collected(source_of(ReadsOn, kafka, filled), tmp_path) != expected()


def test_partitions_that_are_far_apart_in_time_make_nothing_late(kafka: KafkaServer) -> None:
    """One partition is an hour ahead of the other, and twenty times as long."""
    topic = kafka.topic(2)
    ahead = [Message(m.value, partition=0) for m in records([event(i, 3000 + i % 600) for i in range(600)])]
    behind = [Message(m.value, partition=1) for m in records([event(i, i) for i in range(600, 630)])]
    kafka.produce(topic, ahead + behind)
    counts = read(kafka, topic, event_time="at", max_delay="0s").key_by("who").window(rf.tumbling("1m"))
    found = counts.agg(n=rf.count()).to_arrow()
    assert sum(found["n"].to_pylist()) == 630


def test_event_time_of_the_message(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    kafka.produce(topic, [Message(None, b"k", timestamp=1_793_500_000_000 + 1000 * i) for i in range(120)])
    rows = read(kafka, topic, metadata=["_key", "_timestamp"], event_time="_timestamp", max_delay="0s")
    counts = rows.key_by("_key").window(rf.tumbling("1m")).agg(n=rf.count()).to_arrow()
    assert sum(counts["n"].to_pylist()) == 120


def test_new_partitions_are_picked_up_while_the_job_runs(kafka: KafkaServer) -> None:
    topic = kafka.topic(1)
    kafka.produce(topic, records([event(i) for i in range(10)]))
    grown: list[bool] = []

    def grow(batch: pa.RecordBatch) -> pa.RecordBatch:
        if not grown:
            grown.append(True)
            kafka.grow(topic, 2)
            kafka.produce(topic, [Message(m.value, partition=1) for m in records([event(i) for i in range(10, 15)])])
        return batch

    stream = read(kafka, f"^{topic}$", stop=None, discover="1s").map_batches(grow, schema=SCHEMA)
    assert sorted(stream.take(15)["id"].to_pylist()) == list(range(15))


def test_a_topic_that_is_not_there_ends_the_job_at_its_start(kafka: KafkaServer) -> None:
    with pytest.raises(JobFailedError, match="expected topic 'nope'.*create it or mend its name"):
        read(kafka, "nope").to_arrow()


def test_rows_left_out_are_counted(kafka: KafkaServer) -> None:
    topic = kafka.topic()
    kafka.produce(topic, [b"{", *(json.dumps(event(i)).encode() for i in range(3)), None])
    flow = rf.Flow("skips", read(kafka, topic, on_error="skip").collect())
    result = flow.run(local=True, progress=False)
    assert (result.table().num_rows, result.metrics["skipped_rows"]) == (3, 2)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"schema": None}, "needs schema= for format='json'"),
        ({"format": "raw"}, "leave schema= out"),
        ({"format": "protobuf"}, 'must be "json", "avro"'),
        ({"format": "avro-registry", "schema": "{}"}, "needs registry="),
        ({"registry": "http://here"}, 'is for format="avro-registry"'),
        ({"format": JsonFormat(SCHEMA)}, "has its schema"),
        ({"discover": "1ms"}, "at least 0.1 s"),
        ({"topics": "^("}, "no regular expression"),
    ],
)
def test_what_cannot_be_built_is_refused_without_a_broker(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        rf.read_kafka(**{"topics": "t", "bootstrap_servers": "nowhere:1", "schema": SCHEMA} | options)


def test_columns_are_checked_while_building() -> None:
    with pytest.raises(PlanError, match="needs the event time column 'time'"):
        rf.read_kafka("t", bootstrap_servers="nowhere:1", schema=SCHEMA, event_time="time")
    stream = rf.read_kafka(rf.topic_pattern("t.*"), bootstrap_servers="nowhere:1", schema=SCHEMA, metadata=True)
    assert "read_kafka" in rf.Flow("built", stream.select("id", "_offset").print()).explain()
