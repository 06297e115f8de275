"""`read_checkpoint`: what a checkpoint or a savepoint holds, as Arrow tables by step and state.

Works on files alone: without Ray, without the flow, and while the job that writes there is running (its retention may
then take a checkpoint away; the error says so). ``docs/checkpoint-format.md`` describes the files themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json, Manifest, SplitState, decode
from rayflow.core.restore import splits_of
from rayflow.directories import JobDirectory, open_jobs
from rayflow.errors import ConfigError, CorruptCheckpointError
from rayflow.storage.catalog import VOID_MARK
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import CHECKPOINTS, SHARED, parse_manifest
from rayflow.storage.opening import StateInfo, StateReader, names_of

_MANIFEST = "manifest.json"


class Checkpoint:
    """One checkpoint or savepoint. Nothing but the manifest is read until a table is asked for.

    A step is named as in the plan: its ``name=``, or its kind and number (``agg-1``).
    """

    def __init__(self, url: str, manifest: Manifest, storage_options: Mapping[str, Any]) -> None:
        self.url = url
        """The directory that the paths in the manifest are relative to."""
        self.manifest = manifest
        self._reader = StateReader(
            manifest, ObjectStore(url, storage_options), lambda root: ObjectStore(root, storage_options)
        )

    def __repr__(self) -> str:
        return (
            f"Checkpoint({self.manifest.checkpoint} of job {self.manifest.job!r}, {self.manifest.kind}, {self.url!r})"
        )

    @property
    def splits(self) -> tuple[SplitState, ...]:
        """Every split of every source that was not read to its end, with its position."""
        return splits_of(self.manifest)

    def steps(self) -> list[str]:
        """Steps that have state, in the order of the flow."""
        return list(dict.fromkeys(h.operator for part in self.manifest.subtasks for h in part.states))

    def states(self, step: str) -> list[str]:
        """Names of the states of a step. Raises `ConfigError` for a step without state."""
        _known("step", step, self.steps(), repr(self))
        handles = [h for part in self.manifest.subtasks for h in part.states if h.operator == step]
        return list(dict.fromkeys(name for handle in handles for name in names_of(handle)))

    def info(self, step: str, state: str) -> StateInfo:
        """Rows, bytes, pieces, key columns and mode. Raises as `table`."""
        self._check(step, state)
        return self._reader.info(step, state)

    def schema(self, step: str, state: str) -> pa.Schema:
        """Columns of `table`, read from the ends of the files only. Raises as `table`."""
        self._check(step, state)
        return self._reader.schema(step, state)

    def table(self, step: str, state: str, *, key_groups: range | None = None) -> pa.Table:
        """The state of all subtasks, merged: one row for every row that is state; keys first, then values.

        Rows with a time to live have a column ``__expires`` (Unix time in us); those that have run out by now are still
        there. ``key_groups``: only keys of these groups, of which only the bytes are read where the file allows it.

        Raises `ConfigError` for a name that is not there, `CorruptCheckpointError` for a file that is missing or wrong.
        """
        self._check(step, state)
        return self._reader.table(step, state, key_groups)

    def meta(self, step: str, state: str) -> list[Json]:
        """The JSON that stands beside the state: of each subtask the newest, where it has any. Raises as `table`."""
        self._check(step, state)
        newest = {
            h.subtask: h.meta
            for p in self.manifest.subtasks
            for h in p.states
            if h.operator == step and state in names_of(h)
        }
        return [meta for meta in newest.values() if meta is not None]

    def _check(self, step: str, state: str) -> None:
        _known(f"state of step {step!r}", state, self.states(step), repr(self))


def read_checkpoint(
    url: str, checkpoint: int | Literal["latest"] = "latest", *, storage_options: Mapping[str, Any] | None = None
) -> Checkpoint:
    """Open a checkpoint for reading.

    ``url`` is the checkpoint directory of a job (or the folder above, if there is but one job in it), the folder of one
    checkpoint in it, or a savepoint, wherever it has been moved. ``checkpoint`` chooses one of a job's directory:
    ``"latest"`` is the one a run would go on from. Raises `CorruptCheckpointError` if there is none, or its manifest is
    torn or of a newer format version, `ConfigError` for a URL or number that names nothing.
    """
    options = dict(storage_options or {})
    store = ObjectStore(url, options)
    if store.exists(_MANIFEST):
        return _in_folder(store, options, checkpoint)
    found = open_jobs(store.url, options)
    if len(found) > 1:
        names = ", ".join(directory.url for directory in found)
        raise ConfigError(f"{url} holds checkpoints of {len(found)} jobs; name one: {names}")
    return Checkpoint(found[0].url, _chosen(found[0], checkpoint), options)


def _in_folder(store: ObjectStore, options: Mapping[str, Any], checkpoint: int | str) -> Checkpoint:
    """``store`` is the folder of one checkpoint, or a savepoint."""
    root, _, part = store.url.rstrip("/").rpartition("/")
    path = f"{part}/{_MANIFEST}"
    data = store.get(_MANIFEST)
    if data == VOID_MARK:
        raise CorruptCheckpointError(f"checkpoint {store.url} was given up while it was written; choose another")
    manifest = decode(data, path=f"{store.url.rstrip('/')}/{_MANIFEST}")
    if checkpoint not in ("latest", manifest.checkpoint):
        raise ConfigError(
            f"{store.url} holds checkpoint {manifest.checkpoint}, asked for was {checkpoint!r}; name the directory of "
            "the job to choose by number"
        )
    # Files of a savepoint never lie in folders of a job's names.
    of_a_job = any(f.root is None and f.path.startswith((CHECKPOINTS, SHARED)) for f in manifest.files())
    named = parse_manifest(path) == manifest.checkpoint
    if of_a_job and not named:
        raise CorruptCheckpointError(
            f"{store.url} is a copy of the folder of checkpoint {manifest.checkpoint}: the files it names lie in the "
            "directory of its job; read it there, or take a savepoint, which can be moved"
        )
    of_a_job = of_a_job or (named and not manifest.files())
    return Checkpoint(root if of_a_job else store.url, manifest, options)


def _chosen(directory: JobDirectory, checkpoint: int | str) -> Manifest:
    infos = directory.reader.list()
    if checkpoint == "latest":
        for info in infos:
            if info.problem:
                raise CorruptCheckpointError(info.problem)
            if info.counts:
                return directory.reader.read(info.checkpoint)
        raise CorruptCheckpointError(f"{directory.url} holds no complete checkpoint yet")
    if not isinstance(checkpoint, int) or isinstance(checkpoint, bool):
        raise ConfigError(f"expected the number of a checkpoint or 'latest', got {checkpoint!r}")
    there = [info.checkpoint for info in infos]
    if checkpoint not in there:
        raise ConfigError(
            f"{directory.url} holds no checkpoint {checkpoint}; there are {', '.join(map(str, there)) or 'none'}"
        )
    return directory.reader.read(CheckpointId(checkpoint))


def _known(what: str, name: str, names: Iterable[str], where: str) -> None:
    there = list(names)
    if name not in there:
        near = get_close_matches(name, there, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, there)) or 'none'}"
        raise ConfigError(f"{where} has no {what} {name!r}; {hint}")
