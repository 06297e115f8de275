"""Sinks that commit as a whole, under drawn crashes: nothing lost, nothing twice, nothing before its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle
from random import Random
from typing import Any

from rayflow.core.events import CommitWhole, WriteManifest
from rayflow.runtime.coordinator_loop import CoordinatorRuntime
from tests.simulation.broken import replaced
from tests.simulation.faults import FaultBudget, Faults, Violation
from tests.simulation.run import check_end, make_world, play, play_on, wants_another_run
from tests.simulation.scenario import draw
from tests.simulation.storage import Observer
from tests.simulation.target import Target
from tests.simulation.tiny import forget_local_files, tiny

SEEDS = range(30)


def run_whole(seed: int) -> str:
    """What was wrong, "" if nothing."""
    rng = Random(seed)
    faults, observer = Faults(rng, FaultBudget.draw(rng)), Observer()

    def target() -> Target:
        made = Target(faults, observer.names_token)
        made.whole, made.named_by = True, lambda tokens: named_by(observer, tokens)
        return made

    scenario = draw(rng, faults, target, "exactly_once")
    world = make_world(scenario, rng, faults, observer)
    try:
        with tiny() if scenario.incremental else nullcontext():
            play(world)
            plans = cycle((scenario.plan_again or scenario.plan, scenario.plan))
            while wants_another_run(world, scenario):
                world.run_again(next(plans))
                play_on(world)
        check_end(world, scenario)
    except (Violation, AssertionError) as found:
        return f"seed {seed}: {found!r}"
    finally:
        forget_local_files()
    return ""


def named_by(observer: Observer, tokens: Sequence[str]) -> bool:
    sink = tokens[0].partition("/")[0]
    return any(
        [c.payload for s in manifest.subtasks for c in s.committables if c.operator == sink] == list(tokens)
        for manifest in observer.ever.values()
    )


def test_output_that_is_committed_as_a_whole_is_there_once() -> None:
    assert [wrong for seed in SEEDS if (wrong := run_whole(seed))] == []


@contextmanager
def commit_before_the_manifest() -> Iterator[None]:
    """C2: the commit begins together with the write of the manifest."""

    def make(original: Any) -> Any:
        def perform(self: CoordinatorRuntime, actions: Sequence[Any]) -> None:
            for action in actions:
                if isinstance(action, WriteManifest):
                    original(self, [CommitWhole(action.attempt, action.checkpoint, action.snapshots)])
                original(self, [action])

        return perform

    with replaced(CoordinatorRuntime, "_perform", make):
        yield


def test_an_engine_that_commits_before_the_manifest_is_caught() -> None:
    with commit_before_the_manifest():
        wrong = [run_whole(seed) for seed in range(5)]
    assert any("C2" in what or "S1" in what for what in wrong), wrong
