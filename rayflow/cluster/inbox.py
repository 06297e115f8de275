"""The inbox of a subtask: everything that happens to it, in one queue that only its loop empties.

Flight handlers, control calls, timers and upload completions put events in; nobody ever waits to do so. The bound of
the queue (rule F3) is not here: batches are bounded by credit (rule F1), everything else by the protocol.
"""

from __future__ import annotations

import queue
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """Thread-safe queue of many producers and one consumer.

    `queue.SimpleQueue` is C: measured 0.06 us a put, 0.03 us an event drained in bulk, 0.4 us for one put and drained
    alone (a deque with a condition: 0.5 us, and its lock is held by Python code), 6 us to wake a waiting consumer.
    """

    __slots__ = ("_queue",)

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[T] = queue.SimpleQueue()

    def put(self, event: T) -> None:
        """Append; from any thread, also from signal handlers and destructors. Never blocks."""
        self._queue.put(event)

    def drain(self, timeout_s: float | None) -> list[T]:
        """All that is there, oldest first; waits up to ``timeout_s`` for the first event. From the loop's thread only.

        ``timeout_s`` 0 does not wait, None waits for ever. An empty list means that the time ran out.
        """
        get = self._queue.get_nowait
        count = self._queue.qsize()
        if count:
            return [get() for _ in range(count)]  # safe: nobody else takes
        if timeout_s == 0:
            return []
        try:
            first = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return []
        return [first, *(get() for _ in range(self._queue.qsize()))]

    def __len__(self) -> int:
        return self._queue.qsize()
