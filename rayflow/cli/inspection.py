"""Finding and reading checkpoint directories for the command line; changes nothing there."""

from __future__ import annotations

from dataclasses import dataclass

import click

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Manifest
from rayflow.directories import JobDirectory, open_jobs
from rayflow.errors import CorruptCheckpointError
from rayflow.storage.catalog import CheckpointInfo, Problem


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


__all__ = ["JobDirectory", "Verdict", "only_job", "open_jobs", "resolve", "verify"]
