"""Rows/s of the Kafka JSON source beside a bare client that consumes and decodes the same topic in the same run.

`python -m benchmarks.kafka_source [--messages 400000]`. Starts a broker of its own (`noida-db`, in a temporary folder),
writes messages of about 190 bytes and 6 fields to 4 partitions, and reads them all at parallelism 1:

- bare: `Consumer.consume` of 500 and 10,000 messages, with and without waiting, the best of these; the values joined by
  newlines, `pyarrow.json` with an explicit schema; nothing else;
- source: `KafkaSource` and its readers, asked in turns, nothing behind them;
- flow: a whole flow in this process, with event time, into a step that counts.

Each is measured ``--rounds`` times in turn and the best counts. Times begin at the first message, because starting a
job or a client is not the question.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

import rayflow as rf
from benchmarks.figures import emit
from rayflow.kafka import read_kafka
from rayflow.operators.base import OperatorContext
from rayflow.operators.kafka.formats import JsonFormat
from rayflow.operators.kafka.source import KafkaSource

PARTITIONS = 4
BAR = 0.6
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("time", pa.timestamp("us", "UTC")),
        ("user", pa.string()),
        ("price", pa.float64()),
        ("city", pa.string()),
        ("note", pa.string()),
    ]
)


def value(i: int) -> bytes:
    row = {
        "id": i,
        "time": f"2026-11-22T{i // 3600 % 24:02d}:{i // 60 % 60:02d}:{i % 60:02d}.000001Z",
        "user": f"user-{i % 5000}",
        "price": i % 1000 / 4,
        "city": ("Berlin", "Paris", "Rome")[i % 3],
        "note": "x" * 60,
    }
    return json.dumps(row).encode()


def fill(servers: str, topic: str, messages: int) -> None:
    from confluent_kafka import Producer

    producer = Producer(
        {"bootstrap.servers": servers, "linger.ms": 50, "queue.buffering.max.messages": 10_000_000, "acks": "all"}
    )
    for i in range(messages):
        producer.produce(topic, value(i), partition=i % PARTITIONS)
        if i % 10_000 == 0:
            producer.poll(0)
    left = producer.flush(120)
    if left:
        raise RuntimeError(f"{left} messages were not delivered")


def bare(servers: str, topic: str, messages: int) -> float:
    """Rows/s of client and decoder alone, with the manner of calling that is best here."""
    return max(_bare(servers, topic, messages, *how) for how in ((500, 0.05), (10_000, 0.05), (10_000, 0.0)))


def _bare(servers: str, topic: str, messages: int, at_once: int, timeout_s: float) -> float:
    from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": servers, "group.id": "bare", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in range(PARTITIONS)])
    options = pj.ParseOptions(explicit_schema=SCHEMA, unexpected_field_behavior="ignore")
    rows, began = 0, 0.0
    while rows < messages:
        got = consumer.consume(at_once, timeout_s)
        began = began or (time.perf_counter() if got else 0.0)
        if got:
            text = b"\n".join([message.value() for message in got])
            reading = pj.ReadOptions(use_threads=False, block_size=len(text) + 64)
            rows += pj.read_json(pa.BufferReader(text), read_options=reading, parse_options=options).num_rows
    took = time.perf_counter() - began
    consumer.close()
    return rows / took


def source_alone(servers: str, topic: str, messages: int) -> float:
    source = KafkaSource(topic, bootstrap_servers=servers, format=JsonFormat(SCHEMA), stop="latest")
    ctx = OperatorContext(
        job="bench", run_id="bench", operator="read", step="read", subtask=0, parallelism=1, max_parallelism=128,
        attempt=0, key_groups=range(128), now=time.monotonic,
    )  # fmt: skip
    readers = [source.reader(split, None, ctx) for _, split in source.discover()]
    rows, began = 0, 0.0
    while readers:
        before = rows
        for reader in list(readers):
            polled = reader.poll()
            if polled.batch is not None:
                began = began or time.perf_counter()
                rows += polled.batch.num_rows
            if polled.done:
                reader.close()
                readers.remove(reader)
        if rows == before:
            time.sleep(0.001)  # as a loop would: the client's threads need the processor
    return messages_per_s(rows, messages, began)


class Counts:
    """For `map_batches`: when the first row came, and how many there were."""

    began = 0.0
    rows = 0

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        Counts.began = Counts.began or time.perf_counter()
        Counts.rows += batch.num_rows
        return batch.slice(0, 0)


def flow(servers: str, topic: str, messages: int) -> float:
    Counts.began, Counts.rows = 0.0, 0
    rows = read_kafka(topic, bootstrap_servers=servers, schema=SCHEMA, stop="latest", event_time="time", max_delay="1d")
    rf.Flow("bench", rows.map_batches(Counts).print()).run(local=True, progress=False)
    return messages_per_s(Counts.rows, messages, Counts.began)


def messages_per_s(rows: int, messages: int, began: float) -> float:
    took = time.perf_counter() - began
    if rows != messages:
        raise RuntimeError(f"{rows} of {messages} messages were read")
    return rows / took


def main(arguments: list[str] | None = None) -> int:
    from tests.kafka_server import noida

    parser = argparse.ArgumentParser()
    parser.add_argument("--messages", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    measured: dict[str, Callable[[str, str, int], float]] = {"bare": bare, "source": source_alone, "flow": flow}
    best: dict[str, Any] = dict.fromkeys(measured, 0.0)
    with tempfile.TemporaryDirectory() as folder, noida(Path(folder)) as broker:
        topic = broker.topic(PARTITIONS)
        fill(broker.bootstrap_servers, topic, given.messages)
        for _ in range(given.rounds):
            for name, measure in measured.items():
                best[name] = max(best[name], measure(broker.bootstrap_servers, topic, given.messages))
    emit("kafka_json_bare_rows_per_s", best["bare"], "rows/s")
    for name in ("source", "flow"):
        share = best[name] / best["bare"]
        emit(f"kafka_json_{name}_rows_per_s", best[name], "rows/s")
        emit(f"kafka_json_{name}_share_of_bare", share, "ratio", f">= {BAR}", share >= BAR)
    return 0


if __name__ == "__main__":
    sys.exit(main())
