"""The proof of the proof: an engine that breaks one rule is caught by one of the first seeds."""

from __future__ import annotations

import pytest

from tests.simulation.broken import BROKEN
from tests.simulation.run import sweep

SEEDS = 200

BY_OUTPUT = [
    "skip_alignment",
    "snapshot_at_first_barrier",
    "commit_before_manifest",
    "forget_a_credit",
    "barrier_before_output",
    "restore_an_older_manifest",
    "drop_aborted_committables",
]
"""Those that the committed output (or that the job never ends) shows without any look inside."""


def first_failure(name: str, *, monitors: bool) -> str:
    return next((r.violation for r in sweep(range(SEEDS), monitors=monitors, broken=BROKEN[name]()) if r.violation), "")


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_engine_is_caught(name: str) -> None:
    assert first_failure(name, monitors=True), f"{name}: {SEEDS} seeds were clean"


@pytest.mark.parametrize("name", BY_OUTPUT)
def test_a_broken_engine_shows_in_its_output(name: str) -> None:
    assert first_failure(name, monitors=False), f"{name}: {SEEDS} seeds were clean"
