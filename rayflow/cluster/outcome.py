"""Waiting for a job, and how its end becomes an exception of the driver."""

from __future__ import annotations

import time
from typing import Any, Final

from rayflow.cluster.view import Ended
from rayflow.core.events import JobState
from rayflow.errors import (
    ClusterError,
    CommitLostError,
    CorruptCheckpointError,
    DataError,
    FencedError,
    JobFailedError,
    RayflowError,
    StateTooLargeError,
    StorageError,
    UserCodeError,
)

_POLL_S: Final = (0.005, 0.1)


def patiently(timeout: float | None) -> Any:
    """Yields at once and then, ever more slowly, until ``timeout`` seconds have passed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    pause, longest = _POLL_S
    while True:
        yield
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return
        time.sleep(pause if deadline is None else min(pause, deadline - now))
        pause = min(pause * 1.5, longest)


def failure_of(ended: Ended, job: str) -> JobFailedError:
    """The error of a job that failed, with its cause chained."""
    cause = ended.cause
    told = cause.message if cause is not None else "unknown cause"
    error = JobFailedError(f"job {job!r} failed: {told}")
    if cause is not None:
        kind = cause.kind.partition("(")[0]
        error.__cause__ = _KINDS.get(kind, RayflowError)(f"{cause.kind}: {told}")
        if cause.traceback:
            error.__cause__.add_note(f"where it was raised:\n{cause.traceback}")
    return error


def ended_before(ended: Ended, job: str, what: str) -> JobFailedError:
    """The error of a driver that waited for something of a job that has ended meanwhile; a failure tells its cause."""
    if ended.state is JobState.FAILED:
        error = failure_of(ended, job)
        error.add_note(f"it failed before {what}")
        return error
    return JobFailedError(f"job {job!r} ended ({ended.state.value}) before {what}")


_KINDS: dict[str, type[RayflowError]] = {
    "Fenced": FencedError,
    "SubtaskDied": ClusterError,
    **{
        kind.__name__: kind
        for kind in (
            UserCodeError, DataError, StorageError, CommitLostError, CorruptCheckpointError, FencedError,
            StateTooLargeError, ClusterError,
        )
    },
}  # fmt: skip
