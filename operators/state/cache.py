"""A table in front of a `ColdStore` (``rocksdb``): a write-back cache of rows, bounded in bytes and in dirty rows.

Keys that are not in memory are looked up on disk in one call a batch. Changed rows (*dirty*) are written when there are
`DIRTY_ROWS` of them, so that a freeze, which only copies them, is bounded; and before a `scan`. When all tables of the
operator instance together hold more than the bound, a table that is asked for slots keeps the rows that were used since
it last did so, at most half of its share, and lets the others go (after Corbato's clock, 1968, a whole turn at a time).
A removed row whose key may be on disk stays in memory, *gone*, until that is written. All of this happens in `slots`
only: between two calls no row moves.

Rows whose time to live has passed are deleted on disk by a **window** of key groups that moves over the table, twice as
many rows as were written meanwhile: else state that is forgotten would fill the disk, and every checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.base import EXPIRES, Change, ColdStore, ColdTable, OperatorContext
from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.columns import BoolArray, grown
from rayflow.operators.state.index import KeyIndex
from rayflow.partition import hash_columns, key_groups

DIRTY_ROWS: Final = 262_144
"""A freeze copies at most so many rows, and those of one batch more."""
PURGE_ROWS: Final = 65_536
"""Written since expired rows were last looked for on disk."""
_BOOKKEEPING: Final = 4
"""Bytes a slot in the arrays of the cache."""


class CachedRows(Protocol):
    """What a cache needs of its table."""

    index: KeyIndex
    keys: pa.Schema
    stored: pa.Schema
    subkeys: int
    ttl_us: int | None

    def now_us(self) -> int: ...
    def gather(self, slots: Int64Array) -> pa.RecordBatch: ...
    def outdated(self, slots: Int64Array) -> BoolArray | None: ...
    def put(self, slots: Int64Array, rows: pa.RecordBatch) -> None: ...
    def retain(self, slots: Int64Array) -> Int64Array: ...
    def held_bytes(self) -> int: ...


class Disk:
    """What the tables of one operator instance share: the store, and the bound of what they hold in memory."""

    def __init__(self, store: ColdStore, ctx: OperatorContext) -> None:
        self.store = store
        self.memory_bytes = ctx.backend.memory_bytes // 2  # RocksDB has most of the other half
        self.max_parallelism = ctx.max_parallelism
        self.groups = ctx.key_groups
        self.caches: list[Cache] = []

    def too_much(self, cache: Cache) -> bool:
        """Whether this table has to let rows go. A table that is not in use cannot: its slots may be held."""
        own = cache.held_bytes()
        if 2 * own * len(self.caches) <= self.memory_bytes:
            return False
        return sum(other.held_bytes() for other in self.caches) > self.memory_bytes


class Cache:
    """The keeper of one table's changes."""

    def __init__(self, rows: CachedRows, disk: Disk, cold: ColdTable, *, known_empty: bool) -> None:
        self._rows = rows
        self._disk = disk
        self._cold = cold
        self._nothing_cold = known_empty
        """No row was ever written: nothing needs to be looked up."""
        self._dirty: BoolArray = np.zeros(0, np.bool_)
        """By slot: differs from what is on disk."""
        self._cold_too: BoolArray = np.zeros(0, np.bool_)
        """By slot: the key may be on disk."""
        self._gone: BoolArray = np.zeros(0, np.bool_)
        """By slot: there is no such row; the key is kept to be deleted on disk, or as deleted."""
        self._used: BoolArray = np.zeros(0, np.bool_)
        self._dirty_rows = 0
        """At least the number of dirty slots."""
        self._unpurged = 0
        """Rows written to disk since expired ones were looked for."""
        self._purged_to = 0
        """Position among the key groups."""
        disk.caches.append(self)

    # ------------------------------------------------------------------------------------------------- as a keeper

    def grow(self, capacity: int) -> None:
        self._dirty, self._cold_too = grown(self._dirty, capacity), grown(self._cold_too, capacity)
        self._gone, self._used = grown(self._gone, capacity), grown(self._used, capacity)

    def touched(self, slots: Int64Array) -> None:
        self._dirty_rows += len(slots) - int(np.count_nonzero(self._dirty[slots]))
        self._dirty[slots] = True

    def removing(self, slots: Int64Array) -> Int64Array:
        """Those of the slots that can be freed now; the others are only marked."""
        known = self._cold_too[slots]
        marked = slots[known]
        self.touched(marked)
        self._gone[marked] = True
        freed = slots[~known]
        self._dirty[freed] = False
        self._gone[freed] = False
        return freed

    def settle(self) -> None:
        if self._dirty_rows >= DIRTY_ROWS:
            self._dirty_rows = int(np.count_nonzero(self._dirty))
            if self._dirty_rows >= DIRTY_ROWS:
                self.flush()
        if self._disk.too_much(self):
            self._shrink()
        if self._rows.ttl_us is not None and self._unpurged >= PURGE_ROWS:
            self._purge(2 * self._unpurged)
            self._unpurged = 0

    def absent(self, slots: Int64Array) -> BoolArray:
        """Which of the slots, -1 among them, hold no row."""
        return self._gone[slots] | (slots < 0)

    def revive(self, slots: Int64Array) -> Int64Array:
        """Those of the slots that were gone: they are rows again, which the table must empty and touch."""
        again = slots[self._gone[slots]]
        self._gone[again] = False
        return again

    @property
    def gone_rows(self) -> int:
        return int(np.count_nonzero(self._gone))

    def clear(self) -> None:
        """All rows in memory have been forgotten, and those on disk are deleted, a key group at a time."""
        self.reset()
        for group in () if self._nothing_cold else self._disk.groups:
            width = len(self._rows.keys)
            for batch in list(self._cold.scan(range(group, group + 1))):
                keys = pa.RecordBatch.from_arrays(batch.columns[:width], schema=self._rows.keys)
                self._cold.write(Change(np.full(len(keys), group, np.uint16), keys, None))

    # --------------------------------------------------------------------------------------------------- disk to memory

    def fetch(self, new: Int64Array) -> Int64Array:
        """Slots that were made for keys not in memory: fill in what is on disk; returns those whose key is not."""
        self._dirty[new] = False
        self._gone[new] = False
        if self._nothing_cold or len(new) == 0:
            self._cold_too[new] = False
            return new
        found, values = self._cold.get(self._groups(new), self._key_batch(new))
        self._cold_too[new] = found
        here = new[found]
        if len(here):
            self._rows.put(here, values if found.all() else values.filter(pa.array(found)))
        return new[~found]

    def mark_used(self, slots: Int64Array) -> None:
        self._used[slots] = True

    def held_bytes(self) -> int:
        return self._rows.held_bytes() + _BOOKKEEPING * self._rows.index.high

    # --------------------------------------------------------------------------------------------------- memory to disk

    def changes(self) -> list[Change]:
        """Copies of the dirty rows, which count as written from now on."""
        self._drop_outdated()
        dirty = np.flatnonzero(self._dirty[: self._rows.index.high])
        gone = self._gone[dirty]
        removed, kept = dirty[gone], dirty[~gone]
        found = []
        if len(kept):
            rows = self._rows.gather(kept)
            width = len(self._rows.keys)
            keys = pa.RecordBatch.from_arrays(rows.columns[:width], schema=self._rows.keys)
            values = rows.select(list(range(width, rows.num_columns)))
            found.append(Change(self._groups(kept), keys, values))
        if len(removed):
            found.append(Change(self._groups(removed), self._key_batch(removed), None))
        self._cold_too[kept] = True
        self._dirty[dirty] = False
        self._dirty_rows = 0
        self._unpurged += len(kept)
        if len(kept):
            self._nothing_cold = False
        return found

    def flush(self) -> None:
        """Write what is dirty."""
        for change in self.changes():
            self._cold.write(change)

    def write(self, rows: pa.Table, *, delete: bool = False) -> None:
        """Rows of a checkpoint (only their keys if they are to be deleted), before there are rows in memory."""
        width = len(self._rows.keys)
        for batch in rows.combine_chunks().to_batches(max_chunksize=DIRTY_ROWS):
            keys = pa.RecordBatch.from_arrays(batch.columns[:width], schema=self._rows.keys)
            groups = self._key_groups(keys.columns[: width - self._rows.subkeys])
            self._cold.write(
                Change(groups, keys, None if delete else batch.select(list(range(width, batch.num_columns))))
            )
            self._nothing_cold = False

    def scan(self, batch_rows: int) -> Iterator[pa.RecordBatch]:
        self.flush()
        yield from self._cold.scan(batch_rows=batch_rows)

    def with_prefix(self, prefixes: Sequence[pa.Array]) -> pa.RecordBatch:
        self.flush()
        schema = pa.schema(list(self._rows.keys)[: len(prefixes)])
        keys = pa.RecordBatch.from_arrays(list(prefixes), schema=schema)
        owners = prefixes[: len(self._rows.keys) - self._rows.subkeys]
        return self._cold.scan_prefix(self._key_groups(owners), keys)

    def _shrink(self) -> None:
        self.flush()
        high = self._rows.index.high
        kept = np.flatnonzero(self._used[:high] & self._rows.index.alive[:high] & ~self._gone[:high])
        kept = kept[: self._rows.index.count // 2]
        slots = self._rows.retain(kept)
        self._cold_too[slots] = True

    def _purge(self, rows: int) -> None:
        """Delete what has expired in the next key groups, until so many rows were looked at or once round.

        A row in memory is not older than on disk: expired there too, or dirty and going to be written.
        """
        groups, width, now = self._disk.groups, len(self._rows.keys), self._rows.now_us()
        for _ in groups:
            group = groups[self._purged_to % len(groups)]
            self._purged_to += 1
            rows -= purge(self._cold, group, width, now)
            if rows <= 0:
                return

    def reset(self) -> None:
        """The table starts anew with no slots; all that was in it is on disk."""
        self._dirty = self._cold_too = self._gone = self._used = np.zeros(0, np.bool_)
        self._dirty_rows = 0

    def _drop_outdated(self) -> None:
        """Rows that have expired need not be written, but deleted."""
        dirty = np.flatnonzero(self._dirty[: self._rows.index.high] & ~self._gone[: self._rows.index.high])
        outdated = self._rows.outdated(dirty)
        if outdated is not None and outdated.any():
            self._gone[dirty[outdated]] = True

    def _key_batch(self, slots: Int64Array) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays(self._rows.index.keys(slots), schema=self._rows.keys)

    def _groups(self, slots: Int64Array) -> Any:
        columns = self._rows.index.columns[: len(self._rows.keys) - self._rows.subkeys]
        return self._key_groups([column.get(slots) for column in columns])

    def _key_groups(self, owners: Sequence[pa.Array]) -> Any:
        return key_groups(hash_columns(owners), self._disk.max_parallelism).astype(np.uint16)


def purge(cold: ColdTable, group: int, width: int, now_us: int) -> int:
    """Delete the rows of this key group that have expired; how many rows it had. ``width``: columns of the key."""
    looked_at, found = 0, []
    for batch in cold.scan(range(group, group + 1)):
        looked_at += batch.num_rows
        expired = pc.less_equal(batch.column(EXPIRES), now_us).fill_null(False)
        found.append(batch.select(list(range(width))).filter(expired))
    for keys in found:
        if keys.num_rows:
            cold.write(Change(np.full(keys.num_rows, group, np.uint16), keys, None))
    return looked_at
