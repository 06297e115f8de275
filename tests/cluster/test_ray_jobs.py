"""Jobs on real Ray without faults: results, what a `Job` tells, and how one ends."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow import col
from rayflow.cluster.job import attach, running_jobs
from tests.cluster import flows
from tests.cluster.ray_harness import process_is_gone, running, subtask_processes, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ROWS = 50_000


def test_windows_equal_those_of_duckdb_and_come_back_as_a_table(gate: Path) -> None:
    gate.touch()
    flow = rf.Flow("collected", flows.windowed(flows.trickle(gate, ROWS)).collect())
    result = flow.run(parallelism=2)
    assert (result.status, result.restarts) == ("finished", 0)
    assert flows.windows_in(result.table()) == flows.expected_windows(ROWS)
    assert result.metrics["rows_in"] == ROWS * flows.SPLITS
    assert result.timeline[-1].what == "job ended"


def test_a_map_over_files_of_a_relative_path(tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths mean what they mean where the flow is built, not where Ray's processes run."""
    monkeypatch.chdir(tmp_path)
    gate.touch()
    flow = flows.doubled(gate, Path("out"), ROWS)
    result = flow.run(parallelism=2, checkpoints=rf.CheckpointConfig("checkpoints", interval="100ms"))
    assert result.checkpoint is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "gate", "out"]
    flows.assert_doubled(tmp_path / "out", ROWS)


def test_functions_and_data_of_the_driver_travel_with_the_plan() -> None:
    offset = 1000

    def shifted(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([pa.array(batch.column(0).to_numpy() + offset)], names=["v"])

    # Larger than what Ray keeps of an actor's arguments in one piece.
    table = pa.table({"v": np.arange(100_000)})
    schema = pa.schema([("v", pa.int64())])
    result = rf.Flow("travel", rf.from_arrow(table).map_batches(shifted, schema=schema).collect()).run(parallelism=1)
    assert sorted(result.table().column("v").to_pylist()) == list(range(offset, 100_000 + offset))


def test_a_running_job_tells_what_it_does(tmp_path: Path, gate: Path) -> None:
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1h")
    job = flows.windows_flow(gate, tmp_path / "out").submit(parallelism=2, checkpoints=config)
    running(job)
    infos = job.subtasks()
    assert [(s.index, s.state) for s in infos] == [(0, "running"), (1, "running")] * 2
    assert len({s.pid for s in infos} | {job.coordinator().pid, os.getpid()}) == 6
    assert len({s.step for s in infos}) == 2
    assert all(s.node and s.attempt == job.status().attempt for s in infos)
    # A spare process may be there too.
    assert {s.pid for s in infos} <= set(subtask_processes())
    first = job.checkpoint()
    assert job.checkpoint() > first
    assert job.checkpoints()[0].checkpoint > first  # newest first
    until(lambda: job.status().rows_in > 0 and job.status().watermark_us is not None, "a heartbeat")
    assert job.metrics()["rows_in"] > 0
    assert "running" in [e.what for e in job.timeline()]
    with pytest.raises(TimeoutError, match="goes on"):
        job.wait(timeout=0)
    gate.touch()
    assert job.wait(60).status == "finished"
    # The coordinator is gone; what it said last is not.
    assert job.status().state == "finished"
    assert {s.state for s in job.subtasks()} == {"stopped"}
    for info in infos:  # their loops have returned; Ray ends the processes in its own time
        until(lambda pid=info.pid: process_is_gone(pid), "a finished process is gone")  # type: ignore[misc]
    with pytest.raises(rf.ClusterError, match="has ended"):
        job.coordinator()


def test_a_cancelled_job_leaves_no_process(tmp_path: Path, gate: Path) -> None:
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="200ms")
    job = flows.windows_flow(gate, tmp_path / "out").submit(parallelism=2, checkpoints=config)
    running(job)
    before = job.subtasks()
    job.cancel()
    assert running_jobs() == []
    for info in before:
        until(lambda pid=info.pid: process_is_gone(pid), "a cancelled process is gone")  # type: ignore[misc]
    with pytest.raises(rf.JobCancelledError, match="cancelled"):
        job.wait()
    job.cancel()  # once more is no error


def test_a_stopped_job_goes_on_where_it_was(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="200ms")
    job = flows.windows_flow(gate, out).submit(parallelism=2, checkpoints=config)
    running(job)
    until(lambda: job.status().rows_in > 0, "rows are read")
    stopped = job.stop(60)
    assert stopped.status == "stopped"
    assert 0 < stopped.metrics["rows_in"] < flows.ROWS * flows.SPLITS
    gate.touch()
    result = flows.windows_flow(gate, out).run(parallelism=2, checkpoints=config)
    assert result.metrics["rows_in"] < flows.ROWS * flows.SPLITS
    flows.assert_windows(out)


def test_attach_finds_a_job_by_its_flow_and_by_its_full_name(tmp_path: Path, gate: Path) -> None:
    job = rf.Flow("found", flows.trickle(gate).select("v").filter(col("v") < 10).collect()).submit(parallelism=1)
    assert attach("found").name == attach(job.name).name == job.name
    assert running_jobs() == [job.name]
    with pytest.raises(rf.ClusterError, match=f"no such job.*{job.name}"):
        attach("foun")
    gate.touch()
    assert sorted(attach("found").wait(60).table().column("v").to_pylist()) == list(range(10))
    with pytest.raises(rf.ClusterError, match=r"is gone.*given once"):
        job.wait()
