"""Where the checkpoints and states of a job are kept, decided by its configuration; the same for every runtime."""

from __future__ import annotations

from typing import Literal

from rayflow.config import CheckpointConfig, JobConfig
from rayflow.errors import ConfigError
from rayflow.plan import Plan
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore, Store

Start = Literal["latest", "fresh"]


def open_stores(
    plan: Plan, config: JobConfig, checkpoints: CheckpointConfig | None, *, start: Start
) -> tuple[CheckpointStore, SnapshotStore, bool]:
    """(checkpoint store, snapshot store, whether state is held in memory) for a job.

    Raises `ConfigError` for ``state="fs"`` without a URL, and for ``start="fresh"`` on a directory with checkpoints.
    """
    if checkpoints is None and config.state == "fs":
        raise ConfigError('JobConfig(state="fs") needs a place for files; pass checkpoints=CheckpointConfig(url)')
    in_memory = checkpoints is None or config.state == "memory"
    store: Store
    if checkpoints is None or in_memory:
        store = MemoryStore()
    else:
        store = ObjectStore(job_root(checkpoints.url, plan.name), dict(checkpoints.storage_options))
    found = CheckpointStore(store, plan.name)
    if start == "fresh" and (old := found.list()):
        raise ConfigError(
            f"job {plan.name!r} has {len(old)} checkpoints in {checkpoints.url if checkpoints else 'memory'}, "
            'and start="fresh" was asked for; choose another folder, or start="latest" to go on'
        )
    snapshots = (
        SnapshotStore(store, plan.max_parallelism, inline_max_bytes=None)
        if in_memory
        else SnapshotStore(store, plan.max_parallelism)
    )
    return found, snapshots, in_memory
