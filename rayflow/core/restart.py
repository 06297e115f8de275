"""Whether and when a failed job starts again.

Two kinds of failure are told apart, because waiting helps against only one of them:

*The death of a process* (kill -9, a lost node) says nothing about the program. Each subtask may die once in an outage
without a delay; an outage ends when the job has been healthy: ``initial_s`` seconds of running, or
`HEALTHY_CHECKPOINTS` completed checkpoints. A lost node, which takes several subtasks within moments, thus costs no
delay, and a process that dies again and again comes under the delays below.

*A failure that was reported* (an exception, a checkpoint that fails too often, storage that cannot be read) is likely
to come back: ``exponential`` waits ``initial_s * factor ** k`` up to ``max_s`` and forgets k after ``reset_after_s`` of
running; ``fixed`` waits ``initial_s``; ``none`` gives up. The same exception at the same position of the input
``same_failure_limit`` times in a row would come back for ever: the job ends with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from rayflow.core.ids import SubtaskId
from rayflow.core.messages import FailureCause

HEALTHY_CHECKPOINTS: Final = 3


@dataclass(frozen=True, slots=True)
class RestartSpec:
    """The numbers of a restart strategy; `rayflow.config.Restart` is this with constructors that take durations."""

    strategy: Literal["exponential", "fixed", "none"] = "exponential"
    initial_s: float = 1.0
    factor: float = 1.5
    max_s: float = 60.0
    reset_after_s: float = 300.0
    """Exponential: a job that ran this long without failing starts again from ``initial_s``."""
    max_attempts: int | None = None
    """Restarts allowed before the job ends with the last cause; None: no bound."""
    same_failure_limit: int = 3
    """The same exception at the same position this many times in a row ends the job with it."""


@dataclass(frozen=True, slots=True)
class RestartAfter:
    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    cause: FailureCause


Decision = RestartAfter | GiveUp


class RestartPolicy:
    """Decides on one failure at a time; told when the job runs and when a checkpoint completes."""

    def __init__(self, spec: RestartSpec) -> None:
        self.spec = spec
        self.restarts = 0  # restarts granted, several deaths in one recovery counted once
        self._running_since: float | None = None  # None while the job recovers
        self._checkpoints = 0  # completed since the job runs
        self._steps = 0  # exponent of the next delay
        self._dead: set[SubtaskId] = set()  # who has died in the present outage
        self._last: tuple[str, str, str] | None = None
        self._in_a_row = 0  # failures equal to _last, the last one included

    def running(self, now: float) -> None:
        """Every subtask of the attempt runs."""
        self._running_since = now
        self._checkpoints = 0

    def checkpoint_completed(self) -> None:
        self._checkpoints += 1

    def on_death(self, subtask: SubtaskId, cause: FailureCause, now: float) -> Decision:
        """The process of ``subtask`` is gone."""
        recovering = self._running_since is None
        if self._healthy(now):
            self._dead.clear()
        free = subtask not in self._dead
        self._dead.add(subtask)
        self._last, self._in_a_row = None, 0
        if self.spec.strategy == "none":
            return GiveUp(cause)
        if free and recovering and self.restarts:
            return RestartAfter(0.0)
        return self._restart(cause, now, free=free)

    def on_failure(self, cause: FailureCause, now: float) -> Decision:
        """A failure was reported; ``cause.fatal`` is the caller's to see."""
        key = (cause.kind, cause.message, cause.position)
        self._in_a_row = self._in_a_row + 1 if key == self._last else 1
        self._last = key
        if self.spec.strategy == "none":
            return GiveUp(cause)
        if cause.position and self._in_a_row >= self.spec.same_failure_limit:
            return GiveUp(cause)
        return self._restart(cause, now, free=False)

    def _restart(self, cause: FailureCause, now: float, *, free: bool) -> Decision:
        if self.spec.max_attempts is not None and self.restarts >= self.spec.max_attempts:
            return GiveUp(cause)
        if self._running_since is not None and now - self._running_since >= self.spec.reset_after_s:
            self._steps = 0
        self._running_since = None
        self.restarts += 1
        return RestartAfter(0.0 if free else self._delay())

    def _delay(self) -> float:
        if self.spec.strategy == "fixed":
            return self.spec.initial_s
        delay = min(self.spec.initial_s * self.spec.factor**self._steps, self.spec.max_s)
        if delay < self.spec.max_s:  # else the power would grow for ever
            self._steps += 1
        return delay

    def _healthy(self, now: float) -> bool:
        if self._running_since is None:
            return False
        return now - self._running_since >= self.spec.initial_s or self._checkpoints >= HEALTHY_CHECKPOINTS
