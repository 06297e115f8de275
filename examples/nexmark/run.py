"""One query from its first event to its last commit: on Ray, with a process killed on the way, or in this process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

import rayflow as rf
from examples.nexmark.check import Difference, Oracle
from examples.nexmark.generator import Nexmark
from examples.nexmark.query import Query
from examples.nexmark.source import Events, events
from rayflow.cluster.job import Job
from rayflow.core import timeline
from rayflow.stream import Stream

PATIENCE_S = 120.0
HELD_BATCHES = 1_000
"""Of each kind of events, when there will be a kill."""
HELD_S = 0.05
"""A batch is held back for so long until the kill is done, which the job must live to see: here almost half a minute
at parallelism 2, and no more than the kill takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How queries are run."""

    parallelism: int = 2
    interval: str = "1s"
    """Of checkpoints."""
    kill: bool = False
    """SIGKILL a process of the job, drawn by ``seed``, when its second checkpoint is complete."""
    local: bool = False
    """In this process, without Ray; nothing can be killed then."""
    seed: int = 0
    config: rf.JobConfig = field(default_factory=rf.JobConfig)


@dataclass(frozen=True, slots=True)
class Outcome:
    query: str
    rows: int
    """That the flow read."""
    seconds: float
    """From the launch of the subtasks to the last commit."""
    duckdb_seconds: float
    """For the same result from Parquet files, written as Parquet."""
    difference: Difference
    restarts: int
    checkpoints: int
    killed: str = ""


def run(query: Query, config: Nexmark, how: How, oracle: Oracle, folder: Path) -> Outcome:
    """The result is written below ``folder`` as Parquet files and compared with that of DuckDB."""
    out = folder / "out"
    checkpoints = rf.CheckpointConfig(str(folder / "checkpoints"), interval=how.interval)
    gate = folder / "gate"
    streams = events(config)
    if how.kill:
        streams = held(events(config, least_batches=HELD_BATCHES), gate)
    flow = rf.Flow(f"nexmark-{query.name}", query.build(streams).write_parquet(str(out)))
    killed = ""
    began = time.perf_counter()
    if how.local:
        result = flow.run(local=True, parallelism=how.parallelism, checkpoints=checkpoints, config=how.config)
        seconds = time.perf_counter() - began
    else:
        job = flow.submit(parallelism=how.parallelism, checkpoints=checkpoints, config=how.config)
        try:
            if how.kill:
                killed = kill_one(job, random.Random(f"{how.seed} {query.name}"))
                gate.touch()
            result = job.wait(None)
        except BaseException:
            with contextlib.suppress(Exception):
                job.cancel()
            raise
        at = {entry.what: entry.at for entry in result.timeline}
        seconds = at[timeline.JOB_ENDED] - min(e.at for e in result.timeline if e.what == timeline.LAUNCHED)
    duckdb_seconds = oracle.seconds(query, folder / "duckdb.parquet")
    difference = oracle.difference(query, out)
    return Outcome(
        query.name, query.rows(config), seconds, duckdb_seconds, difference, result.restarts, result.checkpoint or 0,
        killed,
    )  # fmt: skip


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder for one run."""
    with tempfile.TemporaryDirectory(prefix="rayflow-nexmark-") as folder:
        yield Path(folder)


# -------------------------------------------------------------------------------------------------------------- kills


class HoldBack:
    """Lets a batch through now and then until a file is there, so that the job lasts until the kill is done."""

    def __init__(self, gate: str) -> None:
        self._gate = gate
        self._open = False

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self._open = self._open or os.path.exists(self._gate)
        if not self._open:
            time.sleep(HELD_S)
        return batch


def held(streams: Events, gate: Path) -> Events:
    """The same events, slowly until ``gate`` is there."""

    def hold(stream: Stream) -> Stream:
        return stream.map_batches(HoldBack, fn_constructor_args=(str(gate),), schema=stream.schema)

    return replace(streams, person=hold(streams.person), auction=hold(streams.auction), bid=hold(streams.bid))


def kill_one(job: Job, rng: random.Random) -> str:
    """SIGKILL to one subtask of a running job that has completed two checkpoints; returns when it runs again."""
    _until(lambda: job.status().state == "running", job)
    job.checkpoint()
    job.checkpoint()
    attempt = job.status().attempt
    victim = rng.choice(sorted(job.subtasks(), key=lambda subtask: (subtask.step, subtask.index)))
    os.kill(victim.pid, signal.SIGKILL)
    _until(lambda: job.status().attempt > attempt and job.status().state == "running", job)
    job.checkpoint()
    return f"{victim.step}/{victim.index}"


def _until(condition: object, job: Job) -> None:
    deadline = time.monotonic() + PATIENCE_S
    assert callable(condition)
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {job}, it is {job.status()}")
        time.sleep(0.01)
