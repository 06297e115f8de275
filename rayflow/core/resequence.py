"""Numbered messages of one stream, put in order again.

The transport below (Ray actor calls) is a FIFO only while nothing is retried, so commands and reports carry an attempt
and a sequence number that counts from 0. Every late, repeated or foreign message has a name (`Arrival`):

C6  a message of another attempt changes nothing (STALE).
F3  the buffer of messages that came too early has a bound (OVERFLOW: a message was lost for good).
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Generic, TypeVar

from rayflow.core.ids import Attempt

T = TypeVar("T")

DEFAULT_LIMIT: Final = 4096


class Arrival(Enum):
    ACCEPTED = "accepted"
    """In order: it, and what waited for it, is released."""
    HELD = "held"
    """Too early: one before it is missing."""
    DUPLICATE = "duplicate"
    STALE = "stale"
    """Of another attempt."""
    OVERFLOW = "overflow"
    """More messages wait than the bound allows: the stream is broken and its owner must start it anew."""


class Resequencer(Generic[T]):
    """Puts the messages of one (attempt) stream in order.

    A coordinator moves on by `advance`. A subtask learns of a new attempt from the commands themselves: with
    ``follow=True`` the first message of a newer attempt, whatever its number, ends the older stream.
    """

    def __init__(self, attempt: Attempt, *, follow: bool = False, limit: int = DEFAULT_LIMIT) -> None:
        self.attempt = attempt
        self.expected = 0  # every number below was released, none at or above
        self._follow = follow
        self._limit = limit
        self._held: dict[int, T] = {}  # keys > expected; len <= limit

    @property
    def held(self) -> int:
        """Messages that wait for an earlier one."""
        return len(self._held)

    def advance(self, attempt: Attempt) -> None:
        """Begin the stream of a newer attempt; what is held of the older one is dropped."""
        if attempt > self.attempt:
            self.attempt = attempt
            self.expected = 0
            self._held.clear()

    def offer(self, attempt: Attempt, sequence: int, message: T) -> tuple[Arrival, tuple[T, ...]]:
        """What became of the message, and the messages that may now be handled, in order."""
        if attempt > self.attempt and self._follow:
            self.advance(attempt)
        if attempt != self.attempt:
            return Arrival.STALE, ()
        if sequence < self.expected or sequence in self._held:
            return Arrival.DUPLICATE, ()
        if sequence > self.expected:
            if len(self._held) >= self._limit:
                return Arrival.OVERFLOW, ()
            self._held[sequence] = message
            return Arrival.HELD, ()
        released = [message]
        self.expected += 1
        while self.expected in self._held:
            released.append(self._held.pop(self.expected))
            self.expected += 1
        return Arrival.ACCEPTED, tuple(released)

    def check_invariants(self) -> None:
        assert all(number > self.expected for number in self._held), self._held.keys()
        assert len(self._held) <= self._limit, len(self._held)
