"""`KeyedState`: all tables of one operator instance, in and out of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import ProtocolError, StateSchemaError
from rayflow.operators.base import (
    DELETED,
    EXPIRES,
    FrozenState,
    FrozenTable,
    OperatorContext,
    Piece,
    RestoredState,
    new_piece,
)
from rayflow.operators.state.cache import Disk, purge
from rayflow.operators.state.evolution import migrate
from rayflow.operators.state.journal import Journal
from rayflow.operators.state.table import StateTable


class KeyedState:
    """Opened in `Operator.open`. Order of calls: restore? -> { table | freeze | use of tables }* -> close.

    ``keys`` are the key columns of the stream; every table's key begins with them, and the key group of a row is that
    of these columns alone (rule K2).
    """

    def __init__(self, ctx: OperatorContext, keys: tuple[str, ...]) -> None:
        self._ctx = ctx
        self._keys = keys
        self._tables: dict[str, StateTable] = {}
        self._restored: dict[str, list[_Restored]] = {}
        """Of tables that are not declared (yet)."""
        self._disk: Disk | None = None
        if ctx.backend.kind == "rocksdb":
            if ctx.backend.open_cold is None or ctx.backend.scratch is None:
                raise ProtocolError(f"{ctx}: the rocksdb back end was given no store to open")
            self._disk = Disk(ctx.backend.open_cold(ctx.backend.scratch("state"), ctx), ctx)
        self._closed = False

    def restore(self, states: Sequence[RestoredState]) -> None:
        """Before the first `table`. States of tables that are never declared are kept and frozen again, not lost."""
        if self._tables or self._restored:
            raise ProtocolError(f"{self._ctx}: state was restored after it was in use; restore comes first and once")
        folders = [state.folder for state in states if state.folder is not None]
        if folders and self._disk is not None:
            self._disk.store.restore(folders)
        for state in states:
            if state.folder is not None:
                if self._disk is not None:
                    continue
                raise StateSchemaError(
                    f"{self._ctx}: the checkpoint holds state {state.name!r} as files of {state.folder.format}, and "
                    f"this run keeps state as {self._ctx.backend.kind!r}; restore from a savepoint of that run, or run "
                    f"with state={state.folder.format!r}"
                )
            piece = new_piece([state.table]) if not state.piece else Piece(state.piece, (state.table,))
            if not state.table.schema.names:
                continue
            self._restored.setdefault(state.name, []).append(_Restored(state, piece))

    def table(
        self, name: str, keys: pa.Schema, values: pa.Schema, *, subkeys: int = 0, ttl_us: int | None = None
    ) -> StateTable:
        """The table of this name; the same one for the same name. ``subkeys``: how many columns at the end of ``keys``
        are not of the stream's key. ``ttl_us``: rows not written for so long (wall time) are gone.

        Raises `StateSchemaError` if restored rows of that name have other columns and no migration leads to these.
        """
        found = self._tables.get(name)
        if found is not None:
            return found
        table = StateTable(name, keys, values, subkeys=subkeys, ttl_us=ttl_us, wall_time=self._ctx.wall_time)
        earlier = self._restored.get(name, ())
        if self._disk is None:
            journal = table.keep_in_memory()
            for restored in earlier:
                self._take_back(table, journal, restored)
            journal.forget_removed()
        else:
            self._open_cold(table, self._disk, earlier)
        self._restored.pop(name, None)
        self._tables[name] = table
        return table

    def freeze(self) -> FrozenState:
        """The state of all tables as it is now, in time that does not grow with it (rule A3): for `Operator.snapshot`.

        Tables are named in the checkpoint as they are here. Under ``memory`` and ``fs`` each is a `FrozenTable` with
        pieces: rows changed since the last freeze, and a moving part of the rest, so that pieces can be let go. Under
        ``rocksdb`` all are in one `FrozenFolder`.
        """
        tables = [
            FrozenTable(
                table.name,
                schema=table.stored,
                key_columns=self._keys,
                pieces=table.journal.freeze(),
                mode="upsert",
                subkey_columns=tuple(table.keys.names[len(table.keys) - table.subkeys :]),
            )
            for table in self._tables.values()
            if table.journal is not None
        ]
        tables += [self._undeclared(*item) for item in self._restored.items()]
        if self._disk is None:
            return FrozenState(tables=tuple(tables))
        changes = {table.name: table.cache.changes() for table in self._tables.values() if table.cache is not None}
        return FrozenState(tables=tuple(tables), folders=(self._disk.store.freeze(changes),))

    def close(self) -> None:
        """Release files and memory; safe at any time and twice."""
        self._tables, self._restored = {}, {}
        if self._disk is not None and not self._closed:
            self._disk.store.close()
        self._closed = True

    # -------------------------------------------------------------------------------------------------------- within

    def _take_back(self, table: StateTable, journal: Journal, restored: _Restored) -> None:
        rows = restored.state.table
        plain, removed = self._migrated(table, rows)
        exact = plain.schema.remove_metadata().equals(_without(rows.schema, DELETED).remove_metadata())
        piece = Piece(restored.piece.id, (rows,), transient=True)
        if not exact:
            whole = plain if removed is None else plain.append_column(DELETED, removed)
            piece = new_piece([whole], transient=True)
        if removed is not None:
            gone = table.index.find(plain.filter(removed).columns[: len(table.keys)])
            table.drop(np.unique(gone[gone >= 0]))
            plain = plain.filter(pc.invert(removed))
        slots = table.load(plain)
        if len(rows):
            journal.adopt(piece, len(rows), slots)

    def _open_cold(self, table: StateTable, disk: Disk, earlier: Sequence[_Restored]) -> None:
        """A table of the store; rows that come from another back end or a savepoint are written into it."""
        values = pa.schema(list(table.stored)[len(table.keys) :])
        stored = disk.store.tables().get(table.name)
        known_empty = stored is None
        if stored is not None and table.ttl_us is None and EXPIRES in stored[1].names:
            # The state has lost its time to live: what had expired by then does not come back.
            old = disk.store.table(table.name, *stored, subkeys=table.subkeys)
            for group in self._ctx.key_groups:
                purge(old, group, len(table.keys), self._now_us())
        cold = disk.store.table(table.name, table.keys, values, subkeys=table.subkeys)
        cache = table.keep_on_disk(disk, cold, known_empty=known_empty)
        for restored in earlier:
            plain, removed = self._migrated(table, restored.state.table)
            if removed is None:
                cache.write(plain)
            else:
                cache.write(plain.filter(removed), delete=True)
                cache.write(plain.filter(pc.invert(removed)))

    def _migrated(self, table: StateTable, rows: pa.Table) -> tuple[pa.Table, pa.ChunkedArray | None]:
        """(the rows with the columns of today, which of them are removed keys or None)."""
        user = pa.schema([*table.keys, *table.values])
        moved = migrate(rows, user, keys=table.keys.names, where=f"{self._ctx}, state {table.name!r}")
        removed = pc.fill_null(moved.column(DELETED), False) if DELETED in moved.schema.names else None
        if table.ttl_us is None and EXPIRES in moved.schema.names:
            due = pc.less_equal(moved.column(EXPIRES), self._now_us()).fill_null(False)  # as in `_open_cold`
            removed = due if removed is None else pc.or_(removed, due)
        plain = moved.select(user.names)
        if table.ttl_us is not None:
            plain = plain.append_column(EXPIRES, self._expiry(table, moved))
        return plain, removed

    def _expiry(self, table: StateTable, rows: pa.Table) -> pa.Array:
        """When the rows expire; a state that had no time to live begins to have it now."""
        if EXPIRES in rows.schema.names:
            return rows.column(EXPIRES)
        assert table.ttl_us is not None
        due = self._now_us() + table.ttl_us
        return pa.array(np.full(len(rows), due, np.int64))

    def _now_us(self) -> int:
        return int(self._ctx.wall_time() * 1_000_000)

    def _undeclared(self, name: str, kept: Sequence[_Restored]) -> FrozenTable:
        """Rows of a table that nobody has asked for, as they came."""
        first = kept[0].state
        return FrozenTable(
            name,
            schema=first.table.schema,
            key_columns=self._keys,
            meta=first.meta,
            pieces=tuple(restored.piece for restored in kept if len(restored.state.table)),
            mode="upsert",
            subkey_columns=first.subkey_columns,
        )


@dataclass(frozen=True, slots=True)
class _Restored:
    state: RestoredState
    piece: Piece
    """Its rows, under the id they had or a new one."""


def _without(schema: pa.Schema, name: str) -> pa.Schema:
    return schema.remove(schema.get_field_index(name)) if name in schema.names else schema
