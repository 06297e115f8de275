"""What people read: when what happened. The names are stable: benchmarks and the progress line look for them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from rayflow.core.events import CoordinatorAction, Note
from rayflow.core.ids import Attempt

STORAGE_READ: Final = "storage read"
SUBTASK_DIED: Final = "subtask died"
SUBTASK_HUNG: Final = "subtask hung"
DETECTED: Final = "failure detected"
"""The first moment of a failover; its detail is the cause."""
RESTART_DELAYED: Final = "restart delayed"
ATTEMPT_BEGINS: Final = "attempt begins"
RESET: Final = "all ready"
SINKS_RECOVERED: Final = "sinks recovered"
LAUNCHED: Final = "launched"
RUNNING: Final = "running"
SPLITS_FOUND: Final = "splits found"
LOOK_FAILED: Final = "look for splits failed"
INPUT_ENDED: Final = "all input ended"
CHECKPOINT_TRIGGERED: Final = "checkpoint triggered"
CHECKPOINT_COMPLETED: Final = "checkpoint completed"
CHECKPOINT_ABORTED: Final = "checkpoint aborted"
CLEANING: Final = "cleaning up"
JOB_ENDED: Final = "job ended"

TIMELINE_LIMIT: Final = 1000
"""Entries kept (rule F3); the oldest go first."""


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    at: float
    attempt: Attempt
    what: str
    detail: str


class Outbox:
    """Collects the actions of one step, and the timeline of all steps."""

    def __init__(self) -> None:
        self._actions: list[CoordinatorAction] = []
        self._timeline: deque[TimelineEntry] = deque(maxlen=TIMELINE_LIMIT)

    @property
    def timeline(self) -> tuple[TimelineEntry, ...]:
        return tuple(self._timeline)

    def put(self, action: CoordinatorAction) -> None:
        self._actions.append(action)

    def note(self, what: str, detail: str, *, attempt: Attempt, now: float) -> None:
        self._timeline.append(TimelineEntry(now, attempt, what, detail))
        self._actions.append(Note(what, detail))

    def take(self) -> list[CoordinatorAction]:
        actions, self._actions = self._actions, []
        return actions
