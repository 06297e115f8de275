"""Kafka -> windows by key -> Kafka, PostgreSQL and Delta at once, through kills and absent servers: a short version of
`benchmarks.delivery_kills`, and that its judge can say no (rules R3, S1)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from benchmarks.delivery_kills import Run, deliveries, told
from benchmarks.delivery_rows import Orders


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_readers_of_three_systems_see_every_window_once(tmp_path: Path) -> None:
    """A subtask dies, then the coordinator, then both; before that the broker and the database are away."""
    sinks = ["kafka", "postgres", "delta"]
    (run,) = deliveries(sinks, tmp_path, rounds=3, seed=7, outage=3, together=True)
    assert run.ok, told(run)
    assert (run.rounds, run.coordinator_kills, run.outages) == (3, 2, 2)
    assert run.missed >= 1, "rows came while the database was away"
    assert run.exact == dict.fromkeys(sinks, True)


@pytest.fixture(scope="module")
def orders() -> Orders:
    return Orders(seed=3, rounds=2)


def test_the_right_windows_are_right_in_any_order(orders: Orders) -> None:
    table = orders.expected()
    assert table.num_rows > 200
    assert pc.sum(table["n"]).as_py() == orders.table.num_rows
    assert orders.difference(table.sort_by([("total", "descending")])) == ""


def test_a_window_twice_a_window_lost_and_a_row_counted_twice_are_each_seen(orders: Orders) -> None:
    table = orders.expected()
    assert orders.difference(pa.concat_tables([table, table.slice(5, 1)])) == "1 rows too many, 0 missing"
    assert orders.difference(table.slice(1)) == "0 rows too many, 1 missing"
    one = table.slice(0, 1)
    more = one.set_column(2, "n", pc.add(one["n"], 1))
    assert orders.difference(pa.concat_tables([table.slice(1), more])) == "1 rows too many, 1 missing"


def test_a_run_without_a_reading_or_with_something_left_open_is_not_exact() -> None:
    assert not Run(["kafka"]).ok
    assert Run(["kafka"], exact={"kafka": True}).ok
    left = Run(["kafka"], exact={"kafka": True}, problems=["kafka: out[0] is open from 3 to 5"])
    assert not left.ok
    assert "out[0] is open" in told(left)
