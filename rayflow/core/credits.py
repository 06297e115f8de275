"""Credit-based flow control in bytes, one account a channel.

F1  bytes in flight (sent and not yet taken by the receiver's loop) never exceed the credit.
F2  nothing overtakes on a channel: what has to wait for credit holds back everything behind it, barriers included.
F3  every queue has a bound: a subtask whose output waits takes no further input, so that what waits is the output of
    one step.

Both sides count cumulatively, so that a repeated or coalesced credit message changes nothing.
"""

from __future__ import annotations

from collections import deque

from rayflow.core.ids import ChannelId
from rayflow.core.messages import Data, Element
from rayflow.errors import ProtocolError


class OutputAccount:
    """Sender's side of one channel."""

    __slots__ = ("_channel", "_sent", "_taken", "_waiting", "_window", "peak")

    def __init__(self, channel: ChannelId, window: int) -> None:
        self._channel = channel
        self._window = window
        self._sent = 0
        self._taken = 0
        self._waiting: deque[Element] = deque()
        self.peak = 0
        """Most bytes that were ever in flight."""

    @property
    def in_flight(self) -> int:
        return self._sent - self._taken

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def offer(self, element: Element) -> list[Element]:
        """Queue the element; returns what may be sent now, in order."""
        if isinstance(element, Data) and element.nbytes > self._window:
            raise ProtocolError(
                f"F1: {element.nbytes} bytes on {self._channel} can never fit its credit of {self._window}"
            )
        self._waiting.append(element)
        return self._release()

    def credit(self, taken: int) -> list[Element]:
        """The receiver has taken ``taken`` bytes in all; returns what may be sent now, in order."""
        if taken > self._sent:
            raise ProtocolError(f"F1: {self._channel} was credited {taken} bytes but only {self._sent} were sent")
        self._taken = max(self._taken, taken)
        return self._release()

    def _release(self) -> list[Element]:
        released: list[Element] = []
        while self._waiting:
            head = self._waiting[0]
            size = head.nbytes if isinstance(head, Data) else 0
            if size and self.in_flight + size > self._window:
                break
            self._sent += size
            self.peak = max(self.peak, self.in_flight)
            released.append(self._waiting.popleft())
        return released

    def check_invariants(self) -> None:
        assert 0 <= self.in_flight <= self._window, (self._channel, self.in_flight, self._window)
