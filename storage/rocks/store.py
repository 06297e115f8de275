"""`RocksStore`: the state of one operator instance in RocksDB, frozen by hard links.

A freeze is a note (`_Freeze`) until somebody performs it: the uploader, or the next write of the loop thread. It has
two stages, each done once under a lock of its own: its changes are **applied** (a write batch; reads of the loop thread
wait for this, or do it), then the database is **linked** (flush, hard links; only writes and the next freeze wait).
What is written later can therefore not be in it (rule A3). One freeze is outstanding at most: the next performs it.

If the disk fails, the store is over: a batch or a flush may be missing, so every later call raises the same error.
"""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import StateSchemaError, StorageError
from rayflow.operators.base import Change, FolderFile, FrozenFolder, OperatorContext, RestoredFolder
from rayflow.operators.state.evolution import Outcome, compare, refusal
from rayflow.storage.rocks.catalog import CATALOG_FILE, Catalog
from rayflow.storage.rocks.database import Database
from rayflow.storage.rocks.restore import Restored, take_over
from rayflow.storage.rocks.table import RocksTable

STATE_NAME: Final = "rocksdb"
"""`FrozenFolder.name` of the one folder of an operator instance."""


class RocksStore:
    """A `ColdStore`. One thread uses it, but for the functions in what `freeze` returned."""

    def __init__(self, folder: Path, ctx: OperatorContext) -> None:
        self.folder = folder
        self._ctx = ctx
        self._memory_bytes = ctx.backend.memory_bytes
        self._catalog = Catalog(uuid.uuid4().hex)
        self._immutable: Mapping[str, str] = {}
        """Files of a restored folder -> the name they were uploaded by."""
        self._opened: Database | None = None
        self._tables: dict[str, RocksTable] = {}
        self._freeze: _Freeze | None = None
        self._freezes = 0
        self._failed: StorageError | None = None
        self._closed = False
        self._closing = threading.Lock()

    # --------------------------------------------------------------------------------------------------------- tables

    def table(self, name: str, keys: pa.Schema, values: pa.Schema, *, subkeys: int = 0) -> RocksTable:
        keys, values = keys.remove_metadata(), values.remove_metadata()
        where = f"state {name!r} of {self._ctx}"
        info = self._catalog.tables.get(name)
        if info is None:
            info = self._catalog.add(name, keys, values, subkeys)
        elif info.subkeys != subkeys:
            raise StateSchemaError(
                f"{where} has {subkeys} columns of its own in its key where there were {info.subkeys}, which moves its "
                "keys to other key groups; give it the old key back, or give the new state another name"
            )
        elif not info.keys.equals(keys):
            found = compare(info.keys, keys, info.keys.names)
            if found.outcome is Outcome.REFUSED:
                raise StateSchemaError(refusal(where, found))
            info.declare(values, where)
            self._tables.pop(name, None)
            with self.writing() as database:
                info = RocksTable(self, info, where).rekey(self._catalog, keys, database)
        elif not info.values.equals(values):
            info.declare(values, where)
        if name not in self._tables:
            self._tables[name] = RocksTable(self, info, where)
        return self._tables[name]

    def tables(self) -> Mapping[str, tuple[pa.Schema, pa.Schema]]:
        return {name: (info.keys, info.values) for name, info in self._catalog.tables.items()}

    @contextmanager
    def reading(self) -> Iterator[Database]:
        """The database with all that was frozen written into it."""
        if self._freeze is not None:
            self._freeze.apply()
        yield self._database()

    @contextmanager
    def writing(self) -> Iterator[Database]:
        """The database, with no freeze that a write could still get into."""
        self._perform_outstanding()
        database = self._database()
        try:
            yield database
        except StorageError as error:
            self._failed = error
            raise

    def _database(self) -> Database:
        if self._failed is not None:
            raise self._failed
        if self._closed:
            raise StorageError(f"local state in {self.folder} is closed; this attempt of {self._ctx} is over")
        if self._opened is None:
            self._prepare_folder()
            self._opened = Database(self.folder / "db", self._memory_bytes)
        return self._opened

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"the folder {self.folder} for local state of {self._ctx} cannot be made: {error}; "
                "set JobConfig(local_dir=...) to a folder that can be written"
            ) from error

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def freeze(self, changes: Mapping[str, Sequence[Change]]) -> FrozenFolder:
        self._perform_outstanding()
        self._database()
        meta = self._catalog.to_json()
        self._freezes += 1
        target = self.folder / f"frozen-{self._freezes:06d}"
        written = [(self._tables[name], tuple(found)) for name, found in changes.items() if found]
        freeze = _Freeze(self, target, meta, written)
        self._freeze = freeze
        return FrozenFolder(STATE_NAME, meta, freeze.finish, freeze.release)

    def _perform_outstanding(self) -> None:
        if self._freeze is not None:
            self._freeze.link()
            self._freeze = None

    def _apply(self, written: Sequence[tuple[RocksTable, Sequence[Change]]]) -> None:
        with self._failing():
            database = self._database()
            for table, changes in written:
                for change in changes:
                    table.put(database, change)

    def _link(self, target: Path, meta: Json) -> tuple[Mapping[str, FolderFile], int]:
        with self._failing():
            database = self._database()
            database.checkpoint(target)
            try:
                (target / CATALOG_FILE).write_text(json.dumps(meta))
                names = sorted(path.name for path in target.iterdir())
            except OSError as error:
                raise StorageError(
                    f"local state cannot be frozen in {target}: {error}; see that the disk has room and is sound"
                ) from error
            files = {name: FolderFile(target / name, self._immutable_name(name)) for name in names}
            return files, database.estimated_rows()

    def _immutable_name(self, name: str) -> str:
        if not name.endswith(".sst"):
            return ""
        return self._immutable.get(name) or f"{self._catalog.lineage}-{name}"

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self._failed = error
            raise

    # -------------------------------------------------------------------------------------------------- restore, close

    def restore(self, folders: Sequence[RestoredFolder]) -> None:
        """Take over these folders, each clipped to its key groups.

        Raises `CorruptCheckpointError` (a file is missing or flipped), `StateSchemaError` (tables of one name that do
        not fit each other), `StorageError` (the disk).
        """
        self._prepare_folder()
        with self._failing():
            found: Restored | None = take_over(folders, self.folder, self._memory_bytes, self._ctx)
        if found is not None:
            self._opened = found.database
            self._catalog = Catalog(self._catalog.lineage, found.catalog.tables)
            self._immutable = found.immutable

    def close(self) -> None:
        """Waits for a freeze that is being performed; one that was not begun is given up. Frozen folders stay."""
        with self._closing:
            if self._closed:
                return
            freeze = self._freeze
            if freeze is None:
                self._end()
            else:
                freeze.give_up(self._end)

    def _end(self) -> None:
        self._closed = True
        if self._opened is not None:
            self._opened.close()


