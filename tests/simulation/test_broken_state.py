"""The proof of the proof, for state: an engine that breaks one rule of it is caught by one of the first seeds that
have keyed state or windows."""

from __future__ import annotations

from random import Random

import pytest

from tests.simulation.broken_state import BROKEN_STATE
from tests.simulation.faults import FaultBudget, Faults
from tests.simulation.run import run_seed
from tests.simulation.scenario import draw
from tests.simulation.target import Target

SEEDS = 300
DIRECTED = {"call_a_part_of_a_piece_by_the_name_of_the_whole"}
"""Needs a piece that lives through two changes of parallelism and then a crash: see `test_key_groups_rescaled`."""


def stateful(seed: int) -> bool:
    """Whether the seed draws keyed state or windows."""
    rng = Random(seed)
    faults = Faults(rng, FaultBudget.draw(rng))
    scenario = draw(rng, faults, lambda: Target(faults, lambda token: False), "exactly_once")
    return scenario.shape in ("keyed", "windows", "two")


@pytest.fixture(scope="module")
def seeds() -> list[int]:
    return [seed for seed in range(SEEDS) if stateful(seed)]


@pytest.mark.parametrize("name", sorted(BROKEN_STATE.keys() - DIRECTED))
def test_a_broken_engine_shows_in_its_output(name: str, seeds: list[int]) -> None:
    with BROKEN_STATE[name]():
        found = (run_seed(seed, monitors=False).violation for seed in seeds)
        assert next(filter(None, found), ""), f"{name}: {len(seeds)} seeds were clean"
