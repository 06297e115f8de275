"""Random programs on every back end, and that broken variants of the tables are caught by them."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.operators.state.conformance import Program, Step, steps, tiny

BACKENDS = ("memory", "fs", "fake", "rocksdb")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)


@pytest.mark.parametrize("kind", ["fs", "fake"])
@given(program=steps)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_random_program_leaves_what_a_dict_would_hold(kind: str, program: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Program(kind, Path(folder)).run(program)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_long_program_leaves_what_a_dict_would_hold(kind: str, seed: int, tmp_path: Path) -> None:
    Program(kind, tmp_path).run(long_program(seed, 40 if kind == "rocksdb" else 150))


def long_program(seed: int, length: int) -> list[Step]:
    rng = random.Random(seed)
    program: list[Step] = []
    for _ in range(length):
        table = rng.choice(["values", "short", "map"])
        keys = tuple(
            (rng.choice([None, *range(12)]), *(rng.choice("abc") if table == "map" else ""))
            for _ in range(rng.randint(1, 8))
        )
        pick: list[tuple[int, Any]] = [
            (4, ("set", table, keys, rng.randint(0, 99))),
            (4, ("add", table, keys, rng.randint(0, 99))),
            (4, ("delete", table, keys, 0)),
            (4, ("look", table, keys, 0)),
            (1, ("touch", table, keys, 0)),
            (2, ("wait", rng.choice([1.0, 6.0]))),
            (3, ("freeze", rng.random() < 0.8)),
            (1, ("restore", rng.randint(1, 3), rng.random() < 0.3)),
        ]
        program.append(rng.choices([step for _, step in pick], [weight for weight, _ in pick])[0])
    return program
