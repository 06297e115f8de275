"""One seed is one run: the same steps in the same order, in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.run import run_seed

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (3, 11, 17)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    first, second = run_seed(seed, digest=True), run_seed(seed, digest=True)
    assert first == second
    assert first.digest


def test_calls_on_other_threads_do_not_change_the_trace() -> None:
    first, second = (run_seed(9, space="async_map", digest=True) for _ in range(2))
    assert first == second
    assert first.steps > 100


def test_the_trace_does_not_depend_on_the_hash_seed_of_the_process() -> None:
    program = f"from tests.simulation.run import run_seed\nfor s in {SEEDS}: print(run_seed(s, digest=True).digest)"

    def digests(hash_seed: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert digests("1") == digests("2")
    assert len(set(digests("1"))) == len(SEEDS)
