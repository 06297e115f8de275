"""A topic, a job that writes to it, and what readers see: for tests of the Kafka sink on a real broker."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.operators.base import Collected, Committer, CommitterContext, SinkOperator
from rayflow.operators.kafka.committer import KafkaCommitter, brokers
from rayflow.operators.kafka.encoding import Encoding
from rayflow.operators.kafka.protocol import TransactionClient
from rayflow.operators.kafka.sink import KafkaSink
from rayflow.operators.kafka.transactions import owner_of
from tests.kafka_server import KafkaServer
from tests.operators.sources.contract import context

OPERATOR = "write_kafka-1"
QUICK = {"linger.ms": 0, "reconnect.backoff.ms": 10}


def rows(*values: int) -> pa.RecordBatch:
    return pa.record_batch({"x": pa.array(values, pa.int64()), "s": [f"text {v}" for v in values]})


@dataclass
class Place:
    kafka: KafkaServer
    topic: str
    job: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex[:8]}")

    def sink(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        exactly_once: bool = True,
        encoding: Encoding | None = None,
    ) -> KafkaSink:
        return KafkaSink(
            self.topic,
            bootstrap_servers=self.kafka.bootstrap_servers,
            encoding=encoding or Encoding(),
            exactly_once=exactly_once,
            options={**QUICK, **(options or {})},
        )

    def start(
        self,
        subtask: int = 0,
        *,
        parallelism: int = 1,
        attempt: int = 1,
        run_id: str = "run",
        sink: KafkaSink | None = None,
    ) -> SinkOperator:
        operator = (sink or self.sink()).build()
        assert isinstance(operator, SinkOperator)
        whose = context(subtask, parallelism=parallelism, attempt=attempt, run_id=run_id)
        operator.open(replace(whose, job=self.job, operator=OPERATOR), Collected())
        return operator

    def committer(self, parallelism: int = 1, *, kind: type[KafkaCommitter] = KafkaCommitter) -> KafkaCommitter:
        return opened(kind(self.sink().cluster), self.job, parallelism)

    def seen(self) -> list[int]:
        """Column x of all that a ``read_committed`` reader of its own sees, sorted."""
        return sorted(self.in_order())

    def in_order(self, *, committed: bool = True) -> list[int]:
        """By partition and offset."""
        found = self.kafka.read(self.topic, committed=committed)
        return [json.loads(message.value)["x"] for message in found if message.value is not None]

    def open_ids(self) -> list[str]:
        """Transactional ids of the job under which something is open."""
        with TransactionClient(self.kafka.bootstrap_servers) as client:
            listed = client.listed(brokers(self.sink().cluster, "test"))
        return [
            each.transactional_id
            for each in listed
            if (owner := owner_of(each.transactional_id)) and owner.job == self.job and each.state == "Ongoing"
        ]

    def expire(self, committable: Json) -> None:
        """What a broker does to a transaction that was open for too long: abort it and raise the epoch."""
        assert isinstance(committable, dict)
        with TransactionClient(self.kafka.bootstrap_servers) as client:
            client.init(str(committable["transactional_id"]), 60_000)


def opened(committer: KafkaCommitter, job: str, parallelism: int = 1) -> KafkaCommitter:
    committer.open(CommitterContext(job, "run", OPERATOR, "step", parallelism))
    return committer


def prepared(operator: SinkOperator, checkpoint: int) -> list[Json]:
    frozen = operator.snapshot(CheckpointId(checkpoint))
    return list(frozen.prepare()) if frozen is not None and frozen.prepare is not None else []


def elsewhere(committer: Committer, committables: list[Json]) -> None:
    """Commit as a process does that does not have the producers."""
    committer.recover(committables, fresh=False)