class _Freeze:
    """One frozen view. `link` is idempotent: whoever asks second gets what the first has made."""

    def __init__(
        self, store: RocksStore, target: Path, meta: Json, written: Sequence[tuple[RocksTable, Sequence[Change]]]
    ) -> None:
        self._store = store
        self._target = target
        self._meta = meta
        self._written = written
        self._applying = threading.Lock()
        self._linking = threading.Lock()
        self._applied = False
        self._released = False
        self._result: tuple[Mapping[str, FolderFile], int] | None = None

    def finish(self) -> tuple[Mapping[str, FolderFile], int]:
        return self.link()

    def apply(self) -> None:
        if self._applied:
            return
        with self._applying:
            if not self._applied:
                self._store._apply(self._written)
                self._applied = True
                self._written = ()

    def link(self) -> tuple[Mapping[str, FolderFile], int]:
        with self._linking:
            if self._result is None:
                self.apply()
                # Given up by the uploader: nobody would ever remove the links.
                self._result = ({}, 0) if self._released else self._store._link(self._target, self._meta)
            return self._result

    def release(self) -> None:
        with self._linking:
            self._released = True
            shutil.rmtree(self._target, ignore_errors=True)

    def give_up(self, end: Callable[[], None]) -> None:
        """Close the database when nobody is at work in it; what was not done raises from then on."""
        with self._linking, self._applying:
            end()
