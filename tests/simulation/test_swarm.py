"""A short sweep of drawn jobs in every run; `benchmarks/simulator.py` and `python -m tests.simulation` do long ones."""

from __future__ import annotations

import pytest

from tests.simulation.events import KINDS
from tests.simulation.run import Result, run_seed, sweep
from tests.simulation.scenario import EVENTS

CHUNK = 25


def failures(results: list[Result]) -> str:
    return "\n\n".join(result.report() for result in results if result.violation)


@pytest.mark.parametrize("start", range(0, 150, CHUNK))
def test_any_schedule_of_faults_gives_the_output_of_a_run_without_them(start: int) -> None:
    results = list(sweep(range(start, start + CHUNK)))
    assert not failures(results), failures(results)
    assert sum(r.faults.get("crash", 0) for r in results) >= CHUNK // 2, "the sweep must meet crashes"
    assert sum(r.checkpoints for r in results) > CHUNK


@pytest.mark.parametrize("start", [0, 10])
def test_flows_of_event_time_too(start: int) -> None:
    results = list(sweep(range(start, start + 10), space=EVENTS))
    assert not failures(results), failures(results)
    assert sum(r.faults.get("crash", 0) for r in results) >= 5, "the sweep must meet crashes"
    assert sum(r.checkpoints for r in results) > 2 * len(results), "and checkpoints before the last one"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_event_time_alone(kind: str) -> None:
    """The same seed is another job in each; see `tests.simulation.broken_events` for what a few of them find."""
    results = list(sweep(range(2), space=kind))
    assert not failures(results), failures(results)


def test_at_least_once_loses_nothing_and_shows_duplicates() -> None:
    results = list(sweep(range(60), mode="at_least_once"))
    assert not failures(results), failures(results)
    assert any(result.duplicates for result in results), "the weaker mode must show what it is weaker in"


def test_a_seed_that_fails_says_how_to_replay_it() -> None:
    report = Result(7, "a flow", violation="R3: a row is missing", trace=("a", "b")).report()
    assert report.startswith("seed 7: R3: a row is missing")
    assert report.endswith("python -m tests.simulation --seed 7")
    assert Result(7, "a flow", space=EVENTS).report().endswith("python -m tests.simulation --space events --seed 7")


def test_seeds_draw_different_jobs() -> None:
    assert len({run_seed(seed).what for seed in range(5)}) == 5
