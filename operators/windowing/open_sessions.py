"""Which sessions of a key are open, and which of all begins first.

Both are derived from the table of sessions, in memory, not in checkpoints. From keys to rows of the table the way is
fast where a key has one session. Keys that have had several sessions at a time are looked up by
prefix, until there is one left and it was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.columns import grown
from rayflow.operators.state.index import KeyIndex
from rayflow.operators.state.table import StateTable
from rayflow.operators.state.timers import TimerQueue

LOOKED_UP: Final = 1_024
"""Sessions that are looked up at once when the first open one is wanted."""


class OpenSessions:
    """All that is put into the table or deleted from it is to be told."""

    def __init__(self, table: StateTable) -> None:
        self._table = table
        fields = list(table.keys)
        self._width = len(fields) - 1
        self._start_type = fields[-1].type
        self._index = KeyIndex(pa.schema(fields[:-1]))
        self._counts: Int64Array = np.zeros(0, np.int64)
        self._starts: Int64Array = np.zeros(0, np.int64)
        self._exact = np.zeros(0, np.bool_)
        """`_starts` is that of the one session there is."""

    def added(self, keys: Sequence[pa.Array], starts: Int64Array) -> None:
        """New rows; keys may repeat."""
        slots, new = self._index.insert(keys)
        if len(self._counts) < self._index.capacity:
            self._counts, self._starts = (
                grown(column, self._index.capacity) for column in (self._counts, self._starts)
            )
            self._exact = grown(self._exact, self._index.capacity)
        self._counts[new] = 0
        np.add.at(self._counts, slots, 1)
        self._starts[slots] = starts
        self._exact[slots] = self._counts[slots] == 1

    def removed(self, keys: Sequence[pa.Array]) -> None:
        """Rows that were there; keys may repeat."""
        slots = self._index.find(keys)
        np.subtract.at(self._counts, slots, 1)
        self._exact[slots] = False
        self._index.remove(self._index.distinct(slots[self._counts[slots] == 0]))

    def of(self, keys: Sequence[pa.Array]) -> pa.RecordBatch:
        """The open sessions of these keys, which are distinct."""
        slots = self._index.find(keys)
        known = slots >= 0
        one = np.zeros(len(slots), np.bool_)
        one[known] = self._exact[slots[known]]
        several = known & ~one
        rows = pa.array(np.flatnonzero(one))
        starts = pa.array(self._starts[slots[one]]).view(self._start_type)
        found = self._table.gather(self._table.slots([*(key.take(rows) for key in keys), starts], insert=False))
        if not several.any():
            return found
        more = self._table.with_prefix([key.filter(pa.array(several)) for key in keys])
        at = self._index.find(more.columns[: self._width])
        alone = self._counts[at] == 1
        self._starts[at[alone]] = more.column(self._width).view(pa.int64()).to_numpy()[alone]
        self._exact[at[alone]] = True
        return pa.concat_batches([found, more])


class SessionStarts:
    """All that is put into the table is to be told."""

    def __init__(self, table: StateTable, gap_us: int) -> None:
        self._table = table
        self._gap_us = gap_us
        self._starts = TimerQueue(table.keys)
        """Start of every session that was ever open, but for those in `_first`, which begin before them."""
        self._first = pa.RecordBatch.from_pylist([], schema=table.keys)
        """Sessions in order of their start; those that have gone are passed over from the front."""

    def added(self, starts: Int64Array, keys: pa.RecordBatch) -> None:
        """New rows; ``keys`` are their keys and starts."""
        self._starts.add(starts, keys)

    def first(self, kept: int) -> int | None:
        """The start of the first open session if that is behind ``kept``; else any time that is not before it. What is
        added later begins at ``kept`` or behind, or in an open session."""
        while True:
            while self._first.num_rows:
                some = self._first.slice(0, LOOKED_UP)
                is_open = np.flatnonzero(self._table.slots(some.columns, insert=False) >= 0)
                if len(is_open):
                    self._first = self._first.slice(int(is_open[0]))
                    return int(self._first.column(len(self._table.keys) - 1).view(pa.int64())[0].as_py())
                self._first = self._first.slice(some.num_rows)
            first = self._starts.first()
            if first is None or first >= kept:
                return first
            taken = self._starts.take(min(first + self._gap_us, kept - 1))
            assert taken is not None
            self._first = taken[1]


__all__ = ["OpenSessions", "SessionStarts"]
