"""`StateTable`: rows by key in memory, addressed by slot; the hot layer of keyed state on every back end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.base import EXPIRES, ColdTable
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.state.cache import Cache, Disk
from rayflow.operators.state.columns import BoolArray, FixedColumn, as_type, grown, slot_column
from rayflow.operators.state.index import Hasher, KeyIndex
from rayflow.operators.state.journal import Journal
from rayflow.operators.state.prefixes import PrefixOrder
from rayflow.partition import hash_columns


class Keeper(Protocol):
    """What becomes of changes: a `Journal` in memory, a cache over a local store under ``rocksdb``."""

    def grow(self, capacity: int) -> None: ...
    def touched(self, slots: Int64Array) -> None: ...
    def removing(self, slots: Int64Array) -> Int64Array: ...
    def settle(self) -> None: ...
    def clear(self) -> None: ...
    def reset(self) -> None: ...


class StateTable:
    """One keyed state of one operator instance. Made by `KeyedState.table`.

    A row is its key columns and its value columns; a key has one row or none. A **slot** is the number of a row; slots
    are valid until the next call of `slots` (which may move rows between memory and disk). Values are null until set.
    """

    name: str
    keys: pa.Schema
    values: pa.Schema

    def __init__(
        self,
        name: str,
        keys: pa.Schema,
        values: pa.Schema,
        *,
        subkeys: int = 0,
        ttl_us: int | None = None,
        wall_time: Callable[[], float] = lambda: 0.0,
        hasher: Hasher = hash_columns,
    ) -> None:
        self.name, self.keys, self.values = name, keys, values
        self.subkeys, self.ttl_us = subkeys, ttl_us
        fields = [*keys, *values, *([pa.field(EXPIRES, pa.int64())] if ttl_us is not None else [])]
        self.stored = pa.schema(fields)
        """Columns of a row in a checkpoint."""
        self.index = KeyIndex(keys, hasher)
        self.columns = {field.name: slot_column(field.type) for field in values}
        self._expires: Int64Array = np.zeros(0, np.int64)
        self._wall_time = wall_time
        self._hasher = hasher
        self.journal: Journal | None = None
        self.cache: Cache | None = None
        """One of the two, from `keep_in_memory` or `keep_on_disk`."""
        self._keeper: Keeper
        self._grown_to = 0
        self._prefixes: PrefixOrder | None = None
        """Made when it is needed first."""

    def keep_in_memory(self) -> Journal:
        """Once, before anything else: changes become pieces."""
        self._keeper = self.journal = Journal(self)
        return self.journal

    def keep_on_disk(self, disk: Disk, cold: ColdTable, *, known_empty: bool) -> Cache:
        """Once, before anything else: memory is a cache of the store."""
        self._keeper = self.cache = Cache(self, disk, cold, known_empty=known_empty)
        return self.cache

    @property
    def width(self) -> int:
        """Columns of a row in a checkpoint."""
        return len(self.stored)

    @property
    def rows(self) -> int:
        """Rows there are (under ``rocksdb`` those in memory)."""
        return self.index.count - (0 if self.cache is None else self.cache.gone_rows)

    def slots(self, keys: Sequence[pa.Array], *, insert: bool) -> Int64Array:
        """The slot of each row's key, -1 where there is none; with ``insert`` rows are made (all values null).

        Keys may repeat: equal keys get equal slots. Null is a key like any other. Rows whose time to live has passed
        are not there.
        """
        self._keeper.settle()
        if self.cache is not None:
            return self._through_cache(self.cache, keys, insert=insert)
        if not insert:
            return self._present(self.index.find(keys))
        slots, new = self.index.insert(keys)
        self._room()
        if len(new):
            self._begin(new)
            if self._prefixes is not None:
                self._prefixes.added(new)
        if len(new) < len(slots):
            self._begin_again(slots)
        return slots

    def key_arrays(self, slots: Int64Array) -> list[pa.Array]:
        """The keys of these rows, a column each."""
        return self.index.keys(slots)

    def get(self, slots: Int64Array, column: str) -> pa.Array:
        """Values in the column's type; null where the slot is -1."""
        return self.columns[column].get(slots)

    def set(self, slots: Int64Array, column: str, values: pa.Array) -> None:
        """Of several rows with one slot the last counts. No slot may be -1."""
        found = self.columns[column]
        found.put(slots, found.prepare(as_type(values, found.kind)), None)
        self.touch(slots)

    def numbers(self, column: str) -> npt.NDArray[Any]:
        """The values of a fixed-width column by slot, to be read and written in place by kernels of the engine.

        Integers, floats and bool as themselves, temporal types as their integers. Valid until the next `slots`. Writers
        call `touch`. Null is not seen here (it reads as zero in a new row): see `valid`. Raises TypeError for a column
        of another type, such as a string or a decimal.
        """
        found = self.columns[column]
        if not isinstance(found, FixedColumn):
            raise TypeError(f"column {column!r} of state {self.name!r} is {found.kind}, not a number; use get and set")
        return found.data

    def valid(self, column: str) -> npt.NDArray[np.bool_]:
        """Which slots hold a value, by slot; as `numbers`."""
        return self.columns[column].valid

    def touch(self, slots: Int64Array) -> None:
        """These rows were changed through `numbers` or `valid`, or will be before the next `slots`: the next checkpoint
        must have them."""
        if self.ttl_us is not None:
            self._expires[slots] = self.now_us() + self.ttl_us
        self._keeper.touched(slots)

    def delete(self, slots: Int64Array) -> None:
        """Remove the rows; -1 and repeated slots are allowed."""
        slots = self.index.distinct(slots[slots >= 0])
        self.drop(slots[self.index.alive[slots]])

    def clear(self) -> None:
        """Remove every row."""
        self._reset()
        self._keeper.clear()

    def scan(self, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """All rows, keys then values, on disk and in memory, each once; the table must not be changed meanwhile."""
        if self.cache is not None:
            yield from map(self._visible, self.cache.scan(batch_rows))
            return
        slots = self._live()
        for low in range(0, len(slots), batch_rows):
            yield self._visible(self.gather(slots[low : low + batch_rows]))

    def with_prefix(self, prefixes: Sequence[pa.Array]) -> pa.RecordBatch:
        """All rows (keys then values) whose key begins with one of these; for tables with a subkey.

        ``prefixes`` are the first columns of the key, distinct. Rows come grouped by prefix, in no order within.
        """
        if self.cache is not None:
            return self._visible(self.cache.with_prefix(prefixes))
        if self._prefixes is None or self._prefixes.width != len(prefixes):
            self._prefixes = PrefixOrder(self.index, len(prefixes), self._hasher)
            self._prefixes.added(np.flatnonzero(self.index.alive[: self.index.high]))
        fitting = [as_type(array, field.type) for array, field in zip(prefixes, self.keys, strict=False)]
        return self._visible(self.gather(self._prefixes.find(fitting)))

    # ------------------------------------------------------------------------------------- for the keeper of changes

    def gather(self, slots: Int64Array) -> pa.RecordBatch:
        """Copies of the rows as they stand in a checkpoint."""
        columns = self.index.keys(slots) + [column.get(slots) for column in self.columns.values()]
        if self.ttl_us is not None:
            columns.append(pa.array(self._expires[slots]))
        return pa.RecordBatch.from_arrays(columns, schema=self.stored)

    def now_us(self) -> int:
        """Wall time, in us."""
        return int(self._wall_time() * 1_000_000)

    def outdated(self, slots: Int64Array) -> BoolArray | None:
        if self.ttl_us is None:
            return None
        outdated: BoolArray = self._expires[slots] <= self.now_us()
        return outdated

    def drop(self, slots: Int64Array) -> None:
        """Remove rows: distinct, all there."""
        if len(slots):
            self.index.remove(self._keeper.removing(slots))

    def load(self, rows: pa.Table | pa.RecordBatch) -> Int64Array:
        """Put rows of a checkpoint, columns `stored`, into the table; nothing counts as changed."""
        slots, new = self.index.insert([flat(rows.column(i)) for i in range(len(self.keys))])
        self._room()
        self.empty(new)
        self.put(slots, rows)
        return slots

    def put(self, slots: Int64Array, rows: pa.Table | pa.RecordBatch) -> None:
        """Values (and the time they expire) of rows that are there; nothing counts as changed."""
        for name, column in self.columns.items():
            column.put(slots, column.prepare(as_type(rows.column(name), column.kind)), None)
        if self.ttl_us is not None:
            # Null in rows from before the state had a time to live: theirs begins now.
            self._expires[slots] = flat(rows.column(EXPIRES)).fill_null(self.now_us() + self.ttl_us).to_numpy()

    def retain(self, slots: Int64Array) -> Int64Array:
        """Forget all rows but these, which get new slots; the memory of the others is free again."""
        rows = self.gather(slots)
        self._reset()
        self._keeper.reset()
        return self.load(rows)

    def held_bytes(self) -> int:
        """Memory in use; room that was made but not touched yet does not count."""
        used = self.index.high / max(1, self.index.capacity)
        columns = sum(column.slot_bytes for column in self.columns.values()) + self._expires.nbytes
        heaps = sum(column.heap_bytes for column in self.columns.values())
        return int(used * columns) + heaps + self.index.held_bytes()

    def empty(self, slots: Int64Array) -> None:
        """All values null."""
        for column in self.columns.values():
            column.clear(slots)

    # -------------------------------------------------------------------------------------------------------- within

    def _begin(self, slots: Int64Array) -> None:
        """These are new rows."""
        self.empty(slots)
        self.touch(slots)

    def _begin_again(self, slots: Int64Array) -> None:
        """Rows of these that have expired begin anew."""
        outdated = self.outdated(slots)
        if outdated is not None and outdated.any():
            self._begin(slots[outdated])

    def _through_cache(self, cache: Cache, keys: Sequence[pa.Array], *, insert: bool) -> Int64Array:
        slots, new = self.index.insert(keys)
        self._room()
        if len(new):
            self.empty(new)
            unknown = cache.fetch(new)
            if insert:
                self.touch(unknown)
            elif len(unknown):
                self.index.remove(unknown)
                slots = np.where(self.index.alive[slots], slots, -1)
        if insert:
            again = cache.revive(slots)
            if len(again):
                self._begin(again)
            self._begin_again(slots)
        else:
            slots = self._present(np.where(cache.absent(slots), -1, slots))
        cache.mark_used(slots[slots >= 0] if not insert else slots)
        return slots

    def _reset(self) -> None:
        self.index = KeyIndex(self.keys, self._hasher)
        self.columns = {field.name: slot_column(field.type) for field in self.values}
        self._expires = np.zeros(0, np.int64)
        self._prefixes = None
        self._grown_to = 0

    def _room(self) -> None:
        """All columns as long as the index."""
        capacity = self.index.capacity
        if self._grown_to != capacity:
            for column in self.columns.values():
                column.grow(capacity)
            if self.ttl_us is not None:
                self._expires = grown(self._expires, capacity)
            self._keeper.grow(capacity)
            self._grown_to = capacity

    def _present(self, slots: Int64Array) -> Int64Array:
        if self.ttl_us is not None and len(self._expires):
            outdated = self._expires[slots] <= self.now_us()
            outdated &= slots >= 0
            if outdated.any():
                slots = np.where(outdated, -1, slots)
        return slots

    def _live(self) -> Int64Array:
        slots = np.flatnonzero(self.index.alive[: self.index.high])
        outdated = self.outdated(slots)
        return slots if outdated is None else slots[~outdated]

    def _visible(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Rows as they are stored, without those that have expired and without the engine's columns."""
        if self.ttl_us is not None:
            rows = rows.filter(pc.greater(rows.column(EXPIRES), self.now_us()).fill_null(True))
        return rows.select([*self.keys.names, *self.values.names])
