"""The exchange between processes: strangers at the door, and peers that die, stop or are too late."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pyarrow.flight as flight
import pytest

from rayflow.cluster import wire
from rayflow.cluster.exchange_server import ExchangeServer
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.messages import Data, EndOfInput, Watermark
from rayflow.errors import ClusterError, ProtocolError
from tests.cluster.exchange_child import ATTEMPT, CHANNEL, JOB, TOKEN
from tests.cluster.exchange_harness import PATIENCE_S, Receiver, Sender, child, data, wait_for

pytest_plugins = ["tests.cluster.exchange_fixtures"]

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
        assert time.monotonic() - started < 5


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
        assert time.monotonic() - started < 5
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
        assert time.monotonic() - started < 5
        other = Sender(receiver.server.address, attempt=Attempt(2))
        other.send(Watermark(1))
        assert receiver.inbox.drain(PATIENCE_S) == [(Attempt(2), CHANNEL, Watermark(1))]
        other.client.close()
        assert not receiver.server.close(timeout_s=0.1), "gRPC waits for the stopped peer; close does not"
    # The next attempt's sender closed without an end of input, which may be told; the old attempt is over and is not.
    assert ATTEMPT not in {attempt for attempt, _, _ in receiver.broken.drain(0.0)}


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
