"""The rows in the files of a RocksDB checkpoint as Arrow: for savepoints, for people, and for the other back ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.storage.rocks.catalog import Catalog
from rayflow.storage.rocks.database import Database
from rayflow.storage.rocks.table import scan

_MEMORY_BYTES: Final = 64 * 1024 * 1024
_BATCH_ROWS: Final = 65_536


def read_folder(folder: Path, meta: Json, groups: range | None = None) -> Mapping[str, Iterator[pa.RecordBatch]]:
    """The tables by name: batches of the key columns and then the value columns, ascending by key group; those of
    ``groups`` only. Empty tables have no batch; `folder_tables` tells their columns.

    ``folder`` holds the files as they were frozen and is only read; ``meta`` is `FrozenFolder.meta`. The files must
    stay until the iterators are done. Raises `CorruptCheckpointError` and `StorageError`.
    """
    catalog = Catalog.from_json(meta, str(folder))
    database = Database(folder, _MEMORY_BYTES, read_only=True)
    return {
        name: scan(database, info, groups, _BATCH_ROWS, f"state {name!r} in {folder}")
        for name, info in catalog.tables.items()
    }


@dataclass(frozen=True, slots=True)
class FolderTable:
    """The columns of one table in a folder."""

    keys: pa.Schema
    values: pa.Schema
    subkeys: int
    """So many columns at the end of ``keys`` do not count for the key group."""


def folder_tables(meta: Json) -> Mapping[str, FolderTable]:
    """The tables by name, from `FrozenFolder.meta` alone."""
    catalog = Catalog.from_json(meta, "the checkpoint")
    return {name: FolderTable(info.keys, info.values, info.subkeys) for name, info in catalog.tables.items()}
