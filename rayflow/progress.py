"""One live line on a terminal while a job runs, and one line when it has ended.

On anything but a terminal nothing is printed. Ctrl-C cancels the job, without asking, and goes on as
`KeyboardInterrupt`: to leave a job running, start it with `Flow.submit` and do not wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.runtime.results import JobResult, JobStatus

POLL_S: Final = 0.25
RATE_WINDOW_S: Final = 3.0
"""Rows per second are those of so many last seconds."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Waitable(Protocol):
    """What of a `rayflow.cluster.job.Job` is needed here."""

    def status(self) -> JobStatus: ...
    def wait(self, timeout: float | None = None) -> JobResult:
        """Raises `TimeoutError` when the job goes on after ``timeout`` seconds."""

    def cancel(self) -> object: ...


def wait_with_progress(
    job: Waitable,
    *,
    show: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> JobResult:
    """The result of ``job``, as `Job.wait` gives it; progress goes to ``console`` (default: standard error) if that is
    a terminal and ``show`` is true.

    Raises what `Job.wait` raises, and `KeyboardInterrupt` on Ctrl-C after the job was told to cancel.
    """
    console = console or Console(stderr=True)
    shown = show and console.is_terminal
    began, meter, line = clock(), Meter(), Text("starting")
    live: AbstractContextManager[Live | None] = (
        Live(line, console=console, transient=True, refresh_per_second=8) if shown else nullcontext()
    )
    try:
        with live as screen:
            while True:
                try:
                    result = job.wait(timeout=POLL_S if shown else None)
                    break
                except TimeoutError:
                    meter.observe(job.status(), clock())
                    if screen is not None:
                        screen.update(Text(meter.line(), no_wrap=True, overflow="ellipsis"))
    except KeyboardInterrupt:
        job.cancel()
        if shown:
            console.print("interrupted: the job was cancelled", highlight=False)
        raise
    if shown:
        console.print(summary(result, clock() - began), highlight=False, soft_wrap=True)
    return result


@dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    rows: int


class Meter:
    """Turns one status after the other into a line. Pure: time is an argument."""

    def __init__(self) -> None:
        self._status: JobStatus | None = None
        self._now = 0.0
        self._readings: list[_Reading] = []
        self._checkpoint_seen: float | None = None
        """When the newest checkpoint was first seen."""

    def observe(self, status: JobStatus, now: float) -> None:
        before = self._status
        if before is not None and status.last_checkpoint != before.last_checkpoint:
            self._checkpoint_seen = now
        if before is not None and status.attempt != before.attempt:
            self._readings.clear()  # rows are counted anew after a restart
        self._readings = [r for r in self._readings if now - r.at <= RATE_WINDOW_S] + [_Reading(now, status.rows_in)]
        self._status, self._now = status, now

    @property
    def rows_per_s(self) -> float:
        first, last = self._readings[0], self._readings[-1]
        return max(0, last.rows - first.rows) / (last.at - first.at) if last.at > first.at else 0.0

    def line(self) -> str:
        """``running · 120,000 rows · 40,000 rows/s · at 2013-04-21 03:00 · checkpoint 7 (0.4 s ago)``, and so on."""
        status = self._status
        if status is None:
            return "starting"
        parts = [status.state, f"{status.rows_in:,} rows", f"{self.rows_per_s:,.0f} rows/s"]
        if status.watermark_us is not None:
            parts.append(f"at {event_time_text(status.watermark_us)}")
        if status.last_checkpoint is None:
            parts.append("no checkpoint yet")
        else:
            seen = self._checkpoint_seen
            ago = "" if seen is None else f" ({self._now - seen:.1f} s ago)"
            parts.append(f"checkpoint {status.last_checkpoint}{ago}")
        if status.restarts:
            parts.append(_restarts(status.restarts))
        if status.detail:
            parts.append(status.detail)
        return " · ".join(parts)


def event_time_text(time_us: int) -> str:
    """Microseconds since the epoch as UTC to the minute; ``start`` and ``end`` for the ends of all time."""
    if time_us >= MAX_WATERMARK:
        return "end"
    if time_us <= MIN_WATERMARK:
        return "start"
    try:
        return f"{_EPOCH + timedelta(microseconds=time_us):%Y-%m-%d %H:%M}"
    except OverflowError:
        return f"{time_us} us"


def summary(result: JobResult, seconds: float) -> str:
    """One line about a job that has ended."""
    parts = [f"{result.name}: {result.status} in {seconds:.1f} s"]
    rows = result.metrics.get("rows_in")
    if rows and not result.restarts:  # after a restart the sources count anew
        parts.append(f"{rows:,.0f} rows in, {rows / max(seconds, 1e-9):,.0f} rows/s")
    if result.checkpoint is not None:
        parts.append(f"checkpoint {result.checkpoint}")
    parts.append(_restarts(result.restarts))
    return " · ".join(parts)


def _restarts(count: int) -> str:
    return f"{count or 'no'} restart{'' if count == 1 else 's'}"
