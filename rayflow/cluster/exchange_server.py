"""The receiving end of the exchange: one Flight server a subtask, one DoExchange stream a channel.

Rules held here
* A handler never waits for anything but its stream: it appends to the inbox and reads on. Flow control is by credit
  alone, because a handler that stops reading leaves some 30 MB in gRPC's buffers (measured) before the sender notices.
* F1  a sender that has more in flight than the window is cut off. F2  so is one whose element numbers have a gap.
* C6  a stream of another job, attempt or channel is refused; streams of older attempts are told that they are over.
* Who has no token is refused before anything is read, and counted.

DoExchange and not DoPut (same speed, measured): its metadata needs no schema, so that watermarks and barriers can go
ahead of the first batch on the same stream, and the client can cancel it, which pyarrow does not offer for DoPut.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import pyarrow as pa
import pyarrow.flight as flight

from rayflow.cluster import wire
from rayflow.core.ids import Attempt, ChannelId
from rayflow.core.messages import Data, Element, EndOfInput
from rayflow.errors import ClusterError, ProtocolError, RayflowError

InboxPut = Callable[[Attempt, ChannelId, Element], None]
OnBroken = Callable[[Attempt, ChannelId, RayflowError], None]

WINDOW_BYTES: Final = 16 * 1024 * 1024
_LINGER_S: Final = 0.002
_MESSAGES_PER_WINDOW: Final = 8


class _Inbound:
    """One channel in one attempt; it outlives its streams. All attributes are guarded by ``lock``."""

    __slots__ = ("announced", "ended", "expected", "lock", "owed", "received", "taken", "writer")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.writer: Any = None
        """Set while a handler runs, and only then: a write after the handler has returned would touch freed memory."""
        self.expected = 0
        """Number of the next element (rule F2)."""
        self.received = 0
        self.taken = 0
        """taken <= received."""
        self.announced = 0
        """What the sender was told; announced <= taken, and never falls."""
        self.owed = False
        """It stands in the flusher's queue."""
        self.ended = False
        """`EndOfInput` was received: the end of the stream is no failure."""

    def announce(self) -> None:
        """Tell the sender what was taken. A dead peer is noticed by the handler, not here."""
        self.announced = self.taken
        with contextlib.suppress(*wire.STREAM_ERRORS):
            self.writer.write_metadata(wire.encode_back(wire.Credit(self.taken)))


class _Attempt:
    """The channels of one attempt and the thread that returns what small credit is left over."""

    def __init__(self, job: str, attempt: Attempt, channels: Iterable[ChannelId]) -> None:
        self.job = job
        self.attempt = attempt
        self.channels = {channel: _Inbound() for channel in channels}
        self._over = threading.Event()
        self._owed: deque[_Inbound] = deque()
        self._wake = threading.Event()
        threading.Thread(target=self._run, name=f"rayflow-credit-{attempt}", daemon=True).start()

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def owe(self, inbound: _Inbound) -> None:
        self._owed.append(inbound)
        if not self._wake.is_set():
            self._wake.set()

    def end(self) -> None:
        """Never blocks: the senders are told by the thread, because one of them may be stopped."""
        self._over.set()
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            if self._over.wait(_LINGER_S):
                break
            self._wake.clear()
            for _ in range(len(self._owed)):
                inbound = self._owed.popleft()
                with inbound.lock:
                    inbound.owed = False
                    # With elements still queued the next take comes back here: nothing is forgotten.
                    if inbound.writer is not None and inbound.announced < inbound.taken == inbound.received:
                        inbound.announce()
        over = wire.encode_back(wire.AttemptOver())
        for inbound in self.channels.values():
            with inbound.lock, contextlib.suppress(*wire.STREAM_ERRORS):
                if inbound.writer is not None:
                    inbound.writer.write_metadata(over)


class _Doorkeeper(flight.ServerMiddlewareFactory):
    """Refuses every call without the token, whatever its method."""

    def __init__(self, token: str, refused: Callable[[], None]) -> None:
        super().__init__()
        self._token = token
        self._refused = refused

    def start_call(self, info: Any, headers: dict[str, list[Any]]) -> None:
        if not wire.is_authorized(self._token, headers):
            self._refused()
            raise flight.FlightUnauthenticatedError(
                "this port belongs to a rayflow job; expected its token, got none or another"
            )


