"""Whole jobs in this process, against DuckDB and closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.core import timeline
from rayflow.errors import JobFailedError, UserCodeError
from rayflow.stream import Stream

N = 20_000


def numbers() -> pa.Table:
    return pa.table(
        {
            "k": pa.array([f"k{i * 7 % 13}" for i in range(N)]),
            "v": pa.array(range(N), pa.int64()),
            "t": pa.array([i * 1000 for i in range(N)], pa.timestamp("us")),
        }
    )


def windows(table: pa.Table, *, splits: int = 3, batch_rows: int = 500) -> Stream:
    rows = rf.from_arrow(table, splits=splits, batch_rows=batch_rows, event_time="t", max_delay="1s")
    return (
        rows.filter(rf.col("v") % 5 != 0)
        .with_columns(double=rf.col("v") * 2)
        .key_by("k")
        .window(rf.tumbling("3s"))
        .agg(n=rf.count(), total=rf.sum("double"), highest=rf.max("v"))
    )


def expected(table: pa.Table) -> pa.Table:
    return duckdb.sql(
        """select k, time_bucket(interval 3 seconds, t) as window_start, count(*) as n, sum(v * 2)::bigint as total,
                  max(v) as highest from "table" where v % 5 <> 0 group by all"""
    ).to_arrow_table()


def rows_of(table: pa.Table) -> list[tuple[object, ...]]:
    columns = ["k", "window_start", "n", "total", "highest"]
    return sorted(zip(*(table[c].to_pylist() for c in columns), strict=True))


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_windows_equal_duckdb(parallelism: int, checkpointed: bool, tmp_path: Path) -> None:
    table = numbers()
    flow = rf.Flow("windows", windows(table).collect(), windows(table).write_parquet(str(tmp_path / "out")))
    result = flow.run(
        local=True,
        parallelism=parallelism,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "chk"), interval="5ms") if checkpointed else None,
        config=rf.JobConfig(inflight_bytes=4096, batch_rows=128),
    )
    assert result.status == "finished"
    assert rows_of(result.table()) == rows_of(expected(table))
    assert rows_of(pq.read_table(tmp_path / "out")) == rows_of(expected(table))
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".parquet"] * len(
        list((tmp_path / "out").iterdir())
    )


def test_a_local_run_is_the_same_every_time(tmp_path: Path) -> None:
    flow = rf.Flow("windows", windows(numbers()).collect())
    config = rf.JobConfig(inflight_bytes=4096, batch_rows=128)
    first, second = (
        flow.run(
            local=True, parallelism=2, config=config, checkpoints=rf.CheckpointConfig(str(tmp_path / c), interval="5ms")
        )
        for c in "ab"
    )
    assert first.timeline == second.timeline
    assert first.table().equals(second.table())


def test_late_rows_go_to_the_side_output() -> None:
    table = pa.table(
        {"k": [1, 1, 1, 1], "v": [1, 2, 3, 4], "t": pa.array([0, 5_000_000, 100, 6_000_000], pa.timestamp("us"))}
    )
    found = (
        rf.from_arrow(table, batch_rows=1, event_time="t", max_delay="0s")
        .key_by("k")
        .window(rf.tumbling("1s"))
        .agg(total=rf.sum("v"))
    )
    flow = rf.Flow("late", found.collect(name="on_time"), found.late.collect(name="late"))
    result = flow.run(local=True, config=rf.JobConfig(watermark_interval="0s"))
    assert sorted(result.table("on_time")["total"].to_pylist()) == [1, 2, 4]
    assert result.table("late").select(["k", "v"]).to_pylist() == [{"k": 1, "v": 3}]


def test_a_source_in_any_order_without_max_delay_loses_nothing() -> None:
    table = numbers().take(np.random.default_rng(3).permutation(N))
    rows = (
        rf.from_arrow(table, batch_rows=97, event_time="t")
        .filter(rf.col("v") % 5 != 0)
        .with_columns(double=rf.col("v") * 2)
    )
    found = rows.key_by("k").window(rf.tumbling("3s")).agg(n=rf.count(), total=rf.sum("double"), highest=rf.max("v"))
    assert rows_of(found.to_arrow()) == rows_of(expected(table))


def test_union_rebalance_and_broadcast() -> None:
    table = pa.table({"v": list(range(100))})
    rows = rf.from_arrow(table, splits=4)
    both = rf.Flow(
        "shapes",
        rows.union(rows.rebalance().map_batches(lambda b: b)).collect(name="union"),
        rows.broadcast().map_batches(lambda b: b).collect(name="broadcast"),
    ).run(local=True, parallelism=3)
    assert sorted(both.table("union")["v"].to_pylist()) == sorted([*range(100), *range(100)])
    assert sorted(both.table("broadcast")["v"].to_pylist()) == sorted([*range(100)] * 3)


def test_a_job_that_fails_once_gives_the_same_result(tmp_path: Path) -> None:
    failed: list[int] = []

    def fail_once(batch: pa.RecordBatch) -> pa.RecordBatch:
        if not failed and batch.column("v")[0].as_py() > N // 2:
            failed.append(1)
            raise RuntimeError("once")
        return batch

    table = numbers()
    rows = rf.from_arrow(table, splits=3, batch_rows=500, event_time="t", max_delay="1s")
    found = (
        rows.map_batches(fail_once, schema=table.schema)
        .filter(rf.col("v") % 5 != 0)
        .with_columns(double=rf.col("v") * 2)
        .key_by("k")
        .window(rf.tumbling("3s"))
        .agg(n=rf.count(), total=rf.sum("double"), highest=rf.max("v"))
    )
    flow = rf.Flow("once", found.write_parquet(str(tmp_path / "out")), found.collect())
    result = flow.run(local=True, parallelism=2, checkpoints=rf.CheckpointConfig(str(tmp_path / "chk"), interval="3ms"))
    assert result.restarts == 1
    assert rows_of(result.table()) == rows_of(expected(table))
    assert rows_of(pq.read_table(tmp_path / "out")) == rows_of(expected(table))


def test_an_exception_that_comes_back_ends_the_job_with_step_subtask_and_cause() -> None:
    def broken(batch: pa.RecordBatch) -> pa.RecordBatch:
        raise KeyError("no such thing")

    flow = rf.Flow("broken", rf.from_arrow(numbers()).map_batches(broken).collect())
    with pytest.raises(JobFailedError, match=r"step 'map_batches'.*subtask 0/1.*KeyError") as caught:
        flow.run(local=True)
    assert isinstance(caught.value.__cause__, UserCodeError)
    assert isinstance(caught.value.__cause__.__cause__, KeyError)


def test_a_finished_job_started_again_is_finished_at_once_and_writes_nothing_twice(tmp_path: Path) -> None:
    table = numbers()
    flow = rf.Flow("again", windows(table).write_parquet(str(tmp_path / "out")), windows(table).collect())
    checkpoints = rf.CheckpointConfig(str(tmp_path / "chk"), interval="5ms")
    flow.run(local=True, checkpoints=checkpoints)
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    result = flow.run(local=True, checkpoints=checkpoints)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert rows_of(result.table()) == rows_of(expected(table))
    with pytest.raises(rf.ConfigError, match="fresh"):
        flow.run(local=True, checkpoints=checkpoints, start="fresh")


def test_output_of_another_run_is_refused(tmp_path: Path) -> None:
    flow = rf.Flow("other", windows(numbers()).write_parquet(str(tmp_path / "out")))
    flow.run(local=True)
    with pytest.raises(JobFailedError, match="out"):
        flow.run(local=True)


def test_a_restored_job_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    read: list[int] = []

    def source(split: int, position: int) -> Iterator[pa.RecordBatch]:
        read.append(position)
        for start in range(position, 1000, 10):
            if start >= 500 and len(read) == 1:
                raise OSError("the first run breaks here")
            yield pa.record_batch({"v": list(range(start, start + 10))})

    rows = rf.from_generator(source, splits=1, schema=pa.schema({"v": pa.int64()}))
    flow = rf.Flow("resume", rows.write_parquet(str(tmp_path / "out")))
    checkpoints = rf.CheckpointConfig(str(tmp_path / "chk"), interval="5ms")
    with pytest.raises(JobFailedError):
        flow.run(local=True, checkpoints=checkpoints, config=rf.JobConfig(restart=rf.Restart.none()))
    result = flow.run(local=True, checkpoints=checkpoints)
    assert read[0] == 0
    assert 0 < read[1] <= 500
    assert result.restarts == 0
    assert sorted(pq.read_table(tmp_path / "out")["v"].to_pylist()) == list(range(1000))


def test_show_and_take(capsys: pytest.CaptureFixture[str]) -> None:
    rows = rf.from_arrow(numbers(), batch_rows=100)
    assert rows.take(5)["v"].to_pylist() == [0, 1, 2, 3, 4]
    rows.select("k", "v").show(2)
    shown = capsys.readouterr().out
    assert "k7" in shown
    assert "int64" in shown


def test_the_timeline_tells_the_story() -> None:
    result = rf.Flow("story", rf.from_arrow(numbers()).collect()).run(local=True)
    told = [entry.what for entry in result.timeline]
    wanted = [
        timeline.ATTEMPT_BEGINS,
        timeline.LAUNCHED,
        timeline.RUNNING,
        timeline.CHECKPOINT_COMPLETED,
        timeline.JOB_ENDED,
    ]
    assert [what for what in told if what in wanted] == wanted


def test_state_in_memory_is_bounded() -> None:
    noise = np.random.default_rng(1).integers(0, 2**62, 10_000_000)
    big = pa.table({"b": noise})
    with pytest.raises(JobFailedError, match="CheckpointConfig"):
        rf.Flow("big", rf.from_arrow(big).collect()).run(local=True, config=rf.JobConfig(restart=rf.Restart.none()))
