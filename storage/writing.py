"""How the state of one subtask becomes the objects and handles of one checkpoint; see `rayflow.storage.snapshots`."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa

from rayflow.core.ids import SubtaskId
from rayflow.core.manifest import FileRef, Section, StateHandle
from rayflow.errors import ConfigError, ProtocolError, StorageError
from rayflow.operators.base import FrozenFolder, FrozenTable, Piece
from rayflow.partition import HASH_VERSION
from rayflow.storage.arrow_files import Encoded, checksum, encode, encode_keyed
from rayflow.storage.layout import immutable_path, pack_path, piece_path
from rayflow.storage.reuse import Reuse, Written
from rayflow.storage.store import Store

SHARED_BYTES_MIN: Final = 64 * 1024
"""A piece whose file is smaller goes into the pack: a request costs as much as that."""
METADATA: Final = b"rayflow"
"""Key of the schema metadata in which a table tells what it is."""
_ALIGNMENT: Final = 64


class SubtaskWriter:
    """Collects the states of one subtask, writes the large ones as they come and the rest at the end."""

    def __init__(
        self,
        store: Store,
        checkpoint: int,
        subtask: SubtaskId,
        parallelism: int,
        *,
        max_parallelism: int,
        inline_max_bytes: int | None,
        shared_min_bytes: int = SHARED_BYTES_MIN,
        reuse: Reuse,
    ) -> None:
        self._store = store
        self._checkpoint = checkpoint
        self._subtask = subtask
        self._parallelism = parallelism
        self._max_parallelism = max_parallelism
        self._inline_max_bytes = inline_max_bytes
        self._shared_min_bytes = shared_min_bytes
        self._reuse = reuse
        self._handles: list[StateHandle] = []
        self._pack: list[bytes] = []
        self._pack_nbytes = 0
        self._written: dict[str, FileRef] = {}  # immutable files by name: two folders may hold the same
        self._uploaded = 0

    def add_table(self, operator: str, frozen: FrozenTable) -> None:
        who = f"state {frozen.name!r} of operator {operator!r} subtask {self._subtask.index}"
        for number, piece in enumerate(frozen.pieces):
            self._add_piece(operator, frozen, piece, number, who)
        if frozen.batches or not frozen.pieces:
            encoded = self._encoded(operator, frozen, frozen.batches, who)
            self._place(self._handle(operator, frozen, encoded), encoded, None)

    def add_folder(self, operator: str, folder: FrozenFolder) -> None:
        """Files that never change go to ``shared/`` once; the others are small and become rows of a table."""
        who = f"state {folder.name!r} of operator {operator!r} subtask {self._subtask.index}"
        if self._inline_max_bytes is None:
            raise ConfigError(
                f'{who} is on local disk and state="memory" has no place for files; use state="fs" or "rocksdb" with '
                "a checkpoint URL"
            )
        files, rows = folder.finish()
        parts, small = [], {}
        for name, file in sorted(files.items()):
            if not file.immutable:
                small[name] = _read(file.path, who)
                continue
            found = self._reuse.files.get(file.immutable) or self._written.get(file.immutable)
            if found is None:
                path = immutable_path(self._checkpoint, operator, self._subtask.index, file.immutable)
                found = self._written[file.immutable] = self._put(path, _read(file.path, who))
            parts.append((name, found))
        table = pa.table(
            {"file": pa.array(list(small), pa.string()), "data": pa.array(small.values(), pa.large_binary())}
        )
        own = {"operator": operator, "state": folder.name, "format": folder.format}
        encoded = encode(table.replace_schema_metadata({METADATA: _json(own)}))
        handle = StateHandle(
            operator=operator,
            subtask=self._subtask.index,
            parallelism=self._parallelism,
            name=folder.name,
            rows=rows,
            keyed=True,
            meta=folder.meta,
            format=folder.format,
            parts=tuple(parts),
        )
        self._place(handle, replace(encoded, blocks=()), None)

    def finish(self) -> Written:
        """Write the pack; everything in the result is durable."""
        if self._pack:
            path = pack_path(self._checkpoint, self._subtask.chain, self._subtask.index)
            data = b"".join(self._pack)
            file = FileRef(path, len(data), checksum(data))
            self._store.put(path, data)
            self._uploaded += len(data)
            packed = [h.section is not None and h.file is None for h in self._handles]
            self._handles = [
                replace(h, file=file) if mine else h for h, mine in zip(self._handles, packed, strict=True)
            ]
        self._uploaded += sum(len(h.inline or "") for h in self._handles)
        return Written(tuple(self._handles), self._uploaded)

    def _add_piece(self, operator: str, frozen: FrozenTable, piece: Piece, number: int, who: str) -> None:
        known = self._reuse.pieces.get(piece.id)
        if known is not None:
            again = replace(
                known,
                name=frozen.name,
                subtask=self._subtask.index,
                parallelism=self._parallelism,
                meta=frozen.meta,
                spread=frozen.spread,
                mode=frozen.mode,
            )
            self._handles.append(again)
            return
        if not piece.batches:
            raise ProtocolError(
                f"{who} has the piece {piece.id}, whose rows were let go and whose file is not known: it would be lost"
            )
        encoded = self._encoded(operator, frozen, piece.batches, who)
        path = piece_path(self._checkpoint, operator, self._subtask.index, frozen.name, number)
        self._place(replace(self._handle(operator, frozen, encoded), piece=piece.id), encoded, path)

    def _handle(self, operator: str, frozen: FrozenTable, encoded: Encoded) -> StateHandle:
        return StateHandle(
            operator=operator,
            subtask=self._subtask.index,
            parallelism=self._parallelism,
            name=frozen.name,
            rows=encoded.rows,
            keyed=frozen.key_columns is not None,
            group_rows=encoded.group_rows,
            meta=frozen.meta,
            spread=frozen.spread,
            mode=frozen.mode,
        )

    def _place(self, handle: StateHandle, encoded: Encoded, shared: str | None) -> None:
        """Into the manifest, into the pack, or, if it may be ``shared``, into an object of its own."""
        data = encoded.data
        if self._inline_max_bytes is None or len(data) <= self._inline_max_bytes:
            self._handles.append(replace(handle, inline=base64.b64encode(data).decode("ascii")))
            return
        if shared is not None and len(data) >= self._shared_min_bytes:
            self._handles.append(replace(handle, file=self._put(shared, data), blocks=encoded.blocks))
            return
        padding = bytes(-self._pack_nbytes % _ALIGNMENT)
        section = Section(self._pack_nbytes + len(padding), len(data), checksum(data))
        self._pack += [padding, data]
        self._pack_nbytes = section.offset + section.nbytes
        self._handles.append(replace(handle, section=section, blocks=encoded.blocks))

    def _put(self, path: str, data: bytes) -> FileRef:
        self._store.put(path, data)
        self._uploaded += len(data)
        return FileRef(path, len(data), checksum(data))

    def _encoded(
        self, operator: str, frozen: FrozenTable, batches: Sequence[pa.RecordBatch | pa.Table], who: str
    ) -> Encoded:
        table = _as_table(batches, frozen.schema, who)
        keys = frozen.key_columns
        own: dict[str, Any] = {"operator": operator, "state": frozen.name}
        if keys is None:
            return encode(_described(table, own))
        missing = [name for name in keys if name not in table.column_names]
        if missing or not keys:
            raise ProtocolError(f"{who} names key columns {keys}, its table has {table.column_names}")
        if frozen.subkey_columns:
            own["subkey_columns"] = list(frozen.subkey_columns)
        own |= {"key_columns": list(keys), "max_parallelism": self._max_parallelism, "hash_version": HASH_VERSION}
        return encode_keyed(_described(table, own), keys, self._max_parallelism)


def _described(table: pa.Table, own: dict[str, Any]) -> pa.Table:
    return table.replace_schema_metadata({**(table.schema.metadata or {}), METADATA: _json(own)})


def _json(own: dict[str, Any]) -> bytes:
    return json.dumps(own, sort_keys=True).encode()


def _read(path: Any, who: str) -> bytes:
    try:
        data: bytes = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{who} cannot be uploaded: file {path} of its frozen store: {error}") from error
    return data


def _as_table(batches: Sequence[pa.RecordBatch | pa.Table], schema: pa.Schema | None, who: str) -> pa.Table:
    try:
        tables = [b if isinstance(b, pa.Table) else pa.Table.from_batches([b]) for b in batches]
        if tables:
            return pa.concat_tables(tables).combine_chunks().unify_dictionaries()
    except pa.ArrowException as error:
        raise ProtocolError(f"{who} has batches of several schemas: {error}") from error
    if schema is None:
        raise ProtocolError(f"{who} has no batches and no schema; an empty state must say its schema")
    return schema.empty_table()
