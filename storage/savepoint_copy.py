"""Writing savepoints: a complete checkpoint copied into a folder of its own, whatever back end it is of.

The copy is canonical. All state is Arrow: RocksDB folders are exported, pieces are merged (one row a key, no
tombstones), and nothing refers to what lies outside of the folder. Keyed state is cut into stretches of key groups, so
that the memory it takes is bounded and every stretch can be read by itself; each is sorted by key group and has blocks.
State without keys is copied piece by piece. Splits, positions and committables are copied as they are.

Committables are those that the job had prepared for the checkpoint. It commits them when the checkpoint is complete, so
they are committed already, or will be; the job that starts from the savepoint commits them again, which is a no-op
(rule S1), and aborts none of them. Of a job that has ended all are committed, and `all_committed` leaves them out: that
output is the user's, may be moved away, and the next job may write elsewhere.

The manifest is written last and only if there is none: a copy that was interrupted is no savepoint.
"""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import FORMAT_VERSION, FileRef, Json, Manifest, StateHandle, SubtaskSnapshot, encode
from rayflow.core.restore import groups_of
from rayflow.errors import ConfigError, StorageError
from rayflow.partition import HASH_VERSION
from rayflow.storage.arrow_files import checksum, encode_keyed
from rayflow.storage.arrow_files import encode as encode_table
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import SAVEPOINTS, quote, released_path
from rayflow.storage.merging import NOTE, StateKeys, merge_pieces
from rayflow.storage.savepoints import KIND, MANIFEST
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore, PutOutcome, Store

Progress = Callable[[int, int], None]
"""(bytes copied, bytes in all), of the files as they were in the checkpoint."""

STRETCH_BYTES: Final = 32 * 1024 * 1024
"""Of the files of one stretch of keyed state, compressed: a few times as much is in memory at once."""
STRETCH_ROWS: Final = 1_000_000
"""The same of an export, whose size is not known before."""
INLINE_BYTES_MAX: Final = 4096


class SavepointCopier:
    """Where the savepoint of a job goes. Made before the savepoint is asked for, so that a bad place is told first.

    ``own`` is the job's directory; None: its snapshots are in manifests alone. ``path`` None: a new folder below it.
    """

    def __init__(
        self, own: str | None, own_options: Mapping[str, Any], path: str | None, options: Mapping[str, Any]
    ) -> None:
        self._own, self._own_options, self._path, self._options = own, own_options, path, options
        if path is not None:
            check_free(ObjectStore(path, options))

    def copy(self, manifest: Manifest, on_progress: Progress | None = None) -> str:
        """The URL of the savepoint."""
        store: Store = MemoryStore() if self._own is None else ObjectStore(self._own, self._own_options)
        snapshots = SnapshotStore(
            store, manifest.max_parallelism, open_root=lambda root: ObjectStore(root, self._own_options)
        )
        url = self._path
        if url is None:
            assert self._own is not None
            url = f"{self._own.rstrip('/')}/{SAVEPOINTS}{manifest.checkpoint:08d}-{secrets.token_hex(4)}"
        return write_savepoint(manifest, snapshots, url, self._options, on_progress=on_progress)

    def release(self, manifest: Manifest) -> None:
        """The checkpoint it was copied from is kept no longer than others; nobody need own the directory for that."""
        assert self._own is not None
        ObjectStore(self._own, self._own_options).put_if_absent(released_path(manifest.checkpoint), b"")


def all_committed(manifest: Manifest) -> Manifest:
    """The last checkpoint of a job that has ended well, with nothing left to commit."""
    return replace(manifest, subtasks=tuple(replace(sub, committables=()) for sub in manifest.subtasks))


def check_free(target: ObjectStore) -> None:
    """Raises `ConfigError` unless there is nothing in the folder."""
    found = target.list()
    if found:
        raise ConfigError(
            f"{target.url} is not empty (it holds {len(found)} files, such as {found[0][0]}): a savepoint is never "
            "written over anything; name a new folder"
        )


