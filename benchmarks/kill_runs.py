"""Runs in a row on real Ray, each with SIGKILL at random moments; every output must be that of DuckDB, row for row.

`python -m benchmarks.kill_runs [--local 30] [--state 6] [--s3 10] [--coordinator 5] [--seed S]`. A run is a job of
parallelism 2 with a checkpoint every 200 ms: for even seeds Parquet files -> tumbling windows by auction -> Parquet,
for odd ones the bids themselves from files to files by auction, where every row that is lost or repeated shows; for
those of `--state` running counts and sums by auction under rocksdb, with little memory. The seed draws who is killed
(one to three subtasks, in some runs the coordinator too) and when, as positions in the life of the job: so many
checkpoints after the last recovery, while a checkpoint is under way, while the job recovers from the kill before,
when its input has ended; then so many looks at its status. A step of user code holds the input back until the kills
that need a running job are made, so no run depends on the speed of the machine.

A run that fails says how to repeat it, and keeps its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import duckdb
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

import rayflow as rf
from benchmarks.bids import make_bids
from benchmarks.figures import emit
from benchmarks.places import LocalPlace, Place, s3_place
from rayflow import col
from rayflow.cluster.job import Job
from rayflow.core import timeline
from rayflow.core.ids import Attempt, SubtaskId
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.runtime.scratch import Scratch
from rayflow.stream import Stream

PARALLELISM = 2
ROWS = 1_000_000
FILES = 8
BATCH_ROWS = 2_000
PAUSE_S = 0.05
"""While the gate is closed each source takes about so long for a batch: the input then lasts more than ten seconds."""
WINDOW = "200ms"
INTERVAL = "200ms"
JOB = "kill-run"
LOCAL_DIR = "local"
MEMORY_BYTES = 1024 * 1024
"""The least there is."""
PATIENCE_S = 60.0
MOST_LOOKS = 30


class When(Enum):
    """A position in the life of a job, counted from its last recovery."""

    COMPLETED = "after so many checkpoints"
    UNDER_WAY = "after so many checkpoints, while the next is under way"
    RECOVERING = "while it recovers from the kill before"
    INPUT_ENDED = "when all input has ended"


@dataclass(frozen=True, slots=True)
class Kill:
    when: When
    checkpoints: int
    looks: int
    """Looks at the status after that: the finer part of the position."""
    victim: float
    """In [0, 1): which of the living subtasks."""
    coordinator: bool = False


def draw_kills(rng: random.Random, *, coordinator: bool) -> list[Kill]:
    """In the order in which they are made. The first needs a running job, at most the last waits for the end."""
    kills = [_draw(rng, list(When)[:3] if i else list(When)[:2]) for i in range(rng.randint(1, 3))]
    if coordinator:
        leader = _draw(rng, list(When)[:2])
        kills.insert(rng.randint(0, len(kills)), Kill(leader.when, leader.checkpoints, leader.looks, 0.0, True))
    if len(kills) > 1 and rng.random() < 0.3:
        last = kills[-1]
        kills[-1] = Kill(When.INPUT_ENDED, 0, last.looks, last.victim, last.coordinator)
    return kills


def _draw(rng: random.Random, moments: Sequence[When]) -> Kill:
    return Kill(rng.choice(moments), rng.randint(0, 3), rng.randint(0, MOST_LOOKS), rng.random())


@dataclass(slots=True)
class Run:
    """What came of one run."""

    seed: int
    where: str
    kills: list[str] = field(default_factory=list)
    coordinator_kills: int = 0
    restarts: int = 0
    checkpoint: int = 0
    identical: bool = False
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.identical and not self.leftovers and not self.problem and bool(self.kills)


class Shape(Enum):
    """What is made of the bids: the name of the table that DuckDB holds against it, its columns, and how they follow
    from the output."""

    WINDOWS = "windows", "auction, window_start, n, total, highest", "output"
    BIDS = "bids", "auction, price, ts", "output"
    RUNNING = (
        "steps",
        "auction, step, price",
        """(select auction, n - lag(n, 1, 0) over each as step, total - lag(total, 1, 0) over each as price
            from output window each as (partition by auction order by n))""",
    )
    """Counts and sums so far, on local disk. In which order the bids of an auction meet is open, so what counts is what
    each row adds: one to the number of its auction, and to the sum the price of one of its bids."""

    @classmethod
    def of(cls, seed: int) -> Shape:
        return cls.BIDS if seed % 2 else cls.WINDOWS


class Bids:
    """The input as files, and what DuckDB makes of them."""

    def __init__(self, folder: Path, rows: int = ROWS) -> None:
        big = pa.concat_tables(pq.read_table(path) for path in make_bids(folder / "whole", rows))
        self.files: list[str] = []
        for i in range(FILES):
            start, stop = i * rows // FILES, (i + 1) * rows // FILES
            path = folder / f"bids-{i}.parquet"
            pq.write_table(big.slice(start, stop - start), path, row_group_size=50_000)
            self.files.append(str(path))
        names = ", ".join("'" + name.replace("'", "''") + "'" for name in self.files)
        self._con = duckdb.connect()
        self._con.execute(
            f"""create table bids as select auction, price, ts from read_parquet([{names}]);
                create table windows as
                select auction, time_bucket(interval {WINDOW.removesuffix("ms")} milliseconds, ts) as window_start,
                       count(*) as n, sum(price)::bigint as total, max(price) as highest
                from bids group by all;
                create table steps as select auction, 1 as step, price from bids"""
        ).fetchall()

    def expected(self, shape: Shape) -> pa.Table:
        """An output that is right."""
        if shape is Shape.RUNNING:
            return self._con.sql(
                """select auction, row_number() over each as n, (sum(price) over each)::bigint as total from bids
                   window each as (partition by auction order by ts rows unbounded preceding)"""
            ).to_arrow_table()
        return self._con.sql(f"from {shape.value[0]}").to_arrow_table()

    def difference(self, shape: Shape, output: pa.Table) -> str:
        """Empty when the output has exactly the expected rows."""
        self._con.register("output", output)
        table, columns, made = shape.value
        got, expected = f"select {columns} from {made}", f"select {columns} from {table}"
        both = self._con.execute(
            f"""select (select count(*) from (({got}) except all ({expected}))),
                       (select count(*) from (({expected}) except all ({got})))"""
        ).fetchall()
        self._con.unregister("output")
        more, fewer = both[0]
        return "" if both == [(0, 0)] else f"{more} rows too many, {fewer} missing"


class HoldBack:
    """User code that lets batches through slowly until a file is there; unevenly, so that barriers meet with a gap."""

    def __init__(self, gate: str) -> None:
        self._gate = gate
        self._rng = random.Random()
        self._open = False

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self._open = self._open or os.path.exists(self._gate)
        if not self._open:
            time.sleep(PAUSE_S * self._rng.choice((0.1, 1.0, 2.0)))
        return batch


def flow(shape: Shape, bids: Bids, gate: Path, place: Place) -> rf.Flow:
    source = ParquetSource(bids.files, columns=("auction", "price", "ts"), batch_rows=BATCH_ROWS)
    keyed = (
        rf.read_source(source, event_time="ts", max_delay="0s", label="read_parquet")
        .map_batches(HoldBack, fn_constructor_args=(str(gate),), schema=source.schema())
        .key_by("auction")
    )
    if shape is Shape.BIDS:
        made: Stream = keyed.filter(col("price") > 0, name="all")
    elif shape is Shape.RUNNING:
        made = keyed.agg(n=rf.count(), total=rf.sum("price"), name="running").select("auction", "n", "total")
    else:
        made = keyed.window(rf.tumbling(WINDOW)).agg(n=rf.count(), total=rf.sum("price"), highest=rf.max("price"))
    return rf.Flow(JOB, made.write_parquet(place.out, storage_options=place.storage_options))


def config(shape: Shape, folder: Path) -> rf.JobConfig | None:
    if shape is not Shape.RUNNING:
        return None
    return rf.JobConfig(state="rocksdb", state_memory_bytes=MEMORY_BYTES, local_dir=str(folder / LOCAL_DIR))


def one_run(
    seed: int,
    place: Place,
    folder: Path,
    bids: Bids,
    *,
    where: str,
    coordinator: bool,
    shape: Shape | None = None,
) -> Run:
    """Never raises: what went wrong stands in the result. ``shape`` None: that of the seed."""
    run = Run(seed, where)
    began = time.monotonic()
    gate = folder / "gate"
    job: Job | None = None
    try:
        shape = shape or Shape.of(seed)
        job = flow(shape, bids, gate, place).submit(
            parallelism=PARALLELISM, checkpoints=place.checkpoints(INTERVAL), config=config(shape, folder)
        )
        for kill in draw_kills(random.Random(seed), coordinator=coordinator):
            _make(kill, job, gate, run)
        gate.touch()
        result = job.wait(PATIENCE_S)
        run.restarts, run.checkpoint = result.restarts, result.checkpoint or 0
        difference = bids.difference(shape, place.output())
        run.identical = not difference
        run.problem = difference
        run.leftovers = place.leftovers(JOB)
        if shape is Shape.RUNNING:
            run.leftovers += left_on_local_disk(folder, orphans=run.coordinator_kills > 0)
        if not run.kills:
            run.problem = "nobody was killed"
    except Exception as error:
        run.problem = f"{type(error).__name__}: {error}"
        traceback.print_exc()
        if job is not None:
            with contextlib.suppress(Exception):
                _story(job)
                job.cancel()
    run.seconds = time.monotonic() - began
    return run


def left_on_local_disk(folder: Path, *, orphans: bool) -> list[str]:
    """When all processes are gone, which Ray ends in its own time. ``orphans``: those of a coordinator that was killed
    may die after the end of the job; what they leave is removed by the next process of the job, so there is one here.
    """
    deadline = time.monotonic() + PATIENCE_S
    while subtask_processes() and time.monotonic() < deadline:
        time.sleep(0.002)
    while True:
        if orphans:
            following = Scratch(str(folder / LOCAL_DIR), JOB, SubtaskId("next", 0), Attempt(1))
            following.folder("state")
            following.close()
        left = [str(path) for path in (folder / LOCAL_DIR).rglob("*")]
        # A process that was killed is a zombie by name while its last threads still hold the lock of its folder.
        if not (left and orphans) or time.monotonic() >= deadline:
            return left
        time.sleep(0.01)


def subtask_processes() -> list[int]:
    """Pids of all processes below this one that are, or were, a subtask."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "SubtaskProcess" in "".join(process.cmdline()[:1]) and process.status() != "zombie":
                found.append(process.pid)
    return found


