"""The memory of the processes of a job, watched from outside."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from types import TracebackType
from typing import Self

import psutil

from rayflow.cluster.job import Job

SAMPLE_S = 0.02
MB = 1024 * 1024


class RssWatch:
    """Samples the resident memory of the subtasks of ``job`` on a thread of its own, between enter and exit.

    ``peaks`` are the highest of each subtask, in bytes, by ``step/index``; ``peak`` the highest sum at one moment.
    """

    def __init__(self, job: Job) -> None:
        self.peaks: dict[str, int] = defaultdict(int)
        self.peak = 0
        self.samples = 0
        self._processes = {
            f"{subtask.step.split(' ')[0]}/{subtask.index}": psutil.Process(subtask.pid) for subtask in job.subtasks()
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rss", daemon=True)

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> None:
        """One sample, now."""
        total = 0
        for name, process in self._processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):  # the job has ended
                rss = int(process.memory_info().rss)
                self.peaks[name] = max(self.peaks[name], rss)
                total += rss
        self.peak = max(self.peak, total)
        self.samples += 1

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.look()


def until_running(job: Job, timeout_s: float = 60.0) -> None:
    """Until every subtask has a process and runs, or the job has ended."""
    deadline = time.monotonic() + timeout_s
    while job.status().state not in ("running", "finished", "failed", "cleaning"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job} did not run within {timeout_s:g} s: {job.status()}")
        time.sleep(0.002)
