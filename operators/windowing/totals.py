"""Aggregates over all rows of a key so far, in keyed state: partial results that are added up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.preaggregate import ROWS, WINDOW_START, Preaggregation
from rayflow.operators.state.distinct import distinct
from rayflow.operators.state.keyed import KeyedState
from rayflow.operators.windowing.updates import at

STATE: Final = "totals"
TOLD: Final = "__told"
"""Column of the state: `ROWS` as it was in the last result of the key."""

LIST_BYTES: Final = 32 * 1024 * 1024
"""Every total of a key has all that its lists had before: of one key with many results in a batch they are large."""


def totals_schema(plan: Preaggregation) -> pa.Schema:
    """Of the state: keys, partial results, `TOLD`."""
    fields = [field for field in plan.schema if field.name != WINDOW_START]
    return pa.schema([*fields, pa.field(TOLD, pa.int64())])


class Totals:
    """One row a key. ``window_start`` of partial results says in which order they are added."""

    def __init__(self, state: KeyedState, plan: Preaggregation) -> None:
        self._plan = plan
        self._width = len(plan.keys)
        fields = list(totals_schema(plan))
        self._values = [field.name for field in fields[self._width : -1]]
        self.table = state.table(STATE, pa.schema(fields[: self._width]), pa.schema(fields[self._width :]))

    def add(self, partials: pa.Table) -> Iterator[pa.Table]:
        """Take in partial results, of which no key and ``window_start`` is twice.

        Gives of each the total of its key up to and with it, in the order of ``window_start``; in several tables where
        totals hold lists that are large together. To be read to its end before anything else.
        """
        if not partials.num_rows:
            return
        keys = [flat(partials.column(key)) for key in self._plan.keys]
        first, codes = distinct(keys)
        starts = self._starts(partials)
        known = self._stored([key.take(pa.array(first)) for key in keys])
        if partials.num_rows > 1 and _list_bytes(known, partials, codes) > LIST_BYTES:
            by_time, half = np.argsort(starts, kind="stable"), partials.num_rows // 2
            for part in (by_time[:half], by_time[half:]):
                yield from self.add(partials.take(pa.array(part)))
            return
        order = np.lexsort((starts, codes))
        totals = self._added_up(partials.take(pa.array(order)), codes[order], known)
        starts = starts[order]
        last = np.flatnonzero(np.append(np.diff(codes[order]), 1))
        self._put(totals.take(pa.array(last)))
        by_time = np.argsort(starts, kind="stable")
        column = pa.array(starts).view(self._plan.window_type)
        totals = totals.set_column(self._width, self._plan.schema.field(WINDOW_START), column)
        yield totals.take(pa.array(by_time))

    def _stored(self, keys: list[pa.Array]) -> pa.Table:
        """The totals of those of these keys that have one."""
        slots = self.table.slots(keys, insert=False)
        rows = pa.Table.from_batches([self.table.gather(slots[slots >= 0])])
        return self.partials(rows.filter(pc.is_valid(rows.column(ROWS))))

    def partials(self, rows: pa.Table) -> pa.Table:
        """Rows of the state as partial results."""
        start = pa.array(np.zeros(rows.num_rows, np.int64)).view(self._plan.window_type)
        return rows.drop_columns([TOLD]).add_column(self._width, WINDOW_START, start).cast(self._plan.schema)

    def _added_up(self, rows: pa.Table, codes: Int64Array, known: pa.Table) -> pa.Table:
        """Sums of all beginnings of each key's rows, by doubling: row i takes in what row i - 1 had, then what row
        i - 2 had, i - 4 and so on: a merge of all rows for each doubling (Hillis and Steele, 1986)."""
        heads = np.flatnonzero(np.append(1, np.diff(codes)))
        place = np.arange(len(codes)) - np.repeat(heads, np.diff(np.append(heads, len(codes))))
        rows = self._numbered(rows, np.arange(len(codes)))
        if known.num_rows:
            both = [flat(pa.chunked_array([*known.column(key).chunks, *rows.column(key).take(pa.array(heads)).chunks]))
                    for key in self._plan.keys]  # fmt: skip
            _, found = distinct(both)
            owner = np.empty(int(found.max()) + 1, np.int64)
            owner[found[known.num_rows :]] = heads
            rows = self._merged(rows, self._numbered(known, owner[found[: known.num_rows]]))
        step = 1
        while step <= int(place.max()):
            later = np.flatnonzero(place >= step)
            rows = self._merged(rows, self._numbered(rows.take(pa.array(later - step)), later))
            step *= 2
        return rows

    def _merged(self, rows: pa.Table, others: pa.Table) -> pa.Table:
        """Each of ``others`` taken into the row whose number it has; the rows in the order of their numbers."""
        merged = self._plan.merge(pa.concat_tables([others, rows]), None)
        return merged.take(pa.array(np.argsort(self._starts(merged), kind="stable")))

    def _numbered(self, rows: pa.Table, numbers: Int64Array) -> pa.Table:
        column = pa.array(numbers).view(self._plan.window_type)
        return rows.set_column(self._width, self._plan.schema.field(WINDOW_START), column)

    def _put(self, totals: pa.Table) -> None:
        slots = self.table.slots([flat(totals.column(key)) for key in self._plan.keys], insert=True)
        for name in self._values:
            self.table.set(slots, name, flat(totals.column(name)))

    def _starts(self, table: pa.Table) -> Int64Array:
        starts: Int64Array = flat(table.column(WINDOW_START)).view(pa.int64()).to_numpy()
        return starts

    # ---------------------------------------------------------------------------------------------- what has been told

    def told(self, totals: pa.Table) -> None:
        """These have become results; of several of a key the last counts."""
        slots = self.table.slots([flat(totals.column(key)) for key in self._plan.keys], insert=False)
        self.table.set(slots, TOLD, flat(totals.column(ROWS)))

    def untold(self) -> list[pa.Table]:
        """All totals that have changed since they were told, as partial results."""
        found = []
        for batch in self.table.scan():
            changed = pc.not_equal(batch.column(ROWS), pc.fill_null(batch.column(TOLD), 0))
            if pc.any(changed).as_py():
                found.append(self.partials(pa.Table.from_batches([batch.filter(changed)])))
        return found

    def of(self, keys: list[pa.Array]) -> pa.Table:
        """The totals of these keys, which are distinct."""
        return at(self._stored(keys), 0, self._plan)


def _list_bytes(known: pa.Table, partials: pa.Table, codes: Int64Array) -> int:
    """About as much the lists of all totals hold at most, if one row a key is ``known`` and ``partials`` are added."""
    lists = [
        field.name for field in partials.schema if pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
    ]
    if not lists:
        return 0
    rows = np.bincount(codes)
    most = int(rows.max())
    if most == 1:
        return 0
    new = np.zeros(len(rows))
    for name in lists:
        lengths = pc.list_value_length(flat(partials.column(name))).fill_null(0).to_numpy()
        size = partials.column(name).nbytes / max(1, int(lengths.sum()))
        new += np.bincount(codes, lengths) * size
    before = sum(int(known.column(name).nbytes) for name in lists)
    return int((new * rows).sum()) + before * most


__all__ = ["STATE", "TOLD", "Totals", "totals_schema"]
