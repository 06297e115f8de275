"""A real Kafka-protocol broker (noida-db) for tests: on 127.0.0.1, on a free port, one a session.

The fixture is registered in ``tests/conftest.py`` and starts on first use. Topics are made with ``retention.ms=-1``,
so that records with old timestamps stay. What the broker is known not to do as Apache Kafka does:
``transaction.timeout.ms`` is not enforced, and a restart with an open transaction breaks that partition.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

_START_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 30.0

Headers = Sequence[tuple[str, bytes | None]]


@dataclass(frozen=True, slots=True)
class Message:
    """What a topic holds, or shall hold. ``timestamp`` in ms since the epoch; None: now."""

    value: bytes | None = None
    key: bytes | None = None
    partition: int = 0
    timestamp: int | None = None
    headers: Headers = ()
    offset: int = -1
    """Where it was read; means nothing for what is produced."""


@dataclass(slots=True)
class KafkaServer:
    """Where a broker listens, and what tests do with it besides what they test."""

    bootstrap_servers: str
    process: subprocess.Popen[bytes] = field(repr=False)

    def topic(self, partitions: int = 1, *, name: str = "", **config: str) -> str:
        """A new empty topic; its name, which nothing else in the session has, begins with ``name``."""
        from confluent_kafka.admin import AdminClient, NewTopic

        name = f"{name or 'topic'}-{uuid.uuid4().hex[:12]}"
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        wanted = NewTopic(name, partitions, 1, config={"retention.ms": "-1"} | config)
        admin.create_topics([wanted])[name].result(_CALL_TIMEOUT_S)
        return name

    def grow(self, topic: str, partitions: int) -> None:
        """The topic has so many partitions from now on."""
        from confluent_kafka.admin import AdminClient, NewPartitions

        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        admin.create_partitions([NewPartitions(topic, partitions)])[topic].result(_CALL_TIMEOUT_S)

    def truncate(self, topic: str, partition: int, before: int) -> None:
        """Delete the records before an offset, as retention does."""
        from confluent_kafka import TopicPartition
        from confluent_kafka.admin import AdminClient

        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers})
        (done,) = admin.delete_records([TopicPartition(topic, partition, before)]).values()
        done.result(_CALL_TIMEOUT_S)

    def producer(self, **options: Any) -> Any:
        """A ``confluent_kafka.Producer``; options with underscores for dots (``transactional_id=``)."""
        from confluent_kafka import Producer

        given = {key.replace("_", "."): value for key, value in options.items()}
        return Producer({"bootstrap.servers": self.bootstrap_servers, "linger.ms": 1} | given)

    def produce(self, topic: str, messages: Sequence[Message | bytes | None], **options: Any) -> None:
        """Write and wait until the broker has it all. Bytes, or None for a tombstone, go to partition 0.

        With ``transactional_id=...`` in one transaction that is committed.
        """
        producer = self.producer(**options)
        if "transactional_id" in options:
            producer.init_transactions(_CALL_TIMEOUT_S)
            producer.begin_transaction()
        write(producer, topic, messages)
        if "transactional_id" in options:
            producer.commit_transaction(_CALL_TIMEOUT_S)

    def read(self, topic: str, *, committed: bool = True) -> list[Message]:
        """All that is in the topic now, by partition and offset, as an independent client reads it.

        ``committed``: only what transactions have committed (``read_committed``); a transaction that is open hides
        what is behind it.
        """
        from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

        consumer = Consumer(
            {
                "bootstrap.servers": self.bootstrap_servers,
                "group.id": f"test-{uuid.uuid4().hex}",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed" if committed else "read_uncommitted",
            }
        )
        try:
            partitions = consumer.list_topics(topic, _CALL_TIMEOUT_S).topics[topic].partitions
            consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in partitions])
            found: list[Message] = []
            open_ones = set(partitions)
            deadline = time.monotonic() + _CALL_TIMEOUT_S
            while open_ones:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"partitions {sorted(open_ones)} of {topic} have no end")
                for message in consumer.consume(10_000, 0.05):
                    if message.error() is None:
                        found.append(_message(message))
                    elif message.error().code() == KafkaError._PARTITION_EOF:
                        open_ones.discard(message.partition())
                    else:
                        raise RuntimeError(str(message.error()))
            return sorted(found, key=lambda m: (m.partition, m.offset))
        finally:
            consumer.close()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The broker answers nobody meanwhile (its process is stopped, its connections stay)."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            deadline = time.monotonic() + _CALL_TIMEOUT_S
            while not _stands_still(self.process.pid):  # on a busy machine its threads go on for a moment
                assert time.monotonic() < deadline, "the broker does not stop"
                time.sleep(0.001)
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


def write(producer: Any, topic: str, messages: Sequence[Message | bytes | None]) -> None:
    """Produce and flush with a producer of one's own; raises for what was not delivered."""
    failed: list[str] = []

    def delivered(error: Any, _: Any) -> None:
        if error is not None:
            failed.append(str(error))

    for each in messages:
        message = each if isinstance(each, Message) else Message(each)
        extra: dict[str, Any] = {} if message.timestamp is None else {"timestamp": message.timestamp}
        if message.headers:
            extra["headers"] = list(message.headers)
        while True:
            try:
                producer.produce(
                    topic, message.value, message.key, message.partition, on_delivery=delivered, **extra
                )  # fmt: skip
                break
            except BufferError:
                producer.poll(0.1)
    if producer.flush(_CALL_TIMEOUT_S) or failed:
        raise RuntimeError(f"not everything was delivered to {topic}: {failed[:3]}")


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """The broker of this session: use a topic of one's own."""
    with noida(tmp_path_factory.mktemp("kafka")) as server:
        yield server


