"""Every query gives what DuckDB gives over the same events, whatever the parallelism and the disorder."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from examples.nexmark.check import Oracle
from examples.nexmark.generator import Kind, Nexmark
from examples.nexmark.queries import ALL, MISSING
from examples.nexmark.query import Query
from examples.nexmark.source import events

# Four minutes on either side of midnight: days end, and windows of ten seconds have a hundred events.
CONFIG = Nexmark(events=5_000, rate=10.0, out_of_order="20s", start=datetime(2024, 5, 1, 23, 56, tzinfo=UTC))


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CONFIG)


def run(query: Query, parallelism: int, config: Nexmark = CONFIG) -> pa.Table:
    stream = query.build(events(config, split_rows=700, batch_rows=128))
    settings = rf.JobConfig(watermark_interval="1ms", batch_rows=64)
    return rf.Flow(query.name, stream.collect()).run(local=True, parallelism=parallelism, config=settings).table()


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_a_query_gives_what_duckdb_gives(name: str, parallelism: int, oracle: Oracle) -> None:
    difference = oracle.difference(ALL[name], run(ALL[name], parallelism))
    assert not difference, str(difference)
    assert difference.expected > 0, "the events do not try this query"


@pytest.mark.parametrize("name", ALL)
def test_a_row_that_is_lost_or_repeated_is_found(name: str, oracle: Oracle) -> None:
    """The judge can say no; where a flow tells changes, it is the last row that counts."""
    rows = run(ALL[name], 1)
    got = oracle.difference(ALL[name], rows)
    assert not got
    assert oracle.difference(ALL[name], rows.slice(0, 0))
    if ALL[name].reading == "from output":
        assert oracle.difference(ALL[name], rows.slice(1))
        assert oracle.difference(ALL[name], pa.concat_tables([rows, rows.slice(0, 1)]))


def test_all_are_named_and_none_is_missing_without_being_told() -> None:
    assert sorted([*ALL, *MISSING], key=lambda name: int(name[1:])) == [f"q{i}" for i in range(23)]
    assert all(query.title for query in ALL.values())
    assert all(query.reads and all(isinstance(kind, Kind) for kind in query.reads) for query in ALL.values())


def test_the_readme_lists_the_queries_that_there_are() -> None:
    readme = (Path(__file__).resolve().parents[2] / "examples" / "nexmark" / "README.md").read_text()
    listed = dict(re.findall(r"^\| (q\d+) \| (.*?) \|", readme, re.MULTILINE))
    assert listed == {query.name: query.title for query in ALL.values()}
    missing = re.search(r"^Missing: (.*?)\.", readme, re.MULTILINE)
    assert tuple(missing[1].split(", ") if missing else ()) == MISSING
