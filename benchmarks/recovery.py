"""From SIGKILL to the first new output, split into detect / reset / restore / first row.

`python -m benchmarks.recovery [--kills 7]`. One job on a warm cluster (parallelism 2, source -> tumbling windows ->
Parquet, a checkpoint every 500 ms, some MB of window state) loses one of its four subtasks at a time. The new output is
the first batch of window results that the sink is given in the new attempt: a step of user code in front of the sink
writes down when that was. All clocks are the monotonic one of the machine: that of the killer, of the coordinator (its
timeline) and of the step. Then the worse cases: a death right after another, when no process of spare stands by yet;
all four at once; the coordinator.

detect     SIGKILL to the coordinator's knowing of it
reset      until the survivors are reset and the dead one is replaced
restore    until every subtask runs with its state
first row  until the first result of a window
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

import rayflow as rf
from benchmarks.figures import emit
from benchmarks.kill_runs import cluster, living
from rayflow.cluster.job import Job
from rayflow.core import timeline

BAR_S = 5.0
KEYS = 10_000
BATCH_ROWS = 2_000
PATIENCE_S = 60.0
SCHEMA = pa.schema([("ts", pa.timestamp("us")), ("key", pa.int64()), ("value", pa.int64())])
PARTS = ("detect", "reset", "restore", "first row")


def endless(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
    """Far more rows than the benchmark lasts, 1 ms of event time for each batch; slow enough to leave the CPU idle."""
    while True:
        i = np.arange(position, position + BATCH_ROWS, dtype=np.int64)
        ts = pa.array(i * 1000 // BATCH_ROWS).cast(pa.timestamp("us"))
        yield pa.record_batch([ts, pa.array(i * 7919 % KEYS), pa.array(i)], schema=SCHEMA)
        position += BATCH_ROWS
        yield None


class FirstOutput:
    """Built anew in every attempt: notes the moment of its first batch in a file of its own."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._told = False

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if batch.num_rows and not self._told:
            self._told = True
            now = time.monotonic()
            path = os.path.join(self._folder, uuid.uuid4().hex)
            with open(path + ".partial", "w") as file:
                file.write(repr(now))
            os.rename(path + ".partial", path + ".first")
        return batch


def flow(folder: Path) -> rf.Flow:
    windows = (
        rf.from_generator(endless, splits=2, schema=SCHEMA, event_time="ts", max_delay="0s")
        .key_by("key")
        .window(rf.tumbling("20ms"))
        .agg(n=rf.count(), total=rf.sum("value"))
    )
    first = windows.map_batches(FirstOutput, fn_constructor_args=(str(folder / "first"),), schema=windows.schema)
    return rf.Flow("recovery", first.write_parquet(str(folder / "out")))


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery; seconds."""

    victim: str
    parts: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.parts)


def moments(folder: Path) -> list[float]:
    return sorted(float(path.read_text()) for path in (folder / "first").glob("*.first"))


def warm(job: Job, folder: Path, *, spare: bool = True) -> None:
    """Until the job runs and all of it gives output; with ``spare``, until a process stands by for the next death."""
    job.checkpoint()
    attempt = job.status().attempt
    launched = _at(job, attempt, timeline.LAUNCHED)
    _until(lambda: sum(moment > launched for moment in moments(folder)) >= 2, "both window subtasks give output")
    if spare:
        _until(lambda: processes() > len(job.subtasks()), "a process stands by")


def processes() -> int:
    """Processes of subtasks below this one that are up, the spare one included."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = "".join(process.cmdline()[:1])
            found += "SubtaskProcess" in title and "__init__" not in title and process.status() != "zombie"
    return found


def recover(job: Job, folder: Path, turn: int | None, *, spare: bool = True) -> Recovery:
    """From the death of one subtask, in turn; of all of them when ``turn`` is None."""
    warm(job, folder, spare=spare)
    before = job.status().attempt
    victims = living(job)
    if turn is not None:
        victims = [victims[turn % len(victims)]]
    killed = time.monotonic()
    for _, pid in victims:
        os.kill(pid, signal.SIGKILL)
    _until(lambda: job.status().attempt > before and job.status().state == "running", "it runs again")
    attempt = job.status().attempt
    detected = next(e.at for e in job.timeline() if e.what == timeline.DETECTED and e.at >= killed)
    ready = _at(job, attempt, timeline.RESET)
    launched, running = _at(job, attempt, timeline.LAUNCHED), _at(job, attempt, timeline.RUNNING)
    _until(lambda: any(moment > launched for moment in moments(folder)), "the first new output")
    first = next(moment for moment in moments(folder) if moment > launched)
    running = min(running, first)  # a subtask may be ahead of the news that all run
    return Recovery(
        ", ".join(name for name, _ in victims), (detected - killed, ready - detected, running - ready, first - running)
    )


def lose_the_coordinator(job: Job, folder: Path) -> float:
    """Seconds from its SIGKILL to the first new output; its subtasks go with it."""
    warm(job, folder)
    leader = job.coordinator()
    killed = time.monotonic()
    os.kill(leader.pid, signal.SIGKILL)
    _until(lambda: job.coordinator().life != leader.life and job.status().state == "running", "it runs again")
    launched = _at(job, job.status().attempt, timeline.LAUNCHED)
    _until(lambda: any(moment > launched for moment in moments(folder)), "the first new output")
    return next(moment for moment in moments(folder) if moment > launched) - killed


def _at(job: Job, attempt: int, what: str) -> float:
    return next(e.at for e in job.timeline() if e.what == what and e.attempt == attempt)


def _until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s: {what}")
        time.sleep(0.005)


def tell(recovery: Recovery) -> Recovery:
    parts = ", ".join(f"{part} {s:.3f} s" for part, s in zip(PARTS, recovery.parts, strict=True))
    print(f"killed {recovery.victim}: {parts}; {recovery.total:.3f} s in all", file=sys.stderr, flush=True)
    return recovery


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayflow-recovery-") as name, cluster():
        folder = Path(name)
        (folder / "first").mkdir()
        checkpoints = rf.CheckpointConfig(str(folder / "checkpoints"), interval="500ms")
        job = flow(folder).submit(parallelism=2, checkpoints=checkpoints)
        found = [tell(recover(job, folder, turn)) for turn in range(options.kills)]
        again = tell(recover(job, folder, options.kills, spare=False))
        everybody = tell(recover(job, folder, None))
        leader = lose_the_coordinator(job, folder)
        job.cancel()
    for i, part in enumerate(PARTS):
        values = [recovery.parts[i] for recovery in found]
        emit(f"recovery, {part}, median", round(statistics.median(values), 3), "s")
        emit(f"recovery, {part}, longest", round(max(values), 3), "s")
    totals = [recovery.total for recovery in found]
    emit("recovery, SIGKILL to first new output, median", round(statistics.median(totals), 3), "s")
    emit("recovery, SIGKILL to first new output, longest", round(max(totals), 3), "s", BAR_S, max(totals) < BAR_S)
    for what, worse in (("a second subtask right after", again), ("all subtasks at once", everybody)):
        emit(f"recovery, SIGKILL of {what}", round(worse.total, 3), "s", BAR_S, worse.total < BAR_S)
    emit("recovery, SIGKILL of the coordinator", round(leader, 3), "s")


if __name__ == "__main__":
    main()
