"""Where the checkpoints and states of a job are kept, decided by its configuration; the same for every runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayflow.config import CheckpointConfig, JobConfig, duration_us
from rayflow.core.ids import CheckpointId
from rayflow.errors import ConfigError
from rayflow.operators.base import Staging
from rayflow.plan import Plan
from rayflow.runtime.restoring import RestorePlan, plan_restore
from rayflow.storage.checkpoints import CheckpointStore, origin_of
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import COORDINATORS, job_root, staging_url
from rayflow.storage.savepoints import IMPORTED, Savepoint, job_of, open_savepoint
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore, Store

Start = str | int
"""``"latest"``: go on from the newest checkpoint; ``"fresh"``: refuse a directory that has any; a number: go back to
that checkpoint; any other text: begin with the savepoint at this URL."""


def _check_sinks(plan: Plan, checkpoints: CheckpointConfig | None) -> None:
    """Sinks that depend on how long checkpoints take have ``check_checkpoints(interval_s, timeout_s)``."""
    for operator in plan.sinks().values():
        check = getattr(operator.factory, "check_checkpoints", None)
        if check is not None and checkpoints is not None:
            check(duration_us(checkpoints.interval) / 1e6, duration_us(checkpoints.timeout) / 1e6)


def open_stores(
    plan: Plan,
    config: JobConfig,
    checkpoints: CheckpointConfig | None,
    *,
    start: Start,
    look: bool = False,
    allow_other_flow: bool = False,
) -> tuple[CheckpointStore, SnapshotStore, bool]:
    """(checkpoint store, snapshot store, whether state is held in memory) for a job.

    With ``look`` the place is listed now, so that one that cannot be reached or has no credentials is an error before
    anything starts. Raises `ConfigError` for ``state="fs"`` without a URL and for ``start="fresh"`` on a directory that
    has checkpoints; `StorageError` for a place that cannot be read. A savepoint to start from that does not fit is a
    `ConfigError`, `StateSchemaError` or `CorruptCheckpointError`, and nothing is changed then.
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
        _check_sinks(plan, checkpoints)
        store.list(COORDINATORS)
    found = CheckpointStore(store, plan.name)
    if start == "fresh" and (old := found.list()):
        raise ConfigError(
            f"job {plan.name!r} has {len(old)} checkpoints in {checkpoints.url if checkpoints else 'memory'}, "
            'and start="fresh" was asked for; choose another folder, or start="latest" to go on'
        )
    options = dict(checkpoints.storage_options) if checkpoints is not None else {}

    def open_root(url: str) -> Store:
        return ObjectStore(url, options)

    snapshots = (
        SnapshotStore(store, plan.max_parallelism, inline_max_bytes=None, open_root=open_root)
        if in_memory
        else SnapshotStore(store, plan.max_parallelism, open_root=open_root)
    )
    if isinstance(start, str) and start not in ("latest", "fresh"):
        begin_with(start, plan, store, options, allow_other_flow=allow_other_flow)
    elif isinstance(start, int):
        # The coordinator, which claims the directory after this, then finds every later checkpoint void (rule C8).
        CheckpointStore(store, plan.name).claim(start_from=CheckpointId(start))
    return found, snapshots, in_memory


def staging_of(plan: Plan, config: JobConfig, checkpoints: CheckpointConfig | None) -> Staging | None:
    """Where sinks may keep rows; None where checkpoints do not outlive the processes either."""
    if checkpoints is None or config.state == "memory":
        return None
    return Staging(
        ObjectStore(staging_url(checkpoints.url, plan.name)).url.rstrip("/"), dict(checkpoints.storage_options)
    )


def begin_with(url: str, plan: Plan, store: Store, options: Mapping[str, Any], *, allow_other_flow: bool) -> None:
    """Make the savepoint at ``url`` the newest checkpoint of the job whose directory ``store`` is.

    Its files stay where they are and are read from there until the job has taken a checkpoint of its own.
    """
    own = job_of(url)
    if own is not None and isinstance(store, ObjectStore) and own[0] == store.url.rstrip("/"):
        # A checkpoint of its own: imported it would name its own files as those of somebody else, which go some day.
        CheckpointStore(store, plan.name).claim(start_from=own[1])
        return
    savepoint, restore = look_at(url, plan, options, allow_other_flow=allow_other_flow)
    restore.check()
    checkpoints = CheckpointStore(store, plan.name)
    newest, taken = checkpoints.newest(), savepoint.manifest
    same_run = (
        newest is not None and newest.kind != IMPORTED and origin_of(newest.run_id) == origin_of(taken.run_id)
    )  # imports keep the origin
    if newest is not None and same_run and newest.checkpoint > taken.checkpoint:
        raise ConfigError(
            f"cannot start from {url}: job {plan.name!r} has gone on from there to checkpoint {newest.checkpoint} in "
            "this checkpoint directory, and what it has committed since would be written again; pass "
            'start="latest" to go on, or a new checkpoint directory and an output of its own to begin there again'
        )
    checkpoints.adopt(savepoint.to_import(), IMPORTED)


def look_at(
    url: str, plan: Plan, options: Mapping[str, Any], *, allow_other_flow: bool
) -> tuple[Savepoint, RestorePlan]:
    """The savepoint, and what of it would be restored into ``plan``; nothing is changed."""
    savepoint = open_savepoint(url, options)
    manifest = savepoint.manifest
    snapshots = SnapshotStore(
        MemoryStore(), manifest.max_parallelism, open_root=lambda root: ObjectStore(root, options)
    )
    return savepoint, plan_restore(
        plan, manifest, snapshots.read_schema, url=savepoint.url, allow_other_flow=allow_other_flow
    )
