"""Rows by the first columns of their key, for tables with a subkey in memory (map and list state).

Slots sorted by the hash of their prefix, as a log-structured merge tree: new rows are sorted when somebody asks, and
sorted arrays of like size are merged, so a row is moved a logarithmic number of times. Rows that are gone stay in the
arrays until a merge; what is found is checked against the table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.columns import grown
from rayflow.operators.state.index import Hasher, KeyIndex, UInt64Array


class PrefixOrder:
    """One for a prefix width and the life of a `KeyIndex`."""

    def __init__(self, index: KeyIndex, width: int, hasher: Hasher) -> None:
        self.width = width
        self._index = index
        self._columns = index.columns[:width]
        self._fields = list(index.schema)[:width]
        self._hasher = hasher
        self._hashes: UInt64Array = np.zeros(0, np.uint64)
        """By slot: of the prefix it had when it was sorted in last."""
        self._levels: list[tuple[UInt64Array, Int64Array]] = []
        """(sorted hashes, their slots), each at least twice as long as the next."""
        self._new: list[Int64Array] = []

    def added(self, slots: Int64Array) -> None:
        """New rows."""
        self._new.append(slots)

    def find(self, prefixes: Sequence[pa.Array]) -> Int64Array:
        """The slots of all rows with one of these prefixes (distinct), those of one prefix together."""
        self._sort_in()
        wanted = self._hasher(prefixes, [field.name for field in self._fields])
        slots, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for hashes, sorted_slots in self._levels:
            low, high = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
            counts = high - low
            owner = np.repeat(np.arange(len(wanted)), counts)
            within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
            slots.append(sorted_slots[low[owner] + within])
            owners.append(owner)
        found, owner = np.concatenate(slots), np.concatenate(owners)
        right = self._index.alive[found]
        for column, values in zip(self._columns, prefixes, strict=True):
            right &= column.same(found, column.prepare(values), owner)
        found, owner = found[right], owner[right]
        found, first = np.unique(found, return_index=True)  # a slot that was freed and taken again may be there twice
        return found[np.argsort(owner[first], kind="stable")]

    def _sort_in(self) -> None:
        if not self._new:
            return
        slots = np.unique(np.concatenate(self._new))
        self._new = []
        slots = slots[self._index.alive[slots]]
        if len(self._hashes) < self._index.capacity:
            self._hashes = grown(self._hashes, self._index.capacity)
        names = [field.name for field in self._fields]
        if len(slots):
            self._hashes[slots] = self._hasher([column.get(slots) for column in self._columns], names)
        self._levels.append(self._sorted(slots))
        while len(self._levels) > 1 and len(self._levels[-2][1]) < 2 * len(self._levels[-1][1]):
            both = np.concatenate([slots for _, slots in self._levels[-2:]])
            self._levels[-2:] = [self._sorted(np.unique(both))]

    def _sorted(self, slots: Int64Array) -> tuple[UInt64Array, Int64Array]:
        slots = slots[self._index.alive[slots]]
        hashes = self._hashes[slots]
        order = np.argsort(hashes)
        return hashes[order], slots[order]
