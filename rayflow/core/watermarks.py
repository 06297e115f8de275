"""Event time over several inputs.

W1  an emitted watermark never decreases.
W2  it is the minimum over live, non-idle channels; an ended channel holds nothing back.
"""

from __future__ import annotations

from collections.abc import Iterable

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, ChannelId
from rayflow.errors import ProtocolError


class InputWatermarks:
    """Combines the watermarks of a subtask's input channels."""

    def __init__(self, channels: Iterable[ChannelId]) -> None:
        self._of = dict.fromkeys(channels, MIN_WATERMARK)
        self._idle: set[ChannelId] = set()
        self.current = MIN_WATERMARK
        """The last combined watermark; never decreases."""

    def advance(self, channel: ChannelId, time: int) -> int | None:
        """A watermark came in. Returns the new combined one if it rose, else None.

        Raises `ProtocolError` when a channel's own watermark falls, because the sender has broken W1.
        """
        if time < self._of[channel]:
            raise ProtocolError(f"W1: watermark on {channel} fell from {self._of[channel]} to {time}")
        self._of[channel] = time
        self._idle.discard(channel)
        return self._combine()

    def end(self, channel: ChannelId) -> int | None:
        """The channel has ended; returns the new combined watermark if it rose."""
        self._of[channel] = MAX_WATERMARK
        self._idle.discard(channel)
        return self._combine()

    def set_idle(self, channel: ChannelId) -> int | None:
        """The channel is quiet and is left out until its next watermark; returns the combined one if it rose."""
        self._idle.add(channel)
        return self._combine()

    def _combine(self) -> int | None:
        live = [time for channel, time in self._of.items() if channel not in self._idle]
        lowest = min(live, default=self.current)
        if lowest <= self.current:
            return None
        self.current = lowest
        return lowest

    def check_invariants(self) -> None:
        live = [time for channel, time in self._of.items() if channel not in self._idle]
        # A channel that comes back from idleness may lag behind; W1 then keeps the combined one where it is.
        assert not live or self.current >= min(live) or self.current == MIN_WATERMARK, (self.current, live)
