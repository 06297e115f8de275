"""Handles to list and map states for whole batches; shapes as in `rayflow.operators.state.access`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.access import D, Handle, HasScope, Scope, Tables, true_rows
from rayflow.operators.state.access_values import AddingHandle, ValueHandle
from rayflow.operators.state.declared import (
    AggregatingState,
    Declared,
    ListState,
    MapState,
    ReducingState,
    ValueState,
)
from rayflow.operators.state.distinct import index_in


class SubkeyHandle(Handle[D]):
    """What lists and maps have in common: a table whose key has one column more."""

    def rows_of(self, scope: Scope, chosen: Int64Array | None = None) -> tuple[Int64Array, pa.RecordBatch]:
        """(position of the key in ``ctx.keys``, row) for every row of these keys; rows in no order."""
        table = self.table
        keys = scope.keys if chosen is None else scope.keys.take(pa.array(chosen))
        scope.forget(table)
        found = table.with_prefix(keys.columns)
        width = keys.num_columns
        at = index_in(found.columns[:width], keys.columns)
        return (at if chosen is None else chosen[at]), found.select(range(width, found.num_columns))

    def slots(self, scope: Scope, index: Int64Array, subkeys: pa.Array, *, insert: bool) -> Int64Array:
        keys = scope.keys.take(pa.array(index)).columns
        return self.table.slots([*keys, subkeys], insert=insert)

    def clear(self, ctx: HasScope, mask: Any = None) -> None:
        """Remove everything of all keys, or of those where ``mask`` (per key) is true."""
        scope = self.scope(ctx)
        chosen = self.mask(mask, scope.keys.num_rows, "key")
        self.remove_all(scope, None if chosen is None else true_rows(chosen))

    def remove_all(self, scope: Scope, chosen: Int64Array | None) -> None:
        at, rows = self.rows_of(scope, chosen)
        if rows.num_rows:
            self.table.delete(self.slots(scope, at, rows.column(0), insert=False))


class ListHandle(SubkeyHandle[ListState]):
    """See `rf.ListState`."""

    def get(self, ctx: HasScope) -> pa.ListArray:
        """The list per key; an empty one where there is none."""
        return self.lists(self.scope(ctx))

    def lists(self, scope: Scope) -> pa.ListArray:
        at, rows = self.rows_of(scope)
        order = np.lexsort((rows.column(0).to_numpy(), at))
        counts = np.bincount(at, minlength=scope.keys.num_rows)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        values = rows.column(1).take(pa.array(order))
        return pa.ListArray.from_arrays(pa.array(offsets), values)

    def append(self, ctx: HasScope, values: Any, mask: Any = None) -> None:
        """Append values per row to the lists of their keys, in the order of the rows; null is an element too."""
        scope = self.scope(ctx)
        n, index = len(scope.index), scope.index
        array = self.fit(values, self.declared.type, n, "row")
        chosen = self.mask(mask, n, "row")
        if chosen is not None:
            rows = true_rows(chosen)
            index, array = index[rows], array.take(pa.array(rows))
        self.extend(scope, index, array)

    def extend(self, scope: Scope, index: Int64Array, values: pa.Array) -> None:
        if len(values):
            positions = pa.array(self._tables.next_positions(len(values)))
            table = self.table
            table.set(self.slots(scope, index, positions, insert=True), table.values.names[0], values)

    def set(self, ctx: HasScope, lists: Any, mask: Any = None) -> None:
        """Replace the lists: a list per key; null is an empty one."""
        scope = self.scope(ctx)
        n = scope.keys.num_rows
        array = self.fit(lists, pa.list_(self.declared.type), n, "key")
        chosen = self.mask(mask, n, "key")
        index = np.arange(n) if chosen is None else true_rows(chosen)
        if chosen is not None:
            array = array.take(pa.array(index))
        self.remove_all(scope, index)
        sizes = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
        self.extend(scope, np.repeat(index, sizes), array.flatten())


class MapHandle(SubkeyHandle[MapState]):
    """See `rf.MapState`."""

    def get(self, ctx: HasScope, map_keys: Any) -> pa.Array:
        """The value per row: that of ``map_keys`` (per row) in the map of the row's key; null where there is none."""
        slots = self._asked(ctx, map_keys)
        return self.table.get(slots, self.table.values.names[0])

    def contains(self, ctx: HasScope, map_keys: Any) -> pa.Array:
        """Per row, whether the map of the row's key has an entry for ``map_keys`` (per row)."""
        return pa.array(self._asked(ctx, map_keys) >= 0)

    def put(self, ctx: HasScope, map_keys: Any, values: Any, mask: Any = None) -> None:
        """Set entries, a key and a value per row; of several rows with one entry the last counts."""
        scope = self.scope(ctx)
        n = len(scope.index)
        index, keys = self._chosen(scope, map_keys, mask)
        array = self.fit(values, self.declared.type, n, "row")
        chosen = self.mask(mask, n, "row")
        if chosen is not None:
            array = array.filter(chosen)
        self.put_to(scope, index, keys, array)

    def put_to(self, scope: Scope, index: Int64Array, map_keys: pa.Array, values: pa.Array) -> None:
        if len(values):
            table = self.table
            table.set(self.slots(scope, index, map_keys, insert=True), table.values.names[0], values)

    def remove(self, ctx: HasScope, map_keys: Any, mask: Any = None) -> None:
        """Remove entries, a key per row; those that are not there are left out."""
        scope = self.scope(ctx)
        index, keys = self._chosen(scope, map_keys, mask)
        self.remove_from(scope, index, keys)

    def remove_from(self, scope: Scope, index: Int64Array, map_keys: pa.Array) -> None:
        if len(map_keys):
            self.table.delete(self.slots(scope, index, map_keys, insert=False))

    def entries(self, ctx: HasScope) -> pa.RecordBatch:
        """All entries of the keys of this call: ``index`` (int64, into ``ctx.keys``, ascending), ``map_key`` and
        ``value``; those of one key in no order."""
        return self.entries_of(self.scope(ctx))

    def entries_of(self, scope: Scope, chosen: Int64Array | None = None) -> pa.RecordBatch:
        at, rows = self.rows_of(scope, chosen)
        order = pa.array(np.argsort(at, kind="stable"))
        columns = [pa.array(at).take(order), rows.column(0).take(order), rows.column(1).take(order)]
        return pa.RecordBatch.from_arrays(columns, names=["index", "map_key", "value"])

    def fit_keys(self, map_keys: Any, rows: int) -> pa.Array:
        array = self.fit(map_keys, self.declared.key_type, rows, "row")
        if array.null_count:
            raise self.problem(f"got {array.null_count} null map keys, expected none; leave those rows out by mask=")
        return array

    def _chosen(self, scope: Scope, map_keys: Any, mask: Any) -> tuple[Int64Array, pa.Array]:
        n, index = len(scope.index), scope.index
        array = self.fit(map_keys, self.declared.key_type, n, "row")
        chosen = self.mask(mask, n, "row")
        if chosen is not None:
            rows = true_rows(chosen)
            index, array = index[rows], array.take(pa.array(rows))
        return index, self.fit_keys(array, len(index))

    def _asked(self, ctx: HasScope, map_keys: Any) -> Int64Array:
        scope = self.scope(ctx)
        index, keys = self._chosen(scope, map_keys, None)
        return self.slots(scope, index, keys, insert=False)


HANDLES: dict[type[Declared], type[Handle[Any]]] = {
    ValueState: ValueHandle,
    ReducingState: AddingHandle,
    AggregatingState: AddingHandle,
    ListState: ListHandle,
    MapState: MapHandle,
}


def handle_of(declared: Declared, name: str, tables: Tables) -> Handle[Any]:
    kind = next(base for base in type(declared).__mro__ if base in HANDLES)
    return HANDLES[kind](declared, name, tables)


__all__ = ["ListHandle", "MapHandle", "handle_of"]
