"""Trouble with checkpoints and with time, on real Ray: a checkpoint that storage refuses aborts with its reason and the
next one commits everything; a function that never returns is found, named, and its process replaced.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.cluster.job import Job
from rayflow.core import timeline
from rayflow.core.manifest import Manifest
from rayflow.storage.layout import checkpoint_folder
from tests.cluster import flows
from tests.cluster.ray_harness import (
    kill,
    kill_and_recover,
    newest,
    pid_of,
    process_is_gone,
    recovered,
    running,
    splits_of,
    told,
    until,
    visible,
)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


TEN = 10


def widely_keyed(gate: Path, out: Path, rows: int) -> rf.Flow:
    """One key for ten rows: so many open windows that their state is no longer a part of the manifest."""
    first_of_ten = (rf.col("v") - rf.col("v") % TEN).alias("first")
    windows = flows.trickle(gate, rows).key_by(first_of_ten).window(rf.tumbling("1000d"))
    return rf.Flow("wide", windows.agg(n=rf.count(), total=rf.sum("v")).write_parquet(str(out)))


def block_the_next(job: Job, tmp_path: Path) -> Path:
    """A file where the folder of the next checkpoint should be; ask for that checkpoint and see it fail."""
    before = told(job, timeline.CHECKPOINT_ABORTED)
    (root,) = (tmp_path / "checkpoints").iterdir()
    latest = int(told(job, timeline.CHECKPOINT_TRIGGERED)[-1].split()[0])
    blocked = root / checkpoint_folder(latest + 1).rstrip("/")
    blocked.touch(exist_ok=False)
    with pytest.raises(TimeoutError, match="timeline"):
        job.checkpoint(timeout=0)
    until(lambda: len(told(job, timeline.CHECKPOINT_ABORTED)) > len(before), "the checkpoint is aborted")
    reason = told(job, timeline.CHECKPOINT_ABORTED)[-1]
    assert blocked.name in reason
    assert "a part of the path is a file: choose another folder" in reason
    return blocked


def committed_up_to(manifest: Manifest) -> dict[int, int]:
    """Rows of each split of `flows.trickle` that lie before the checkpoint."""
    unread = {int(s.split): int(s.position or 0) for s in splits_of(manifest)}
    return {split: unread.get(split, flows.ROWS) for split in range(flows.SPLITS) if unread.get(split, 1)}


def rows_of_splits(out: Path) -> dict[int, int]:
    v = pa.concat_tables(map(pq.read_table, visible(out))).column("v").to_numpy()
    splits, counts = np.unique(v // flows.ROWS, return_counts=True)
    return dict(zip(splits.tolist(), counts.tolist(), strict=True))


def test_a_manifest_that_cannot_be_written_aborts_and_the_next_checkpoint_commits_everything(
    tmp_path: Path, gate: Path
) -> None:
    out = tmp_path / "out"
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1h")
    job = flows.doubled(gate, out).submit(
        parallelism=2, checkpoints=config, config=rf.JobConfig(restart=rf.Restart.exponential(initial="50ms"))
    )
    running(job)
    until(lambda: job.status().rows_in > 0, "rows are read")
    first = job.checkpoint()
    prefix = committed_up_to(newest(job, tmp_path))
    until(lambda: rows_of_splits(out) == prefix, "the first checkpoint is committed")
    block_the_next(job, tmp_path)
    assert "its manifest could not be written" in told(job, timeline.CHECKPOINT_ABORTED)[-1]
    assert rows_of_splits(out) == prefix, "nothing of a checkpoint that failed is committed"
    assert job.checkpoint() == first + 2
    longer = committed_up_to(newest(job, tmp_path))
    assert sum(longer.values()) > sum(prefix.values())
    until(lambda: rows_of_splits(out) == longer, "all that was held back is committed")
    # A recovery must know what became of the manifest, and waits for storage to tell.
    blocked = block_the_next(job, tmp_path)
    kill(job.subtasks()[0].pid)
    until(lambda: any("a part of the path is a file" in c for c in told(job, timeline.DETECTED)), "recovery fails")
    blocked.unlink()
    until(lambda: job.status().state == "running", "the job runs again")
    job.checkpoint()
    gate.touch()
    job.wait(60)
    flows.assert_doubled(out)


def test_state_that_cannot_be_uploaded_aborts_and_the_next_checkpoint_goes_on(tmp_path: Path, gate: Path) -> None:
    out, rows = tmp_path / "out", 400_000
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1h")
    job = widely_keyed(gate, out, rows).submit(parallelism=2, checkpoints=config)
    running(job)
    until(lambda: job.status().rows_in > 0, "rows are read")
    first = job.checkpoint()
    block_the_next(job, tmp_path)
    assert "declined: " in told(job, timeline.CHECKPOINT_ABORTED)[-1]
    assert job.checkpoint() == first + 2
    kill_and_recover(job, pid_of(job, "window"))
    assert told(job, timeline.STORAGE_READ)[-1] == f"checkpoint {first + 2}"
    gate.touch()
    assert job.wait(60).restarts == 1
    table = pa.concat_tables(map(pq.read_table, visible(out)))
    table = table.sort_by("first")
    first, n, total = (table.column(name).to_numpy() for name in ("first", "n", "total"))
    assert np.array_equal(first, np.arange(0, rows * flows.SPLITS, TEN))
    assert np.array_equal(n, np.full(len(first), TEN))
    assert np.array_equal(total, first * TEN + sum(range(TEN)))


@dataclass(frozen=True)
class HangsOnce:
    """Passes batches on; waits for ever with the first one after ``order`` is there."""

    order: Path

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self.order.exists():
            self.order.unlink()
            threading.Event().wait()
        return batch


def test_a_function_that_hangs_is_found_named_and_its_process_replaced(tmp_path: Path, gate: Path) -> None:
    out, order = tmp_path / "out", tmp_path / "hang"
    stream = (
        flows.trickle(gate)
        .rebalance(parallelism=1)
        .map_batches(HangsOnce(order), schema=flows.SCHEMA, parallelism=1, name="stuck")
    )
    doubled = stream.select("v", twice=rf.col("v") * 2)
    config = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="200ms")
    job = rf.Flow("hangs", doubled.write_parquet(str(out))).submit(
        parallelism=2, checkpoints=config, config=rf.JobConfig(hang_timeout="4s")
    )
    running(job)
    attempt, stuck = job.status().attempt, pid_of(job, "stuck")
    order.touch()
    recovered(job, attempt)
    (hung,) = told(job, timeline.SUBTASK_HUNG)
    assert hung == "rebalance-1[0]"
    assert "gave no sign for 4 s and was killed" in told(job, timeline.DETECTED)[0]
    assert pid_of(job, "stuck") != stuck
    until(lambda: process_is_gone(stuck), "the stuck process is gone")
    gate.touch()
    assert job.wait(60).restarts == 1
    flows.assert_doubled(out)
