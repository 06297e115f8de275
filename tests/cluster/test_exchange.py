"""The exchange between processes: order, credit, the door, and peers that die, stop or lie."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from rayflow.cluster import exchange_server, wire
from rayflow.cluster.exchange_client import ExchangeClient, _Outbound
from rayflow.cluster.exchange_server import ExchangeServer
from rayflow.cluster.inbox import Inbox
from rayflow.core.credits import OutputAccount
from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import Barrier, CheckpointKind, Data, Element, EndOfInput, Watermark
from rayflow.errors import ClusterError, ProtocolError, RayflowError
from tests.cluster.exchange_child import ATTEMPT, CHANNEL, JOB, TOKEN

psutil: Any = importlib.import_module("psutil")  # without stubs
ROOT = Path(__file__).resolve().parents[2]
WINDOW = 1 << 20
PATIENCE_S = 20.0


class Receiver:
    """A server and what came in; the test is its loop."""

    def __init__(
        self, *channels: ChannelId, window: int = WINDOW, server: type[ExchangeServer] = ExchangeServer
    ) -> None:
        self.inbox: Inbox[tuple[Attempt, ChannelId, Element]] = Inbox()
        self.broken: Inbox[tuple[Attempt, ChannelId, RayflowError]] = Inbox()
        self.put: Callable[[Attempt, ChannelId, Element], None] = lambda a, c, e: self.inbox.put((a, c, e))
        self.server = ExchangeServer(
            "127.0.0.1",
            TOKEN,
            lambda a, c, e: self.put(a, c, e),
            window_bytes=window,
            on_broken=lambda a, c, e: self.broken.put((a, c, e)),
        )
        self.server.accept(JOB, ATTEMPT, channels or [CHANNEL])

    def take(self, count: int, *, credit: bool = True) -> list[Element]:
        """Exactly this many more elements, in order of arrival."""
        taken: list[Element] = []
        while len(taken) < count:
            events = self.inbox.drain(PATIENCE_S)
            assert events, f"{len(taken)} of {count} elements came; broken: {self.broken.drain(0)}"
            for _, channel, element in events:
                taken.append(element)
                if credit and isinstance(element, Data):
                    self.server.return_credit(channel, element.nbytes)
        assert len(taken) == count
        return taken


class Sender:
    """A client and what it was told."""

    def __init__(
        self,
        address: str,
        *channels: ChannelId,
        token: str = TOKEN,
        job: str = JOB,
        attempt: Attempt = ATTEMPT,
        timeout_s: float = 10.0,
    ) -> None:
        self.credits: Inbox[tuple[ChannelId, int]] = Inbox()
        self.broken: Inbox[tuple[ChannelId, RayflowError]] = Inbox()
        self.on_credit: Callable[[ChannelId, int], None] = lambda c, n: self.credits.put((c, n))
        self.client = ExchangeClient(
            token,
            job,
            attempt,
            lambda c, n: self.on_credit(c, n),
            lambda c, e: self.broken.put((c, e)),
            connect_timeout_s=timeout_s,
        )
        for channel in channels or [CHANNEL]:
            self.client.connect(channel, address)

    def send(self, element: Element, channel: ChannelId = CHANNEL) -> None:
        self.client.send(channel, element)

    def error(self) -> str:
        """Why the channel broke; it was told exactly once."""
        events = self.broken.drain(PATIENCE_S)
        assert len(events) == 1, events
        assert isinstance(events[0][1], ClusterError)
        return str(events[0][1])


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.close()


@pytest.fixture
def senders() -> Iterator[Callable[..., Sender]]:
    made: list[Sender] = []

    def make(*args: Any, **options: Any) -> Sender:
        made.append(Sender(*args, **options))
        return made[-1]

    yield make
    for sender in made:
        sender.client.close()


@contextlib.contextmanager
def child(role: str, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the other end, and the first line it said. Killed at the end."""
    command = [sys.executable, "-m", "tests.cluster.exchange_child", role, *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def data(n: int, start: int = 0, **columns: Any) -> Data:
    batch = pa.record_batch({"x": np.arange(start, start + n), **columns})
    return Data(batch, batch.nbytes)


def wait_for(condition: Callable[[], bool]) -> None:
    """For states that nothing announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        os.sched_yield()


def channels_into(target: int, count: int) -> list[ChannelId]:
    return [ChannelId(0, SubtaskId("a", i), SubtaskId("b", target)) for i in range(count)]


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
    monkeypatch.setattr(sys.modules[__name__], "PATIENCE_S", 0.3)
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
    receiver.server.return_credit(ChannelId(9, SubtaskId("a", 0), SubtaskId("b", 0)), 1)


# ------------------------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"token": "another"}, "token"),
        ({"token": ""}, "token"),
        ({"token": TOKEN + "x"}, "token"),
        ({"job": "other"}, "expected job 'job', got 'other'"),
        ({"attempt": Attempt(0)}, "C6.*expected attempt 1, got 0"),
        ({"attempt": Attempt(2)}, "C6.*expected attempt 1, got 2"),
    ],
)
def test_strangers_are_refused_and_counted(
    options: dict[str, Any], expected: str, receiver: Receiver, senders: Callable[..., Sender]
) -> None:
    sender = senders(receiver.server.address, **options)
    sender.send(Watermark(1))
    error = sender.error()
    assert re.search(expected, error), error
    assert str(CHANNEL) in error
    assert receiver.server.address in error
    assert receiver.server.refused == 1
    sender.send(Watermark(2))
    assert not len(sender.broken), "told once"
    assert not len(receiver.inbox)


def test_no_token_at_all(receiver: Receiver) -> None:
    client = flight.FlightClient(receiver.server.address)
    with pytest.raises(flight.FlightUnauthenticatedError):
        list(client.list_flights())
    with pytest.raises(flight.FlightUnauthenticatedError):
        list(client.do_action("x"))
    assert receiver.server.refused == 2


def test_a_server_that_skips_the_token_check_is_caught(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, senders: Callable[..., Sender]
) -> None:
    """The broken variant: with the check gone, what the tests above forbid happens."""
    monkeypatch.setattr(wire, "is_authorized", lambda token, headers: True)
    sender = senders(receiver.server.address, token="another")
    sender.send(Watermark(1))
    assert receiver.take(1) == [Watermark(1)]
    assert receiver.server.refused == 0


def test_an_unknown_channel(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    unknown = ChannelId(1, SubtaskId("a", 0), SubtaskId("b", 0))
    sender = senders(receiver.server.address, unknown)
    sender.send(Watermark(1), unknown)
    assert "no such channel" in sender.error()
    assert receiver.server.refused == 1


def test_a_server_that_accepts_nothing_yet(senders: Callable[..., Sender]) -> None:
    server = ExchangeServer("127.0.0.1", TOKEN, lambda a, c, e: None)
    sender = senders(server.address)
    sender.send(Watermark(1))
    assert "accepts no streams yet" in sender.error()
    server.close()


def test_two_senders_on_one_channel(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    first, second = senders(receiver.server.address), senders(receiver.server.address)
    first.send(Watermark(1))
    assert receiver.take(1) == [Watermark(1)]
    second.send(Watermark(2))
    assert "open stream already" in second.error()
    first.send(Watermark(3))
    assert receiver.take(1) == [Watermark(3)]
    assert not len(first.broken)


def test_an_unreadable_address_is_refused(receiver: Receiver) -> None:
    options = flight.FlightCallOptions(headers=[(b"authorization", wire.authorization(TOKEN).encode())])
    client = flight.FlightClient(receiver.server.address)
    for command in (b"", b"[]", b"\x80\x04pickle", b'{"job":1,"attempt":1,"channel":[1]}'):
        _, reader = client.do_exchange(flight.FlightDescriptor.for_command(command), options)
        with pytest.raises(flight.FlightServerError, match="cannot be read"):
            reader.read_chunk()
    assert receiver.server.refused == 4


def test_streams_of_an_older_attempt_end(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    old = senders(receiver.server.address)
    old.send(Watermark(1))
    receiver.take(1)
    receiver.server.accept(JOB, Attempt(2), [CHANNEL])
    assert "C6" in old.error()
    new = senders(receiver.server.address, attempt=Attempt(2))
    new.send(Watermark(2))
    old.send(Watermark(3))
    events = receiver.inbox.drain(PATIENCE_S)
    assert events == [(Attempt(2), CHANNEL, Watermark(2))]
    assert not len(receiver.broken), "an old attempt is nobody's failure"


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


# ----------------------------------------------------------------------------------------------- peers that are no more


def test_nobody_listens(senders: Callable[..., Sender]) -> None:
    server = ExchangeServer("127.0.0.1", TOKEN, lambda a, c, e: None)
    address = server.address
    server.close()
    sender = senders(address)
    sender.send(Watermark(1))
    error = sender.error()
    assert str(CHANNEL) in error
    assert address in error


def test_no_answer_is_an_error_after_the_timeout(senders: Callable[..., Sender]) -> None:
    with child("receive") as (process, address):
        os.kill(process.pid, signal.SIGSTOP)
        sender = senders(address, timeout_s=0.2)
        sender.send(Watermark(1))
        assert "no answer within 0.2 s" in sender.error()


def test_a_killed_receiver_breaks_the_channel_once(senders: Callable[..., Sender]) -> None:
    with child("receive") as (process, address):
        sender = senders(address)
        sender.send(data(10))
        process.kill()
        error = sender.error()
        assert str(CHANNEL) in error
        sender.send(data(10))
        sender.send(data(10, y=[1] * 10))
        assert not len(sender.broken)
        started = time.monotonic()
        sender.client.close()
        assert time.monotonic() - started < 1


def test_neither_send_nor_close_waits_for_a_stopped_receiver(senders: Callable[..., Sender]) -> None:
    with child("receive") as (process, address):
        sender = senders(address)
        sender.send(data(10))
        os.kill(process.pid, signal.SIGSTOP)
        batch = data(5_000_000)
        started = time.monotonic()
        for _ in range(20):
            sender.send(batch)
        assert len(sender.client._channels[CHANNEL]._queue) >= 18, "800 MB cannot have gone to a stopped process"
        sender.client.close()
        assert time.monotonic() - started < 1
        assert not len(sender.broken), "closing is no failure"
    wait_for(lambda: str(CHANNEL) not in "".join(t.name for t in threading.enumerate()))


def test_a_stopped_sender_blocks_neither_credit_nor_the_next_attempt() -> None:
    receiver = Receiver()
    with child("send", receiver.server.address) as (process, line):
        assert line == "sent"
        (element,) = receiver.take(1, credit=False)
        assert isinstance(element, Data)
        os.kill(process.pid, signal.SIGSTOP)
        started = time.monotonic()
        receiver.server.return_credit(CHANNEL, element.nbytes)
        receiver.server.accept(JOB, Attempt(2), [CHANNEL])
        assert time.monotonic() - started < 1
        other = Sender(receiver.server.address, attempt=Attempt(2))
        other.send(Watermark(1))
        assert receiver.inbox.drain(PATIENCE_S) == [(Attempt(2), CHANNEL, Watermark(1))]
        other.client.close()
        assert not receiver.server.close(timeout_s=0.1), "gRPC waits for the stopped peer; close does not"
    assert not len(receiver.broken)


def test_a_killed_sender_is_told_to_the_receiver() -> None:
    receiver = Receiver()
    with child("send", receiver.server.address) as (process, _):
        receiver.take(1)
        process.kill()
        attempt, channel, error = receiver.broken.drain(PATIENCE_S)[0]
    assert (attempt, channel) == (ATTEMPT, CHANNEL)
    assert isinstance(error, ClusterError)
    assert receiver.server.close()


def test_after_the_end_of_input_nobody_is_missed(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    sender = senders(receiver.server.address)
    sender.send(EndOfInput())
    receiver.take(1)
    stream = sender.client._channels[CHANNEL]._stream
    assert stream is not None
    assert stream.done.wait(PATIENCE_S)
    sender.client.close()
    assert receiver.server.close()
    assert not len(receiver.broken)
    assert not len(sender.broken)


def test_no_thread_is_left_behind() -> None:
    names = {t.name for t in threading.enumerate()}
    receiver = Receiver()
    sender = Sender(receiver.server.address)
    sender.send(data(1))
    receiver.take(1)
    sender.client.close()
    assert receiver.server.close()
    wait_for(lambda: {t.name for t in threading.enumerate() if t.name.startswith("rayflow")} <= names)


def test_misuse_of_the_client(receiver: Receiver, senders: Callable[..., Sender]) -> None:
    sender = senders(receiver.server.address)
    with pytest.raises(ProtocolError, match="connected already"):
        sender.client.connect(CHANNEL, receiver.server.address)
    with pytest.raises(ProtocolError, match="not connected"):
        sender.client.send(ChannelId(5, SubtaskId("a", 0), SubtaskId("b", 0)), Watermark(1))
    sender.send(EndOfInput())
    with pytest.raises(ProtocolError, match="F2"):
        sender.send(Watermark(1))
