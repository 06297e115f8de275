"""Finding and reading checkpoint directories for the command line; changes nothing there."""

from __future__ import annotations

import json
from dataclasses import dataclass

import click

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Manifest
from rayflow.errors import CorruptCheckpointError
from rayflow.storage.catalog import CheckpointInfo, CheckpointReader, Problem
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import CHECKPOINTS, COORDINATORS, parse_checkpoint, parse_claim, unquote


@dataclass(frozen=True, slots=True)
class JobDirectory:
    job: str
    url: str
    reader: CheckpointReader


@dataclass(frozen=True, slots=True)
class Verdict:
    """What reading every byte of one checkpoint found."""

    job: JobDirectory
    checkpoint: CheckpointInfo
    problems: tuple[Problem, ...]

    @property
    def ignored(self) -> bool:
        """A later run has gone on from an older checkpoint: this one is never restored, whatever is in it."""
        return not self.checkpoint.problem and not self.checkpoint.counts


def open_jobs(url: str, storage_options: dict[str, str]) -> list[JobDirectory]:
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


def only_job(url: str, storage_options: dict[str, str]) -> JobDirectory:
    found = open_jobs(url, storage_options)
    if len(found) > 1:
        names = ", ".join(directory.url for directory in found)
        raise click.UsageError(f"{url} holds {len(found)} jobs; name one: {names}")
    return found[0]


def resolve(directory: JobDirectory, which: str) -> Manifest:
    """The manifest of checkpoint ``which``: a number, or ``latest`` for the newest that a run would go on from."""
    if which != "latest":
        if not which.isdecimal():
            raise click.UsageError(f"expected the number of a checkpoint or 'latest', got {which!r}")
        return directory.reader.read(CheckpointId(int(which)))
    for info in directory.reader.list():
        if info.problem:
            raise CorruptCheckpointError(info.problem)
        if info.counts:
            return directory.reader.read(info.checkpoint)
    raise CorruptCheckpointError(f"{directory.url} holds no complete checkpoint yet")


def verify(directory: JobDirectory) -> list[Verdict]:
    return [
        Verdict(directory, info, tuple(directory.reader.verify(info.checkpoint))) for info in directory.reader.list()
    ]


def _job_directory(url: str, storage_options: dict[str, str]) -> JobDirectory:
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
