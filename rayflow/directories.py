"""Finding the checkpoints of a job below a URL; changes nothing there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayflow.errors import CorruptCheckpointError
from rayflow.storage.catalog import CheckpointReader
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import CHECKPOINTS, COORDINATORS, parse_checkpoint, parse_claim, unquote


@dataclass(frozen=True, slots=True)
class JobDirectory:
    job: str
    url: str
    reader: CheckpointReader


def open_jobs(url: str, storage_options: Mapping[str, Any]) -> list[JobDirectory]:
    """The job whose checkpoint directory ``url`` is, or all jobs directly below it, by name.

    Raises `CorruptCheckpointError` when there are none.
    """
    store = ObjectStore(url, storage_options)
    if store.list(COORDINATORS) or store.list(CHECKPOINTS):
        return [_job_directory(url, storage_options)]
    base = url if url.endswith("://") else url.rstrip("/") + "/"
    parts = set()
    for path, _ in store.list():
        part, _, below = path.partition("/")
        if parse_claim(below) is not None or parse_checkpoint(below) is not None:
            parts.add(part)
    if not parts:
        raise CorruptCheckpointError(
            f"{url} holds no checkpoints; name the folder given to CheckpointConfig(url), or the folder of a job in it"
        )
    return sorted((_job_directory(base + part, storage_options) for part in parts), key=lambda d: d.job)


def _job_directory(url: str, storage_options: Mapping[str, Any]) -> JobDirectory:
    store = ObjectStore(url, storage_options)
    job = _noted_job(store) or unquote(url.rstrip("/").rpartition("/")[2]) or url
    return JobDirectory(job, url, CheckpointReader(store, job))


def _noted_job(store: ObjectStore) -> str | None:
    """As the coordinators wrote it down; the folder may have been renamed or its name shortened."""
    for path, _ in store.list(COORDINATORS):
        if parse_claim(path) is None:
            continue
        try:
            return str(json.loads(store.get(path))["job"])
        except (KeyError, TypeError, ValueError):
            continue  # a damaged note is no reason not to look at the checkpoints
    return None
