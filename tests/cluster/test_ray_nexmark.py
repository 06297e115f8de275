"""Queries of Nexmark on real Ray, a process killed on the way: equal to DuckDB."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.nexmark.check import Oracle
from examples.nexmark.generator import Nexmark
from examples.nexmark.queries import ALL
from examples.nexmark.run import How, run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

CONFIG = Nexmark(events=50_000, rate=500.0, out_of_order="5s")


@pytest.mark.parametrize("name", ["q9", "q18"])
def test_a_query_through_a_kill_is_equal_to_duckdb(name: str, tmp_path: Path) -> None:
    how = How(interval="200ms", kill=True, seed=sum(name.encode()))
    outcome = run(ALL[name], CONFIG, how, Oracle(CONFIG), tmp_path)
    assert outcome.restarts == 1, "nobody was killed"
    assert not outcome.difference, str(outcome.difference)
    assert outcome.difference.expected > 1_000
