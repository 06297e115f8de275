"""State in and out of storage (manifest format 2), checked by size and SHA-256.

Writing. A state is its pieces, oldest first, and what is written for this checkpoint only; each is one Arrow IPC file
(`rayflow.storage.arrow_files`). Small ones go into the manifest, pieces of `SHARED_BYTES_MIN` and more into an object
of their own in ``shared/``, all others one behind the other into one object a subtask and checkpoint (its sections).
What may be named again (`rayflow.storage.reuse`) is not written at all.

Reading. Of a keyed table a subtask takes its own range of key groups (rules K1, K3) by reading the blocks that hold it.
The file is self-describing: its schema metadata names the operator, the key columns, the number of groups (rule K4) and
the version of the hash they were computed with.

A folder of a local store (``rocksdb``) is a handle whose ``parts`` are its immutable files; the few others are the rows
of its table (``file``, ``data``). All of them, put into an empty folder, are the store.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import SubtaskId
from rayflow.core.manifest import Block, FileRef, StateHandle, SubtaskSnapshot
from rayflow.core.restore import clip
from rayflow.errors import CorruptCheckpointError, ProtocolError, StateTooLargeError
from rayflow.operators.base import FrozenState, RestoredState
from rayflow.partition import HASH_VERSION
from rayflow.storage.arrow_files import checksum, read_block, read_head
from rayflow.storage.filesystem import opener_of
from rayflow.storage.folders import restored_folder
from rayflow.storage.merging import StateKeys, keys_of
from rayflow.storage.reuse import Reuse, Written
from rayflow.storage.store import Store
from rayflow.storage.writing import METADATA, SHARED_BYTES_MIN, SubtaskWriter

MEMORY_STATE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Inline state of one job that its coordinator holds with ``state="memory"``, as base64."""

