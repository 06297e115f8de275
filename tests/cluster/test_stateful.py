"""The judge of `tests.cluster.stateful` accepts what a run without faults gives, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from tests.cluster.stateful import SCHEMA, Stops, assert_three_ways, calls, table_of, three_ways

KEYS, CALLS = 20, 12


@pytest.fixture
def out(tmp_path: Path) -> Path:
    rows = rf.from_generator(
        calls(Stops(tmp_path), KEYS, CALLS, ()), schema=SCHEMA, event_time="t", max_delay="0s", parallelism=1
    )
    three_ways(rows, tmp_path / "out", CALLS).run(local=True, parallelism=2)
    return tmp_path / "out"


def rewrite(folder: Path, table: pa.Table) -> None:
    for file in folder.glob("*.parquet"):
        file.unlink()
    pq.write_table(table, folder / "part-0.parquet")


def test_a_run_without_faults_is_right(out: Path) -> None:
    assert_three_ways(out, KEYS, CALLS)


@pytest.mark.parametrize(
    ("way", "column"),
    [
        ("running", "n"),
        ("running", "total"),
        ("running", "top"),
        ("windows", "n"),
        ("windows", "total"),
        ("by-hand", "s"),
        ("by-hand", "fired"),
        ("by-hand", "latest"),
    ],
)
def test_a_number_that_is_off_by_one_in_one_row_is_seen(out: Path, way: str, column: str) -> None:
    table = table_of(out / way, "k")
    first = pc.equal(pc.rank(pc.if_else(pc.is_valid(table[column]), 0, 1), tiebreaker="first"), 1)
    off = pc.add(table[column], first.cast(pa.int64()))
    rewrite(out / way, table.set_column(table.column_names.index(column), column, off))
    with pytest.raises(AssertionError):
        assert_three_ways(out, KEYS, CALLS)


@pytest.mark.parametrize("way", ["running", "windows", "by-hand"])
@pytest.mark.parametrize("again", [True, False])
def test_a_row_that_comes_twice_or_not_at_all_is_seen(out: Path, way: str, again: bool) -> None:
    table = table_of(out / way, "k")
    rewrite(out / way, pa.concat_tables([table, table.slice(3, 1)]) if again else table.slice(1))
    with pytest.raises(AssertionError):
        assert_three_ways(out, KEYS, CALLS)


def test_a_list_with_an_element_twice_is_seen(out: Path) -> None:
    table = table_of(out / "by-hand", "k")
    lists = [[*seen, seen[-1]] if seen and key == 7 else seen for key, seen in zip(*two(table), strict=True)]
    column = pa.array(lists, table.schema.field("seen").type)
    rewrite(out / "by-hand", table.set_column(table.column_names.index("seen"), "seen", column))
    with pytest.raises((AssertionError, ValueError)):
        assert_three_ways(out, KEYS, CALLS)


def two(table: pa.Table) -> tuple[list[int], list[list[int] | None]]:
    return table["k"].to_pylist(), table["seen"].to_pylist()