@contextlib.contextmanager
def noida(folder: Path, port: int = 0) -> Iterator[KafkaServer]:
    """Run a broker on ``folder``; ready means that it has answered a client."""
    for tries_left in (0,) if port else (2, 1, 0):
        process, address = _start(folder, port or free_port())
        try:
            _wait_until_it_works(address, process, folder / "noida.log")
            break
        except BaseException:
            ended = process.poll() is not None  # somebody else was faster to take the port
            _end(process)
            if not (ended and tries_left):
                raise
    try:
        yield KafkaServer(address, process)
    finally:
        _end(process)


def _start(folder: Path, port: int) -> tuple[subprocess.Popen[bytes], str]:
    flags = ["--host", "127.0.0.1", "--only", "kafka", "--kafka-port", str(port)]
    binary = Path(str(files("noida_db"))) / "noida-db"
    binary.chmod(0o755)
    with (folder / "noida.log").open("wb") as output:
        process = subprocess.Popen(
            [str(binary), "start", "--data-dir", str(folder / "data"), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {"HOME": str(folder)},
        )
    return process, f"127.0.0.1:{port}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)
    process.kill()  # its data are temporary
    process.wait()


def _stands_still(pid: int) -> bool:
    """Whether every thread of the process is stopped."""
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return all(state in "Tt" for state in states)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def _wait_until_it_works(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    from confluent_kafka.admin import AdminClient

    host, _, port = address.partition(":")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            socket.create_connection((host, int(port)), 1).close()
            AdminClient({"bootstrap.servers": address}).list_topics(timeout=10)
            if process.poll() is not None:
                raise RuntimeError("another broker answers")
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"noida-db did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.02)  # the broker offers nothing to wait on but an answer


def _message(message: Any) -> Message:
    kind, timestamp = message.timestamp()
    return Message(
        value=message.value(),
        key=message.key(),
        partition=message.partition(),
        timestamp=timestamp if kind else None,
        headers=tuple(message.headers() or ()),
        offset=message.offset(),
    )


def records(rows: Sequence[Mapping[str, Any]], *, partitions: int = 1) -> list[Message]:
    """Rows as JSON messages, dealt out to the partitions in turn."""
    import json

    return [Message(json.dumps(row).encode(), partition=i % partitions) for i, row in enumerate(rows)]


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary, noida(Path(temporary)) as running:
        print(running.bootstrap_servers, flush=True)
        sys.stdin.read()
