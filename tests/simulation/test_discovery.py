"""A folder that fills while the job reads it, dies, is stopped and goes on at another parallelism: every file is read
once, by whichever attempt (rules R2, R3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from random import Random
from typing import Any

import pyarrow as pa

import rayflow as rf
from rayflow.config import JobConfig
from rayflow.core.coordinator import CoordinatorSettings
from rayflow.core.events import CheckpointRequested, JobState
from rayflow.core.failover import Failover
from rayflow.core.messages import CheckpointKind
from rayflow.core.restart import RestartSpec
from rayflow.core.splits import SplitPool
from rayflow.graph import Node
from rayflow.operators.base import OperatorContext, Polled, Source, SplitReader
from rayflow.plan import build_plan
from tests.simulation.broken import replaced
from tests.simulation.faults import FaultBudget, Faults, Violation
from tests.simulation.run import check_end, make_world
from tests.simulation.scenario import Scenario
from tests.simulation.storage import Observer
from tests.simulation.target import FakeSink, Row, Target

SCHEMA = pa.schema([("file", pa.string()), ("row", pa.int64())])
STEPS_MAX = 30_000
SEEDS = range(60)


@dataclass(frozen=True, eq=False)
class Folder(Source):
    """Shows more of its files each time somebody looks, and now and then cannot be read."""

    rng: Random
    files: tuple[tuple[str, int], ...]
    side_by_side: bool
    shown: list[int] = field(default_factory=lambda: [0])
    bounded = False
    discovery_interval_s = 0.02

    @property
    def in_turns(self) -> bool:
        return self.side_by_side

    def schema(self) -> pa.Schema:
        return SCHEMA

    def discover(self) -> Sequence[tuple[str, Any]]:
        self.shown[0] = min(len(self.files), self.shown[0] + self.rng.choice((0, 1, 3)))
        return [(name, [name, rows]) for name, rows in self.files[: self.shown[0]]]

    def discover_again(self) -> Sequence[tuple[str, Any]]:
        if self.rng.random() < 0.1:
            raise OSError("the folder cannot be listed")
        return self.discover()

    def reader(self, split: Any, position: Any, ctx: OperatorContext) -> SplitReader:
        return Reader(split[0], split[1], position or 0)


@dataclass(eq=False)
class Reader(SplitReader):
    name: str
    rows: int
    position: int

    def poll(self) -> Polled:
        if self.position >= self.rows:
            return Polled(done=True)
        batch = pa.record_batch([[self.name], [self.position]], schema=SCHEMA)
        self.position += 1
        return Polled(batch, self.position)


def drawn(rng: Random, target: Target) -> Scenario:
    files = tuple((f"part-{n}", rng.choice((0, 5, 40))) for n in range(rng.randint(5, 14)))
    folder = Folder(rng, files, side_by_side=rng.random() < 0.3)

    sink = Node("sink", inputs=(rf.read_source(folder).rebalance()._input(),), operator=FakeSink(target), name="sink")
    first, second = (build_plan("sim", [sink], parallelism=rng.choice((1, 2, 3)), max_parallelism=8) for _ in range(2))
    expected = Counter[Row]((name, row) for name, rows in files for row in range(rows))
    return Scenario(
        what=f"{files}, side by side: {folder.side_by_side}",
        plan=first,
        config=JobConfig(linger=0.001, watermark_interval=0.05),
        settings=CoordinatorSettings(
            interval_s=rng.choice((0.01, 0.1)), restart=RestartSpec(initial_s=0.01, max_s=0.2), timeout_s=5.0,
            hang_timeout_s=5.0,
        ),
        mode="exactly_once",
        wait_s=0.02,
        retain=1,
        inline_max_bytes=None,
        targets=(target,),
        expected=(expected,),
        plan_again=second,
        heartbeat_s=0.5,
    )  # fmt: skip


def run_folder(seed: int, *, steps_max: int = STEPS_MAX) -> str:
    """What was wrong, "" if nothing. The job is stopped when all rows are there, and not before all are shown."""
    rng = Random(seed)
    budget = replace(FaultBudget.draw(rng), crashes=rng.randint(3, 8), crash_horizon=rng.choice((300, 2_000)))
    faults, observer = Faults(rng, replace(budget, user_errors=0)), Observer()
    target = Target(faults, observer.names_token)
    scenario = drawn(rng, target)
    world = make_world(scenario, rng, faults, observer)
    plans = cycle((scenario.plan_again or scenario.plan, scenario.plan))
    (expected,) = scenario.expected
    told: Any = None
    try:
        world.start()
        while True:
            while world.coordinator_down or not world.coordinator.ended:
                world.step()
                running = not world.coordinator_down and world.coordinator.machine.state is JobState.RUNNING
                if running and told is not world.coordinator and world.steps % 50 == 0 and target.rows() >= expected:
                    told = world.coordinator
                    world.coordinator_inbox.append(CheckpointRequested(CheckpointKind.STOP))
                if world.steps > steps_max:
                    raise Violation(f"no end: {sum(target.rows().values())} of {sum(expected.values())} rows are there")
            if world.coordinator.outcome.state is JobState.FAILED:
                break
            if world.coordinator.outcome.state is JobState.STOPPED and target.rows() >= expected:
                break
            world.run_again(next(plans))
        check_end(world, scenario, JobState.STOPPED)
    except (Violation, AssertionError) as found:
        return f"seed {seed}: {found!r}; {scenario.what}, {faults.happened}"
    return ""


def test_every_file_is_read_once() -> None:
    assert [wrong for seed in SEEDS if (wrong := run_folder(seed))] == []


@contextmanager
def forget_what_was_seen() -> Iterator[None]:
    """R2: a checkpoint does not tell which splits were read to their end."""

    def make(original: Any) -> Any:
        def restore(self: SplitPool, splits: Any, seen: Any = None) -> None:
            original(self, splits, None)

        return restore

    with replaced(SplitPool, "restore", make):
        yield


@contextmanager
def forget_what_was_found() -> Iterator[None]:
    """R2: a restored job knows which splits were seen, and not which of them are still to be read."""

    def make(original: Any) -> Any:
        def deploy(self: Failover, now: float) -> None:
            assert self._recovered is not None
            if self._recovered.manifest is not None:
                manifest = self._recovered.manifest
                begun = tuple(replace(snapshot, splits=()) for snapshot in manifest.subtasks)
                manifest = replace(manifest, pending_splits=(), subtasks=begun)
                self._recovered = replace(self._recovered, manifest=manifest)
            original(self, now)

        return deploy

    with replaced(Failover, "deploy", make):
        yield


def test_an_engine_that_forgets_what_was_read_is_caught() -> None:
    with forget_what_was_seen():
        assert any("rows too many" in run_folder(seed, steps_max=8_000) for seed in range(10))


def test_an_engine_that_does_not_restore_what_was_found_is_caught() -> None:
    with forget_what_was_found():
        assert any("rows are there" in run_folder(seed, steps_max=8_000) for seed in range(20))
