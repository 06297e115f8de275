"""The input gate: elements that have arrived and wait for the loop, fair over channels, silent on blocked ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from rayflow.core.alignment import Aligner
from rayflow.core.ids import ChannelId
from rayflow.core.messages import Element
from rayflow.errors import ProtocolError


class InputGate:
    """Queues by channel, taken round robin. A blocked channel keeps its elements, and with them its credit (F1, A2)."""

    def __init__(self, channels: Iterable[ChannelId], aligner: Aligner) -> None:
        self._queues: dict[ChannelId, deque[Element]] = {channel: deque() for channel in channels}
        self._ready: deque[ChannelId] = deque()
        """Channels that have elements and are not blocked, each once."""
        self._parked: set[ChannelId] = set()
        """Channels that have elements and were found blocked."""
        self._aligner = aligner

    def put(self, channel: ChannelId, element: Element) -> None:
        queue = self._queues.get(channel)
        if queue is None:
            raise ProtocolError(f"F2: element on {channel}, which is not an input of this subtask")
        queue.append(element)
        if len(queue) == 1:
            self._ready.append(channel)

    def take(self) -> tuple[ChannelId, Element] | None:
        """The next element of the next channel that may yield one, else None."""
        while self._ready:
            channel = self._ready.popleft()
            if self._aligner.blocked(channel):
                self._parked.add(channel)
                continue
            queue = self._queues[channel]
            element = queue.popleft()
            if queue:
                self._ready.append(channel)
            return channel, element
        return None

    @property
    def has_ready(self) -> bool:
        return any(not self._aligner.blocked(channel) for channel in self._ready)

    def unblock(self) -> None:
        """An alignment has ended: parked channels yield again."""
        for channel in sorted(self._parked):
            self._ready.append(channel)
        self._parked.clear()

    def check_invariants(self) -> None:
        ready = list(self._ready)
        assert len(ready) == len(set(ready)), ready
        assert self._parked.isdisjoint(ready)
        waiting = {channel for channel, queue in self._queues.items() if queue}
        assert waiting == self._parked | set(ready), (waiting, self._parked, ready)
