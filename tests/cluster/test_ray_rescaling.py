"""P3 on real Ray: keyed state goes to the owners of its key groups at every parallelism, through kills (K1, K3, R1).

The source waits at stops, so it is known which rows were summed at which parallelism: every row of the output has one
right subtask. Also a rolling upgrade, and coordinators that die around savepoints.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import rayflow as rf
from benchmarks.places import unnamed
from rayflow.cluster.job import Job
from rayflow.core import timeline
from rayflow.core.keygroups import owner_of
from rayflow.partition import hash_columns, key_groups
from rayflow.restore_plan import Verdict, restore_plan
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root
from tests.cluster import stateful
from tests.cluster.ray_harness import kill, kill_and_recover, newest, pid_of, recovered, splits_of, told, until
from tests.cluster.stateful import GROUPS, KEYS, PART, Stops, columns_of, files_below, sums_flow, table_of
from tests.restoring.test_upgrade import After, Before

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

CONFIG = rf.JobConfig(max_parallelism=GROUPS, batch_rows=64, restart=rf.Restart.exponential(initial="10ms"))


def at_will(tmp_path: Path, name: str = "checkpoints") -> rf.CheckpointConfig:
    """No checkpoint but those that are asked for."""
    return rf.CheckpointConfig(str(tmp_path / name), interval="1h")


def expected(*parts: int) -> list[list[int]]:
    """Columns k, subtask, n, total, sorted by k and n, when the parts were summed at these parallelisms."""
    of_key = key_groups(hash_columns([pa.array(range(KEYS), pa.int64())]), GROUPS).tolist()
    rows = [
        (key, owner_of(of_key[key], parts[i // PART], GROUPS), i // KEYS + 1, sum(range(key, i + 1, KEYS)))
        for key in range(KEYS)
        for i in range(key, len(parts) * PART, KEYS)
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def sums_in(out: Path) -> list[list[int]]:
    return columns_of(table_of(out, "k", "n"), "k", "subtask", "n", "total")


def test_the_right_owners_differ_between_the_parallelisms() -> None:
    two, four = expected(2, 2), expected(2, 4)
    assert two != four
    assert set(two[1]) == {0, 1}
    assert set(four[1]) == {0, 1, 2, 3}
    assert two[:1] + two[2:] == four[:1] + four[2:]


def test_a_ladder_two_four_two_with_kills_on_every_rung(tmp_path: Path) -> None:
    stops, out, parts = Stops(tmp_path), tmp_path / "out", (2, 2, 4, 4, 2, 2)
    job = sums_flow(stops, len(parts), out).submit(parallelism=2, checkpoints=at_will(tmp_path), config=CONFIG)
    stops.until_reached(1)
    job.checkpoint()
    stops.go(1)
    stops.until_reached(2)
    kill_and_recover(job, pid_of(job, "sums", 1))
    stops.until_reached_again(2)

    job = job.rescale(4, timeout=60)
    assert read_up_to(job, tmp_path) == 2 * PART
    stops.go(2)
    stops.until_reached(3)
    kill_and_recover(job, pid_of(job, "sums", 3))  # no checkpoint but the savepoint it came from
    stops.go(3)
    stops.until_reached(4)
    kill_and_recover(job, pid_of(job, "sums", 0))
    stops.until_reached_again(4)
    stopped = job.stop(60, savepoint=str(tmp_path / "savepoint"))
    assert stopped.savepoint is not None
    (tmp_path / "savepoint").rename(tmp_path / "moved")

    job = sums_flow(stops, len(parts), out).submit(
        parallelism=2, checkpoints=at_will(tmp_path, "others"), config=CONFIG, start=str(tmp_path / "moved")
    )
    stops.go(4)
    stops.until_reached(5)
    kill_and_recover(job, pid_of(job, "sums", 0))
    stops.go(5)
    assert job.wait(60).restarts == 1
    assert sums_in(out) == expected(*parts)


def read_up_to(job: Job, tmp_path: Path) -> int:
    (split,) = splits_of(newest(job, tmp_path))
    return int(split.position or 0)


def test_a_rolling_upgrade(tmp_path: Path) -> None:
    """Another back end, another parallelism, a new step, new columns of a state and a new state; a dry run before."""
    stops, parts = Stops(tmp_path), 3
    rows = stateful.trickle(stops, parts)
    old = rows.key_by("k").process(Before, name="totals")
    before = rf.Flow("upgrade", old.write_parquet(str(tmp_path / "old"), name="rows"))
    job = before.submit(parallelism=2, checkpoints=at_will(tmp_path), config=CONFIG)
    stops.until_reached(1)
    job.checkpoint()
    stops.go(1)
    stops.until_reached(2)
    url = job.stop(60, savepoint=True).savepoint
    assert url is not None

    totals = rows.key_by("k").process(After, name="totals")
    counted = totals.key_by("k").agg(emitted=rf.count(), name="emitted")
    ways = (totals.write_parquet(str(tmp_path / "new"), name="more"), counted.collect(name="counts"))
    after = rf.Flow("upgrade", *ways)
    config = replace(CONFIG, state="rocksdb", local_dir=str(tmp_path / "local"))
    dry = restore_plan(after, url, parallelism=3, config=config)
    assert not dry.problems, "the old sink had committed everything, so nothing is left behind"
    found = {(line.step, line.state): line.verdict for line in dry.lines}
    assert found["totals", "values"] is Verdict.CHANGED
    assert found["totals", "ups"] is Verdict.NEW
    assert found["totals", "digits"] is Verdict.MATCHED

    job = after.submit(parallelism=3, checkpoints=at_will(tmp_path), config=config, start=url)
    stops.until_reached_again(2)
    kill_and_recover(job, pid_of(job, "totals", 2))
    stops.go(2)
    result = job.wait(60)
    of_old, of_new = (table_of(tmp_path / name, "k", "n") for name in ("old", "new"))
    for table, low, high in ((of_old, 1, 2 * PART // KEYS), (of_new, 2 * PART // KEYS + 1, parts * PART // KEYS)):
        k, n, total = (table[name].to_numpy() for name in ("k", "n", "total"))
        assert np.array_equal(total, n * k + KEYS * (n * (n - 1) // 2))
        assert len(set(zip(k.tolist(), n.tolist(), strict=True))) == len(k), "nothing comes twice"
        assert [table.filter(pc.equal(table["k"], key))["n"][-1].as_py() for key in range(KEYS)] == [high] * KEYS
        assert n.min() >= low
    assert (
        of_new["highest"].to_numpy().tolist() == (of_new["k"].to_numpy() + KEYS * (of_new["n"].to_numpy() - 1)).tolist()
    )
    assert of_new["ups"].to_numpy().tolist() == (of_new["n"].to_numpy() - 2 * PART // KEYS).tolist()
    counts = result.table("counts").group_by("k").aggregate([("emitted", "max")])
    assert sum(counts["emitted_max"].to_pylist()) == of_new.num_rows == result.table("counts").num_rows
    until(lambda: not files_below(tmp_path / "local"), "nothing is left on the local disk")


def test_the_coordinator_dies_while_a_savepoint_is_taken_and_when_one_was_just_started_from(tmp_path: Path) -> None:
    stops, out, parts = Stops(tmp_path), tmp_path / "out", (2, 2, 4, 4)
    flow = sums_flow(stops, len(parts), out)
    job = flow.submit(parallelism=2, checkpoints=at_will(tmp_path), config=CONFIG)
    stops.until_reached(1)
    job.checkpoint()
    stops.go(1)
    stops.until_reached(2)
    attempt = job.status().attempt
    kill(pid_of(job, "sums", 1), sig=signal.SIGSTOP)  # so that it cannot complete
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(job.savepoint, str(tmp_path / "half"))
        until(lambda: any("savepoint" in d for d in told(job, timeline.CHECKPOINT_TRIGGERED)), "it is under way")
        kill(job.coordinator().pid)
        recovered(job, attempt)
        with pytest.raises(rf.StorageError, match=r"coordinator.*ask again"):
            asked.result(60)
    assert not (tmp_path / "half").exists()
    stops.until_reached_again(2)
    stopped = job.stop(60, savepoint=str(tmp_path / "whole"))
    assert stopped.savepoint is not None

    again = at_will(tmp_path, "others")
    job = flow.submit(parallelism=4, checkpoints=again, config=CONFIG, start=stopped.savepoint)
    stops.go(2)
    stops.until_reached(3)
    attempt = job.status().attempt
    kill(job.coordinator().pid)
    recovered(job, attempt)
    stops.go(3)
    job.wait(60)
    assert sums_in(out) == expected(*parts)
    for name in ("checkpoints", "others"):
        assert unnamed(ObjectStore(job_root(str(tmp_path / name), "sums")), "sums") == []