def write_savepoint(
    manifest: Manifest,
    snapshots: SnapshotStore,
    target_url: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    max_parallelism: int | None = None,
    on_progress: Progress | None = None,
) -> str:
    """Copy what ``manifest`` names, as ``snapshots`` reads it, into the empty or new folder; its absolute URL.

    ``max_parallelism`` re-buckets the keyed state on the way. Raises `ConfigError` for a folder that is not empty,
    `CorruptCheckpointError` for a file that is missing or wrong, `StorageError` when the copy cannot be written; then
    what was written of it is removed.
    """
    target = ObjectStore(target_url, storage_options)
    check_free(target)
    copy = _Copy(manifest, snapshots, target, max_parallelism or manifest.max_parallelism, on_progress)
    try:
        subtasks = tuple(copy.subtask(snapshot) for snapshot in manifest.subtasks)
        whole = replace(
            manifest, kind=KIND, max_parallelism=copy.max_parallelism, subtasks=subtasks, version=FORMAT_VERSION
        )
        if target.put_if_absent(MANIFEST, encode(whole)) is PutOutcome.EXISTS:
            raise ConfigError(f"{target.url} got a manifest from somebody else meanwhile; name a new folder")
    except BaseException:
        copy.remove()
        raise
    return target.url


@dataclass(slots=True)
class _Copy:
    manifest: Manifest
    snapshots: SnapshotStore
    target: ObjectStore
    max_parallelism: int
    on_progress: Progress | None
    _done: int = 0
    _written: list[str] | None = None

    def subtask(self, snapshot: SubtaskSnapshot) -> SubtaskSnapshot:
        states: dict[tuple[str, str], list[StateHandle]] = {}
        for handle in snapshot.states:
            states.setdefault((handle.operator, handle.name), []).append(handle)
        copied: list[StateHandle] = []
        for handles in states.values():
            if handles[0].format != "arrow":
                for handle in handles:
                    copied += self._exported(snapshot, handle)
            elif handles[0].keyed:
                copied += self._merged(snapshot, handles)
            else:
                copied += [self._piece(handle, number) for number, handle in enumerate(handles)]
            self._tell(sum(handle.nbytes for handle in handles))
        stats = replace(snapshot.stats, nbytes=sum(h.nbytes for h in copied), rows=sum(h.rows for h in copied))
        return replace(snapshot, states=tuple(copied), stats=stats)

    def remove(self) -> None:
        """Of a copy that failed."""
        for path in self._written or ():
            with contextlib.suppress(StorageError):
                self.target.delete(path)

    def _piece(self, handle: StateHandle, number: int) -> StateHandle:
        table = self.snapshots.read(handle).table
        own = replace(handle, piece="", section=None, blocks=(), file=None, inline=None)
        return self._stored(own, _described(table, handle, None, 0), None, number)

    def _merged(self, snapshot: SubtaskSnapshot, handles: Sequence[StateHandle]) -> list[StateHandle]:
        last = handles[-1]
        keys = self.snapshots.keys(last)
        where = f"state {last.name!r} of operator {last.operator!r} subtask {last.subtask}"
        stretches = _stretches(handles, self.manifest.max_parallelism)
        found = []
        for number, groups in enumerate(stretches):
            tables = [self.snapshots.read(handle, groups).table for handle in handles]
            table = merge_pieces(tables, key_columns=keys.identity, mode=last.mode, where=where)
            meta = last.meta if len(stretches) == 1 else None
            found.append(self._keyed(snapshot, last, table, keys, groups, number, meta))
        if len(stretches) > 1 and last.meta is not None:
            # One piece tells it to all who get a part of the old subtask's groups, and only once to each.
            groups = range(stretches[0].start, stretches[-1].stop)
            found.append(self._keyed(snapshot, last, table.slice(0, 0), keys, groups, len(stretches), last.meta))
        return found

    def _exported(self, snapshot: SubtaskSnapshot, handle: StateHandle) -> Iterator[StateHandle]:
        """Every table in a folder of a local store."""
        from rayflow.storage.rocks.export import folder_tables, read_folder

        folder = self.snapshots.read(handle).folder
        assert folder is not None
        with tempfile.TemporaryDirectory(prefix="rayflow-savepoint-") as local:
            folder.download(Path(local))
            batches = read_folder(Path(local), handle.meta, folder.key_groups)
            for name, columns in folder_tables(handle.meta).items():
                names = tuple(columns.keys.names)
                own = len(names) - columns.subkeys
                keys = StateKeys(names[:own], names[own:])
                schema = pa.schema([*columns.keys, *columns.values])
                state = replace(handle, name=name, format="arrow", parts=(), meta=None, mode="upsert")
                for number, table in enumerate(_chunks(batches[name], schema)):
                    copied = self._keyed(snapshot, state, table, keys, folder.key_groups, number, None)
                    if present := copied.group_rows:  # so that only their owners look into it
                        copied = replace(copied, groups=(present[0][0], present[-1][0] + 1))
                    yield copied

    def _keyed(
        self,
        snapshot: SubtaskSnapshot,
        of: StateHandle,
        table: pa.Table,
        keys: StateKeys,
        groups: range,
        number: int,
        meta: Json,
    ) -> StateHandle:
        before, after = self.manifest.max_parallelism, self.max_parallelism
        parallelism = self.manifest.parallelism[snapshot.subtask.chain]
        handle = replace(
            of,
            subtask=snapshot.subtask.index,
            parallelism=parallelism,
            rows=table.num_rows,
            # The group grows with the hash, so a range of groups stays one whatever their number is.
            groups=(groups.start * after // before, -(-groups.stop * after // before)),
            meta=_moved(meta, key_group_range(snapshot.subtask.index, parallelism, after).start),
            piece="",
            section=None,
            blocks=(),
            group_rows=(),
            file=None,
            inline=None,
        )
        return self._stored(handle, _described(table, of, keys, after), keys, number)

    def _stored(self, handle: StateHandle, table: pa.Table, keys: StateKeys | None, number: int) -> StateHandle:
        encoded = encode_table(table) if keys is None else encode_keyed(table, keys.key_columns, self.max_parallelism)
        data = encoded.data
        handle = replace(handle, rows=encoded.rows, group_rows=encoded.group_rows)
        if len(data) <= INLINE_BYTES_MAX:
            return replace(handle, inline=base64.b64encode(data).decode("ascii"))
        where = f"{quote(handle.operator, dots=False)}-{handle.subtask}.{quote(handle.name, dots=False)}-{number}"
        path = f"state/{where}.arrow"
        if self._written is None:
            self._written = []
        self._written.append(path)
        self.target.put(path, data)
        return replace(handle, file=FileRef(path, len(data), checksum(data)), blocks=encoded.blocks)

    def _tell(self, nbytes: int) -> None:
        self._done += nbytes
        if self.on_progress is not None:
            total = sum(handle.nbytes for snapshot in self.manifest.subtasks for handle in snapshot.states)
            self.on_progress(self._done, total)


def _stretches(handles: Sequence[StateHandle], max_parallelism: int) -> list[range]:
    """Ranges of key groups, together all that count in ``handles``, of about `STRETCH_BYTES` each or one group."""
    owned = [groups_of(handle, max_parallelism) for handle in handles]
    start, stop = min(r.start for r in owned), max(r.stop for r in owned)
    weight = np.zeros(max_parallelism, dtype=np.float64)
    for handle, own in zip(handles, owned, strict=True):
        if not handle.group_rows:
            continue
        groups, first = (np.array(column) for column in zip(*handle.group_rows, strict=True))
        inside = (groups >= own.start) & (groups < own.stop)
        rows = np.diff(first, append=handle.rows)
        weight[groups[inside]] += rows[inside] * (handle.nbytes / handle.rows)
    cuts, size = [start], 0.0
    for group in range(start, stop):
        if size and size + weight[group] > STRETCH_BYTES:
            cuts.append(group)
            size = 0.0
        size += weight[group]
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], stop], strict=True)]


