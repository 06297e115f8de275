"""A broker that takes requests and answers none: no call waits longer than was asked for."""

from __future__ import annotations

import time

import pytest

from rayflow.core.ids import CheckpointId
from rayflow.errors import ConnectorError
from rayflow.operators.kafka import producers, slots
from rayflow.operators.kafka.sink import ExactlyOnceOperator
from tests.kafka_server import KafkaServer
from tests.operators.kafka_sink.place import Place, rows


@pytest.fixture
def place(kafka: KafkaServer) -> Place:
    return Place(kafka, kafka.topic(1))


def test_the_marker_of_a_transaction_is_not_waited_for_until_the_client_gives_up(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gives a request 60 s, whatever its call was told; the checkpoint is declined long before."""
    monkeypatch.setattr(producers, "SOCKET_TIMEOUT_MS", 500)
    monkeypatch.setattr(producers, "CALL_TIMEOUT_S", 0.0)
    operator = place.start()
    assert isinstance(operator, ExactlyOnceOperator)
    operator.process(rows(1), 0)
    assert operator._open.slot is not None
    operator._open.slot._producer.flush()
    monkeypatch.setattr(slots, "CALL_TIMEOUT_S", 0.5)
    frozen = operator.snapshot(CheckpointId(1))
    assert frozen is not None
    assert frozen.prepare is not None
    with place.kafka.away():
        began = time.monotonic()
        with pytest.raises(ConnectorError, match="subtask 0/1 could not write the marker of a transaction"):
            frozen.prepare()
        assert time.monotonic() - began < 30
    monkeypatch.undo()
    place.committer().commit(list(frozen.prepare()))
    assert place.seen() == [1]
    operator.close()
