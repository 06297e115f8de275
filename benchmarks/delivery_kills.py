"""Kafka -> windows by key -> somewhere, on real Ray, with SIGKILL of subtasks and of the coordinator in turn.

`python -m benchmarks.delivery_kills [--rounds 20] [--sink kafka --sink postgres ...] [--together] [--outage 5]
[--seed S]`. A job a sink (`--together`: one job with all of them) of parallelism 2, with a checkpoint every 300 ms,
reads a topic of four partitions. It gets its rows a round at a time: half of them, then a checkpoint must complete,
then the others, and at a checkpoint that has just completed, or is under way, a process of a subtask is killed; in the
next round the coordinator; in the one after that both at once. The next round begins when the job runs again. With
`--outage N`, in every Nth round the broker and the servers that are written to go away too, for some seconds and until
the job has had to do with it.

After the last round the topic holds as many rows as the job was told to read, and it ends. What a client that is not
rayflow reads then (`read_committed` for Kafka) must be what DuckDB makes of the rows that were produced, as a multiset;
nothing may be prepared or open any more. Exit code 1 if it is not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import rayflow as rf
from benchmarks.__main__ import ModuleRun, table_of
from benchmarks.delivery_rows import PARTITIONS, SCHEMA, Orders
from benchmarks.delivery_targets import KINDS, PostgresTarget, Servers, Target, target
from benchmarks.figures import Figure, emit
from benchmarks.kill_runs import cluster, living
from rayflow.cluster.job import Job
from rayflow.core import timeline
from rayflow.core.timeline import TimelineEntry

if TYPE_CHECKING:
    from tests.kafka_server import KafkaServer

PARALLELISM = 2
INTERVAL = "300ms"
PATIENCE_S = 120.0
AWAY_S = 2.0
"""How long servers are away at least."""
NOTICED_S = 30.0
"""How long a server may stay away that the job has rows for, until it has missed it."""
MOST_LOOKS = 10


class Who(Enum):
    """Killed in turn."""

    SUBTASK = "subtask"
    COORDINATOR = "coordinator"
    BOTH = "both"


@dataclass(slots=True)
class Run:
    """What came of one job."""

    sinks: list[str]
    kills: list[str] = field(default_factory=list)
    coordinator_kills: int = 0
    outages: int = 0
    missed: int = 0
    """Outages in which a checkpoint or the attempt failed or waited; in the others the job had nothing to do there."""
    rounds: int = 0
    recovered_s: list[float] = field(default_factory=list)
    rows: int = 0
    exact: dict[str, bool] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problems and bool(self.exact) and all(self.exact.values())


def flow(name: str, kafka: KafkaServer, topic: str, rows: int, targets: Sequence[Target]) -> rf.Flow:
    read = rf.read_kafka(
        topic,
        bootstrap_servers=kafka.bootstrap_servers,
        schema=SCHEMA,
        stop={(topic, partition): rows // PARTITIONS for partition in range(PARTITIONS)},
        event_time="at",
        max_delay="1s",
    )
    windows = read.key_by("who").window(rf.tumbling("1s")).agg(n=rf.count(), total=rf.sum("amount"))
    made = windows.select("who", "n", "total", start="window_start").select("who", "start", "n", "total")
    return rf.Flow(name, *(each.sink(made) for each in targets))


class Delivery:
    """One job and its rounds."""

    def __init__(self, targets: Sequence[Target], servers: Servers, folder: Path, *, rounds: int, seed: int) -> None:
        self.run = Run([each.kind for each in targets])
        self._targets = targets
        self._kafka = servers.kafka()
        self._topic = self._kafka.topic(PARTITIONS, name="orders")
        self._orders = Orders(seed, rounds + 1)
        self._rng = random.Random(seed)
        checkpoints = rf.CheckpointConfig(str(folder / "checkpoints"), interval=INTERVAL)
        name = "-".join(["delivery", *self.run.sinks])
        made = flow(name, self._kafka, self._topic, self._orders.table.num_rows, targets)
        self.job = made.submit(parallelism=PARALLELISM, checkpoints=checkpoints)

    def round(self, number: int, *, outage: bool = False) -> None:
        who = list(Who)[number % len(Who)]
        self._until(lambda: self.job.status().state == "running", "it runs")
        self._produce(2 * number)
        self.job.checkpoint(PATIENCE_S)
        if outage:
            self._outage(2 * number + 1)
        else:
            self._produce(2 * number + 1)
        moment = self._moment()
        began = time.monotonic()
        killed = self._kill(who, number // len(Who))
        took = time.monotonic() - began
        self.run.kills.append(f"{killed} {moment}")
        self.run.recovered_s.append(took)
        self.run.rounds += 1
        away = ", servers away" if outage else ""
        print(f"  round {number}: {killed} {moment}{away}; runs again after {took:.1f} s", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """The rows behind the last round, and the judgement."""
        self._produce(2 * self.run.rounds)
        self._produce(2 * self.run.rounds + 1)
        self.job.wait(PATIENCE_S)
        for each in self._targets:
            delivered = each.rows()
            self.run.rows += delivered.num_rows
            wrong = self._orders.difference(delivered)
            self.run.exact[each.kind] = not wrong
            self.run.problems += [f"{each.kind}: {wrong}"] if wrong else []
            self.run.problems += [f"{each.kind}: {left}" for left in each.leftovers()]

    def _produce(self, half: int, share: float = 1.0, begin: float = 0.0) -> None:
        """So much of the half round, from there on."""
        messages = self._orders.messages(half)
        first, count = round(begin * len(messages)), round(share * len(messages))
        self._kafka.produce(self._topic, messages[first : first + count])

    def _moment(self) -> str:
        """Waits for the moment of the next kill."""
        before = self.job.status().last_checkpoint or 0
        if self._rng.random() < 0.5:
            moment = "when a checkpoint is complete"
            self._until(lambda: (self.job.status().last_checkpoint or 0) > before, "a checkpoint completes")
        else:
            moment = "while a checkpoint is under way"
            self._next_trigger()
        for _ in range(self._rng.randint(0, MOST_LOOKS)):
            self.job.status()
        return moment

    def _kill(self, who: Who, turn: int) -> str:
        """Returns when the job runs again; names of the killed."""
        attempt = self.job.status().attempt
        leader = self.job.coordinator()
        killed = []
        if who is not Who.COORDINATOR:
            victims = living(self.job)
            name, pid = victims[turn % len(victims)]
            os.kill(pid, signal.SIGKILL)
            killed.append(name)
        if who is not Who.SUBTASK:
            os.kill(leader.pid, signal.SIGKILL)
            self.run.coordinator_kills += 1
            killed.append("coordinator")
            self._until(lambda: self.job.coordinator().life != leader.life, "it has a new coordinator")
        self._runs_after(attempt)
        return " and ".join(killed)

    def _outage(self, half: int) -> None:
        """The broker goes away when rows have come and a checkpoint is under way; the database before rows come."""
        self._produce(half, 0.5)
        self._next_trigger()
        self._absent(self._kafka.away)
        databases = [each for each in self._targets if isinstance(each, PostgresTarget)]
        if databases:
            self._absent(databases[0].away, meanwhile=lambda: self._produce(half, 0.5, 0.5), at_most_s=NOTICED_S)
        else:
            self._produce(half, 0.5, 0.5)

    def _absent(
        self,
        away: Callable[[], AbstractContextManager[None]],
        meanwhile: Callable[[], None] = lambda: None,
        at_most_s: float = 2 * AWAY_S,
    ) -> None:
        """For some seconds, and until the job has missed it; it need not, when everything was there already."""
        self.run.outages += 1
        watch = _Watch(self.job)
        with away():
            meanwhile()
            began = time.monotonic()
            while (passed := time.monotonic() - began) < at_most_s:
                if watch.missed() and passed > AWAY_S:
                    self.run.missed += 1
                    break
                time.sleep(0.01)
        self.job.checkpoint(PATIENCE_S)

    def _runs_after(self, attempt: int) -> None:
        def again() -> bool:
            status = self.job.status()
            return status.attempt > attempt and status.state == "running"

        self._until(again, "it runs again")

    def _next_trigger(self) -> None:
        def newest() -> TimelineEntry | None:
            story = reversed(self.job.timeline())
            return next((entry for entry in story if entry.what == timeline.CHECKPOINT_TRIGGERED), None)

        seen = newest()
        self._until(lambda: newest() != seen, "a checkpoint is triggered")

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            status = self.job.status()
            if status.state in ("finished", "failed", "cancelled", "stopped"):
                raise RuntimeError(f"waited for {self.job}: {what}; it is {status}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {PATIENCE_S:g} s for {self.job}: {what}; it is {status}")
            time.sleep(0.002)


class _Watch:
    """Sees that a checkpoint or the attempt has failed since, or that a checkpoint has not got on for a second."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._failed = self._newest(timeline.CHECKPOINT_ABORTED, timeline.DETECTED)
        self._pending: TimelineEntry | None = None
        self._since = time.monotonic()

    def missed(self) -> bool:
        newest, now = self._newest(timeline.CHECKPOINT_TRIGGERED, timeline.CHECKPOINT_COMPLETED), time.monotonic()
        if newest != self._pending or newest is None or newest.what != timeline.CHECKPOINT_TRIGGERED:
            self._pending, self._since = newest, now
        return now - self._since > 1.0 or self._newest(timeline.CHECKPOINT_ABORTED, timeline.DETECTED) != self._failed

    def _newest(self, *what: str) -> TimelineEntry | None:
        return next((entry for entry in reversed(self._job.timeline()) if entry.what in what), None)


