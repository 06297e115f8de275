"""Which tables a RocksDB holds, and how their rows are laid out: JSON, part of the checkpoint format.

::

    {"format": 1, "lineage": "<hex>",
     "tables": [{"name": "values", "number": 1, "keys": "<schema>", "subkeys": 0,
                 "versions": ["<schema>", ...], "current": 0}]}

A schema is an Arrow IPC schema message in base64. A key in the database is ``group (2 bytes, big-endian), number of the
table (1 byte)``, then the key columns; a value is ``version (1 byte)``, then the value columns in the schema of that
version (`rayflow.storage.rocks.codec`). ``current`` is the version that the rows are shown in. The last ``subkeys``
columns of the key are not of the stream's key: the key group is that of the others. ``lineage`` names the
life of the database that wrote the folder. The same JSON stands in the folder as `CATALOG_FILE`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import CorruptCheckpointError, StateSchemaError, StorageError
from rayflow.operators.base import UInt16Array
from rayflow.operators.state.evolution import Outcome, compare, migrate, refusal
from rayflow.storage.rocks.codec import FORMAT, RowCodec

CATALOG_FILE: Final = "rayflow-tables.json"
_LAST_NUMBER: Final = 254
"""255 is kept free: three bytes 0xff are behind every key."""
_LAST_VERSION: Final = 255


@dataclass(slots=True)
class TableInfo:
    """One table. ``versions`` only grows: rows say by number which one they were written in."""

    name: str
    number: int
    keys: pa.Schema
    versions: list[pa.Schema]
    current: int = 0
    subkeys: int = 0
    """How many columns at the end of ``keys`` the key group does not depend on."""
    _key_codec: RowCodec = field(init=False)
    _codecs: dict[int, RowCodec] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._key_codec = RowCodec(self.keys, lead=(("group", ">u2"), ("table", "u1")), key=True)

    @property
    def values(self) -> pa.Schema:
        return self.versions[self.current]

    def encode_keys(self, groups: UInt16Array, keys: pa.RecordBatch) -> list[bytes]:
        return self._key_codec.encode(keys, {"group": groups, "table": self.number})

    def encode_prefixes(self, groups: UInt16Array, prefixes: pa.RecordBatch) -> list[bytes]:
        schema = pa.schema([self.keys.field(index) for index in range(prefixes.num_columns)])
        codec = RowCodec(schema, lead=self._key_codec.lead, key=True)
        return codec.encode(prefixes, {"group": groups, "table": self.number})

    def decode_keys(self, rows: list[bytes]) -> pa.RecordBatch:
        return self._key_codec.decode(rows)

    def encode_values(self, values: pa.RecordBatch) -> list[bytes]:
        return self._codec(self.current).encode(values, {"version": self.current})

    def decode_values(self, rows: list[bytes], where: str) -> pa.RecordBatch:
        """In the current schema, whatever version each row was written in."""
        versions = np.frombuffer(b"".join([row[:1] for row in rows]), np.uint8) if len(self.versions) > 1 else None
        if versions is None or bool((versions == self.current).all()):
            return self._codec(self.current).decode(rows)
        parts: list[pa.RecordBatch] = []
        order = []
        for version in np.unique(versions).tolist():
            places = np.flatnonzero(versions == version)
            order.append(places)
            old = self._codec(version).decode([rows[place] for place in places.tolist()])
            parts.append(self._migrated(old, where))
        merged = pa.Table.from_batches(parts).combine_chunks()
        back = np.argsort(np.concatenate(order), kind="stable")
        return merged.take(pa.array(back)).combine_chunks().to_batches()[0]

    def declare(self, values: pa.Schema, where: str) -> None:
        """From now on rows have these columns. Raises `StateSchemaError` if rows of any version cannot be shown so."""
        for version in self.versions:
            found = compare(version, values)
            if found.outcome is Outcome.REFUSED:
                raise StateSchemaError(refusal(where, found))
        for number, version in enumerate(self.versions):
            if version.equals(values):
                self.current = number
                return
        if len(self.versions) > _LAST_VERSION:
            raise StateSchemaError(
                f"{where} has changed its columns {_LAST_VERSION} times, which is all that local state can tell apart; "
                "take a savepoint and start from it"
            )
        self.versions.append(values)
        self.current = len(self.versions) - 1

    def _codec(self, version: int) -> RowCodec:
        if version not in self._codecs:
            if version >= len(self.versions):
                raise CorruptCheckpointError(
                    f"rows of table {self.name!r} are of version {version}, known are {len(self.versions)}; "
                    "the files are not those of this table: start from another checkpoint"
                )
            self._codecs[version] = RowCodec(self.versions[version], lead=(("version", "u1"),))
        return self._codecs[version]

    def _migrated(self, old: pa.RecordBatch, where: str) -> pa.RecordBatch:
        wanted = self.values
        table = migrate(pa.Table.from_batches([old]), wanted, where=where).combine_chunks()
        arrays = [
            table.column(name).combine_chunks() if name in table.column_names else pa.nulls(table.num_rows, kind)
            for name, kind in zip(wanted.names, wanted.types, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=wanted)


@dataclass(slots=True)
class Catalog:
    lineage: str
    tables: dict[str, TableInfo] = field(default_factory=dict)

    def add(self, name: str, keys: pa.Schema, values: pa.Schema, subkeys: int = 0) -> TableInfo:
        taken = {table.number for table in self.tables.values()}
        number = next((n for n in range(1, _LAST_NUMBER + 1) if n not in taken), None)
        if number is None:
            raise StateSchemaError(
                f"a step can have {_LAST_NUMBER} tables of state on local disk, {name!r} would be one more; "
                "put values into one state with several columns"
            )
        info = TableInfo(name, number, keys.remove_metadata(), [values.remove_metadata()], 0, subkeys)
        self.tables[name] = info
        return info

    def to_json(self) -> Json:
        return {
            "format": FORMAT,
            "lineage": self.lineage,
            "tables": [
                {
                    "name": table.name,
                    "number": table.number,
                    "keys": _encode_schema(table.keys),
                    "subkeys": table.subkeys,
                    "versions": [_encode_schema(version) for version in table.versions],
                    "current": table.current,
                }
                for table in self.tables.values()
            ],
        }

    @classmethod
    def from_json(cls, meta: Json, where: str) -> Catalog:
        """Raises `StorageError` for a newer format and `CorruptCheckpointError` for anything else it cannot read."""
        try:
            found = meta["format"]
            if found == FORMAT:
                tables = [
                    TableInfo(
                        row["name"],
                        row["number"],
                        _decode_schema(row["keys"]),
                        [_decode_schema(version) for version in row["versions"]],
                        row["current"],
                        row["subkeys"],
                    )
                    for row in meta["tables"]
                ]
                return cls(meta["lineage"], {table.name: table for table in tables})
        except (KeyError, TypeError, ValueError, IndexError, pa.ArrowException) as error:
            raise CorruptCheckpointError(
                f"{where}: the list of tables cannot be read ({error}); start from another checkpoint"
            ) from error
        raise StorageError(
            f"{where}: local state is of format {found}, this rayflow reads {FORMAT}; use the version that wrote it"
        )

    @classmethod
    def read(cls, folder: Path) -> Catalog:
        path = folder / CATALOG_FILE
        try:
            meta = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CorruptCheckpointError(
                f"{path}: the list of tables cannot be read ({error}); start from another checkpoint"
            ) from error
        return cls.from_json(meta, str(folder))


def _encode_schema(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def _decode_schema(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text, validate=True)))
