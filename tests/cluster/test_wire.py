"""The codec of the exchange: exact inverses, and nothing foreign is understood."""

from __future__ import annotations

import pytest

from rayflow.cluster import wire
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import Barrier, CheckpointKind, Data, Element, EndOfInput, Idle, Watermark
from rayflow.errors import ProtocolError

ELEMENTS: list[Element] = [
    Data("a batch", 0),
    Data("a batch", 2**64 - 1),
    *(Watermark(t) for t in (MIN_WATERMARK, -1, 0, MAX_WATERMARK)),
    *(Barrier(CheckpointId(c), kind) for c in (1, 2**64 - 1) for kind in CheckpointKind),
    EndOfInput(),
    Idle(),
]


@pytest.mark.parametrize("sequence", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("element", ELEMENTS)
def test_elements_come_back_as_they_were(element: Element, sequence: int) -> None:
    payload = element.payload if isinstance(element, Data) else None
    assert wire.decode_element(wire.encode_element(element, sequence), payload) == (sequence, element)


@pytest.mark.parametrize(
    "header", [None, b"", b"\x01" * 17, b"\x01" * 19, b"\x09" + b"\0" * 17, b"\x03\x09" + b"\0" * 16]
)
def test_foreign_headers_are_refused(header: bytes | None) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_element(header, None)


def test_header_and_payload_belong_together() -> None:
    with pytest.raises(ProtocolError, match="without a batch"):
        wire.decode_element(wire.encode_element(Data("x", 1), 0), None)
    with pytest.raises(ProtocolError, match="with a batch"):
        wire.decode_element(wire.encode_element(EndOfInput(), 0), "x")


@pytest.mark.parametrize("got", [0, 2, 4, 100])
def test_a_gap_or_a_repeat_breaks_f2(got: int) -> None:
    channel = ChannelId(0, SubtaskId("a", 0), SubtaskId("b", 0))
    wire.check_sequence(channel, 3, 3)
    with pytest.raises(ProtocolError, match="F2"):
        wire.check_sequence(channel, 3, got)


@pytest.mark.parametrize("message", [wire.Credit(0), wire.Credit(2**64 - 1), wire.AttemptOver()])
def test_messages_back_come_back_as_they_were(message: wire.Credit | wire.AttemptOver) -> None:
    assert wire.decode_back(wire.encode_back(message)) == message


@pytest.mark.parametrize("data", [None, b"", b"\x07" + b"\0" * 8])
def test_foreign_messages_back_are_refused(data: bytes | None) -> None:
    with pytest.raises(ProtocolError):
        wire.decode_back(data)


def test_an_address_comes_back_as_it_was() -> None:
    address = wire.StreamAddress('jöb "x"', Attempt(7), ChannelId(3, SubtaskId("a->b", 1), SubtaskId("c", 2)))
    assert wire.StreamAddress.from_command(address.to_command()) == address


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["Bearer secret"], True),
        ([b"Bearer secret"], True),
        ([], False),
        (["Bearer secre"], False),
        (["secret"], False),
        (["Bearer "], False),
        (["Bearer s\u00e9cret"], False),
        (["Bearer secret", "Bearer other"], False),
    ],
)
def test_only_the_token_opens(values: list[str | bytes], expected: bool) -> None:
    assert wire.is_authorized("secret", {"authorization": values} if values else {}) is expected
