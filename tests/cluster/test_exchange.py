"""The exchange between processes: content, order and credit."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from rayflow.cluster import exchange_server, wire
from rayflow.cluster.exchange_client import _Outbound
from rayflow.cluster.inbox import Inbox
from rayflow.core.credits import OutputAccount
from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import Barrier, CheckpointKind, Data, Element, EndOfInput, Watermark
from rayflow.errors import ProtocolError
from tests.cluster.exchange_child import ATTEMPT, CHANNEL, JOB, TOKEN
from tests.cluster.exchange_harness import PATIENCE_S, WINDOW, Receiver, Sender, channels_into, data

pytest_plugins = ["tests.cluster.exchange_fixtures"]

psutil: Any = importlib.import_module("psutil")  # without stubs


# ------------------------------------------------------------------------------------------------------- order, content


def test_elements_arrive_as_sent_and_in_order(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    sent: list[Element] = [Watermark(-5), Barrier(CheckpointId(1), CheckpointKind.SAVEPOINT)]
    for i in range(200):
        sent.append(data(10, i))
        if i % 7 == 0:
            sent.append(Watermark(i))
        if i % 50 == 0:
            sent.append(Barrier(CheckpointId(2 + i), CheckpointKind.STOP))
    sent.append(EndOfInput())
    sender = senders(receiver.server.address)
    for element in sent:
        sender.send(element)
    assert receiver.take(len(sent)) == sent
    assert not len(receiver.broken)
    assert not len(sender.broken)


def test_control_elements_need_no_batch(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    sender = senders(receiver.server.address)
    sender.send(Watermark(7))
    sender.send(EndOfInput())
    assert receiver.take(2) == [Watermark(7), EndOfInput()]


def test_order_holds_when_the_schema_changes(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    sent: list[Element] = [Watermark(0)]
    for i in range(30):
        sent += [data(5, i), data(5, i, y=["a"] * 5), Watermark(i), data(5, i, y=[1.5] * 5)]
    sender = senders(receiver.server.address)
    for element in sent:
        sender.send(element)
    got = receiver.take(len(sent))
    assert got == sent
    assert [e.payload.schema for e in got if isinstance(e, Data)] == [
        e.payload.schema for e in sent if isinstance(e, Data)
    ]


def test_credit_goes_on_over_a_schema_change(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    sender = senders(receiver.server.address)
    first, second = data(100), data(100, y=[0] * 100)
    sender.send(first)
    sender.send(second)
    receiver.take(2)
    taken = 0
    while taken < first.nbytes + second.nbytes:
        events = sender.credits.drain(PATIENCE_S)
        assert events, f"credited {taken} bytes only"
        taken = max(taken, *(n for _, n in events))
    assert taken == first.nbytes + second.nbytes


def test_batches_of_every_shape_survive_and_are_aligned(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    word = pa.array(["x", "y", None])
    batches = [
        pa.record_batch({"x": np.arange(1_000_000)}).slice(7, 3),
        pa.record_batch({"x": pa.array([], pa.int64())}),
        pa.record_batch({"d": word.dictionary_encode()}),
        pa.record_batch({"d": pa.array(["other", "words", None]).dictionary_encode()}),
        pa.record_batch({"l": [[1], None, [2, 3]], "s": [{"a": 1}, None, {"a": 2}], "v": word.cast(pa.string_view())}),
        pa.record_batch({"m": [1]}, schema=pa.schema([pa.field("m", pa.int64(), metadata={"k": "v"})])),
        pa.RecordBatch.from_struct_array(pa.array([{}, {}], pa.struct([]))),
    ]
    sender = senders(receiver.server.address)
    for batch in batches:
        sender.send(Data(batch, 1))
    got = [e.payload for e in receiver.take(len(batches)) if isinstance(e, Data)]
    for expected, batch in zip(batches, got, strict=True):
        batch.validate(full=True)
        assert batch.equals(expected, check_metadata=True)
        assert all(
            b.address % 64 == 0 for column in batch.columns for b in column.buffers() if b is not None and b.size
        )
    assert got[0].get_total_buffer_size() < 1000, "a slice must not ship its parent"


def test_a_batch_larger_than_any_default_limit(senders: Callable[..., Sender]) -> None:
    receiver = Receiver(window=1 << 30)
    with contextlib.closing(receiver.server):
        big = data(2_000_000)
        senders(receiver.server.address).send(big)
        assert receiver.take(1) == [big]


def test_32_channels_into_one_subtask() -> None:
    channels = channels_into(0, 32)
    receiver = Receiver(*channels)
    sender = Sender(receiver.server.address, *channels)
    for i in range(20):
        for k, channel in enumerate(channels):
            sender.send(data(10, 1000 * k + i), channel)
    seen: dict[ChannelId, list[int]] = {c: [] for c in channels}
    count = 0
    while count < 20 * 32:
        events = receiver.inbox.drain(PATIENCE_S)
        assert events
        count += len(events)
        for _, channel, element in events:
            assert isinstance(element, Data)
            seen[channel].append(element.payload["x"][0].as_py())
    assert seen == {c: [1000 * k + i for i in range(20)] for k, c in enumerate(channels)}
    sender.client.close()
    assert receiver.server.close()


# ------------------------------------------------------------------------------------------------------ order, enforced


def raw_stream(receiver: Receiver) -> tuple[Any, Any]:
    options = flight.FlightCallOptions(headers=[(b"authorization", wire.authorization(TOKEN).encode())])
    command = wire.StreamAddress(JOB, ATTEMPT, CHANNEL).to_command()
    client = flight.FlightClient(receiver.server.address)
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command), options)
    assert wire.decode_back(reader.read_chunk().app_metadata) == wire.Credit(0)
    return writer, reader


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([wire.encode_element(Watermark(1), 0), wire.encode_element(Watermark(1), 2)], "F2.*expected element 1, got 2"),
        ([wire.encode_element(Watermark(1), 0), wire.encode_element(Watermark(1), 0)], "F2.*expected element 1, got 0"),
        ([wire.encode_element(EndOfInput(), 0), wire.encode_element(Watermark(1), 1)], "F2.*after its end"),
        ([b"x" * 18], "unknown type"),
        ([b"x"], "expected an element header"),
        ([wire.encode_element(data(1), 0)], "without a batch"),
    ],
)
def test_a_sender_that_breaks_the_rules_is_cut_off(headers: list[bytes], expected: str, receiver: Receiver) -> None:
    writer, reader = raw_stream(receiver)
    for header in headers:
        writer.write_metadata(header)
    with pytest.raises(flight.FlightServerError, match=expected):
        reader.read_chunk()


def overtaking(self: Any, stream: Any) -> bool:
    """Does not wait until the old stream is taken when the schema changes."""
    return True


WRITE = _Outbound._write


def swapping(self: Any, element: Element) -> None:
    """Lets the first batch of a new schema go ahead of the last one of the old."""
    if not hasattr(self, "held"):
        self.held = element
        return
    self._sequence = 1
    WRITE(self, element)
    self._sequence = 0
    WRITE(self, self.held)


@pytest.mark.parametrize(
    ("method", "broken", "rule"),
    [("_drain", overtaking, "open stream already"), ("_write", swapping, "expected element 0, got 1")],
)
def test_a_client_that_reorders_across_a_schema_change_is_caught(
    method: str,
    broken: Callable[..., Any],
    rule: str,
    receiver: Receiver,
    senders: Callable[..., Sender],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Outbound, method, broken)
    sender = senders(receiver.server.address)
    sender.send(data(3))
    sender.send(data(3, y=[1, 2, 3]))
    error = sender.error()
    assert "F2" in error
    assert rule in error


# --------------------------------------------------------------------------------------------------------------- credit


def pump(receiver: Receiver, sender: Sender, batch: Data, count: int, take: int) -> OutputAccount:
    """Send ``count`` batches under credit; the receiver takes ``take`` only when the sender can do no more."""
    events: Inbox[Element | int] = Inbox()
    receiver.put = lambda attempt, channel, element: events.put(element)
    sender.on_credit = lambda channel, taken: events.put(taken)
    account = OutputAccount(CHANNEL, WINDOW)
    arrived: list[Data] = []
    offered = taken = 0
    while taken < count:
        while offered < count and not account.waiting:
            offered += 1
            for element in account.offer(batch):
                sender.send(element)
        for element in arrived[:take]:
            taken += 1
            receiver.server.return_credit(CHANNEL, element.nbytes)
        del arrived[:take]
        if taken == count:
            break
        happened = events.drain(0 if arrived else PATIENCE_S)
        assert happened or arrived, f"stalled: {account.in_flight} bytes in flight; {sender.broken.drain(0)}"
        for event in happened:
            if isinstance(event, Data):
                arrived.append(event)
            elif isinstance(event, int):
                for element in account.credit(event):
                    sender.send(element)
        account.check_invariants()
    return account


@pytest.mark.parametrize("take", [1, 3, 1000])
def test_a_slow_receiver_bounds_what_is_in_flight(
    take: int, receiver: Receiver, senders: Callable[..., Sender]
) -> None:
    batch = data(12_000)
    sender = senders(receiver.server.address)
    pump(receiver, sender, batch, 20, take)
    before = psutil.Process().memory_info().rss
    receiver.server.accept(JOB, Attempt(2), [CHANNEL])
    sender = senders(receiver.server.address, attempt=Attempt(2))
    account = pump(receiver, sender, batch, 1500, take)
    assert WINDOW - batch.nbytes < account.peak <= WINDOW
    assert psutil.Process().memory_info().rss - before < 32 * WINDOW, "of 137 MB sent"


@pytest.mark.parametrize("share", [1.0, 0.95, 0.4, 0.001])
def test_credit_never_stalls_a_sender(share: float, receiver: Receiver, senders: Callable[..., Sender]) -> None:
    """Elements as large as the window need every byte of credit back, also what is below the coalescing step."""
    rows = max(1, int(WINDOW * share) // 8)
    account = pump(receiver, senders(receiver.server.address), data(rows), 50, 1)
    assert account.peak <= WINDOW


def test_a_server_that_coalesces_without_the_remainder_stalls(
    monkeypatch: pytest.MonkeyPatch, senders: Callable[..., Sender]
) -> None:
    """The broken variant of the test above: credit below the step is forgotten."""
    monkeypatch.setattr(exchange_server._Attempt, "owe", lambda self, inbound: None)
    receiver = Receiver()
    sender = senders(receiver.server.address)
    small = data(10)
    sender.send(small)
    receiver.take(1)
    assert sender.credits.drain(0.3) == []
    sender.client.close()
    receiver.server.close()


def test_a_sender_that_ignores_credit_is_cut_off(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    sender = senders(receiver.server.address)
    batch = data(12_000)
    for _ in range(12):
        sender.send(batch)
    assert "F1" in sender.error()
    assert sum(e.nbytes for _, _, e in receiver.inbox.drain(0) if isinstance(e, Data)) <= WINDOW
    attempt, channel, error = receiver.broken.drain(PATIENCE_S)[0]
    assert (attempt, channel) == (ATTEMPT, CHANNEL)
    assert isinstance(error, ProtocolError)


def test_credit_for_what_never_came_is_an_error(receiver: Receiver) -> None:
    with pytest.raises(ProtocolError, match="F1"):
        receiver.server.return_credit(CHANNEL, 1)


def test_credit_for_an_attempt_that_is_over_changes_nothing(receiver: Receiver) -> None:
    receiver.server.return_credit(CHANNEL, 1, attempt=Attempt(0))
    receiver.server.return_credit(ChannelId(9, SubtaskId("a", 0), SubtaskId("b", 0)), 1)
