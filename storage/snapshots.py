"""State tables in and out of storage: Arrow IPC files that any Arrow reader opens, checked by size and SHA-256.

A keyed table is sorted by key group (rule K2) and its handle says where each group begins, so that a subtask of any
parallelism takes its own range (rules K1, K3) as one slice. The file is self-describing: its schema metadata names the
operator, the key columns, the number of groups (rule K4) and the version of the hash they were computed with.

lz4, because it halves what is written for less time than writing it takes (2 M rows of 5 columns: 80 to 46 MB in
0.13 s; written and synced 0.05 s instead of 0.23 s; read in 0.03 s; zstd saves a third more, reads 4 times slower).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.manifest import FileRef, StateHandle, SubtaskSnapshot
from rayflow.errors import CorruptCheckpointError, ProtocolError, StateTooLargeError
from rayflow.operators.base import FrozenTable, RestoredState
from rayflow.partition import HASH_VERSION, hash_columns, key_groups
from rayflow.storage.layout import state_path
from rayflow.storage.store import Store

MEMORY_STATE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Inline state of one job that its coordinator holds with ``state="memory"``, as base64."""

_ROWS_A_BATCH: Final = 65_536
"""Record batches of this size let a reader take a range without reading the rest."""
_METADATA: Final = b"rayflow"


class SnapshotStore:
    """Writes frozen tables for a checkpoint and reads them back. Safe in several threads; holds no state of its own.

    ``inline_max_bytes``: a table whose file is not larger goes into its handle, and so into the manifest: one object
    less for each small state. None puts every table there (``state="memory"``), and ``store`` is not touched.
    """

    def __init__(self, store: Store, max_parallelism: int, inline_max_bytes: int | None = 4096) -> None:
        self._store = store
        self._max_parallelism = max_parallelism
        self._inline_max_bytes = inline_max_bytes

    def write(self, checkpoint: int, operator: str, subtask: int, parallelism: int, frozen: FrozenTable) -> StateHandle:
        """Make the table durable; for the uploader thread (hashing and compression leave the GIL to others).

        Raises `StorageError` if it cannot be written, `ProtocolError` if the frozen table cannot be one table.
        """
        who = f"state {frozen.name!r} of operator {operator!r} subtask {subtask}"
        table = _as_table(frozen, who)
        group_rows: tuple[tuple[int, int], ...] = ()
        if frozen.key_columns is not None:
            table, group_rows = self._by_key_group(table, frozen.key_columns, who)
        data = _to_bytes(self._described(table, operator, frozen))
        file, inline = None, None
        if self._inline_max_bytes is None or len(data) <= self._inline_max_bytes:
            inline = base64.b64encode(data).decode("ascii")
        else:
            file = FileRef(state_path(checkpoint, operator, subtask, frozen.name), len(data), checksum(data))
            self._store.put(file.path, data)
        return StateHandle(
            operator=operator,
            subtask=subtask,
            parallelism=parallelism,
            name=frozen.name,
            rows=table.num_rows,
            keyed=frozen.key_columns is not None,
            file=file,
            inline=inline,
            group_rows=group_rows,
            meta=frozen.meta,
        )

    def read(self, handle: StateHandle, key_groups: range | None = None) -> RestoredState:
        """The table of ``handle``; of a keyed one only the rows in ``key_groups`` (None: all).

        Raises `CorruptCheckpointError` naming the file if it is missing, has another size or checksum, or does not hold
        what its handle says: never an empty state instead.
        """
        where = _where(handle)
        self._check_groups(handle, where)
        try:
            with pa.ipc.open_file(pa.py_buffer(self._bytes(handle, where))) as reader:
                rows = slice(0, handle.rows)
                if handle.keyed and key_groups is not None:
                    rows = rows_of_groups(handle, key_groups)
                self._check_described(reader.schema, handle, where)
                table = _read_rows(reader, rows, handle, where)
        except pa.ArrowException as error:
            raise CorruptCheckpointError(f"{where} is no Arrow file: {error}; use an earlier checkpoint") from error
        metadata = {k: v for k, v in (table.schema.metadata or {}).items() if k != _METADATA}
        return RestoredState(handle.name, table.replace_schema_metadata(metadata or None), handle.meta)

    def _by_key_group(
        self, table: pa.Table, key_columns: tuple[str, ...], who: str
    ) -> tuple[pa.Table, tuple[tuple[int, int], ...]]:
        missing = [name for name in key_columns if name not in table.column_names]
        if missing or not key_columns:
            raise ProtocolError(f"{who} names key columns {key_columns}, its table has {table.column_names}")
        if not table.num_rows:
            return table, ()
        groups = key_groups(
            hash_columns([table.column(name) for name in key_columns], list(key_columns)), self._max_parallelism
        )
        if np.any(groups[1:] < groups[:-1]):
            order = np.argsort(groups, kind="stable")
            groups, table = groups[order], table.take(pa.array(order))
        present, first = np.unique(groups, return_index=True)
        return table, tuple(zip(present.tolist(), first.tolist(), strict=True))

    def _described(self, table: pa.Table, operator: str, frozen: FrozenTable) -> pa.Table:
        own: dict[str, Any] = {"operator": operator, "state": frozen.name}
        if frozen.key_columns is not None:
            own |= {
                "key_columns": list(frozen.key_columns),
                "max_parallelism": self._max_parallelism,
                "hash_version": HASH_VERSION,
            }
        text = json.dumps(own, sort_keys=True).encode()
        return table.replace_schema_metadata({**(table.schema.metadata or {}), _METADATA: text})

    def _check_described(self, schema: pa.Schema, handle: StateHandle, where: str) -> None:
        if not handle.keyed:
            return
        try:
            own = json.loads((schema.metadata or {})[_METADATA])
            groups, version = own["max_parallelism"], own["hash_version"]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(f"{where} does not tell its key groups ({error!r})") from error
        if groups != self._max_parallelism:
            raise CorruptCheckpointError(
                f"{where} has {groups} key groups, the job has max_parallelism={self._max_parallelism}: it is fixed "
                f"for the life of a job (rule K4); run with max_parallelism={groups}"
            )
        if version != HASH_VERSION:
            raise CorruptCheckpointError(
                f"{where} was written with key hash version {version}, this one has {HASH_VERSION}; use that rayflow"
            )

    def _check_groups(self, handle: StateHandle, where: str) -> None:
        pairs = handle.group_rows
        sane = (
            all(g < h and r < s for (g, r), (h, s) in pairwise(pairs))
            and (not pairs or (pairs[0][0] >= 0 and pairs[0][1] == 0 and pairs[-1][1] < handle.rows))
            and bool(pairs) == (handle.keyed and handle.rows > 0)
        )
        if not sane:
            raise CorruptCheckpointError(f"{where} has an index of key groups that contradicts itself or its rows")
        if pairs and pairs[-1][0] >= self._max_parallelism:
            raise CorruptCheckpointError(
                f"{where} has key group {pairs[-1][0]}, the job has max_parallelism={self._max_parallelism}: it is "
                "fixed for the life of a job (rule K4)"
            )

    def _bytes(self, handle: StateHandle, where: str) -> bytes:
        if handle.inline is not None:
            try:
                return base64.b64decode(handle.inline, validate=True)
            except (binascii.Error, ValueError) as error:
                raise CorruptCheckpointError(f"{where} is not base64: {error}") from error
        if handle.file is None:
            raise CorruptCheckpointError(f"{where} has neither a file nor inline data")
        try:
            data = self._store.get(handle.file.path)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{where} is missing; use an earlier checkpoint") from error
        problem = mismatch(data, handle.file)
        if problem:
            raise CorruptCheckpointError(f"{where} {problem}; use an earlier checkpoint")
        return data


