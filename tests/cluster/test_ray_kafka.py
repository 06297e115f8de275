"""Kafka on real Ray: a reader of it dies while messages come, and every one of them counts once (rules R2, R3)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from tests.cluster.ray_harness import kill, recovered, until
from tests.kafka_server import KafkaServer, Message, records

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


PARTITIONS, HALF = 3, 900
SCHEMA = pa.schema([("id", pa.int64()), ("at", pa.timestamp("s")), ("who", pa.string())])


def messages(first: int) -> list[Message]:
    rows = [
        {"id": i, "at": f"2026-11-22 10:{i // 60:02d}:{i % 60:02d}", "who": f"w{i % 5}"}
        for i in range(first, first + HALF)
    ]
    return records(rows, partitions=PARTITIONS)


def test_readers_die_while_messages_come(kafka: KafkaServer, tmp_path: Path) -> None:
    topic = kafka.topic(PARTITIONS)
    kafka.produce(topic, messages(0))
    rows = rf.read_kafka(
        topic,
        bootstrap_servers=kafka.bootstrap_servers,
        schema=SCHEMA,
        stop={(topic, partition): 2 * HALF // PARTITIONS for partition in range(PARTITIONS)},
        event_time="at",
        max_delay="10s",
    )
    counts = rows.key_by("who").window(rf.tumbling("1m")).agg(n=rf.count(), total=rf.sum("id"))
    flow = rf.Flow("kafka-on-ray", counts.collect())
    job = flow.submit(parallelism=2, checkpoints=rf.CheckpointConfig(str(tmp_path / "chk"), interval="200ms"))
    until(lambda: job.status().rows_in == HALF, "the first half is read")
    job.checkpoint()
    attempt = job.status().attempt
    kill(next(s.pid for s in job.subtasks() if s.step.startswith("read_kafka")))
    recovered(job, attempt)
    kafka.produce(topic, messages(HALF))
    result = job.wait(120)
    table = result.table()
    assert result.restarts == 1
    assert sum(table["n"].to_pylist()) == 2 * HALF
    assert sum(table["total"].to_pylist()) == sum(range(2 * HALF))
