"""The proof of the proof, for event time: an engine that breaks one rule of windows, joins, orders or calls in flight
is caught by one of the first seeds that draw such a step, by its output alone."""

from __future__ import annotations

import pytest

from tests.simulation.broken_events import BROKEN_EVENTS
from tests.simulation.faults import FaultBudget
from tests.simulation.run import run_seed

SEEDS = 40


@pytest.mark.parametrize("name", sorted(BROKEN_EVENTS))
def test_a_broken_engine_shows_in_its_output(name: str) -> None:
    broken, kind = BROKEN_EVENTS[name]

    def run(seed: int) -> str:
        faults = FaultBudget(crashes=4, crash_horizon=50_000, stops=2)
        return run_seed(seed, space=kind, monitors=False, faults=faults).violation

    with broken():
        caught = next((seed for seed in range(SEEDS) if run(seed).startswith(("R3", "W1", "W3"))), None)
    assert caught is not None, f"{name}: {SEEDS} seeds of {kind} were clean"
    assert run(caught) == "", "and the whole engine comes through the same schedule"
