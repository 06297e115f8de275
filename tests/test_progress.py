"""The progress line: what it says, when it is silent, and what Ctrl-C does. The job is scripted; no time passes."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import JobFailedError
from rayflow.progress import Meter, event_time_text, summary, wait_with_progress
from rayflow.runtime.results import JobResult, JobStatus

RESULT = JobResult(name="delays", status="finished", checkpoint=9, restarts=0, metrics={"rows_in": 5000.0})


def status(**changes: object) -> JobStatus:
    fields: dict[str, object] = {
        "state": "running",
        "attempt": 1,
        "restarts": 0,
        "last_checkpoint": None,
        "rows_in": 0,
        "watermark_us": None,
    }
    return JobStatus(**(fields | changes))  # type: ignore[arg-type]


class ScriptedJob:
    """Ends after so many polls, with a result or an exception."""

    def __init__(self, polls: int, end: JobResult | BaseException) -> None:
        self._polls = polls
        self._end = end
        self.asked = 0
        self.cancelled = 0

    def status(self) -> JobStatus:
        self.asked += 1
        return status(rows_in=1000 * self.asked, last_checkpoint=self.asked)

    def wait(self, timeout: float | None = None) -> JobResult:
        if timeout is not None and self._polls:
            self._polls -= 1
            raise TimeoutError
        if isinstance(self._end, BaseException):
            raise self._end
        return self._end

    def cancel(self) -> None:
        self.cancelled += 1


def ticking() -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += 1.0


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=200, color_system=None), out


def test_a_terminal_sees_the_line_and_then_the_summary() -> None:
    screen, out = console(terminal=True)
    clock = ticking()
    assert wait_with_progress(ScriptedJob(3, RESULT), console=screen, clock=lambda: next(clock)) is RESULT
    assert "1,000 rows/s" in out.getvalue()
    assert out.getvalue().rstrip().endswith("delays: finished in 4.0 s · 5,000 rows in, 1,250 rows/s · "
                                            "checkpoint 9 · no restarts")  # fmt: skip


def test_what_is_no_terminal_sees_nothing_and_nobody_polls() -> None:
    screen, out = console(terminal=False)
    job = ScriptedJob(3, RESULT)
    assert wait_with_progress(job, console=screen) is RESULT
    assert out.getvalue() == ""
    assert job.asked == 0


def test_a_terminal_sees_nothing_when_nothing_is_to_be_shown() -> None:
    screen, out = console(terminal=True)
    assert wait_with_progress(ScriptedJob(3, RESULT), show=False, console=screen) is RESULT
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_control_c_cancels_the_job_and_goes_on(terminal: bool) -> None:
    screen, out = console(terminal=terminal)
    job = ScriptedJob(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        wait_with_progress(job, console=screen)
    assert job.cancelled == 1
    assert ("was cancelled" in out.getvalue()) is terminal


def test_a_failure_comes_through_without_cancelling() -> None:
    screen, out = console(terminal=True)
    job = ScriptedJob(1, JobFailedError("step 'map' failed"))
    with pytest.raises(JobFailedError, match="step 'map' failed"):
        wait_with_progress(job, console=screen)
    assert job.cancelled == 0
    assert "finished" not in out.getvalue()


def test_the_line_tells_rates_event_time_and_the_age_of_the_checkpoint() -> None:
    meter = Meter()
    assert meter.line() == "starting"
    meter.observe(status(rows_in=1000), 10.0)
    assert meter.line() == "running · 1,000 rows · 0 rows/s · no checkpoint yet"
    meter.observe(status(rows_in=5000, last_checkpoint=3, watermark_us=1_357_034_400_000_000), 12.0)
    meter.observe(status(rows_in=5000, last_checkpoint=3, watermark_us=1_357_034_400_000_000), 12.5)
    assert meter.line() == ("running · 5,000 rows · 1,600 rows/s · at 2013-01-01 10:00 · checkpoint 3 (0.5 s ago)")


def test_a_restart_does_not_make_the_rate_negative() -> None:
    meter = Meter()
    meter.observe(status(rows_in=9000, last_checkpoint=2), 1.0)
    meter.observe(status(rows_in=9900, last_checkpoint=2), 2.0)
    meter.observe(status(rows_in=100, attempt=2, restarts=1, last_checkpoint=2, detail="window[1] died"), 3.0)
    meter.observe(status(rows_in=600, attempt=2, restarts=1, last_checkpoint=2), 4.0)
    assert meter.rows_per_s == 500
    assert "1 restart" in meter.line()


def test_the_rate_is_that_of_the_last_seconds() -> None:
    meter = Meter()
    for second in range(10):
        meter.observe(status(rows_in=1000 * second if second < 5 else 5000), float(second))
    assert meter.rows_per_s == 0


@pytest.mark.parametrize(
    ("time_us", "text"),
    [
        (0, "1970-01-01 00:00"),
        (MAX_WATERMARK, "end"),
        (MIN_WATERMARK, "start"),
        (-1, "1969-12-31 23:59"),
        (2**62, f"{2**62} us"),
    ],
)
def test_event_times_of_all_sizes(time_us: int, text: str) -> None:
    assert event_time_text(time_us) == text


def test_summary_leaves_out_the_rate_after_a_restart() -> None:
    result = JobResult(name="x", status="stopped", checkpoint=None, restarts=2, metrics={"rows_in": 5.0})
    assert summary(result, 2.0) == "x: stopped in 2.0 s · 2 restarts"
