"""A job as it travels, and what it takes of the cluster; without Ray."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.cluster.package import KEPT_BYTES_MAX, SLICE_BYTES, JobPackage, pack, slices_of, unpack
from rayflow.cluster.resources import check_fits, cpus_needed, cpus_per_subtask
from rayflow.config import duration_us
from rayflow.plan import Plan
from rayflow.stream import Stream


def numbers(parallelism: int | None = None) -> Stream:
    return rf.from_arrow(pa.table({"v": [1, 2, 3]}), parallelism=parallelism)


def chains(count: int, parallelism: int) -> Plan:
    """A plan of ``count`` chains."""
    stream = numbers()
    for _ in range(count - 1):
        stream = stream.rebalance()
        stream = stream.select("v")
    plan = rf.Flow("chains", stream.collect()).plan(parallelism=parallelism)
    assert len(plan.chains) == count
    return plan


def package(plan: Plan, checkpoints: rf.CheckpointConfig | None = None, **config: str) -> JobPackage:
    return JobPackage(plan, rf.JobConfig(**config), checkpoints, "run", "token")  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("parallelism", [1, 2, 5])
def test_a_job_takes_one_cpu_for_each_unit_of_parallelism(count: int, parallelism: int) -> None:
    plan = chains(count, parallelism)
    share = cpus_per_subtask(plan)
    assert sum(share[c.id] * c.parallelism for c in plan.chains) <= parallelism, "Ray refuses a thousandth more"
    assert cpus_needed(plan) == parallelism


def test_chains_of_different_parallelism_are_added_up() -> None:
    flow = rf.Flow("mixed", numbers(parallelism=1).rebalance(parallelism=3).select("v").collect())
    assert cpus_needed(flow.plan(parallelism=3)) == 2  # 1/2 + 3/2


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers() -> None:
    check_fits(chains(2, 4), 4.0)
    with pytest.raises(rf.ClusterError, match=r"'chains' needs 4 CPUs for parallelism 4, the cluster has 2; lower"):
        check_fits(chains(2, 4), 2.0)


def test_a_package_comes_back_from_its_slices() -> None:
    blob = bytes(3 * SLICE_BYTES)
    flow = rf.Flow(
        "blob", numbers().map_batches(lambda b, blob=blob: b, schema=pa.schema([("v", pa.int64())])).collect()
    )
    slices = slices_of(pack(package(flow.plan())))
    assert len(slices) > 3
    assert max(map(len, slices)) <= SLICE_BYTES
    assert unpack(tuple(slices)).plan.name == "blob"


def test_what_ray_would_not_keep_travels_in_one_piece() -> None:
    data = bytes(KEPT_BYTES_MAX + 1)
    assert slices_of(data) == [data]
    assert len(slices_of(data[:-1])) == KEPT_BYTES_MAX / SLICE_BYTES


def test_a_function_that_cannot_travel_is_named_by_its_step(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file:
        stream = numbers().map_batches(lambda b, file=file: b, schema=pa.schema([("v", pa.int64())]), name="writes")
        with pytest.raises(rf.PlanError, match=r"step 'writes' of job 'open' cannot be sent.*inside the function"):
            pack(package(rf.Flow("open", stream.collect()).plan()))


def test_bytes_that_cannot_be_loaded_say_what_to_install() -> None:
    with pytest.raises(rf.ClusterError, match=r"No module named 'nowhere'.*on every node"):
        unpack((b"cnowhere\nx\n.",))


def test_only_files_survive_the_coordinator(tmp_path: Path) -> None:
    plan, files = chains(1, 1), rf.CheckpointConfig(str(tmp_path))
    assert package(plan, files).durable
    assert not package(plan, files, state="memory").durable
    assert not package(plan).durable


@pytest.mark.parametrize("hang_timeout", ["100ms", "500ms", "1s", "4s", "60s"])
def test_a_subtask_gives_several_signs_of_life_before_it_counts_as_hung(hang_timeout: str) -> None:
    """With one a second, a healthy job with a hang_timeout of half a second lost its processes again and again."""
    made = package(chains(1, 1), hang_timeout=hang_timeout)
    heartbeat_s = made.spec().heartbeat_s
    assert heartbeat_s is not None
    assert 3 * heartbeat_s < duration_us(made.config.hang_timeout) / 1e6
