"""A `ColdStore` that is a dict, and a checkpoint writer that goes through real Arrow IPC bytes and real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.operators.base import (
    BoolArray,
    Change,
    ColdStore,
    FolderFile,
    FrozenFolder,
    FrozenState,
    FrozenTable,
    OperatorContext,
    RestoredFolder,
    RestoredState,
    StateBackend,
    UInt16Array,
)
from rayflow.partition import hash_columns, key_groups
from tests.operators.helpers import context

Row = tuple[int, dict[str, Any]]


class FakeCold:
    """As `rayflow.storage.rocks`: a freeze is performed by whoever comes first, and reads see what was frozen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, FakeColdTable] = {}
        self.pending: Callable[[], Any] | None = None
        self.freezes = 0

    def table(self, name: str, keys: pa.Schema, values: pa.Schema, *, subkeys: int = 0) -> FakeColdTable:
        return self.made.setdefault(name, FakeColdTable(self, keys, values))

    def tables(self) -> Mapping[str, tuple[pa.Schema, pa.Schema]]:
        return {name: (table.keys, table.values) for name, table in self.made.items()}

    def perform(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending()

    def freeze(self, changes: Mapping[str, Sequence[Change]]) -> FrozenFolder:
        self.perform()
        self.freezes += 1
        target = self.folder / f"frozen-{self.freezes}"
        meta = {name: [len(table.keys)] for name, table in self.made.items()}

        def perform() -> None:
            for name, found in changes.items():
                for change in found:
                    self.made[name].apply(change)
            target.mkdir(parents=True)
            for name, table in self.made.items():
                with pa.ipc.new_file(str(target / name), pa.schema([*table.keys, *table.values])) as writer:
                    for batch in table.scan():
                        writer.write_batch(batch)
            (target / "meta").write_text(json.dumps(meta))

        self.pending = perform

        def finish() -> tuple[Mapping[str, FolderFile], int]:
            if self.pending is perform:
                self.perform()
            return {path.name: FolderFile(path) for path in target.iterdir()}, 0

        return FrozenFolder("fake", {}, finish, lambda: shutil.rmtree(target, ignore_errors=True), "fake")

    def restore(self, folders: Sequence[RestoredFolder]) -> None:
        for number, folder in enumerate(folders):
            target = self.folder / f"restored-{number}"
            target.mkdir(parents=True)
            folder.download(target)
            for name, (width,) in json.loads((target / "meta").read_text()).items():
                rows = pa.ipc.open_file(str(target / name)).read_all()
                fields = list(rows.schema)
                table = self.table(name, pa.schema(fields[:width]), pa.schema(fields[width:]))
                for batch in rows.combine_chunks().to_batches():
                    groups = key_groups(hash_columns(batch.columns[:1]), 128).astype(np.uint16)
                    keep = np.isin(groups, folder.key_groups)
                    batch = batch.filter(pa.array(keep))
                    names = batch.schema.names
                    table.apply(Change(groups[keep], batch.select(names[:width]), batch.select(names[width:])))

    def close(self) -> None:
        self.pending = None


class FakeColdTable:
    def __init__(self, store: FakeCold, keys: pa.Schema, values: pa.Schema) -> None:
        self.store, self.keys, self.values = store, keys, values
        self.rows: dict[str, Row] = {}

    def get(self, groups: UInt16Array, keys: pa.RecordBatch) -> tuple[BoolArray, pa.RecordBatch]:
        self.store.perform()
        found = [self.rows.get(repr(list(row.values()))) for row in keys.to_pylist()]
        blank = dict.fromkeys(self.values.names)
        values = [blank if row is None else {name: row[1][name] for name in self.values.names} for row in found]
        return np.array([row is not None for row in found], np.bool_), _batch(values, self.values)

    def write(self, change: Change) -> None:
        self.store.perform()
        self.apply(change)

    def apply(self, change: Change) -> None:
        for i, key in enumerate(change.keys.to_pylist()):
            if change.values is None:
                self.rows.pop(repr(list(key.values())), None)
            else:
                self.rows[repr(list(key.values()))] = (
                    int(change.groups[i]),
                    key | change.values.slice(i, 1).to_pylist()[0],
                )

    def scan(self, groups: range | None = None, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        self.store.perform()
        rows = [
            row for group, row in sorted(self.rows.values(), key=lambda r: r[0]) if groups is None or group in groups
        ]
        for low in range(0, len(rows), batch_rows):
            yield _batch(rows[low : low + batch_rows], pa.schema([*self.keys, *self.values]))

    def scan_prefix(self, groups: UInt16Array, prefixes: pa.RecordBatch) -> pa.RecordBatch:
        self.store.perform()
        names = prefixes.schema.names
        found = [
            row
            for prefix in prefixes.to_pylist()
            for _, row in self.rows.values()
            if [row[name] for name in names] == list(prefix.values())
        ]
        return _batch(found, pa.schema([*self.keys, *self.values]))


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=schema)


# ------------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class Saved:
    """One subtask's part of a checkpoint: as files."""

    key_groups: range
    tables: list[tuple[FrozenTable, list[tuple[str, bytes]]]]
    folders: list[tuple[str, Path]]


@dataclass
class World:
    """Storage, clock and back end; makes contexts, saves frozen states and gives them back."""

    kind: str
    folder: Path
    memory_bytes: int = 1 << 30
    now: float = 1_000.0
    uploaded: dict[str, bytes] = field(default_factory=dict)
    """Pieces that a complete checkpoint holds."""
    groups: dict[str, range] = field(default_factory=dict)
    """Of a piece: whose rows in it are state."""
    bytes_written: int = 0
    _numbers: int = 0

    def context(self, subtask: int = 0, parallelism: int = 1) -> OperatorContext:
        kind = "rocksdb" if self.kind in ("fake", "rocksdb") else self.kind
        backend = StateBackend(kind, self.memory_bytes, self.scratch, self.open_cold)  # type: ignore[arg-type]
        return replace(context(subtask, parallelism, backend), wall_time=lambda: self.now)

    def scratch(self, name: str) -> Path:
        self._numbers += 1
        path = self.folder / f"{name}-{self._numbers}"
        path.mkdir(parents=True)
        return path

    def open_cold(self, folder: Path, ctx: OperatorContext) -> ColdStore:
        if self.kind == "fake":
            return FakeCold(folder)
        from rayflow.storage.rocks import open_rocks

        return open_rocks(folder, ctx)

    def save(self, frozen: FrozenState, key_groups_: range, *, complete: bool = True) -> Saved:
        """The uploader, and then the checkpoint is complete or aborted."""
        tables = []
        for table in frozen.tables:
            assert table.mode == "upsert"
            parts = []
            assert len({piece.id for piece in table.pieces}) == len(table.pieces)
            for piece in table.pieces:
                if piece.id not in self.uploaded:
                    assert piece.batches, "rows that no complete checkpoint holds must be there"
                    data = _ipc(piece.batches)
                    self.bytes_written += len(data)
                    self.groups[piece.id] = key_groups_
                else:
                    data = self.uploaded[piece.id]
                parts.append((piece.id, data))
            tables.append((table, parts))
        folders = []
        for folder in frozen.folders:
            files, _ = folder.finish()
            target = self.scratch("remote")
            for name, file in files.items():
                shutil.copy(file.path, target / name)
            folder.release()
            folders.append((folder.format, target))
        if complete:
            self.uploaded = {id: data for _, parts in tables for id, data in parts} | self.uploaded
            for table in frozen.tables:
                for piece in table.pieces:
                    if piece.transient:
                        piece.batches = ()
        return Saved(key_groups_, tables, folders)

    def give_back(
        self, saved: Sequence[Saved], ctx: OperatorContext, *, savepoint: bool = False
    ) -> list[RestoredState]:
        """What the subtask gets of a checkpoint, clipped to its key groups."""
        found = []
        for part in saved:
            own = sorted(set(part.key_groups) & set(ctx.key_groups))
            if not own:
                continue
            for table, pieces in part.tables:
                for id, data in pieces:
                    before = self.groups[id]
                    mine = range(max(before.start, ctx.key_groups.start), min(before.stop, ctx.key_groups.stop))
                    if not mine:
                        continue
                    rows = pa.ipc.open_file(data).read_all()
                    assert table.key_columns is not None
                    groups = key_groups(hash_columns([rows.column(k) for k in table.key_columns]), 128)
                    rows = rows.filter(pa.array(np.isin(groups, mine)))
                    if mine != before:  # a part is another piece, see `rayflow.core.restore.clip`
                        id = f"{id.partition('@')[0]}@{mine.start}-{mine.stop}"
                        self.uploaded[id], self.groups[id] = _ipc([rows]), mine
                    piece = "" if savepoint else id
                    found.append(RestoredState(table.name, rows, piece=piece, subkey_columns=table.subkey_columns))
            for format, folder in part.folders:
                exact = part.key_groups == ctx.key_groups
                groups_ = range(own[0], own[-1] + 1)

                def download(target: Path, folder: Path = folder) -> None:
                    shutil.copytree(folder, target, dirs_exist_ok=True)

                restored = RestoredFolder(format, groups_, exact, download)
                found.append(RestoredState("folder", pa.table({}), folder=restored))
        return found


def _ipc(batches: Sequence[pa.RecordBatch | pa.Table]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data
