"""Jobs in this process that are stopped in the middle, and savepoints of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import rayflow as rf
from rayflow.core.events import CheckpointRequested
from rayflow.core.manifest import Manifest, decode, encode
from rayflow.core.messages import CheckpointKind
from rayflow.flow import allowing, run_local
from rayflow.runtime.inprocess import World
from rayflow.runtime.results import JobResult
from rayflow.runtime.stores import Start
from rayflow.storage.catalog import CheckpointReader
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root
from rayflow.storage.savepoint_copy import write_savepoint
from rayflow.storage.savepoints import MANIFEST
from rayflow.storage.snapshots import SnapshotStore


def run(
    flow: rf.Flow,
    checkpoints: Path | None,
    *,
    parallelism: int = 2,
    rounds: int | None = None,
    start: Start = "latest",
    config: rf.JobConfig | None = None,
    allow_dropped: Collection[str] = (),
) -> JobResult:
    """To the end, or until it is stopped after so many rounds of the local runtime."""
    config = config or rf.JobConfig(batch_rows=64, inflight_bytes=4096)
    turns = 0

    def on_round(world: World) -> None:
        nonlocal turns
        turns += 1
        if turns == rounds:
            world.coordinator.handle(CheckpointRequested(CheckpointKind.STOP))

    return run_local(
        allowing(flow.plan(parallelism=parallelism, config=config), allow_dropped),
        config,
        None if checkpoints is None else rf.CheckpointConfig(str(checkpoints), interval="7ms"),
        start=start,
        on_round=on_round,
    )


def newest(checkpoints: Path, job: str) -> Manifest:
    store = ObjectStore(job_root(str(checkpoints), job))
    reader = CheckpointReader(store, job)
    return next(reader.read(info.checkpoint) for info in reader.list() if info.counts)


def savepoint_of(checkpoints: Path, job: str, target: Path) -> str:
    """The newest checkpoint of the job, copied."""
    manifest = newest(checkpoints, job)
    store = ObjectStore(job_root(str(checkpoints), job))
    return write_savepoint(manifest, SnapshotStore(store, manifest.max_parallelism), str(target))


def manifest_in(savepoint: Path) -> Manifest:
    return decode((savepoint / MANIFEST).read_bytes(), path=str(savepoint))


def rewrite(savepoint: Path, **changes: object) -> None:
    """The manifest with other members, as whole as before."""
    changed = replace(manifest_in(savepoint), **changes)  # type: ignore[arg-type]
    (savepoint / MANIFEST).write_bytes(encode(changed))


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