def _make(kill: Kill, job: Job, gate: Path, run: Run) -> None:
    attempt = job.status().attempt
    if kill.when is When.INPUT_ENDED:
        gate.touch()
        _until(lambda: _happened(job, timeline.INPUT_ENDED), job, "its input has ended")
    elif kill.when is When.RECOVERING:
        _until(lambda: job.status().state != "running" or job.status().attempt > attempt, job, "the kill is noticed")
    else:
        _until(lambda: job.status().state == "running", job, "it runs")
        goal = (job.status().last_checkpoint or 0) + kill.checkpoints
        _until(lambda: (job.status().last_checkpoint or 0) >= goal, job, f"checkpoint {goal} completes")
        if kill.when is When.UNDER_WAY:
            seen = _count(job, timeline.CHECKPOINT_TRIGGERED)
            _until(lambda: _count(job, timeline.CHECKPOINT_TRIGGERED) != seen, job, "a checkpoint is triggered")
    for _ in range(kill.looks):
        job.status()
    if _over(job):
        return
    if kill.coordinator:
        leader = job.coordinator()
        os.kill(leader.pid, signal.SIGKILL)
        run.kills.append(f"coordinator {kill.when.name.lower()}")
        run.coordinator_kills += 1
        _until(lambda: job.coordinator().life != leader.life, job, "it has a new coordinator")
    else:
        victims = living(job)
        if victims:
            name, pid = victims[int(kill.victim * len(victims))]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                run.kills.append(f"{name} {kill.when.name.lower()}")


