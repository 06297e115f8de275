"""Where the checkpoints and states of a job are kept, decided by its configuration; the same for every runtime."""

from __future__ import annotations

from typing import Literal

from rayflow.config import CheckpointConfig, JobConfig
from rayflow.core.ids import CheckpointId
from rayflow.errors import ConfigError
from rayflow.plan import Plan
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import COORDINATORS, job_root
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore, Store

Start = Literal["latest", "fresh"] | int
"""Go on from the newest checkpoint; refuse a directory that has any; or go back to the checkpoint of this number."""


def open_stores(
    plan: Plan, config: JobConfig, checkpoints: CheckpointConfig | None, *, start: Start, look: bool = False
) -> tuple[CheckpointStore, SnapshotStore, bool]:
    """(checkpoint store, snapshot store, whether state is held in memory) for a job.

    With ``look`` the place is listed now, so that one that cannot be reached or has no credentials is an error before
    anything starts. Raises `ConfigError` for ``state="fs"`` without a URL and for ``start="fresh"`` on a directory that
    has checkpoints; `StorageError` for a place that cannot be read.
    """
    if checkpoints is None and config.state in ("fs", "rocksdb"):
        raise ConfigError(
            f'JobConfig(state="{config.state}") needs a place for files; pass checkpoints=CheckpointConfig(url)'
        )
    in_memory = checkpoints is None or config.state == "memory"
    store: Store
    if checkpoints is None or in_memory:
        store = MemoryStore()
    else:
        store = ObjectStore(job_root(checkpoints.url, plan.name), dict(checkpoints.storage_options))
    if look:
        store.list(COORDINATORS)
    found = CheckpointStore(store, plan.name)
    if start == "fresh" and (old := found.list()):
        raise ConfigError(
            f"job {plan.name!r} has {len(old)} checkpoints in {checkpoints.url if checkpoints else 'memory'}, "
            'and start="fresh" was asked for; choose another folder, or start="latest" to go on'
        )
    if isinstance(start, int):
        # The coordinator, which claims the directory after this, then finds every later checkpoint void (rule C8).
        CheckpointStore(store, plan.name).claim(start_from=CheckpointId(start))
    snapshots = (
        SnapshotStore(store, plan.max_parallelism, inline_max_bytes=None)
        if in_memory
        else SnapshotStore(store, plan.max_parallelism)
    )
    return found, snapshots, in_memory
