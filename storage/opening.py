"""One state of a checkpoint as one Arrow table, for people and tools: every piece of every subtask, checked and merged.

Works on any manifest: of a job's directory, of a savepoint, of one that imported a savepoint (`FileRef.root`). Nothing
is changed anywhere; RocksDB folders are fetched into a temporary folder and read there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from rayflow.core.manifest import Manifest, StateHandle
from rayflow.core.restore import groups_of
from rayflow.storage.merging import StateKeys, merge_pieces
from rayflow.storage.rocks import read_folder
from rayflow.storage.rocks.catalog import Catalog, TableInfo
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import Store

ARROW: Final = "arrow"
_NO_GROUPS: Final = range(0)


@dataclass(frozen=True, slots=True)
class StateInfo:
    """One named state of one step, all subtasks together."""

    step: str
    state: str
    rows: int
    """Rows in its pieces: in ``upsert`` mode more than there are keys, where a key was written several times."""
    nbytes: int
    pieces: int
    subtasks: int
    mode: str
    """``append`` or ``upsert``, as in the manifest."""
    keys: StateKeys
    format: str
    """``arrow`` or ``rocksdb``; of the latter ``rows`` and ``nbytes`` are those of the whole folder."""


class StateReader:
    """Tables of one manifest. ``open_root`` opens the directory that a file's path is relative to, by its URL."""

    def __init__(self, manifest: Manifest, store: Store, open_root: Callable[[str], Store]) -> None:
        self._manifest = manifest
        self._store = SnapshotStore(store, manifest.max_parallelism, open_root=open_root)

    def info(self, step: str, state: str) -> StateInfo:
        """Reads the head of one file."""
        handles = self._handles(step, state)
        newest = handles[-1]
        return StateInfo(
            step=step,
            state=state,
            rows=sum(handle.rows for handle in handles),
            nbytes=sum(handle.nbytes for handle in handles),
            pieces=len(handles),
            subtasks=len({handle.subtask for handle in handles}),
            mode=newest.mode if newest.format == ARROW else "upsert",
            keys=self._keys(newest, state),
            format=newest.format,
        )

    def schema(self, step: str, state: str) -> pa.Schema:
        """Columns of `table`; no rows are read, where the files allow it."""
        handles = self._handles(step, state)
        stubs = [self._stub(handle, state) for handle in handles]
        # One piece alone does not tell which columns of the engine the others have.
        return merge_pieces(stubs, key_columns=self._keys(handles[-1], state).identity, mode="append").schema

    def table(self, step: str, state: str, key_groups: range | None = None) -> pa.Table:
        """All rows that are state, or those of keys in ``key_groups``.

        One subtask after the other, so no more than the result and the pieces of one subtask are in memory.
        Raises `CorruptCheckpointError` naming the file for what is missing or flipped.
        """
        handles = self._handles(step, state)
        keys = self._keys(handles[-1], state).identity
        merged = []
        for subtask in dict.fromkeys(handle.subtask for handle in handles):
            own = [handle for handle in handles if handle.subtask == subtask]
            tables = [self._rows(handle, state, self._groups(handle, key_groups)) for handle in own]
            where = f"state {state!r} of step {step!r} subtask {subtask}"
            mode = own[-1].mode if own[-1].format == ARROW else "append"
            merged.append(merge_pieces(tables, key_columns=keys, mode=mode, where=where))
        return merge_pieces(merged, key_columns=keys, mode="append", where=f"state {state!r} of step {step!r}")

    def _handles(self, step: str, state: str) -> Sequence[StateHandle]:
        """In the order in which they make the state: one subtask after the other, oldest first."""
        parts = self._manifest.subtasks
        return [h for part in parts for h in part.states if h.operator == step and state in names_of(h)]

    def _keys(self, handle: StateHandle, state: str) -> StateKeys:
        if handle.format == ARROW:
            return self._store.keys(handle)
        table = _tables(handle)[state]
        names = tuple(table.keys.names)
        return StateKeys(names[: len(names) - table.subkeys], names[len(names) - table.subkeys :])

    def _groups(self, handle: StateHandle, wanted: range | None) -> range:
        own = groups_of(handle, self._manifest.max_parallelism) if handle.keyed else _NO_GROUPS
        if wanted is None or not handle.keyed:
            return own
        start = max(own.start, wanted.start)
        return range(start, max(start, min(own.stop, wanted.stop)))

    def _stub(self, handle: StateHandle, state: str) -> pa.Table:
        if handle.format == ARROW:
            return self._store.read_schema(handle).empty_table()
        table = _tables(handle)[state]
        return pa.schema([*table.keys, *table.values]).empty_table()

    def _rows(self, handle: StateHandle, state: str, groups: range) -> pa.Table:
        restored = self._store.read(handle, groups)
        if restored.folder is None:
            return restored.table
        stub = self._stub(handle, state)
        if not groups:
            return stub
        with tempfile.TemporaryDirectory(prefix="rayflow-") as folder:
            restored.folder.download(Path(folder))
            return pa.Table.from_batches(read_folder(Path(folder), handle.meta, groups)[state], stub.schema)


def names_of(handle: StateHandle) -> tuple[str, ...]:
    """The states in it: a folder of a local store holds several tables."""
    return (handle.name,) if handle.format == ARROW else tuple(_tables(handle))


def _tables(handle: StateHandle) -> Mapping[str, TableInfo]:
    return Catalog.from_json(handle.meta, f"state {handle.name!r} of operator {handle.operator!r}").tables
