"""The at-least-once Kafka sink on a real broker: nothing is acknowledged that is not delivered."""

from __future__ import annotations

import pyarrow as pa
import pytest

from rayflow.core.ids import CheckpointId
from rayflow.errors import ConnectorError, DataError
from rayflow.operators.kafka import producers
from rayflow.operators.kafka.encoding import Encoding
from tests.kafka_server import KafkaServer
from tests.operators.kafka_sink.place import Place, prepared, rows


@pytest.fixture
def place(kafka: KafkaServer) -> Place:
    return Place(kafka, kafka.topic(1))


def test_a_checkpoint_is_prepared_when_its_rows_are_delivered(place: Place) -> None:
    sink = place.sink(exactly_once=False)
    assert sink.committer() is None
    operator = place.start(sink=sink)
    operator.process(rows(1, 2), 0)
    assert prepared(operator, 1) == []
    assert place.in_order() == [1, 2]
    operator.process(rows(3), 0)
    one = operator.snapshot(CheckpointId(2))
    operator.process(rows(4), 0)  # waits for those before the barrier
    assert one is not None
    assert one.prepare is not None
    one.prepare()
    prepared(operator, 3)
    assert place.in_order() == [1, 2, 3, 4]
    assert operator.snapshot(CheckpointId(4)) is None
    operator.close()
    operator.close()


def test_a_broker_that_is_away_declines_the_checkpoint_and_loses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = place.start(sink=place.sink(exactly_once=False))
    operator.process(rows(1), 0)
    prepared(operator, 1)
    monkeypatch.setattr(producers, "DELIVERY_TIMEOUT_S", 0.0)
    with place.kafka.away():
        operator.process(rows(2), 0)
        frozen = operator.snapshot(CheckpointId(2))
        assert frozen is not None
        assert frozen.prepare is not None
        with pytest.raises(ConnectorError, match="subtask 0/1 expected its messages to be delivered .* 1 are not"):
            frozen.prepare()
        operator.process(rows(3), 0)
    monkeypatch.undo()
    frozen.prepare()
    prepared(operator, 3)
    assert place.in_order() == [1, 2, 3]
    operator.close()


def test_a_full_queue_waits_for_the_broker(place: Place) -> None:
    operator = place.start(sink=place.sink({"queue.buffering.max.messages": 10}, exactly_once=False))
    operator.process(rows(*range(1_000)), 0)
    prepared(operator, 1)
    assert place.in_order() == list(range(1_000))
    operator.close()


@pytest.mark.parametrize("exactly_once", [True, False])
def test_a_message_that_the_broker_never_takes_fails_with_its_reason(place: Place, exactly_once: bool) -> None:
    sink = place.sink(exactly_once=exactly_once, encoding=Encoding(partition="x"))
    operator = place.start(sink=sink)
    operator.process(rows(0), 0)
    prepared(operator, 1)
    with pytest.raises(DataError, match=r"step 'step' subtask 0/1 .*_UNKNOWN_PARTITION"):  # noqa: PT012  here or there
        operator.process(rows(99), 0)
        prepared(operator, 2)
    operator.close()


def test_a_message_that_is_too_large_fails_with_its_reason(place: Place) -> None:
    operator = place.start(sink=place.sink({"message.max.bytes": 1_000}, exactly_once=False))
    with pytest.raises(DataError, match="MSG_SIZE_TOO_LARGE.*message.max.bytes"):
        operator.process(pa.record_batch({"x": [1], "s": ["x" * 2_000]}), 0)
    operator.close()