def _chunks(
    batches: Iterator[pa.RecordBatch], schema: pa.Schema, *, rows_max: int = STRETCH_ROWS
) -> Iterator[pa.Table]:
    """At least one table, each of about ``rows_max`` rows or `STRETCH_BYTES`."""
    held: list[pa.RecordBatch] = []
    rows = nbytes = told = 0
    for batch in batches:
        held.append(batch)
        rows, nbytes = rows + batch.num_rows, nbytes + batch.nbytes
        if rows >= rows_max or nbytes >= 2 * STRETCH_BYTES:
            yield pa.Table.from_batches(held, schema)
            held, rows, nbytes, told = [], 0, 0, told + 1
    if held or not told:
        yield pa.Table.from_batches(held, schema)


def _described(table: pa.Table, of: StateHandle, keys: StateKeys | None, max_parallelism: int) -> pa.Table:
    """With the note that tells what it is, as in the state files of checkpoints."""
    own: dict[str, Any] = {"operator": of.operator, "state": of.name}
    if keys is not None:
        own |= {
            "key_columns": list(keys.key_columns),
            "max_parallelism": max_parallelism,
            "hash_version": HASH_VERSION,
        }
        if keys.subkey_columns:
            own["subkey_columns"] = list(keys.subkey_columns)
    text = json.dumps(own, sort_keys=True).encode()
    return table.replace_schema_metadata({**(table.schema.metadata or {}), NOTE: text})


def _moved(meta: Json, first_group: int) -> Json:
    """Meta of keyed state may tell the first group of its subtask as ``first_group``: it has moved with the others."""
    if isinstance(meta, dict) and "first_group" in meta:
        return {**meta, "first_group": first_group}
    return meta
