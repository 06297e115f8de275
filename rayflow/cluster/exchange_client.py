"""The sending end of the exchange: one stream a channel, one connection a stream.

Rules held here
* F2  elements leave in the order of `ExchangeClient.send`, numbered; a new stream of a channel is opened only after the
  receiver has taken all of the old one.
* A peer that is gone, stopped or refuses is told by ``on_broken``, once a channel, and never raised into the loop.
* `send` and `close` wait for nobody: a thread a channel writes. Tried without: a write to a stopped process blocks in
  TCP even when its call is cancelled, so the loop could not have been reset before that process died.

One connection a channel, not one an address: measured on 2 cores with 2 and 4 channels, the same at 1,000 rows a batch
and 5-40 % more at 10,000 and 65,536; and a slow channel cannot hold up another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Final

import pyarrow.flight as flight

from rayflow.cluster import wire
from rayflow.cluster.inbox import Inbox
from rayflow.core.ids import Attempt, ChannelId
from rayflow.core.messages import Data, Element, EndOfInput
from rayflow.errors import ClusterError, ProtocolError, RayflowError

OnCredit = Callable[[ChannelId, int], None]
OnBroken = Callable[[ChannelId, RayflowError], None]

CONNECT_TIMEOUT_S: Final = 10.0

_OPTIONS: Final = [
    # Arrow sets the message size to unlimited already; it stands here because everything depends on it.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Without its own pool every channel to one address would share one connection (see above).
    ("grpc.use_local_subchannel_pool", 1),
    # A server answers pings that come more often than every 5 min by "too many pings" and cuts the connection, and
    # pyarrow cannot change that: so this finds only what everything else (Ray, heartbeats) has missed.
    ("grpc.keepalive_time_ms", 330_000),
    # gRPC makes this TCP_USER_TIMEOUT too: a write that a stopped peer does not take ends after so long.
    ("grpc.keepalive_timeout_ms", 20_000),
]


class _Stream:
    """One DoExchange call and the thread that reads its credits."""

    def __init__(
        self, address: str, call: wire.StreamAddress, options: Any, on_credit: OnCredit, on_error: Callable[[str], None]
    ) -> None:
        self.writer: Any = None
        self.schema: Any = None
        """Schema of the batches; None until the first one."""
        self.accepted = False
        self.opened = threading.Event()
        """The receiver has accepted the stream, or will never do so."""
        self.done = threading.Event()
        """The receiver has taken everything and ended the stream, or it is broken."""
        self.finishing = False
        """Nothing more will be sent: that the receiver ends the stream is no failure."""
        self.writing = threading.Lock()
        """Held while something is written, so that the reader closes the writer only when nobody uses it."""
        self._reader: Any = None
        self._cancelled = False
        self._lock = threading.Lock()
        self._address = address
        self._call = call
        self._options = options
        self._on_credit = on_credit
        self._on_error = on_error
        threading.Thread(target=self._run, name=f"rayflow-credits-{call.channel}", daemon=True).start()

    def _run(self) -> None:
        error: str | None = None
        try:
            client = flight.FlightClient(self._address, generic_options=_OPTIONS)
            descriptor = flight.FlightDescriptor.for_command(self._call.to_command())
            writer, reader = client.do_exchange(descriptor, self._options)
            with self._lock:
                self.writer, self._reader = writer, reader
                if self._cancelled:
                    reader.cancel()
            self._read_credits(reader)
        except StopIteration:
            error = None if self.finishing else "the receiver has ended the stream"
        except (*wire.STREAM_ERRORS, ProtocolError) as raised:
            error = wire.brief(raised)
        finally:
            if error is not None and not self._cancelled:
                self._on_error(error)
            self.done.set()
            self.opened.set()
            with self.writing, contextlib.suppress(*wire.STREAM_ERRORS):
                if self.writer is not None:
                    self.writer.close()  # Left to its destructor, it would print what is known already.

    def _read_credits(self, reader: Any) -> None:
        """Until the stream ends, which raises."""
        known = 0
        while True:
            message = wire.decode_back(reader.read_chunk().app_metadata)
            if isinstance(message, wire.AttemptOver):
                raise ProtocolError("C6: the receiver belongs to another attempt by now")
            if not self.accepted:
                self.accepted = True
                self.opened.set()
            if message.taken > known:
                known = message.taken
                self._on_credit(self._call.channel, known)

    def finish(self) -> None:
        """Nothing more will be sent; the receiver ends the stream when it has taken everything."""
        self.finishing = True
        with self.writing:
            self.writer.done_writing()

    def cancel(self) -> None:
        """From any thread, at any time. A blocked write or read of this stream returns with an error."""
        with self._lock:
            self._cancelled = True
            if self._reader is not None:
                self._reader.cancel()
        self.opened.set()
        self.done.set()


class _Outbound:
    """One channel: what the loop gave to it, and the thread that writes it. Outlives its streams."""

    def __init__(
        self,
        call: wire.StreamAddress,
        address: str,
        options: Any,
        timeout_s: float,
        on_credit: OnCredit,
        on_broken: OnBroken,
    ) -> None:
        self.address = address
        self.started = False
        self.ended = False
        """`EndOfInput` was sent: nothing follows."""
        self.over = threading.Event()
        """The channel is broken or closed: elements are dropped, nobody is told any more."""
        self._call = call
        self._options = options
        self._timeout_s = timeout_s
        self._on_credit = on_credit
        self._on_broken = on_broken
        self._queue: Inbox[Element | None] = Inbox()
        """Bounded by credit (rule F1); None ends the thread."""
        self._sequence = 0
        self._stream: _Stream | None = None
        self._lock = threading.Lock()

    def put(self, element: Element) -> None:
        self.ended = isinstance(element, EndOfInput)
        self._queue.put(element)
        if not self.started:
            self.started = True
            threading.Thread(target=self._run, name=f"rayflow-send-{self._call.channel}", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self.over.set()
            stream = self._stream
        if stream is not None:
            stream.cancel()
        self._queue.put(None)

    def _run(self) -> None:
        while not self.over.is_set():
            for element in self._queue.drain(None):
                if element is None or self.over.is_set():
                    return
                try:
                    self._write(element)
                except wire.STREAM_ERRORS as error:
                    # The reader knows why; the writer only knows that.
                    if self._stream is not None:
                        self._stream.done.wait(1.0)
                    self._fail(wire.brief(error))
                if isinstance(element, EndOfInput):
                    return

    def _write(self, element: Element) -> None:
        stream = self._stream_for(element)
        if stream is None:
            return
        header = wire.encode_element(element, self._sequence)
        with stream.writing:
            if isinstance(element, Data):
                stream.writer.write_with_metadata(element.payload, header)
            else:
                stream.writer.write_metadata(header)
        if isinstance(element, EndOfInput):
            stream.finish()
        self._sequence += 1

    def _stream_for(self, element: Element) -> _Stream | None:
        """The open stream that can carry the element; None when the channel is over.

        A Flight stream has one schema. For another one the old stream is ended, the receiver takes the rest of it, and
        a new stream follows: two round trips. Control elements need no schema and go on whatever stream is open.
        """
        stream = self._stream
        if not isinstance(element, Data):
            return stream or self._open()
        schema = element.payload.schema
        # With metadata: extension types that are not registered live there.
        if stream is not None and stream.schema is not None and not stream.schema.equals(schema, check_metadata=True):
            if not self._drain(stream):
                return None
            stream = None
        stream = stream or self._open()
        if stream is not None and stream.schema is None:
            with stream.writing:
                stream.writer.begin(schema)
            stream.schema = schema
        return stream

    def _open(self) -> _Stream | None:
        with self._lock:
            if self.over.is_set():
                return None
            stream = _Stream(self.address, self._call, self._options, self._on_credit, self._fail)
            self._stream = stream
        if not stream.opened.wait(self._timeout_s):
            self._fail(f"no answer within {self._timeout_s:g} s; is the node up and reachable?")
            stream.cancel()
        return stream if stream.accepted and not self.over.is_set() else None

    def _drain(self, stream: _Stream) -> bool:
        """End the stream and wait until the receiver has put all of it into its inbox (rule F2)."""
        stream.finish()
        if not stream.done.wait(self._timeout_s):
            self._fail(f"the receiver did not end its stream within {self._timeout_s:g} s; is it stopped?")
            stream.cancel()
        return not self.over.is_set()

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self.over.is_set():
                return
            self.over.set()
        self._queue.put(None)
        channel = self._call.channel
        self._on_broken(channel, ClusterError(f"channel {channel} to {self.address} is broken: {reason}"))


class ExchangeClient:
    """Sends the elements of all output channels of one subtask, in one attempt.

    ``on_credit(channel, taken)``: bytes that the receiver's loop has taken in all; it may repeat.
    ``on_broken(channel, error)``: the channel is lost, told once, with a `ClusterError` that names channel and address.
    Both are called from threads of the exchange and must append and return.
    """

    def __init__(
        self,
        token: str,
        job: str,
        attempt: Attempt,
        on_credit: OnCredit,
        on_broken: OnBroken,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._job = job
        self._attempt = attempt
        self._on_credit = on_credit
        self._on_broken = on_broken
        self._timeout_s = connect_timeout_s
        self._options = flight.FlightCallOptions(
            headers=[(wire.AUTHORIZATION.encode(), wire.authorization(token).encode())]
        )
        self._channels: dict[ChannelId, _Outbound] = {}

    def connect(self, channel: ChannelId, address: str) -> None:
        """Say where the channel leads ("grpc://host:port"). Its stream is opened by the first element."""
        if channel in self._channels:
            raise ProtocolError(f"{channel} is connected already to {self._channels[channel].address}")
        call = wire.StreamAddress(self._job, self._attempt, channel)
        self._channels[channel] = _Outbound(
            call, address, self._options, self._timeout_s, self._on_credit, self._on_broken
        )

    def send(self, channel: ChannelId, element: Element) -> None:
        """Give the element to the channel. From the loop's thread only; never blocks.

        The caller has taken credit for it (rule F1), and so bounds what waits here (rule F3). After `on_broken` or
        `close` elements are dropped. Raises `ProtocolError` for a channel that is not connected or has ended.
        """
        outbound = self._channels.get(channel)
        if outbound is None:
            raise ProtocolError(f"{channel} is not connected; connect it before sending")
        if outbound.ended:
            raise ProtocolError(f"F2: {channel} got {type(element).__name__} after its end of input")
        if not outbound.over.is_set():
            outbound.put(element)

    def close(self) -> None:
        """Cancel everything at once, from any thread; waits for nobody. What is in flight may be lost.

        A thread that is stuck in a write to a stopped peer ends with that peer, or 20 s later.
        """
        for outbound in list(self._channels.values()):
            outbound.close()
