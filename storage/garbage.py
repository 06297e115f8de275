"""What lies in a checkpoint directory for nothing, told or deleted from outside of any job.

The judgement is that of a coordinator that has just completed the newest checkpoint (`rayflow.storage.retention`), so
it is right while a job runs there: what is newer than the newest complete checkpoint is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rayflow.core.ids import CheckpointId
from rayflow.errors import CorruptCheckpointError
from rayflow.storage.catalog import CheckpointReader
from rayflow.storage.retention import Contents, Retention
from rayflow.storage.store import PutOutcome, Store

KEEP_ALL: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Garbage:
    files: tuple[tuple[str, int], ...]
    """(path, bytes), in the order in which they are deleted: manifests before what they name."""

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.files)


def collect_garbage(store: Store, job: str, *, keep: int = KEEP_ALL, delete: bool = False) -> Garbage:
    """Files that no checkpoint to be kept needs: the newest ``keep`` that count, and pinned savepoints.

    Nothing is deleted without ``delete``. Raises `CorruptCheckpointError`, having deleted nothing, when a manifest
    that may count cannot be read: it may name anything.
    """
    reader = CheckpointReader(store, job)
    infos = reader.list()
    directory = reader.survey()
    broken = next((info.problem for info in infos if info.problem), "")
    if broken:
        raise CorruptCheckpointError(f"{broken}. Nothing is deleted, because that manifest may name anything")
    newest = next((info.checkpoint for info in infos if info.counts), None)
    if newest is None:
        return Garbage(())

    def contents(checkpoint: CheckpointId) -> Contents | None:
        manifest = reader.load(checkpoint)
        if manifest is None:
            return None
        own = frozenset(file.path for file in manifest.files() if file.root is None)
        return Contents(manifest.kind, manifest.incarnation, own)

    recorder = _Recorder(store, delete)
    retention = Retention(recorder, contents)
    retention.learn_all(directory)
    retention.retain(directory, newest, keep)
    paths = dict.fromkeys(path for path in recorder.deleted if path in directory.files)
    return Garbage(tuple((path, directory.files[path]) for path in paths))


class _Recorder:
    """A store that notes what is deleted, and does it only if it is meant."""

    def __init__(self, store: Store, delete: bool) -> None:
        self._store, self._delete = store, delete
        self.deleted: list[str] = []

    def put(self, path: str, data: bytes) -> None:
        self._store.put(path, data)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        return self._store.put_if_absent(path, data)

    def get(self, path: str) -> bytes:
        return self._store.get(path)

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        return self._store.get_range(path, start, stop)

    def exists(self, path: str) -> bool:
        return self._store.exists(path)

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        return self._store.list(prefix, after=after)

    def delete(self, path: str) -> None:
        self.deleted.append(path)
        if self._delete:
            self._store.delete(path)

    def delete_prefix(self, prefix: str) -> None:
        self.deleted += [path for path, _ in self._store.list(prefix)]
        if self._delete:
            self._store.delete_prefix(prefix)
