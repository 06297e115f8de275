"""Jobs with a script instead of drawn faults: a fault is gated on what is confirmed, never on time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from rayflow.config import JobConfig
from rayflow.core.coordinator import CoordinatorSettings
from rayflow.core.events import JobState
from rayflow.core.restart import RestartSpec
from rayflow.graph import Node
from rayflow.plan import build_plan
from rayflow.stream import Stream
from tests.simulation.faults import FaultBudget, Faults, Violation
from tests.simulation.run import check_end, make_world, play
from tests.simulation.scenario import Scenario
from tests.simulation.storage import Observer
from tests.simulation.target import FakeSink, Row, Target
from tests.simulation.world import SimWorld


@dataclass
class Stage:
    """What outlives a run: storage and target, and the seed that draws the schedule."""

    rng: Random
    faults: Faults
    observer: Observer

    @staticmethod
    def new(seed: int) -> Stage:
        return Stage(Random(seed), Faults(Random(0), FaultBudget()), Observer())

    @property
    def confirmed(self) -> int:
        """Checkpoints whose manifest is durable, over all attempts."""
        return len(self.observer.ever)

    def target(self) -> Target:
        return Target(self.faults, self.observer.names_token)

    def world(self, scenario: Scenario) -> SimWorld:
        return make_world(scenario, self.rng, self.faults, self.observer)


def sink(stream: Stream, target: Target) -> Node:
    return Node("sink", (stream._input(),), FakeSink(target))


def scripted(
    sinks: Sequence[tuple[Stream, Target, Counter[Row]]],
    *,
    parallelism: int,
    interval_s: float | None = 0.002,
    tolerable_failures: int = 3,
    retain: int = 2,
    batch_rows: int = 2,
    credit_bytes: int = 256,
    inline_max_bytes: int | None = 0,
    max_parallelism: int = 13,
) -> Scenario:
    """A job with tiny batches and credits."""
    nodes = [sink(stream, target) for stream, target, _ in sinks]
    config = JobConfig(max_parallelism=max_parallelism, batch_rows=batch_rows, linger="1ms", watermark_interval="1ms")
    object.__setattr__(config, "inflight_bytes", credit_bytes)
    return Scenario(
        what="scripted",
        plan=build_plan("sim", nodes, parallelism=parallelism, max_parallelism=max_parallelism),
        config=config,
        settings=CoordinatorSettings(
            interval_s=interval_s,
            timeout_s=600.0,
            tolerable_failures=tolerable_failures,
            hang_timeout_s=1e9,
            restart=RestartSpec(initial_s=0.01, max_s=0.1),
        ),
        mode="exactly_once",
        wait_s=0.001,
        retain=retain,
        inline_max_bytes=inline_max_bytes,
        targets=tuple(target for _, target, _ in sinks),
        expected=tuple(expected for _, _, expected in sinks),
    )


def until(world: SimWorld, reached: Callable[[], Any], *, steps_max: int = 100_000) -> None:
    """Step until the condition holds; the world must have been started."""
    limit = world.steps + steps_max
    while not reached():
        if world.coordinator.ended and not world.coordinator_down:
            raise Violation(f"the job ended as {world.coordinator.outcome} before the condition held")
        world.step()
        if world.steps > limit:
            raise Violation(f"the condition did not hold after {steps_max} steps")


def finish(world: SimWorld, scenario: Scenario, outcome: JobState = JobState.FINISHED) -> None:
    """Go on to the end and check it."""
    while world.coordinator_down or not world.coordinator.ended:
        world.step()
        if world.steps > 400_000:
            raise Violation("no end")
    check_end(world, scenario, outcome)


__all__ = ["Stage", "finish", "play", "scripted", "sink", "until"]
