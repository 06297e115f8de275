"""One thread that runs tasks in order; what they return is told as events. The uploader of a subtask and the storage
thread of a coordinator are this."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from rayflow.cluster.inbox import Inbox

T = TypeVar("T")


class Background(Generic[T]):
    """``tell`` hears what a task returned, ``failed`` what it raised although tasks answer for their own errors."""

    def __init__(self, name: str, tell: Callable[[T], None], failed: Callable[[BaseException], None]) -> None:
        self._tasks: Inbox[Callable[[], T]] = Inbox()
        self._tell = tell
        self._failed = failed
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def put(self, task: Callable[[], T]) -> None:
        """Never blocks. The number of tasks is bounded by the protocol: one checkpoint at a time (rule F3)."""
        self._tasks.put(task)

    def _run(self) -> None:
        while True:
            for task in self._tasks.drain(None):
                try:
                    self._tell(task())
                except BaseException as error:
                    self._failed(error)
                    return
