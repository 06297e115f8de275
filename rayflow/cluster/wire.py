"""What stands beside the batches on the wire: headers of elements, messages back to the sender, the stream's address.

Every element of a channel is one Flight message. A batch travels as Flight's own body; everything else stands in
``app_metadata`` as a fixed 18-byte struct. Nothing here is ever pickled, so a stranger's bytes can at worst be refused.

F2  nothing overtakes on a channel: every element carries its number, and the receiver refuses a gap or a repeat.
"""

from __future__ import annotations

import hmac
import json
import struct
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.flight as flight

from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import Barrier, CheckpointKind, Data, Element, EndOfInput, Idle, Watermark
from rayflow.errors import ProtocolError

_UNSIGNED: Final = struct.Struct("<BBQQ")
_SIGNED: Final = struct.Struct("<BBQq")
"""type, checkpoint kind (0 unless a barrier), element number on the channel, value."""
_BACK: Final = struct.Struct("<BQ")

_DATA: Final = 1
_WATERMARK: Final = 2
_BARRIER: Final = 3
_END: Final = 4
_IDLE: Final = 5
_CREDIT: Final = 16
_ATTEMPT_OVER: Final = 17

# Written out, so that reordering the enum cannot change the wire.
_KIND_CODE: Final = {
    CheckpointKind.PERIODIC: 0,
    CheckpointKind.FINAL: 1,
    CheckpointKind.SAVEPOINT: 2,
    CheckpointKind.STOP: 3,
}
_KIND: Final = {code: kind for kind, code in _KIND_CODE.items()}

AUTHORIZATION: Final = "authorization"
"""Header of every call; gRPC wants it in lower case."""


STREAM_ERRORS: Final = (flight.FlightError, pa.ArrowException, OSError, StopIteration)
"""What pyarrow raises when a stream cannot go on."""


def brief(error: BaseException) -> str:
    """The message of a Flight error without gRPC's debug context, which is a page long."""
    return str(error).split(". gRPC client debug context", 1)[0].split(". Detail:", 1)[0]


def encode_element(element: Element, sequence: int) -> bytes:
    """The header of the element; the payload of `Data` is not part of it.

    ``sequence`` is the number of the element on its channel in this attempt, from 0.
    """
    match element:
        case Data(_, nbytes):
            return _UNSIGNED.pack(_DATA, 0, sequence, nbytes)
        case Watermark(time):
            return _SIGNED.pack(_WATERMARK, 0, sequence, time)
        case Idle():
            return _UNSIGNED.pack(_IDLE, 0, sequence, 0)
        case Barrier(checkpoint, kind):
            return _UNSIGNED.pack(_BARRIER, _KIND_CODE[kind], sequence, checkpoint)
        case EndOfInput():
            return _UNSIGNED.pack(_END, 0, sequence, 0)


def decode_element(header: Any, payload: Any) -> tuple[int, Element]:
    """The number of an element on its channel, and the element.

    ``header`` is a bytes-like object, ``payload`` the batch that came with it or None. Raises `ProtocolError` when the
    header is not one of ours, or payload and header do not belong together.
    """
    if header is None or len(header) != _UNSIGNED.size:
        found = "no header" if header is None else f"a header of {len(header)} bytes"
        raise ProtocolError(f"expected an element header of {_UNSIGNED.size} bytes, got {found}")
    code, kind, sequence, value = _UNSIGNED.unpack_from(header)
    if (code == _DATA) != (payload is not None):
        raise ProtocolError(
            f"element {sequence} of type {code} came {'without' if payload is None else 'with'} a batch"
        )
    if code == _DATA:
        return sequence, Data(payload, value)
    if code == _WATERMARK:
        return sequence, Watermark(_SIGNED.unpack_from(header)[3])
    if code == _IDLE:
        return sequence, Idle()
    if code == _BARRIER and kind in _KIND:
        return sequence, Barrier(CheckpointId(value), _KIND[kind])
    if code == _END:
        return sequence, EndOfInput()
    raise ProtocolError(f"element {sequence} has the unknown type {code}, kind {kind}; are all nodes of one version?")


def check_sequence(channel: ChannelId, expected: int, got: int) -> None:
    """Rule F2: raises `ProtocolError` on a gap or a repeat."""
    if got != expected:
        what = "an element was lost" if got > expected else "an element came twice or late"
        raise ProtocolError(
            f"F2: on {channel} expected element {expected}, got {got}: {what}; restart from a checkpoint"
        )


@dataclass(frozen=True, slots=True)
class Credit:
    """The receiver's loop has taken ``taken`` bytes in all, over all streams of the channel in this attempt (rule F1).

    Also the first message on every stream: it says that the stream was accepted.
    """

    taken: int


@dataclass(frozen=True, slots=True)
class AttemptOver:
    """The receiver belongs to another attempt by now; this stream has no future (rule C6)."""


def encode_back(message: Credit | AttemptOver) -> bytes:
    """A message from the receiver of a stream back to its sender."""
    if isinstance(message, Credit):
        return _BACK.pack(_CREDIT, message.taken)
    return _BACK.pack(_ATTEMPT_OVER, 0)


def decode_back(data: Any) -> Credit | AttemptOver:
    """Inverse of `encode_back`; raises `ProtocolError` on anything else."""
    if data is not None and len(data) == _BACK.size:
        code, taken = _BACK.unpack_from(data)
        if code == _CREDIT:
            return Credit(taken)
        if code == _ATTEMPT_OVER:
            return AttemptOver()
    raise ProtocolError("expected a credit from the receiver, got something else; are all nodes of one version?")


@dataclass(frozen=True, slots=True)
class StreamAddress:
    """What a stream says about itself when it is opened."""

    job: str
    attempt: Attempt
    channel: ChannelId

    def to_command(self) -> bytes:
        c = self.channel
        channel = [c.edge, c.source.chain, c.source.index, c.target.chain, c.target.index]
        return json.dumps({"job": self.job, "attempt": self.attempt, "channel": channel}).encode()

    @classmethod
    def from_command(cls, command: bytes) -> StreamAddress:
        """Raises `ProtocolError` when the bytes are not the address of a stream."""
        try:
            body = json.loads(command)
            edge, source, source_index, target, target_index = body["channel"]
            channel = ChannelId(
                int(edge), SubtaskId(str(source), int(source_index)), SubtaskId(str(target), int(target_index))
            )
            return cls(str(body["job"]), Attempt(int(body["attempt"])), channel)
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"the address of a stream cannot be read: {error!r}") from error


def authorization(token: str) -> str:
    """Value of the header that opens the door."""
    return f"Bearer {token}"


def is_authorized(token: str, headers: dict[str, list[Any]]) -> bool:
    """Whether the call carries the job's token exactly once; compared in constant time."""
    values = headers.get(AUTHORIZATION, [])
    if len(values) != 1:
        return False
    value = values[0] if isinstance(values[0], bytes) else str(values[0]).encode()
    return hmac.compare_digest(value, authorization(token).encode())