READ_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of one request; neighbouring blocks are read together up to this."""

OpenRoot = Callable[[str], Store]


class SnapshotStore:
    """Writes frozen states for a checkpoint and reads them back. Safe in several threads.

    ``inline_max_bytes``: a table whose file is not larger goes into its handle, and so into the manifest: one object
    less for each small state. None puts every table there (``state="memory"``), and ``store`` is not touched.
    ``shared_min_bytes``: pieces whose file is smaller lie in the object of their checkpoint.
    ``open_root`` opens the directory of a savepoint, by its URL; None: with the options of ``store``.
    """

    def __init__(
        self,
        store: Store,
        max_parallelism: int,
        inline_max_bytes: int | None = 4096,
        *,
        shared_min_bytes: int = SHARED_BYTES_MIN,
        open_root: OpenRoot | None = None,
    ) -> None:
        self._store = store
        self._max_parallelism = max_parallelism
        self._inline_max_bytes = inline_max_bytes
        self._shared_min_bytes = shared_min_bytes
        self._open_root = open_root or opener_of(store)
        self._roots: dict[str, Store] = {}
        self.bytes_read = 0
        """From storage, by `read` and what it returned; for measurements."""

    def write(
        self,
        checkpoint: int,
        subtask: SubtaskId,
        parallelism: int,
        states: Sequence[tuple[str, FrozenState]],
        reuse: Reuse | None = None,
    ) -> Written:
        """Make the states of one subtask durable; for the uploader thread (hashing and compression leave the GIL).

        ``states``: (operator id, its state). Pieces and immutable files in ``reuse`` are named, not written. Raises
        `StorageError` if it cannot be written, `ProtocolError` if a state cannot be one table or a piece has no rows.
        """
        writer = SubtaskWriter(
            self._store,
            checkpoint,
            subtask,
            parallelism,
            max_parallelism=self._max_parallelism,
            inline_max_bytes=self._inline_max_bytes,
            shared_min_bytes=self._shared_min_bytes,
            reuse=reuse or Reuse(),
        )
        for operator, state in states:
            for table in state.tables:
                writer.add_table(operator, table)
            for folder in state.folders:
                writer.add_folder(operator, folder)
        return writer.finish()

    def read(self, handle: StateHandle, key_groups: range | None = None) -> RestoredState:
        """The table of ``handle``; of a keyed one only the rows that are state in ``key_groups`` (None: all).

        Raises `CorruptCheckpointError` naming the file if it is missing, has another size or checksum, or does not hold
        what its handle says: never an empty state instead.
        """
        where = _where(handle)
        groups = range(self._max_parallelism) if key_groups is None else key_groups
        if handle.format != "arrow":
            folder = restored_folder(handle, groups, self._max_parallelism, self._fetch, lambda: self._small(handle))
            return RestoredState(handle.name, pa.table({}), handle.meta, folder=folder)
        self._check_groups(handle, where)
        rows = slice(0, handle.rows)
        if handle.keyed:
            rows = rows_of_groups(handle, _within(groups, handle.groups))
        table = self._table(handle, rows, where)
        piece = handle.piece if key_groups is None else clip(handle, key_groups, self._max_parallelism).piece
        if any(file.root is not None for file in handle.files):
            piece = ""
        subkeys = tuple(_own(table.schema, where).get("subkey_columns", ())) if handle.keyed else ()
        return RestoredState(handle.name, _undescribed(table), handle.meta, piece, subkey_columns=subkeys)

    def read_schema(self, handle: StateHandle) -> pa.Schema:
        """The columns of a table, reading no rows where that is possible. Raises what `read` raises."""
        return self._schema(handle).remove_metadata()

    def key_columns(self, handle: StateHandle) -> tuple[str, ...] | None:
        """The columns that tell its key group; None for state without keys. Raises what `read` raises."""
        if not handle.keyed:
            return None
        return tuple(_own(self._schema(handle), _where(handle))["key_columns"])

    def keys(self, handle: StateHandle) -> StateKeys:
        """The columns that tell its rows apart. Raises what `read` raises."""
        return keys_of(self._schema(handle))

    # ---------------------------------------------------------------------------------------------------------- tables

    def _schema(self, handle: StateHandle) -> pa.Schema:
        where = _where(handle)
        if handle.format != "arrow":
            raise ProtocolError(f"{where} is a folder of a local store and has no columns; its meta tells its tables")
        return self._table(handle, slice(0, 0), where).schema

    def _table(self, handle: StateHandle, rows: slice, where: str) -> pa.Table:
        try:
            if handle.blocks and handle.inline is None:
                return self._read_blocks(handle, rows, where)
            with pa.ipc.open_file(pa.py_buffer(self._bytes(handle, where))) as reader:
                self._check_described(reader.schema, handle, where)
                return _read_rows(reader, rows, handle, where)
        except pa.ArrowException as error:
            raise CorruptCheckpointError(f"{where} is no Arrow file: {error}; use an earlier checkpoint") from error

    def _read_blocks(self, handle: StateHandle, rows: slice, where: str) -> pa.Table:
        head, *batches = handle.blocks
        ends = [*(block.first_row for block in batches[1:]), handle.rows]
        wanted = [
            (block, end)
            for block, end in zip(batches, ends, strict=False)
            if max(block.first_row, rows.start) < min(end, rows.stop)
        ]
        schema, kept = None, []
        views = self._block_views(handle, [head, *(block for block, _ in wanted)], where)
        for (block, end), view in zip([(head, 0), *wanted], views, strict=True):
            if schema is None:
                schema = read_head(bytes(view))
                self._check_described(schema, handle, where)
                continue
            batch = read_block(view, schema)
            if batch.num_rows != end - block.first_row:
                raise CorruptCheckpointError(
                    f"{where} has {batch.num_rows} rows from row {block.first_row} on, its manifest says "
                    f"{end - block.first_row}; use an earlier checkpoint"
                )
            start = max(rows.start - block.first_row, 0)
            kept.append(batch.slice(start, min(rows.stop, end) - block.first_row - start))
        found = sum(batch.num_rows for batch in kept)
        if found != max(0, rows.stop - rows.start):
            raise CorruptCheckpointError(
                f"{where} has {found} of the {rows.stop - rows.start} rows that its manifest says; use an earlier one"
            )
        return pa.Table.from_batches(kept, schema)

    def _block_views(self, handle: StateHandle, blocks: Sequence[Block], where: str) -> Iterable[memoryview]:
        """The bytes of each block, checked; neighbours are read by one request."""
        base = 0 if handle.section is None else handle.section.offset
        for run in _runs(blocks):
            start, stop = run[0].offset, run[-1].offset + run[-1].nbytes
            view = memoryview(self._range(handle, base + start, base + stop, where))
            for block in run:
                part = view[block.offset - start : block.offset - start + block.nbytes]
                if (found := checksum(part)) != block.checksum:
                    raise CorruptCheckpointError(
                        f"{where} has checksum {found} in bytes {base + block.offset} to "
                        f"{base + block.offset + block.nbytes}, its manifest says {block.checksum}; "
                        "use an earlier checkpoint"
                    )
                yield part

    def _small(self, handle: StateHandle) -> pa.Table:
        """The files of a folder that are rows of its own table."""
        where = _where(handle)
        try:
            with pa.ipc.open_file(pa.py_buffer(self._bytes(handle, where))) as reader:
                return reader.read_all()
        except pa.ArrowException as error:
            raise CorruptCheckpointError(f"{where} is no Arrow file: {error}; use an earlier checkpoint") from error

    # ----------------------------------------------------------------------------------------------------------- bytes

    def _bytes(self, handle: StateHandle, where: str) -> bytes:
        """A whole table."""
        if handle.inline is not None:
            try:
                return base64.b64decode(handle.inline, validate=True)
            except (binascii.Error, ValueError) as error:
                raise CorruptCheckpointError(f"{where} is not base64: {error}") from error
        section = handle.section
        if handle.file is None:
            raise CorruptCheckpointError(f"{where} has neither a file nor inline data")
        if section is None:
            return self._fetch(handle.file, where)
        data = self._range(handle, section.offset, section.offset + section.nbytes, where)
        if (found := checksum(data)) != section.checksum:
            raise CorruptCheckpointError(
                f"{where} has checksum {found} in its section, its manifest says {section.checksum}; "
                "use an earlier checkpoint"
            )
        return data

    def _fetch(self, file: FileRef, where: str) -> bytes:
        """A whole file."""
        try:
            data = self._store_of(file).get(file.path)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{where} is missing; use an earlier checkpoint") from error
        self.bytes_read += len(data)
        problem = mismatch(data, file)
        if problem:
            raise CorruptCheckpointError(f"{where} {problem}; use an earlier checkpoint")
        return data

    def _range(self, handle: StateHandle, start: int, stop: int, where: str) -> bytes:
        assert handle.file is not None
        try:
            data = self._store_of(handle.file).get_range(handle.file.path, start, stop)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{where} is missing; use an earlier checkpoint") from error
        self.bytes_read += len(data)
        if len(data) != stop - start:
            raise CorruptCheckpointError(
                f"{where} has {start + len(data)} bytes, its manifest says {handle.file.nbytes}; "
                "use an earlier checkpoint"
            )
        return data

    def _store_of(self, file: FileRef) -> Store:
        if file.root is None:
            return self._store
        if file.root not in self._roots:
            self._roots[file.root] = self._open_root(file.root)
        return self._roots[file.root]

    # ---------------------------------------------------------------------------------------------------------- checks

    def _check_described(self, schema: pa.Schema, handle: StateHandle, where: str) -> None:
        if not handle.keyed:
            return
        own = _own(schema, where)
        groups, version = own["max_parallelism"], own["hash_version"]
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
        if any(a.first_row > b.first_row or a.offset + a.nbytes > b.offset for a, b in pairwise(handle.blocks)) or any(
            b.offset != 0 for b in handle.blocks[:1]
        ):
            raise CorruptCheckpointError(f"{where} has an index of blocks that contradicts itself")


def rows_of_groups(handle: StateHandle, groups: range) -> slice:
    """The rows of a keyed table that lie in ``groups`` (a contiguous range); they are contiguous, being sorted."""
    inside = [(group, row) for group, row in handle.group_rows if group >= groups.start]
    start = inside[0][1] if inside else handle.rows
    stop = next((row for group, row in inside if group >= groups.stop), handle.rows)
    return slice(start, max(start, stop))


def rows_that_count(handle: StateHandle) -> int:
    """Rows that are state; fewer than the piece has where some of its key groups belong to others."""
    if not handle.group_rows or handle.groups is None:
        return handle.rows
    rows = rows_of_groups(handle, range(*handle.groups))
    return int(rows.stop - rows.start)


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


def dealt(state: RestoredState, index: int, parallelism: int) -> RestoredState:
    """What subtask ``index`` gets of a table whose rows are dealt out in turn (`StateHandle.spread` ``list``)."""
    rows = pa.array(np.arange(index, state.table.num_rows, parallelism))
    return replace(state, table=state.table.take(rows), piece="")


def _where(handle: StateHandle) -> str:
    place = "inline state" if handle.file is None else f"state file {handle.file.path}"
    return f"{place} ({handle.name!r} of operator {handle.operator!r} subtask {handle.subtask})"


def _within(groups: range, own: tuple[int, int] | None) -> range:
    if own is None:
        return groups
    start = max(groups.start, own[0])
    return range(start, max(start, min(groups.stop, own[1])))


def _own(schema: pa.Schema, where: str) -> dict[str, Any]:
    try:
        own: dict[str, Any] = json.loads((schema.metadata or {})[METADATA])
        if missing := {"key_columns", "max_parallelism", "hash_version"} - own.keys():
            raise KeyError(*sorted(missing))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{where} does not tell its key groups ({error!r})") from error
    return own


def _undescribed(table: pa.Table) -> pa.Table:
    metadata = {k: v for k, v in (table.schema.metadata or {}).items() if k != METADATA}
    return table.replace_schema_metadata(metadata or None)


def _runs(blocks: Sequence[Block]) -> Iterable[list[Block]]:
    """Blocks that lie one behind the other, at most `READ_BYTES_MAX` together unless one alone is larger."""
    run: list[Block] = []
    for block in blocks:
        if run and (
            run[-1].offset + run[-1].nbytes != block.offset
            or block.offset + block.nbytes - run[0].offset > READ_BYTES_MAX
        ):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


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