def deliver(
    targets: Sequence[Target], servers: Servers, folder: Path, *, rounds: int, seed: int, outage: int = 0
) -> Run:
    """Never raises once the job is submitted: what went wrong stands in the result. ``outage``: in every so manieth
    round."""
    began = time.monotonic()
    delivery = Delivery(targets, servers, folder, rounds=rounds, seed=seed)
    run = delivery.run
    try:
        for number in range(rounds):
            delivery.round(number, outage=outage > 0 and number % outage == outage - 1)
        delivery.finish()
    except Exception as error:
        run.problems.append(f"{type(error).__name__}: {error}")
        traceback.print_exc()
        with contextlib.suppress(Exception):
            for entry in delivery.job.timeline()[-40:]:
                print(f"  {entry.at:12.3f} {entry.attempt} {entry.what}: {entry.detail[:300]}", file=sys.stderr)
            delivery.job.cancel()
    run.seconds = time.monotonic() - began
    return run


def deliveries(
    kinds: Sequence[str], folder: Path, *, rounds: int, seed: int, outage: int = 0, together: bool = False
) -> Iterator[Run]:
    """One job after another, on the Ray cluster of this process, each with targets of its own."""
    servers = Servers(folder)
    try:
        for i, each in enumerate([tuple(kinds)] if together else [(kind,) for kind in kinds]):
            own = folder / f"job-{i}"
            own.mkdir()
            targets = [target(kind, servers, own) for kind in each]
            yield deliver(targets, servers, own, rounds=rounds, seed=seed + i, outage=outage)
    finally:
        servers.close()


