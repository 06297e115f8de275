"""P2 on real Ray over every state back end: SIGKILLs right after a checkpoint and in the middle of an upload."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Literal

import pytest

import rayflow as rf
from benchmarks.places import unnamed
from rayflow.cluster.job import Job
from rayflow.core import timeline
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import checkpoint_folder, job_root, shared_prefix
from tests.cluster.ray_harness import kill, newest, pid_of, recovered, splits_of, told, until
from tests.cluster.stateful import SCHEMA, Stops, assert_three_ways, calls, files_below, three_ways

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

CALLS = 28
WAITS = (14, 16, 22)


def triggered(job: Job) -> int:
    """Ask for a checkpoint that cannot complete yet; its number, when it is under way."""
    before = told(job, timeline.CHECKPOINT_TRIGGERED)
    with pytest.raises(TimeoutError, match="timeline"):
        job.checkpoint(timeout=0)
    until(lambda: len(told(job, timeline.CHECKPOINT_TRIGGERED)) > len(before), "the checkpoint is triggered")
    return int(told(job, timeline.CHECKPOINT_TRIGGERED)[-1].split()[0])


def files_of(root: Path, checkpoint: int) -> list[Path]:
    """What was written for it, half of it included."""
    return [*(root / checkpoint_folder(checkpoint)).glob("*"), *root.glob(f"{shared_prefix(checkpoint)}*")]


@pytest.mark.parametrize(
    ("state", "parallelism", "keys", "victim", "bystander"),
    [
        ("memory", 1, 500, "window", "by-hand"),
        ("fs", 4, 12_000, "running", "by-hand"),
        ("rocksdb", 2, 30_000, "by-hand", "window"),
    ],
)
def test_killed_right_after_a_checkpoint_and_during_an_upload(
    tmp_path: Path,
    state: Literal["memory", "fs", "rocksdb"],
    parallelism: int,
    keys: int,
    victim: str,
    bystander: str,
) -> None:
    """Under rocksdb the operators have far less memory than state: they evict, spill, and read back."""
    out, stops, local = tmp_path / "out", Stops(tmp_path), tmp_path / "local"
    rows = rf.from_generator(
        calls(stops, keys, CALLS, WAITS), schema=SCHEMA, event_time="t", max_delay="0s", parallelism=1
    )
    job = three_ways(rows, out, CALLS).submit(
        parallelism=parallelism,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1h"),
        config=rf.JobConfig(
            state=state,
            state_memory_bytes=1024 * 1024,
            local_dir=str(local),
            restart=rf.Restart.exponential(initial="10ms"),
        ),
    )
    root = Path(job_root(str(tmp_path / "checkpoints"), "gated"))
    stops.until_reached(WAITS[0])
    first = job.checkpoint()
    stops.go(WAITS[0])
    stops.until_reached(WAITS[1])
    second = job.checkpoint()
    if state != "memory":
        assert [s.position for s in splits_of(newest(job, tmp_path))] == [keys * WAITS[1]]
        old = [f for f in newest(job, tmp_path).files() if f.path.startswith(shared_prefix(first))]
        assert old, "the second checkpoint is an incremental one"
    if state == "rocksdb":
        assert list(local.rglob("*.sst"))
        assert list(local.rglob("run-*.arrow"))

    attempt, dead = job.status().attempt, pid_of(job, victim)
    kill(dead)
    recovered(job, attempt)
    assert told(job, timeline.STORAGE_READ)[-1] == f"checkpoint {second}"
    stops.go(WAITS[1])
    stops.until_reached(WAITS[2])

    attempt, stopped, dead = job.status().attempt, pid_of(job, bystander), pid_of(job, victim)
    kill(stopped, sig=signal.SIGSTOP)  # so that the checkpoint cannot complete
    third = triggered(job)
    if state != "memory":
        until(lambda: files_of(root, third), "the upload has begun")
    kill(dead)
    kill(stopped, sig=signal.SIGCONT)
    recovered(job, attempt)
    assert told(job, timeline.STORAGE_READ)[-1] == f"checkpoint {second}"
    stops.go(WAITS[2])
    assert job.wait(60).restarts == 2
    assert_three_ways(out, keys, CALLS)
    if state != "memory":
        assert unnamed(ObjectStore(str(root)), "gated") == []
    until(lambda: not files_below(local), "nothing is left on the local disk")
