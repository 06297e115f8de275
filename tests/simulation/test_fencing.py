"""C8: two coordinators, each with subtasks of its own, on one checkpoint directory and one target, interleaved at will.

The later one fences the earlier: whatever the earlier one was about to do, the committed output is exact, nothing is
committed twice, and the earlier one ends with a clear message unless it had finished before.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from rayflow.core.events import JobState
from rayflow.core.restart import RestartSpec
from rayflow.storage.checkpoints import CheckpointStore
from tests.simulation.broken import replaced
from tests.simulation.faults import FaultBudget, Faults, Violation
from tests.simulation.run import check_output, make_world
from tests.simulation.scenario import draw
from tests.simulation.storage import Observer
from tests.simulation.target import Target
from tests.simulation.world import SimWorld

STEPS_MAX = 60_000


def ended(world: SimWorld) -> bool:
    return world.coordinator.ended and not world.coordinator_down


def two_runs(seed: int) -> tuple[JobState | None, str]:
    """How the earlier run ended, and why."""
    rng = Random(seed)
    faults = Faults(rng, FaultBudget(crashes=rng.choice((0, 0, 2)), crash_horizon=400))
    observer = Observer()
    scenario = draw(rng, faults, lambda: Target(faults, observer.names_token), "exactly_once")
    restart = RestartSpec(initial_s=0.01, max_s=0.2)
    scenario = replace(scenario, settings=replace(scenario.settings, restart=restart))
    for target in scenario.targets:
        target.alone = False
    worlds = [make_world(scenario, rng, faults, observer) for _ in range(2)]
    for world in worlds:
        # What the earlier run has prepared and not yet committed, the later may remove: only the output can judge.
        world.monitors.enabled = False
    first, second = worlds
    first.start()
    for _ in range(int(2000 ** rng.random())):
        if not ended(first):
            first.step()
    second.start()
    bias = rng.choice((0.1, 0.5, 0.9))
    while not (ended(first) and ended(second)):
        world = first if rng.random() < bias else second
        world = world if not ended(world) else (first if world is second else second)
        world.step()
        if world.steps > STEPS_MAX:
            raise Violation(f"no end: {[w.coordinator.machine.state for w in worlds]}")
    states = [w.coordinator.outcome.state for w in worlds]
    assert JobState.FINISHED in states, [w.coordinator.outcome for w in worlds]
    for target, expected in zip(scenario.targets, scenario.expected, strict=True):
        check_output("sink", target.rows(), expected, exact=True)
    loser = next((w for w in worlds if w.coordinator.outcome.state is not JobState.FINISHED), first)
    cause = loser.coordinator.outcome.cause
    return loser.coordinator.outcome.state, "" if cause is None else cause.message


def test_the_later_of_two_runs_fences_the_earlier() -> None:
    outcomes: Counter[JobState | None] = Counter()
    for seed in range(60):
        state, why = two_runs(seed)
        outcomes[state] += 1
        assert state is JobState.FINISHED or "directory" in why, f"seed {seed}: {state} {why}"
    assert outcomes[JobState.FAILED] > 10, outcomes


@pytest.mark.parametrize("rule", ["_check_not_fenced"])
def test_without_the_look_for_later_claims_output_is_wrong(rule: str) -> None:
    def blind(_: object) -> object:
        return lambda self: None

    with replaced(CheckpointStore, rule, blind):
        for seed in range(200):
            try:
                two_runs(seed)
            except (Violation, AssertionError):
                return
    pytest.fail("200 seeds of two runs were clean without fencing")
