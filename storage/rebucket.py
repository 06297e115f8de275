"""A savepoint at another number of key groups (rule K4: a job's own is fixed for life).

The group of a key is the product of its hash's high bits and the number of groups, shifted (`rayflow.partition`), so
keys keep their order and a stretch of groups stays a stretch: every file is rewritten by itself, in bounded memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayflow.errors import ConfigError
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.savepoint_copy import Progress, write_savepoint
from rayflow.storage.savepoints import open_savepoint
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore


def rebucket(
    source_url: str,
    target_url: str,
    max_parallelism: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> str:
    """Write the savepoint (or checkpoint) at ``source_url`` anew with so many key groups; the URL of the new one.

    The source is only read. Raises `ConfigError` for a number that is too small or too large and for a target that is
    not empty, and what `open_savepoint` raises.
    """
    if not 1 <= max_parallelism <= 32_768:
        raise ConfigError(f"max_parallelism must lie between 1 and 32768, got {max_parallelism}")
    manifest = open_savepoint(source_url, storage_options).manifest
    widest = max(manifest.parallelism, key=lambda chain: manifest.parallelism[chain])
    if manifest.parallelism[widest] > max_parallelism:
        raise ConfigError(
            f"{source_url} was taken with parallelism {manifest.parallelism[widest]} of step {widest!r}, more than "
            f"max_parallelism={max_parallelism}; rescale the job first, or choose a larger number"
        )
    snapshots = SnapshotStore(
        MemoryStore(), manifest.max_parallelism, open_root=lambda root: ObjectStore(root, storage_options)
    )
    return write_savepoint(
        manifest, snapshots, target_url, storage_options, max_parallelism=max_parallelism, on_progress=on_progress
    )