class ExchangeServer(flight.FlightServerBase):
    """Receives the elements of all input channels of one subtask.

    ``inbox_put(attempt, channel, element)`` is called from gRPC's threads and must append and return. The payload of
    `Data` is a ``pyarrow.RecordBatch`` in buffers of its own, aligned to 64 bytes.

    ``on_broken(attempt, channel, error)`` is called when a stream of the current attempt breaks before its
    `EndOfInput`: the sender is gone (`ClusterError`) or broke a rule (`ProtocolError`).

    ``window_bytes`` is the credit of every sender (rule F1).
    """

    def __init__(
        self,
        host: str,
        token: str,
        inbox_put: InboxPut,
        *,
        window_bytes: int = WINDOW_BYTES,
        on_broken: OnBroken | None = None,
    ) -> None:
        if not token:
            raise ProtocolError("an exchange server needs a token, got an empty one; make one for each job")
        # The server runs as soon as the base is initialised: everything else stands before that.
        self._inbox_put = inbox_put
        self._on_broken = on_broken
        self._window = window_bytes
        self._credit_step = max(1, window_bytes // _MESSAGES_PER_WINDOW)
        self._memory = pa.default_cpu_memory_manager()
        self._current: _Attempt | None = None
        self._count_lock = threading.Lock()
        self._refused = 0
        bracketed = f"[{host}]" if ":" in host else host
        super().__init__(f"grpc://{bracketed}:0", middleware={"doorkeeper": _Doorkeeper(token, self._count_refused)})
        self.address: str = f"grpc://{bracketed}:{self.port}"

    @property
    def refused(self) -> int:
        """Calls and streams that were turned away: no token, or not a channel of the current attempt."""
        return self._refused

    def accept(self, job: str, attempt: Attempt, channels: Iterable[ChannelId]) -> None:
        """From now on accept streams of exactly these; streams of an older attempt end. Never blocks."""
        previous = self._current
        self._current = _Attempt(job, attempt, channels)
        if previous is not None:
            previous.end()

    def return_credit(self, channel: ChannelId, nbytes: int, *, attempt: Attempt | None = None) -> None:
        """The loop has taken ``nbytes`` of the channel: let the sender know, now or soon (rule F1).

        ``attempt`` is that of the element; credit for another one changes nothing (rule C6). It may be left out by a
        loop that calls `accept` itself and has thrown away what it had not taken by then.

        Credit is cumulative and coalesced: it is written here as soon as 1/8 of the window is owed, so that at most 8
        such messages are unread by the sender and a write never blocks the loop, even when the sender is stopped. What
        is owed below that is written by the attempt's own thread within 2 ms, if nothing of the channel is left in the
        inbox. Why no sender waits for ever: consider the last element that was sent. When the loop takes it, this is
        called, nothing is left in the inbox, and so all that was taken is announced: the sender then knows of 0 bytes
        in flight and may send an element as large as the window. While elements are left, the loop comes back here.
        """
        current = self._current
        inbound = None if current is None else current.channels.get(channel)
        if current is None or inbound is None or nbytes == 0 or attempt not in (None, current.attempt):
            return  # Taken from an attempt that is over: its sender is gone (rule C6).
        with inbound.lock:
            inbound.taken += nbytes
            if inbound.taken > inbound.received:
                raise ProtocolError(
                    f"F1: {channel} returned credit for {inbound.taken} bytes but received {inbound.received}"
                )
            if inbound.taken - inbound.announced >= self._credit_step and inbound.writer is not None:
                inbound.announce()
            elif not inbound.owed:
                inbound.owed = True
                current.owe(inbound)

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """One stream. Ends with an error, told to the sender, when it is refused or breaks a rule."""
        address, owner, inbound = self._admit(descriptor, writer)
        failure: RayflowError | None = None
        try:
            self._receive(address.channel, owner, inbound, reader)
            # A sender that switches its schema ends its stream in good order, and the next one follows at once. One
            # that died or cancelled looks the same to the reader.
            if context.is_cancelled():
                failure = ClusterError(f"{address.channel}: the sender is gone; restart from a checkpoint")
        except ProtocolError as error:
            failure = error
        except wire.STREAM_ERRORS as error:
            failure = ClusterError(f"{address.channel}: the stream is broken: {wire.brief(error)}")
        finally:
            with inbound.lock:
                inbound.writer = None
        if failure is None:
            return
        if self._on_broken is not None and not owner.over and not inbound.ended:
            self._on_broken(owner.attempt, address.channel, failure)
        raise flight.FlightServerError(str(failure)) from failure

    def _receive(self, channel: ChannelId, owner: _Attempt, inbound: _Inbound, reader: Any) -> None:
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            batch = chunk.data
            if batch is not None:
                # Flight hands out buffers at any address, odd ones too, and Acero warns on stderr for each of them.
                # Copying 64k rows x 4 int64 takes 0.1-0.2 ms, 1,000 rows 2 us; it also lets go of gRPC's memory.
                batch = batch.copy_to(self._memory)
            sequence, element = wire.decode_element(chunk.app_metadata, batch)
            with inbound.lock:
                if owner.over:
                    raise ProtocolError(f"C6: attempt {owner.attempt} of {channel} is over; wait for the next launch")
                wire.check_sequence(channel, inbound.expected, sequence)
                if inbound.ended:
                    raise ProtocolError(f"F2: {channel} sent element {sequence} after its end of input")
                inbound.expected += 1
                if isinstance(element, Data):
                    inbound.received += element.nbytes
                    if inbound.received - inbound.announced > self._window:
                        raise ProtocolError(
                            f"F1: {channel} has {inbound.received - inbound.announced} bytes in flight, its credit is "
                            f"{self._window}; set the same credit on all nodes"
                        )
                inbound.ended = isinstance(element, EndOfInput)
            self._inbox_put(owner.attempt, channel, element)

    def _admit(self, descriptor: Any, writer: Any) -> tuple[wire.StreamAddress, _Attempt, _Inbound]:
        """Let the stream in, or refuse and count it."""
        try:
            address = wire.StreamAddress.from_command(descriptor.command or b"")
        except ProtocolError as error:
            raise self._refusal(str(error)) from error
        current = self._current
        if current is None:
            raise self._refusal(f"{address.channel}: this subtask accepts no streams yet; launch after all are ready")
        if address.job != current.job:
            raise self._refusal(f"{address.channel}: expected job {current.job!r}, got {address.job!r}")
        if address.attempt != current.attempt:
            raise self._refusal(
                f"C6: {address.channel}: expected attempt {current.attempt}, got {address.attempt}; wait for the launch"
            )
        inbound = current.channels.get(address.channel)
        if inbound is None:
            raise self._refusal(
                f"{address.channel}: attempt {current.attempt} has no such channel; is the plan the same?"
            )
        with inbound.lock:
            if current.over:
                raise self._refusal(f"C6: {address.channel}: attempt {current.attempt} is over; wait for the launch")
            if inbound.writer is not None:
                raise self._refusal(f"F2: {address.channel} has an open stream already; one channel has one sender")
            inbound.writer = writer
            inbound.announce()  # "accepted", and what an earlier stream could not be told any more
        return address, current, inbound

    def _refusal(self, reason: str) -> flight.FlightServerError:
        self._count_refused()
        return flight.FlightServerError(reason)

    def _count_refused(self) -> None:
        with self._count_lock:
            self._refused += 1

    def close(self, timeout_s: float = 2.0) -> bool:
        """End all streams and stop listening; tells whether that was done in time.

        gRPC waits for open streams and offers no way to cut them here: a peer that is stopped (not dead) keeps its
        stream, and then a Python exit waits for it too. Such a process has to be ended by ``os._exit`` or a signal.
        """
        current, self._current = self._current, None
        if current is not None:
            current.end()
        stopper = threading.Thread(target=self.shutdown, name="rayflow-exchange-close", daemon=True)
        stopper.start()
        stopper.join(timeout_s)
        return not stopper.is_alive()
