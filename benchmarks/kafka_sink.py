"""Rows/s of the Kafka sink beside a bare client that produces the same messages in the same run.

`python -m benchmarks.kafka_sink [--rows 400000]`. Starts a broker of its own (`noida-db`, in a temporary folder) and
writes rows of six columns as JSON objects of about 140 bytes, with a key, to 4 partitions:

- bare: the client alone, with values and keys that are bytes already, and the options of the sink;
- at_least_once, exactly_once: the operator alone with one checkpoint at the end (encode, send, deliver, commit);
- flow: a whole flow in this process, exactly once, with checkpoints.

Each is measured ``--rounds`` times in turn and the best counts. Times begin at the first row, because starting a job or
a client is not the question.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

import rayflow as rf
from benchmarks.figures import emit
from rayflow.core.ids import CheckpointId
from rayflow.operators.base import Collected, CommitterContext, OperatorContext
from rayflow.operators.kafka.encoding import Encoder, Encoding
from rayflow.operators.kafka.producers import Producer
from rayflow.operators.kafka.sink import KafkaSink

PARTITIONS = 4
BATCH = 10_000
BAR = 0.4
"""The bare client does not encode. Of what it takes, encoding takes as much again on one core."""


def table(rows: int) -> pa.Table:
    ids = np.arange(rows, dtype=np.int64)
    return pa.table(
        {
            "id": ids,
            "time": pa.array(1_700_000_000_000_000 + ids * 1_000, pa.timestamp("us", "UTC")),
            "user": pa.array([f"user-{i % 5000}" for i in range(rows)]),
            "price": (ids % 1000) / 4,
            "city": pa.array([("Berlin", "Paris", "Rome")[i % 3] for i in range(rows)]),
            "note": pa.array(["x" * 30] * rows),
        }
    )


def bare(servers: str, topic: str, data: pa.Table) -> float:
    encoder = Encoder(Encoding(key=("user",)), data.schema, "bench")
    ready = [encoder.encode(batch) for batch in data.to_batches(BATCH)]
    producer = Producer(servers, {}, where="bench")
    producer.client.list_topics(topic, timeout=10)
    began = time.perf_counter()
    for messages in ready:
        producer.send(topic, messages)
    producer.flush()
    return float(data.num_rows / (time.perf_counter() - began))


def operator_alone(exactly_once: bool, servers: str, topic: str, data: pa.Table) -> float:
    sink = KafkaSink(topic, bootstrap_servers=servers, encoding=Encoding(key=("user",)), exactly_once=exactly_once)
    operator, committer = sink.build(), sink.committer()
    operator.open(
        OperatorContext(
            job="bench", run_id="bench", operator="write", step="write", subtask=0, parallelism=1, max_parallelism=128,
            attempt=0, key_groups=range(128), now=time.monotonic,
        ),
        Collected(),
    )  # fmt: skip
    batches = data.to_batches(BATCH)
    began = time.perf_counter()
    for batch in batches:
        operator.process(batch, 0)
    frozen = operator.snapshot(CheckpointId(time.time_ns()))
    assert frozen is not None
    assert frozen.prepare is not None
    prepared = frozen.prepare()
    if committer is not None:
        committer.open(CommitterContext("bench", "bench", "write", "write", 1))
        committer.commit(prepared)
    took = time.perf_counter() - began
    operator.close()
    return float(data.num_rows / took)


class Began:
    """For `map_batches`: when the first row came."""

    at = 0.0

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        Began.at = Began.at or time.perf_counter()
        return batch


def flow(servers: str, topic: str, data: pa.Table) -> float:
    Began.at = 0.0
    rows = rf.from_arrow(data, batch_rows=BATCH).map_batches(Began)
    with tempfile.TemporaryDirectory() as folder:
        rf.Flow("bench", rows.write_kafka(topic, bootstrap_servers=servers, key="user")).run(
            local=True, progress=False, checkpoints=rf.CheckpointConfig(folder, interval="10ms")
        )
    return float(data.num_rows / (time.perf_counter() - Began.at))


def main(arguments: list[str] | None = None) -> int:
    from tests.kafka_server import noida

    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    data = table(given.rows)
    measured: dict[str, Callable[[str, str, pa.Table], float]] = {
        "bare": bare,
        "at_least_once": partial(operator_alone, False),
        "exactly_once": partial(operator_alone, True),
        "flow": flow,
    }
    best = dict.fromkeys(measured, 0.0)
    with tempfile.TemporaryDirectory() as folder, noida(Path(folder)) as broker:
        for _ in range(given.rounds):
            for name, measure in measured.items():
                topic = broker.topic(PARTITIONS)
                best[name] = max(best[name], measure(broker.bootstrap_servers, topic, data))
    emit("kafka_json_bare_produce_rows_per_s", best["bare"], "rows/s")
    for name in ("at_least_once", "exactly_once", "flow"):
        share = best[name] / best["bare"]
        emit(f"kafka_json_sink_{name}_rows_per_s", best[name], "rows/s")
        emit(f"kafka_json_sink_{name}_share_of_bare", share, "ratio", f">= {BAR}", share >= BAR)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
