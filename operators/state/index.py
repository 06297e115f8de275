"""`KeyIndex`: from keys to slots, a whole batch at a time.

Open addressing in numpy with double hashing (Knuth, TAOCP 3, 6.4, algorithm D): every round advances all keys that
are not decided yet, so there are as many rounds as the longest probe sequence, on arrays that shrink fast. An entry
holds 31 bits of the hash and the slot, so that one random access decides most; equality of the keys themselves is
always verified. At most half of the entries are used.

Measured on one core, 65,536 random lookups against 1 M keys, hashing included: int64 20 to 23 M rows/s, strings of 15
bytes 6 M rows/s (half of it is Arrow's take of the stored keys, to compare them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.columns import BoolArray, as_type, grown, slot_column
from rayflow.partition import hash_columns

UInt64Array: TypeAlias = npt.NDArray[np.uint64]
Hasher: TypeAlias = Callable[[Sequence[pa.Array], Sequence[str]], UInt64Array]

_EMPTY: Final = -1
_GONE: Final = -2
_SLOT: Final = 0xFFFF_FFFF
_SMALLEST: Final = 1_024


class KeyIndex:
    """Keys by slot, and the way back. Slots are reused; ``capacity`` is one more than any slot may be."""

    def __init__(self, keys: pa.Schema, hasher: Hasher = hash_columns) -> None:
        self.schema = keys
        self.columns = [slot_column(field.type, key=True) for field in keys]
        self.hashes: UInt64Array = np.zeros(0, np.uint64)
        self.alive: BoolArray = np.zeros(0, np.bool_)
        self.capacity = 0
        self.high = 0
        """No slot from here on was ever used."""
        self.count = 0
        self._hasher = hasher
        self._free: list[Int64Array] = []
        self._free_count = 0
        self._entries: Int64Array = np.full(_SMALLEST, _EMPTY, np.int64)
        self._scratch: Int64Array = np.zeros(0, np.int64)
        self._used = 0
        """Entries that are not empty, removed ones among them; at most half."""

    def find(self, keys: Sequence[pa.Array]) -> Int64Array:
        """The slot of each key, -1 where it has none."""
        arrays, hashes = self._hashed(keys)
        return self._find(hashes, self._prepared(arrays))

    def insert(self, keys: Sequence[pa.Array]) -> tuple[Int64Array, Int64Array]:
        """(the slot of each key, those of them that are new and hold nothing yet)."""
        arrays, hashes = self._hashed(keys)
        prepared = self._prepared(arrays)
        slots = self._find(hashes, prepared)
        missing = np.flatnonzero(slots < 0)
        if len(missing) == 0:
            return slots, missing
        self._reserve(len(missing))
        return slots, self._place(missing, hashes, prepared, slots)

    def remove(self, slots: Int64Array) -> None:
        """Free these slots: distinct, all in use."""
        pending, hashes = slots, self.hashes[slots]
        places = self._first(hashes)
        while len(pending):
            entries = self._entries[places]
            found = (entries & _SLOT == pending) & (entries >= 0)
            self._entries[places[found]] = _GONE
            rest = np.flatnonzero(~found)
            pending, hashes = pending[rest], hashes[rest]
            places = self._next(places[rest], hashes)
        self.alive[slots] = False
        for column in self.columns:
            column.clear(slots)
        self.count -= len(slots)
        self._free.append(slots)
        self._free_count += len(slots)
        if self.count == 0:
            self._forget()

    def distinct(self, slots: Int64Array) -> Int64Array:
        """Each slot once; without sorting."""
        if len(slots) < 2 or bool(np.all(slots[1:] > slots[:-1])):
            return slots
        if len(self._scratch) < self.capacity:
            self._scratch = np.empty(self.capacity, np.int64)
        places = np.arange(len(slots))
        self._scratch[slots] = places
        once: Int64Array = slots[self._scratch[slots] == places]
        return once

    def keys(self, slots: Int64Array) -> list[pa.Array]:
        """The key columns of these slots."""
        return [column.get(slots) for column in self.columns]

    def held_bytes(self) -> int:
        """Memory in use; room that was made but not touched yet does not count."""
        slots = self.hashes.nbytes + self.alive.nbytes + sum(column.slot_bytes for column in self.columns)
        heaps = sum(column.heap_bytes for column in self.columns)
        return self._entries.nbytes + heaps + slots * self.high // max(1, self.capacity)

    # ------------------------------------------------------------------------------------------------------- probing

    def _hashed(self, keys: Sequence[pa.Array]) -> tuple[list[pa.Array], UInt64Array]:
        arrays = [as_type(array, field.type) for array, field in zip(keys, self.schema, strict=True)]
        return arrays, self._hasher(arrays, self.schema.names)

    def _prepared(self, arrays: Sequence[pa.Array]) -> list[Any]:
        return [column.prepare(array) for column, array in zip(self.columns, arrays, strict=True)]

    def _first(self, hashes: UInt64Array) -> Int64Array:
        places: Int64Array = (hashes & np.uint64(len(self._entries) - 1)).view(np.int64)
        return places

    def _next(self, places: Int64Array, hashes: UInt64Array) -> Int64Array:
        """An odd step that is the key's own meets every entry."""
        places = places + ((hashes >> np.uint64(32)).view(np.int64) | 1)
        places &= len(self._entries) - 1
        return places

    def _same(self, slots: Int64Array, prepared: Sequence[Any], rows: Int64Array | None) -> BoolArray:
        equal = self.columns[0].same(slots, prepared[0], rows)
        for column, values in zip(self.columns[1:], prepared[1:], strict=True):
            equal &= column.same(slots, values, rows)
        return equal

    def _find(self, hashes: UInt64Array, prepared: Sequence[Any]) -> Int64Array:
        found = np.full(len(hashes), -1, np.int64)
        if self.count == 0:
            return found
        rows: Int64Array | None = None  # all
        places, marks = self._first(hashes), _marks(hashes)
        while len(places):
            entries = self._entries[places]
            hit = (entries >> 32) == marks
            if hit.all():
                slots = entries & _SLOT
                hit = self._same(slots, prepared, rows)
                if hit.all():
                    if rows is None:
                        return slots
                    found[rows] = slots
                    break
                which = np.flatnonzero(hit)
            else:
                which = np.flatnonzero(hit)
                if len(which):
                    slots = entries[which] & _SLOT
                    equal = self._same(slots, prepared, which if rows is None else rows[which])
                    if not equal.all():
                        hit[which[~equal]] = False
                        which = which[equal]
            if len(which):
                found[which if rows is None else rows[which]] = entries[which] & _SLOT
            rest = np.flatnonzero(~hit & (entries != _EMPTY))
            rows = rest if rows is None else rows[rest]
            places, marks = self._next(places[rest], hashes[rows]), marks[rest]
        return found

    def _place(self, rows: Int64Array, hashes: UInt64Array, prepared: Sequence[Any], slots: Int64Array) -> Int64Array:
        """Give these rows, whose keys have no slot, one each; equal keys the same. Fills in ``slots``."""
        pending = rows
        places, marks = self._first(hashes[rows]), _marks(hashes[rows])
        new: list[Int64Array] = []
        while len(pending):
            entries = self._entries[places]
            empty = np.flatnonzero(entries == _EMPTY)
            done = np.zeros(len(pending), np.bool_)
            if len(empty):
                claimed = places[empty]
                self._entries[claimed] = empty  # of several rows that want the same entry the last one gets it
                won = empty[self._entries[claimed] == empty]
                taken = self._allocate(len(won))
                self._entries[places[won]] = (marks[won] << 32) | taken
                winners = pending[won]
                self.hashes[taken] = hashes[winners]
                self.alive[taken] = True
                for column, values in zip(self.columns, prepared, strict=True):
                    column.put(taken, values, winners)
                slots[winners] = taken
                done[won] = True
                new.append(taken)
            which = np.flatnonzero((entries >> 32) == marks)
            if len(which):  # a key that a row before it, of this batch, has brought in
                found = entries[which] & _SLOT
                equal = self._same(found, prepared, pending[which])
                slots[pending[which[equal]]] = found[equal]
                done[which[equal]] = True
            rest = np.flatnonzero(~done)
            pending, marks = pending[rest], marks[rest]
            onward = self._next(places[rest], hashes[pending])
            places = np.where(entries[rest] == _EMPTY, places[rest], onward)  # who lost an entry looks at it again
        return np.concatenate(new)

    # --------------------------------------------------------------------------------------------------------- room

    def _allocate(self, count: int) -> Int64Array:
        taken: list[Int64Array] = []
        wanted = count
        while wanted and self._free:
            free = self._free.pop()
            if len(free) > wanted:
                self._free.append(free[:-wanted])
                free = free[-wanted:]
            taken.append(free)
            wanted -= len(free)
        self._free_count -= count - wanted
        if wanted:
            taken.append(np.arange(self.high, self.high + wanted))
            self.high += wanted
        self._used += count
        self.count += count
        return taken[0] if len(taken) == 1 else np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def _reserve(self, count: int) -> None:
        """Room for so many new keys."""
        wanted = self.high + max(0, count - self._free_count)
        if wanted > self.capacity:
            self.capacity = max(wanted, 2 * self.capacity, _SMALLEST)
            self.hashes, self.alive = grown(self.hashes, self.capacity), grown(self.alive, self.capacity)
            for column in self.columns:
                column.grow(self.capacity)
        if 2 * (self._used + count) > len(self._entries):
            size = len(self._entries)
            while 2 * (self.count + count) > size or 4 * self.count > size:
                size *= 2
            self._rebuild(size)

    def _rebuild(self, size: int) -> None:
        self._entries = np.full(size, _EMPTY, np.int64)
        slots = np.flatnonzero(self.alive[: self.high])
        hashes = self.hashes[slots]
        places = self._first(hashes)
        while len(slots):
            empty = np.flatnonzero(self._entries[places] == _EMPTY)
            self._entries[places[empty]] = (_marks(hashes[empty]) << 32) | slots[empty]
            rest = np.flatnonzero(self._entries[places] & _SLOT != slots)
            slots, hashes = slots[rest], hashes[rest]
            places = self._next(places[rest], hashes)
        self._used = self.count

    def _forget(self) -> None:
        self._free, self._free_count, self.high, self._used = [], 0, 0, 0
        self._entries = np.full(_SMALLEST, _EMPTY, np.int64)


def _marks(hashes: UInt64Array) -> Int64Array:
    marks: Int64Array = (hashes >> np.uint64(33)).view(np.int64)
    return marks
