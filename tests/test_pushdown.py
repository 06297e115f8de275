"""Sources read only the columns that their chain needs, and the result does not change."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow import col
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.stream import Stream

ROWS = pa.table(
    {
        "k": [1, 2, 1],
        "v": [10, 20, 30],
        "w": [1.0, 2.0, 3.0],
        "s": ["a", "b", "c"],
        "t": pa.array([0, 1, 2], pa.timestamp("us")),
    }
)


@pytest.fixture
def rows(tmp_path: Path) -> Stream:
    pq.write_table(ROWS, tmp_path / "rows.parquet")
    return rf.read_parquet(str(tmp_path / "rows.parquet"), event_time="t", max_delay="0s")


def read(stream: Stream) -> list[str] | None:
    (source,) = rf.Flow("x", stream.collect()).plan().sources().values()
    assert isinstance(source.source, ParquetSource)
    return list(source.source.columns) if source.source.columns is not None else None


def test_only_what_is_used_is_read(rows: Stream) -> None:
    assert read(rows.select("v")) == ["v", "t"]
    assert read(rows.filter(col("w") > 1).select(x=col("v") + 1)) == ["v", "w", "t"]
    assert read(rows.with_columns(v=col("w") * 2).select("v")) == ["w", "t"]
    assert read(rows.rename({"v": "x"}).select("x")) == ["v", "t"]
    assert read(rows.drop("s").select("k")) == ["k", "s", "t"]


def test_a_window_reads_keys_time_and_the_columns_of_its_aggregates(rows: Stream) -> None:
    found = rows.key_by("k").window(rf.tumbling("1s")).agg(n=rf.count(), total=rf.sum(col("v") * 2))
    assert read(found) == ["k", "v", "t"]
    assert sorted(found.to_arrow()["total"].to_pylist()) == [40, 80]


def test_nothing_is_left_out_before_a_user_function_or_for_a_whole_row(rows: Stream) -> None:
    assert read(rows) is None
    assert read(rows.filter(col("v") > 1)) is None
    assert read(rows.map_batches(lambda b: b).select("v")) is None
    assert read(rows.select("v").map_batches(lambda b: b)) == ["v", "t"]


def test_two_consumers_get_every_column(rows: Stream) -> None:
    flow = rf.Flow("x", rows.select("v").collect(name="a"), rows.select("w").collect(name="b"))
    (source,) = flow.plan().sources().values()
    assert source.source.columns is None


def test_the_rows_are_the_same(rows: Stream) -> None:
    assert rows.filter(col("w") > 1).select("v", "s").to_arrow().to_pylist() == [
        {"v": 20, "s": "b"},
        {"v": 30, "s": "c"},
    ]