def rows_of_groups(handle: StateHandle, groups: range) -> slice:
    """The rows of a keyed table that lie in ``groups`` (a contiguous range); they are contiguous, being sorted."""
    inside = [(group, row) for group, row in handle.group_rows if group >= groups.start]
    start = inside[0][1] if inside else handle.rows
    stop = next((row for group, row in inside if group >= groups.stop), handle.rows)
    return slice(start, max(start, stop))


def checksum(data: bytes) -> str:
    """As a `FileRef` has it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def mismatch(data: bytes, expected: FileRef) -> str:
    """What is wrong with the bytes of a file, or "" if nothing is."""
    if len(data) != expected.nbytes:
        return f"has {len(data)} bytes, its manifest says {expected.nbytes}"
    found = checksum(data)
    return "" if found == expected.checksum else f"has checksum {found}, its manifest says {expected.checksum}"


def inline_bytes(handle: StateHandle) -> int:
    """How much of the coordinator's memory, and of the manifest, the handle takes."""
    return len(handle.inline or "")


def check_memory_state(snapshots: Iterable[SubtaskSnapshot], limit: int = MEMORY_STATE_BYTES_MAX) -> None:
    """Raise `StateTooLargeError` if the inline state of one checkpoint passes ``limit`` bytes (``state="memory"``)."""
    sizes = [(inline_bytes(handle), handle) for snapshot in snapshots for handle in snapshot.states]
    total = sum(size for size, _ in sizes)
    if total > limit:
        size, largest = max(sizes, key=lambda pair: pair[0])
        raise StateTooLargeError(
            f'state="memory" may hold {limit:,} bytes a job in the coordinator, this checkpoint has {total:,}, most '
            f"of it ({size:,}) in {_where(largest)}; pass CheckpointConfig(url), which keeps state in files"
        )


def _where(handle: StateHandle) -> str:
    place = "inline state" if handle.file is None else f"state file {handle.file.path}"
    return f"{place} ({handle.name!r} of operator {handle.operator!r} subtask {handle.subtask})"


def _as_table(frozen: FrozenTable, who: str) -> pa.Table:
    try:
        tables = [b if isinstance(b, pa.Table) else pa.Table.from_batches([b]) for b in frozen.batches]
        if tables:
            return pa.concat_tables(tables).combine_chunks().unify_dictionaries()
    except pa.ArrowException as error:
        raise ProtocolError(f"{who} has batches of several schemas: {error}") from error
    if frozen.schema is None:
        raise ProtocolError(f"{who} has no batches and no schema; an empty state must say its schema")
    return frozen.schema.empty_table()


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=_ROWS_A_BATCH)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _read_rows(reader: Any, rows: slice, handle: StateHandle, where: str) -> pa.Table:
    """The wanted rows; only batches that hold some of them are kept."""
    kept, begin = [], 0
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        start, stop = max(rows.start - begin, 0), min(rows.stop - begin, batch.num_rows)
        if start < stop:
            kept.append(batch.slice(start, stop - start))
        begin += batch.num_rows
    if begin != handle.rows:
        raise CorruptCheckpointError(f"{where} has {begin} rows, its manifest says {handle.rows}")
    return pa.Table.from_batches(kept, reader.schema)
