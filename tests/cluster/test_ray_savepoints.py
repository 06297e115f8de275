"""`Job.savepoint`, `Job.stop(savepoint=…)` and `Job.rescale` on real Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import rayflow as rf
from rayflow.cli.main import main
from rayflow.cluster.job import attach, running_jobs
from rayflow.restore_plan import restore_plan
from tests.cluster import flows
from tests.cluster.ray_harness import running, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_savepoint_of_a_running_job_is_moved_and_started_from(tmp_path: Path, gate: Path) -> None:
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="100ms", retain=1)
    collected = rf.Flow("windows", flows.windowed(flows.trickle(gate)).collect())
    job = collected.submit(parallelism=2, checkpoints=config)
    running(job)
    until(lambda: job.status().rows_in > 0, "rows are read")
    told: list[tuple[int, int]] = []
    first = job.savepoint(on_progress=lambda done, total: told.append((done, total)))
    assert first.startswith(str(tmp_path / "checkpoints" / "windows" / "savepoints"))
    assert told
    assert told[-1][0] == told[-1][1]
    second = job.savepoint(str(tmp_path / "second"))
    assert second == str(tmp_path / "second")
    with pytest.raises(rf.ConfigError, match="is not empty"):
        job.savepoint(second)
    kept = files_below(Path(first))
    job.checkpoint()
    job.checkpoint()
    # The copy is complete, so the checkpoint it was made of is no longer pinned.
    until(lambda: all(c.kind != "savepoint" for c in job.checkpoints()), "retention has taken the copied checkpoints")
    gate.touch()
    assert flows.windows_in(job.wait(120).table()) == flows.expected_windows()
    assert files_below(Path(first)) == kept, "retention and the sweep leave savepoints alone"
    moved = shutil.move(first, tmp_path / "moved")
    assert not restore_plan(collected, str(moved), parallelism=3).refused
    other = rf.CheckpointConfig(str(tmp_path / "other"), interval="200ms")
    result = collected.run(parallelism=3, checkpoints=other, start=str(moved))
    assert flows.windows_in(result.table()) == flows.expected_windows()
    assert result.metrics["rows_in"] < flows.ROWS * flows.SPLITS


def test_a_job_in_memory_is_stopped_with_a_savepoint_and_goes_on_from_it(tmp_path: Path, gate: Path) -> None:
    flow = rf.Flow("windows", flows.windowed(flows.trickle(gate)).collect())
    memory = rf.JobConfig(state="memory")
    job = flow.submit(parallelism=2, config=memory)
    until(lambda: job.status().rows_in > 0, "rows are read")
    with pytest.raises(rf.ConfigError, match="needs a place"):
        job.stop(savepoint=True)
    url = job.savepoint(str(tmp_path / "running"))
    assert (Path(url) / "manifest.json").is_file()
    stopped = job.stop(60, savepoint=str(tmp_path / "stopped"))
    assert (stopped.status, stopped.savepoint) == ("stopped", str(tmp_path / "stopped"))
    gate.touch()
    for start in (url, stopped.savepoint):
        assert start is not None
        result = flow.run(parallelism=1, config=memory, start=start)
        assert flows.windows_in(result.table()) == flows.expected_windows()


def test_a_job_is_rescaled_up_and_down_in_one_call_each(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="200ms")
    job = flows.windows_flow(gate, out).submit(parallelism=2, checkpoints=config)
    running(job)
    with pytest.raises(rf.ConfigError, match="parallelism must lie between"):
        job.rescale(1000)
    with pytest.raises(rf.ClusterError, match="needs 100 CPUs"):
        job.rescale(100)
    assert job.status().state == "running", "what cannot be is refused before the job is stopped"
    wide = attach("windows").rescale(4)
    until(lambda: job.name not in running_jobs(), "the old job is gone, which Ray ends in its own time")
    running(wide)
    assert {s.index for s in wide.subtasks()} == set(range(4))
    narrow = wide.rescale(1)
    running(narrow)
    assert {s.index for s in narrow.subtasks()} == {0}
    gate.touch()
    assert narrow.wait(120).status == "finished"
    flows.assert_windows(out)


def test_the_command_line_looks_after_a_job(tmp_path: Path, gate: Path) -> None:
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="200ms")
    job = flows.windows_flow(gate, tmp_path / "out").submit(parallelism=1, checkpoints=config)
    running(job)
    runner = CliRunner()
    listed = json.loads(runner.invoke(main, ["jobs", "--json"]).stdout)
    assert [(row["job"], row["state"]) for row in listed] == [(job.name, "running")]
    taken = runner.invoke(main, ["savepoint", "windows", "--to", str(tmp_path / "taken")])
    assert taken.exit_code == 0, taken.output
    assert taken.stdout.strip() == str(tmp_path / "taken")
    scaled = runner.invoke(main, ["rescale", "windows", "2", "--json"])
    assert scaled.exit_code == 0, scaled.output
    running(attach(json.loads(scaled.stdout)["job"]))
    stopped = runner.invoke(main, ["stop", "windows", "--savepoint", "--json"])
    assert stopped.exit_code == 0, stopped.output
    body = json.loads(stopped.stdout)
    assert body["status"] == "stopped"
    assert (Path(body["savepoint"]) / "manifest.json").is_file()
    until(lambda: json.loads(runner.invoke(main, ["jobs", "--json"]).stdout) == [], "no job is listed any more")
    gone = runner.invoke(main, ["savepoint", "windows"])
    assert gone.exit_code == 1
    assert "no such job runs" in gone.output
    # Those who hold the old handles are told how it ended.
    gate.touch()
    result = flows.windows_flow(gate, tmp_path / "out").run(
        parallelism=2, checkpoints=rf.CheckpointConfig(str(tmp_path / "new")), start=body["savepoint"]
    )
    assert result.status == "finished"
    flows.assert_windows(tmp_path / "out")
