"""`RocksTable`: one table of a `RocksStore`; whole batches in, whole batches out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from operator import is_not
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.base import BoolArray, Change, UInt16Array
from rayflow.storage.rocks.catalog import Catalog, TableInfo
from rayflow.storage.rocks.database import Database

if TYPE_CHECKING:
    from rayflow.storage.rocks.store import RocksStore

# Rows given to RocksDB at a time: bounds what a call keeps in memory beside the batch.
_CHUNK = 65_536


class RocksTable:
    """A `ColdTable`. Every method raises `StorageError` if the disk fails."""

    def __init__(self, store: RocksStore, info: TableInfo, where: str) -> None:
        self._store = store
        self._info = info
        self._where = where

    def get(self, groups: UInt16Array, keys: pa.RecordBatch) -> tuple[BoolArray, pa.RecordBatch]:
        encoded = self._info.encode_keys(groups, keys)
        with self._store.reading() as database:
            rows = database.get(encoded)
        found = np.fromiter(map(partial(is_not, None), rows), np.bool_, len(rows))
        if found.all():
            return found, self._info.decode_values(cast(list[bytes], rows), self._where)
        there = self._info.decode_values([row for row in rows if row is not None], self._where)
        return found, there.take(pa.array(np.cumsum(found) - 1, mask=~found))

    def write(self, change: Change) -> None:
        with self._store.writing() as database:
            self.put(database, change)

    def put(self, database: Database, change: Change) -> None:
        """`write` without looking for a freeze; for the freeze itself."""
        for start in range(0, len(change.groups), _CHUNK):
            part = slice(start, start + _CHUNK)
            keys = self._info.encode_keys(change.groups[part], change.keys.slice(start, _CHUNK))
            if change.values is None:
                database.delete(keys)
            else:
                database.put(keys, self._info.encode_values(change.values.slice(start, _CHUNK)))

    def scan(self, groups: range | None = None, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        with self._store.reading() as database:
            yield from scan(database, self._info, groups, batch_rows, self._where)

    def scan_prefix(self, groups: UInt16Array, prefixes: pa.RecordBatch) -> pa.RecordBatch:
        with self._store.reading() as database:
            starts = self._info.encode_prefixes(groups, prefixes)
            found = [pair for start in starts for pair in database.items(start, _after(start))]
        return _rows(self._info, found, self._where)

    def rekey(self, catalog: Catalog, keys: pa.Schema, database: Database) -> TableInfo:
        """All rows again, under a key of wider types: as a new table of the same name."""
        old = catalog.tables.pop(self._info.name)
        catalog.tables[f"{old.name} "] = old  # keeps its number taken
        new = catalog.add(old.name, keys, old.values, old.subkeys)
        pairs = _pairs(database, old, None)
        while chunk := list(islice(pairs, _CHUNK)):
            encoded = [key for key, _ in chunk]
            groups = np.frombuffer(b"".join([key[:2] for key in encoded]), ">u2").astype(np.uint16)
            narrow = old.decode_keys(encoded)
            wide = pa.RecordBatch.from_arrays(
                [pc.cast(narrow.column(field.name), field.type) for field in keys], schema=keys
            )
            values = old.decode_values([value for _, value in chunk], self._where)
            database.put(new.encode_keys(groups, wide), new.encode_values(values))
            database.delete(encoded)
        del catalog.tables[f"{old.name} "]
        return new


def scan(
    database: Database, info: TableInfo, groups: range | None, batch_rows: int, where: str
) -> Iterator[pa.RecordBatch]:
    """Keys and values, ascending by key group."""
    pairs = _pairs(database, info, groups)
    while chunk := list(islice(pairs, batch_rows)):
        yield _rows(info, chunk, where)


def _rows(info: TableInfo, pairs: list[tuple[bytes, bytes]], where: str) -> pa.RecordBatch:
    keys = info.decode_keys([key for key, _ in pairs])
    values = info.decode_values([value for _, value in pairs], where)
    schema = pa.schema([*info.keys, *info.values])
    return pa.RecordBatch.from_arrays([*keys.columns, *values.columns], schema=schema)


def _pairs(database: Database, info: TableInfo, groups: range | None) -> Iterator[tuple[bytes, bytes]]:
    """Encoded rows; one seek a group, because the rows of a table stand together only within a group."""
    number = info.number
    for group in database.groups(groups):
        start = group.to_bytes(2, "big")
        yield from database.items(start + bytes([number]), start + bytes([number + 1]))


def _after(prefix: bytes) -> bytes:
    """The smallest byte string that is greater than everything that begins with ``prefix``."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1])
