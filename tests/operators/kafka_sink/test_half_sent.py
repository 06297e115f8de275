"""Rows that were sent in part: never sealed as if they were whole, and never sent again beside themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from rayflow.core.ids import CheckpointId
from rayflow.errors import ConnectorError
from rayflow.operators.base import Collected
from rayflow.operators.kafka import producers
from rayflow.operators.kafka.encoding import Messages
from rayflow.operators.kafka.producers import Producer, ProducerBrokenError
from rayflow.operators.kafka.sink import AtLeastOnceOperator, KafkaSink, _Interval
from tests.operators.kafka_sink.place import rows
from tests.operators.sources.contract import context

FOREVER_S = 30.0


class NeedsBroker(AtLeastOnceOperator):
    """Without a broker: `_send` is scripted."""

    def __init__(self) -> None:
        super().__init__(KafkaSink("t", bootstrap_servers="localhost:1", exactly_once=False))
        self.sending: Callable[[], None] = lambda: None

    def open(self, *_: Any) -> None:
        self.ctx = context()
        self.out = Collected()

    def _send(self, interval: _Interval, messages: Messages) -> None:
        self._dirty = True
        self.sending()

    def _deliver(self, sealed: _Interval) -> None:
        self._dirty = False


class ToldOfWaiting:
    """A lock that says when another thread is about to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.main = threading.current_thread()
        self.wanted = threading.Event()

    def __enter__(self) -> None:
        if threading.current_thread() is self.main:
            self.wanted.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_a_barrier_does_not_seal_rows_that_are_being_lost_at_that_moment() -> None:
    operator = NeedsBroker()
    operator.open()
    operator.process(rows(1), 0)
    first = operator.snapshot(CheckpointId(1))
    assert first is not None
    assert first.prepare is not None
    operator.process(rows(2), 0)  # waits behind the barrier
    lock = ToldOfWaiting()
    operator._lock = lock  # type: ignore[assignment]
    begun = threading.Event()

    def failing() -> None:
        begun.set()
        assert lock.wanted.wait(FOREVER_S)
        raise ConnectorError("no broker")

    operator.sending = failing
    uploader = threading.Thread(target=first.prepare)
    uploader.start()
    assert begun.wait(FOREVER_S)
    with pytest.raises(ConnectorError, match="no broker"):
        operator.snapshot(CheckpointId(2))
    uploader.join()


class FakeKafka:
    """A client whose queue takes so many messages and delivers none."""

    class KafkaException(Exception):
        pass

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken: list[bytes] = []

    def Producer(self, config: object) -> FakeKafka:
        return self

    def produce(self, topic: str, value: bytes, key: bytes | None) -> None:
        if len(self.taken) == self.room:
            raise BufferError
        self.taken.append(value)

    def poll(self, timeout: float) -> int:
        return 0

    def __len__(self) -> int:
        return len(self.taken)


@pytest.mark.parametrize(("room", "broken"), [(0, False), (2, True)])
def test_a_full_queue_can_be_tried_again_only_while_it_took_nothing(
    room: int, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = FakeKafka(room)
    monkeypatch.setattr(producers, "confluent", lambda: kafka)
    monkeypatch.setattr(producers, "QUEUE_TIMEOUT_S", -1.0)
    producer = Producer("localhost:1", {}, where="step")
    with pytest.raises(ConnectorError, match="queue was full") as found:
        producer.send("t", Messages([b"1", b"2", b"3"]))
    assert isinstance(found.value, ProducerBrokenError) == broken
    assert len(kafka.taken) == room
