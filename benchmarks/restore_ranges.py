"""How long 1 GB of keyed state takes to restore at another parallelism, and that each subtask reads its own part only.

`python -m benchmarks.restore_ranges [--keys 10000000]`. The job of `benchmarks.big_state` (int64 key, 12 int64 values,
``fs``) loads its keys at parallelism 2 and stops with a savepoint; it goes on from that at 4, stops, and goes on at 2.
Each subtask tells how many bytes it has read to restore (`SubtaskInfo.metrics`); beside it stands what the rows of its
key groups take in the savepoint. Time is from the launch of the subtasks until all run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import rayflow as rf
from benchmarks.big_state import NAME, PATIENCE_S, GatedKeys, keeper, rows_in
from benchmarks.figures import emit
from benchmarks.kill_runs import cluster
from rayflow.cluster.job import Job
from rayflow.core import timeline
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import Manifest, decode

VALUES = 12
STEP = "keep"
BAR = 1.1


def flow(keys: int, gates: Path) -> rf.Flow:
    rows = rf.read_source(GatedKeys(keys, VALUES, str(gates)), parallelism=1)
    return rf.Flow(NAME, rows.key_by("key").process(keeper(VALUES), name=STEP).print())


def read_by_subtasks(job: Job) -> dict[int, float]:
    """Bytes read by each subtask of the keyed step, once all have restored."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = {s.index: s.metrics for s in job.subtasks() if s.step.startswith(STEP)}
        if found and all("restored_bytes" in metrics for metrics in found.values()):
            return {index: metrics["restored_bytes"] for index, metrics in found.items()}
        time.sleep(0.1)
    raise TimeoutError(f"{job} did not restore: {job.status()}")


def own_share(manifest: Manifest, index: int, parallelism: int) -> float:
    """Bytes that the rows of the subtask's key groups take in the savepoint."""
    mine = key_group_range(index, parallelism, manifest.max_parallelism)
    total = 0.0
    for handle in (h for part in manifest.subtasks for h in part.states if h.operator == STEP and h.rows):
        starts = [row for _, row in handle.group_rows]
        for (group, first), after in zip(handle.group_rows, [*starts[1:], handle.rows], strict=True):
            if group in mine:
                total += handle.nbytes * (after - first) / handle.rows
    return total


def go_on(keys: int, gates: Path, folder: Path, savepoint: str, parallelism: int) -> tuple[Job, float, float, float]:
    """(job, seconds to restore, bytes read by all, largest bytes read against own share)."""
    manifest = decode((Path(savepoint) / "manifest.json").read_bytes(), path=savepoint)
    checkpoints = rf.CheckpointConfig(str(folder / f"at-{parallelism}-{time.monotonic_ns()}"), interval="1h")
    job = flow(keys, gates).submit(parallelism=parallelism, checkpoints=checkpoints, start=savepoint)
    read = read_by_subtasks(job)
    at = {entry.what: entry.at for entry in job.timeline()}
    ratio = max(nbytes / own_share(manifest, index, parallelism) for index, nbytes in read.items())
    print(f"parallelism {parallelism}: read {read}", file=sys.stderr, flush=True)
    return job, at[timeline.RUNNING] - at[timeline.LAUNCHED], sum(read.values()), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10_000_000)
    options = parser.parse_args()
    with cluster(), tempfile.TemporaryDirectory(prefix="rayflow-restore-") as name:
        folder = Path(name)
        gates = folder / "gates"
        gates.mkdir()
        checkpoints = rf.CheckpointConfig(str(folder / "at-2"), interval="1h")
        job = flow(options.keys, gates).submit(parallelism=2, checkpoints=checkpoints)
        rows_in(job, options.keys)
        began = time.monotonic()
        savepoint = job.stop(savepoint=str(folder / "first"), timeout=PATIENCE_S).savepoint
        emit("restore, stop with a savepoint of all keys", round(time.monotonic() - began, 1), "s")
        for old, new in ((2, 4), (4, 2)):
            assert savepoint is not None
            job, seconds, nbytes, ratio = go_on(options.keys, gates, folder, savepoint, new)
            emit(f"restore {old} -> {new}: bytes read by all subtasks", round(nbytes / 1e9, 3), "GB")
            emit(f"restore {old} -> {new}: launch until all run", round(seconds, 2), "s")
            ok = ratio <= BAR
            emit(f"restore {old} -> {new}: most read against own key groups", round(ratio, 3), "ratio", BAR, ok)
            if new == 4:
                savepoint = job.stop(savepoint=str(folder / "second"), timeout=PATIENCE_S).savepoint
            else:
                job.cancel()


if __name__ == "__main__":
    main()
