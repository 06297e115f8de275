"""Kafka to Kafka on real Ray: writers are killed again and again, and readers see every row once (rules R3, S1)."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from tests.cluster.ray_harness import kill_and_recover, until
from tests.kafka_server import KafkaServer, records

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


PARTITIONS, PART, KILLS = 2, 300, 2
SCHEMA = pa.schema([("id", pa.int64()), ("k", pa.string())])


def test_writers_die_and_readers_see_every_row_once(kafka: KafkaServer, tmp_path: Path) -> None:
    source, target = kafka.topic(PARTITIONS), kafka.topic(3)
    total = PART * (KILLS + 1)
    rows = rf.read_kafka(
        source,
        bootstrap_servers=kafka.bootstrap_servers,
        schema=SCHEMA,
        stop={(source, partition): total // PARTITIONS for partition in range(PARTITIONS)},
    )
    sink = rows.rebalance().write_kafka(target, bootstrap_servers=kafka.bootstrap_servers, key="k", name="out")
    flow = rf.Flow("kafka-to-kafka-on-ray", sink)
    job = flow.submit(
        parallelism=2,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "chk"), interval="50ms"),
        config=rf.JobConfig(restart=rf.Restart.fixed(delay="50ms")),
    )
    for n in range(KILLS + 1):
        rows_in = [{"id": i, "k": f"k{i % 5}"} for i in range(n * PART, (n + 1) * PART)]
        kafka.produce(source, records(rows_in, partitions=PARTITIONS))
        if n < KILLS:
            until(lambda n=n: len(seen(kafka, target)) > n * PART, "rows of this part are committed")  # type: ignore[misc]
            kill_and_recover(job, next(s.pid for s in job.subtasks() if "out" in s.step and s.index == n % 2))
    result = job.wait(120)
    assert result.restarts == KILLS
    assert sorted(seen(kafka, target)) == list(range(total))


def seen(kafka: KafkaServer, topic: str) -> list[int]:
    return [json.loads(message.value or b"")["id"] for message in kafka.read(topic)]