def told(run: Run) -> str:
    verdict = "exact" if run.ok else f"FAILED ({'; '.join(run.problems[:5])})"
    return (
        f"{', '.join(run.sinks)}: {run.rounds} rounds in {run.seconds:.0f} s, {len(run.kills)} kills, "
        f"{run.coordinator_kills} with the coordinator, {run.missed} of {run.outages} outages noticed, "
        f"{run.rows:,} rows: {verdict}"
    )


def figures(run: Run, rounds: int) -> list[Figure]:
    title = f"delivery to {', '.join(run.sinks)}"
    worst = round(max(run.recovered_s, default=0.0), 2)
    return [
        emit(f"{title}: rounds with a kill", run.rounds, "rounds", rounds, run.rounds == rounds),
        emit(f"{title}: read back", "exact" if run.ok else "; ".join(run.problems), "", "exact", run.ok),
        emit(f"{title}: kill until it runs again, longest", worst, "s"),
        emit(f"{title}: outages of servers, noticed by the job", run.missed, "outages"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sink", action="append", choices=KINDS, help="may be given again; default: all of them")
    parser.add_argument("--together", action="store_true", help="one job with all sinks")
    parser.add_argument("--outage", type=int, default=0, help="servers go away in every so manieth round")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rayflow-delivery-"))
    done: list[Run] = []
    measured: list[Figure] = []
    with cluster():
        for run in deliveries(
            options.sink or KINDS,
            folder,
            rounds=options.rounds,
            seed=options.seed,
            outage=options.outage,
            together=options.together,
        ):
            done.append(run)
            print(told(run), file=sys.stderr, flush=True)
            measured += figures(run, options.rounds)
    Console(stderr=True).print(table_of([ModuleRun("delivery_kills", tuple(measured), 0)]))
    good = all(run.ok and run.rounds == options.rounds for run in done)
    if good:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"kept: {folder}", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
