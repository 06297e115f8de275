"""Every query gives what DuckDB gives over the same events, whatever the parallelism and the disorder."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow as rf
from examples.nexmark.check import Oracle
from examples.nexmark.generator import Kind, Nexmark
from examples.nexmark.queries import ALL, MISSING
from examples.nexmark.query import Query
from examples.nexmark.source import events
from rayflow.stream import Stream

# Some minutes on either side of midnight: days end, and windows of ten seconds have a hundred events.
CONFIG = Nexmark(events=3_000, rate=10.0, out_of_order="20s", start=datetime(2024, 5, 1, 23, 58, tzinfo=UTC))

SETTINGS = rf.JobConfig(watermark_interval="1ms", batch_rows=64)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(CONFIG)


def run(query: Query, parallelism: int, config: Nexmark = CONFIG, *, split_rows: int = 700) -> pa.Table:
    stream = query.build(events(config, split_rows=split_rows, batch_rows=128))
    return rf.Flow(query.name, stream.collect()).run(local=True, parallelism=parallelism, config=SETTINGS).table()


class FailOnce:
    """User code that raises when a row of the middle comes by, the first time."""

    def __init__(self) -> None:
        self.failures = 0

    def on(self, stream: Stream) -> Stream:
        middle = CONFIG.start.replace(tzinfo=None) + timedelta(seconds=CONFIG.events / CONFIG.rate / 2)

        def fail_once(batch: pa.RecordBatch) -> pa.RecordBatch:
            if not self.failures and pc.max(batch["dateTime"]).as_py() > middle:
                self.failures += 1
                raise RuntimeError("the power went off")
            return batch

        return stream.map_batches(fail_once, schema=stream.schema)


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_a_query_gives_what_duckdb_gives(name: str, parallelism: int, oracle: Oracle) -> None:
    difference = oracle.difference(ALL[name], run(ALL[name], parallelism))
    assert not difference, str(difference)
    assert difference.expected > 0, "the events do not try this query"


@pytest.mark.parametrize("name", [name for name, query in ALL.items() if query.reading == "from output"])
def test_a_row_that_is_lost_or_repeated_is_found(name: str, oracle: Oracle) -> None:
    """The judge can say no. Where a flow tells changes, losing one of them may well change nothing."""
    rows = oracle.expected(ALL[name])
    assert not oracle.difference(ALL[name], rows)
    assert oracle.difference(ALL[name], rows.slice(1)).missing == 1
    assert oracle.difference(ALL[name], pa.concat_tables([rows, rows.slice(0, 1)])).too_many == 1


@pytest.mark.parametrize("name", ALL)
def test_a_failure_on_the_way_does_not_show(name: str, oracle: Oracle, tmp_path: Path) -> None:
    failing = FailOnce()
    streams = events(CONFIG, split_rows=700, batch_rows=128)
    if Kind.BID in ALL[name].reads:
        streams = replace(streams, bid=failing.on(streams.bid))
    else:
        streams = replace(streams, auction=failing.on(streams.auction))
    result = rf.Flow(name, ALL[name].build(streams).collect()).run(
        local=True, parallelism=2, config=SETTINGS, checkpoints=rf.CheckpointConfig(str(tmp_path), interval="5ms")
    )
    assert (failing.failures, result.restarts) == (1, 1)
    assert result.checkpoint is not None
    difference = oracle.difference(ALL[name], result.table())
    assert not difference, str(difference)


@given(
    name=st.sampled_from(sorted(ALL)),
    seed=st.integers(0, 1_000),
    parallelism=st.integers(1, 3),
    rate=st.sampled_from([5.0, 100.0, 1_000.0]),
    disorder_s=st.sampled_from([0, 1, 60]),
    split_rows=st.integers(50, 2_000),
)
@settings(max_examples=15, deadline=None)
def test_other_events_in_another_order(
    name: str, seed: int, parallelism: int, rate: float, disorder_s: int, split_rows: int
) -> None:
    config = Nexmark(events=1_000, rate=rate, out_of_order=f"{disorder_s}s", seed=seed, active_people=20)
    difference = Oracle(config).difference(ALL[name], run(ALL[name], parallelism, config, split_rows=split_rows))
    assert not difference, str(difference)


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
