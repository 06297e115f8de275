"""Event time over several inputs: the channels of a subtask, or the splits of a source.

W1  an emitted watermark never decreases.
W2  it is the minimum over live, non-idle inputs; one that has ended holds nothing back.

An idle input comes back with its next watermark. It may lag behind what was said without it: the combined watermark
then stays where it is (W1), and rows of it that are older are late.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import ProtocolError

K = TypeVar("K", bound=Hashable)


class InputWatermarks(Generic[K]):
    """Combines the watermarks of inputs."""

    def __init__(self, inputs: Iterable[K]) -> None:
        self._of: dict[K, int] = dict.fromkeys(inputs, MIN_WATERMARK)
        """Inputs that have not ended."""
        self._idle: set[K] = set()
        self.current = MIN_WATERMARK
        """The last combined watermark; never decreases."""

    @property
    def all_idle(self) -> bool:
        """There are inputs that have not ended, and all of them are idle."""
        return bool(self._of) and len(self._idle) == len(self._of)

    def is_idle(self, key: K) -> bool:
        return key in self._idle

    def add(self, key: K, time: int = MIN_WATERMARK) -> None:
        """A new input, which has got as far as ``time``. The combined watermark stays until the next `advance`."""
        self._of[key] = time

    def advance(self, key: K, time: int) -> int | None:
        """A watermark came in. Returns the new combined one if it rose, else None.

        Raises `ProtocolError` when an input's own watermark falls, because the sender has broken W1.
        """
        before = self._of.get(key, MAX_WATERMARK)
        if time < before:
            raise ProtocolError(f"W1: watermark on {key} fell from {before} to {time}")
        self._of[key] = time
        self._idle.discard(key)
        return self._combine()

    def end(self, key: K) -> int | None:
        """The input has ended; returns the new combined watermark if it rose, the maximum when it was the last."""
        risen = self.forget(key)
        if self._of:
            return risen
        self.current = MAX_WATERMARK
        return MAX_WATERMARK

    def forget(self, key: K) -> int | None:
        """The input is gone and says nothing any more; returns the new combined watermark if it rose.

        Unlike after `end`, others may follow: when it was the last one nothing is concluded from that.
        """
        self._of.pop(key, None)
        self._idle.discard(key)
        return self._combine()

    def set_idle(self, key: K) -> int | None:
        """The input is quiet and is left out until its next watermark; returns the combined one if it rose.

        Late news of an input that has ended changes nothing. When all are idle the watermark stays.
        """
        if key in self._of:
            self._idle.add(key)
        return self._combine()

    def _combine(self) -> int | None:
        # Only inputs that may still bring rows count. One that has ended must not speak for others that are idle: its
        # maximum would close every window, and the idle one comes back.
        lowest = min((time for key, time in self._of.items() if key not in self._idle), default=self.current)
        if lowest <= self.current:
            return None
        self.current = lowest
        return lowest

    def check_invariants(self) -> None:
        assert self._idle <= self._of.keys()
        live = [time for key, time in self._of.items() if key not in self._idle]
        # An input that comes back from idleness may lag behind; W1 then keeps the combined one where it is.
        assert not live or self.current >= min(live) or self.current == MIN_WATERMARK, (self.current, live)