def living(job: Job) -> list[tuple[str, int]]:
    """(step and index, pid) of the subtasks whose process lives; a pid that was given away again is not among them."""
    found = []
    for subtask in job.subtasks():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(subtask.pid) if subtask.pid else None
            if process and "SubtaskProcess" in "".join(process.cmdline()[:1]) and process.status() != "zombie":
                found.append((f"{subtask.step.split(' ')[0]}/{subtask.index}", subtask.pid))
    return found


def _over(job: Job) -> bool:
    return job.status().state in ("finished", "failed", "cancelled", "stopped")


def _count(job: Job, what: str) -> int:
    return sum(entry.what == what for entry in job.timeline())


def _happened(job: Job, what: str) -> bool:
    attempt = job.status().attempt
    return any(entry.what == what and entry.attempt == attempt for entry in job.timeline())


def _until(condition: Callable[[], bool], job: Job, what: str) -> None:
    """Waits for the thing itself, or the end of the job."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and not _over(job):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {job}: {what}; it is {job.status()}")
        time.sleep(0.002)


def _story(job: Job) -> None:
    for entry in job.timeline()[-40:]:
        print(f"  {entry.at:12.3f} {entry.attempt} {entry.what}: {entry.detail[:200]}", file=sys.stderr)


@contextlib.contextmanager
def cluster(cpus: int = 8) -> Iterator[None]:
    """A Ray of this process for all runs. More CPUs than the machine has: what is tried is the protocol."""
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def runs(local: int, s3: int, coordinator: int, seed: int, folder: Path, *, state: int = 0) -> Iterator[Run]:
    """One after another, on the Ray cluster of this process; ``state``: so many more with state on local disk."""
    bids = Bids(folder / "bids")
    every = local // coordinator if coordinator else 0
    for i in range(local):
        own = folder / f"run-{i:03d}"
        own.mkdir()
        leads = every > 0 and i % every == 0 and i // every < coordinator
        run = one_run(seed + i, LocalPlace(own), own, bids, where="local", coordinator=leads)
        yield run
        if run.ok:
            shutil.rmtree(own)
    for i in range(local, local + state):
        own = folder / f"run-{i:03d}"
        own.mkdir()
        leads = coordinator > 0 and i == local
        where = "state"
        run = one_run(seed + i, LocalPlace(own), own, bids, where=where, coordinator=leads, shape=Shape.RUNNING)
        yield run
        if run.ok:
            shutil.rmtree(own)
    if s3:
        from tests.servers import seaweed

        (folder / "weed").mkdir()
        with seaweed(folder / "weed") as server:
            for i in range(local + state, local + state + s3):
                own = folder / f"run-{i:03d}"
                own.mkdir()
                yield one_run(seed + i, s3_place(server), own, bids, where="s3", coordinator=False)


def told(run: Run) -> str:
    verdict = "identical" if run.ok else f"FAILED ({run.problem or f'left behind: {run.leftovers[:5]}'})"
    return (
        f"{run.where:5} seed {run.seed}: {run.seconds:4.1f} s, killed {', '.join(run.kills) or 'nobody'}; "
        f"{run.restarts} restarts, {run.checkpoint} checkpoints: {verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, default=30)
    parser.add_argument("--state", type=int, default=6, help="runs with state on local disk")
    parser.add_argument("--s3", type=int, default=10)
    parser.add_argument(
        "--coordinator", type=int, default=5, help="so many of the local runs, and a run with state, lose it too"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rayflow-kill-runs-"))
    done: list[Run] = []
    with cluster():
        began = time.monotonic()
        for run in runs(options.local, options.s3, options.coordinator, options.seed, folder, state=options.state):
            done.append(run)
            print(told(run), file=sys.stderr, flush=True)
            if not run.ok:
                kinds = " ".join(f"--{where} {run.where == where:d}" for where in ("local", "state", "s3"))
                again = f"{kinds} --seed {run.seed}"
                leads = f"--coordinator {run.coordinator_kills}"
                print(f"  again: python -m benchmarks.kill_runs {again} {leads}; kept: {folder}", file=sys.stderr)
        seconds = time.monotonic() - began
    for where, bar in (("local", options.local), ("state", options.state), ("s3", options.s3)):
        good = sum(run.identical for run in done if run.where == where)
        if bar:
            emit(f"kill runs identical to DuckDB, {where}", good, "runs", bar, good == bar)
    left = sum(len(run.leftovers) for run in done)
    leaders = sum(run.coordinator_kills for run in done)
    emit("kills of subtasks", sum(len(run.kills) for run in done) - leaders, "kills")
    emit("kills of coordinators", leaders, "kills", options.coordinator, leaders >= options.coordinator)
    emit("kill runs: files left behind", left, "files", 0, left == 0)
    emit("kill runs: all", round(seconds, 1), "s")
    if all(run.ok for run in done):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
