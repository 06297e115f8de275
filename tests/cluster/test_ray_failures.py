"""What goes wrong on real Ray is said in one sentence, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.flight as flight
import pytest
import ray

import rayflow as rf
from rayflow.cluster.job import running_jobs
from tests.cluster import flows
from tests.cluster.conftest import CPUS
from tests.cluster.ray_harness import running, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

SOON = rf.JobConfig(restart=rf.Restart.exponential(initial="10ms"))
NUMBERS = pa.schema([("v", pa.int64())])


def mapped(gate: Path, fn: Callable[[pa.RecordBatch], pa.RecordBatch]) -> rf.Flow:
    return rf.Flow("mapped", flows.trickle(gate, 1000).map_batches(fn, schema=NUMBERS, name="careless").collect())


def test_a_plan_that_is_too_large_is_refused_with_the_numbers(tmp_path: Path, gate: Path) -> None:
    flow = flows.windows_flow(gate, tmp_path / "out")
    wanted = f"needs {CPUS + 1} CPUs for parallelism {CPUS + 1}, the cluster has {CPUS}; lower parallelism or add nodes"
    with pytest.raises(rf.ClusterError, match=wanted):
        flow.submit(parallelism=CPUS + 1)
    assert running_jobs() == []


def test_a_job_that_waits_for_cpus_says_so_and_begins_when_they_are_free(gate: Path) -> None:
    gate.touch()
    hog = ray.remote(num_cpus=CPUS)(Hog).remote()
    ray.get(hog.here.remote())
    job = rf.Flow("patient", flows.trickle(gate, 1000).select("v").collect()).submit(parallelism=2)
    until(lambda: "2 of 2 processes have not started" in job.status().detail, "the job tells what it waits for")
    assert f"0 of {CPUS} CPUs free" in job.status().detail
    ray.kill(hog)
    assert job.wait(60).table().num_rows == 1000 * flows.SPLITS


class Hog:
    """Holds CPUs."""

    def here(self) -> None:
        pass


def test_a_function_that_raises_three_times_at_one_place_ends_the_job_with_its_cause(gate: Path) -> None:
    def careless(batch: pa.RecordBatch) -> pa.RecordBatch:
        raise ZeroDivisionError("seven is not allowed")

    gate.touch()
    job = mapped(gate, careless).submit(parallelism=1, config=SOON)
    with pytest.raises(rf.JobFailedError, match=r"careless.*subtask 0/1.*seven is not allowed") as caught:
        job.wait(60)
    assert isinstance(caught.value.__cause__, rf.UserCodeError)
    assert "in careless" in caught.value.__cause__.__notes__[0]
    assert job.status().restarts == 2


def test_a_batch_of_another_schema_names_step_expected_and_got(gate: Path) -> None:
    gate.touch()
    flow = mapped(gate, lambda batch: pa.record_batch([pa.array(["x"] * batch.num_rows)], names=["v"]))
    with pytest.raises(rf.JobFailedError, match=r"careless.*returned columns {v: string}, expected {v: int64}"):
        flow.submit(parallelism=1, config=SOON).wait(60)


def test_a_function_that_cannot_travel_is_refused_before_anything_starts(gate: Path) -> None:
    lock = threading.Lock()

    def holding(batch: pa.RecordBatch) -> pa.RecordBatch:
        with lock:
            return batch

    with pytest.raises(rf.PlanError, match=r"careless.*lock.*inside the function"):
        mapped(gate, holding).submit(parallelism=1)
    assert running_jobs() == []


class Fragile:
    """A function that cannot be loaded once the coordinator has loaded it; ``times`` says how often."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.times = times

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        return batch.select(["v"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        loads = len(list(self.folder.iterdir()))
        (self.folder / str(loads)).touch()
        if 1 <= loads <= self.times:
            raise ImportError("no module named 'mine'")


def test_a_process_that_cannot_start_is_tried_again(tmp_path: Path, gate: Path) -> None:
    gate.touch()
    job = mapped(gate, Fragile(tmp_path / "loads", 2)).submit(parallelism=1, config=SOON)
    assert job.wait(60).restarts == 2
    died = next(e for e in job.timeline() if e.what == "subtask died")
    assert "no module named 'mine'" in died.detail.splitlines()[0]
    assert "in __setstate__" in died.detail


def test_processes_that_never_start_end_the_job_with_the_reason(tmp_path: Path, gate: Path) -> None:
    with pytest.raises(
        rf.JobFailedError, match=r"from_generator-1\[0\] cannot run, 3 .*no module named 'mine'.*every node"
    ):
        mapped(gate, Fragile(tmp_path / "loads", 1000)).submit(parallelism=1, config=SOON).wait(60)


def test_a_module_beside_the_script_is_found_by_the_processes(tmp_path: Path, cluster: str) -> None:
    (tmp_path / "beside.py").write_text("def double(batch):\n    return batch.append_column('w', batch['v'])\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import ray, pyarrow as pa, rayflow as rf\nimport beside\n"
        f"ray.init(address={cluster!r}, logging_level='ERROR', log_to_driver=False)\n"
        "schema = pa.schema([('v', pa.int64()), ('w', pa.int64())])\n"
        "stream = rf.from_arrow(pa.table({'v': [1, 2, 3]})).map_batches(beside.double, schema=schema)\n"
        "print(rf.Flow('script', stream.collect()).run(parallelism=1).table().column('w').to_pylist())\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[1, 2, 3]", done.stderr


def test_without_restarts_a_death_is_the_end_and_says_whose(tmp_path: Path, gate: Path) -> None:
    config = rf.JobConfig(restart=rf.Restart.none())
    job = flows.windows_flow(gate, tmp_path / "out").submit(parallelism=1, config=config)
    until(lambda: job.status().state == "running", "the job runs")
    psutil.Process(job.subtasks()[0].pid).kill()
    with pytest.raises(rf.JobFailedError, match=r"from_generator-1\[0\] died: worker process has died"):
        job.wait(60)


def test_a_second_run_on_one_checkpoint_directory_fences_the_first(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="200ms")
    first = flows.windows_flow(gate, out).submit(parallelism=1, checkpoints=config, config=SOON)
    running(first)
    second = flows.windows_flow(gate, out).submit(parallelism=1, checkpoints=config, config=SOON)
    with pytest.raises(rf.JobFailedError, match=r"took over the checkpoint directory") as caught:
        first.wait(60)
    assert isinstance(caught.value.__cause__, rf.FencedError)
    running(second)
    gate.touch()
    second.wait(60)
    flows.assert_windows(out)


def test_fresh_refuses_a_directory_with_checkpoints(tmp_path: Path, gate: Path) -> None:
    gate.touch()
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"))
    flows.windows_flow(gate, tmp_path / "out", 1000).run(parallelism=1, checkpoints=config)
    with pytest.raises(rf.ConfigError, match='start="latest"'):
        flows.windows_flow(gate, tmp_path / "out", 1000).submit(parallelism=1, checkpoints=config, start="fresh")


def test_a_stranger_at_the_port_of_a_subtask_is_refused(tmp_path: Path, gate: Path) -> None:
    job = flows.windows_flow(gate, tmp_path / "out").submit(parallelism=1)
    until(lambda: job.status().state == "running", "the job runs")
    refused = 0
    for info in job.subtasks():
        for connection in psutil.Process(info.pid).net_connections(kind="tcp"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            client = flight.FlightClient(f"grpc://[{connection.laddr.ip}]:{connection.laddr.port}")
            with pytest.raises(pa.ArrowException) as caught:
                list(client.list_flights(options=flight.FlightCallOptions(timeout=5)))
            refused += isinstance(caught.value, flight.FlightUnauthenticatedError)
    assert refused == len(job.subtasks())
    gate.touch()
    job.wait(60)
