"""Waiting for things and killing things, for tests on real Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rayflow.cluster.job import Job
from rayflow.core.manifest import Manifest, SplitState, decode
from rayflow.runtime.results import JobStatus
from rayflow.storage.layout import manifest_path

PATIENCE_S = 120.0
"""For a machine with much else to do; what is waited for is there within moments on a quiet one."""


def until(condition: Callable[[], object], what: str, *, timeout_s: float = PATIENCE_S) -> None:
    """Wait for the thing itself; nothing is assumed of how long it takes."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for: {what}"
        time.sleep(0.01)


def kill(*pids: int, sig: signal.Signals = signal.SIGKILL) -> None:
    assert all(pid > 1 for pid in pids), pids
    for pid in pids:
        os.kill(pid, sig)


def living(job: Job) -> JobStatus:
    """Its status; the test fails with what the job failed with."""
    status = job.status()
    if status.state == "failed":
        job.wait(0)  # raises, with the cause
    return status


def running(job: Job) -> None:
    """Until every subtask runs, and a checkpoint of this attempt is complete."""
    until(lambda: living(job).state == "running", f"{job} runs")
    job.checkpoint()


def recovered(job: Job, attempt: int) -> None:
    """Until an attempt later than ``attempt`` runs."""

    def again() -> bool:
        status = living(job)
        return status.attempt > attempt and status.state == "running"

    until(again, f"{job} runs again")


def process_is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def subtask_processes() -> list[int]:
    """Pids of this session's processes that are, or were, a subtask."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "SubtaskProcess" in "".join(process.cmdline()[:1]) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def told(job: Job, what: str) -> list[str]:
    """Details of the timeline entries of that name."""
    return [e.detail for e in job.timeline() if e.what == what]


def story(job: Job) -> str:
    """All that the job has to say of itself."""
    timeline = job.timeline()
    begun = timeline[0].at if timeline else 0.0
    return "\n".join(
        [
            str(job.status()),
            *map(str, job.subtasks()),
            *(f"{e.at - begun:8.3f} {e.what} {e.detail}" for e in (*timeline[:60], *timeline[60:][-60:])),
        ]
    )


def pid_of(job: Job, step: str, index: int = 0) -> int:
    """Of the subtask whose chain has ``step`` in its title."""
    (pid,) = [s.pid for s in job.subtasks() if step in s.step and s.index == index]
    return pid


def kill_and_recover(job: Job, pid: int) -> None:
    attempt = job.status().attempt
    kill(pid)
    recovered(job, attempt)


def visible(out: Path) -> list[Path]:
    """Committed files, in the order in which each subtask made them."""
    return sorted(out.glob("*.parquet"))


def newest(job: Job, tmp_path: Path) -> Manifest:
    """The newest checkpoint's manifest, from its file."""
    while True:
        path = manifest_path(job.checkpoints()[0].checkpoint)
        for file in (tmp_path / "checkpoints").glob(f"*/{path}"):
            with contextlib.suppress(FileNotFoundError):  # no longer the newest, and deleted already: look again
                return decode(file.read_bytes(), path=path)


def splits_of(manifest: Manifest) -> list[SplitState]:
    """Those that are not read to their end."""
    return [*manifest.pending_splits, *(split for subtask in manifest.subtasks for split in subtask.splits)]
