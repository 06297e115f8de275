"""Running aggregates over sets: how many different values a key has had, exactly or by a sketch.

What a key has seen lies in a table of its own, a row for each value (or register of the sketch) of each key, so that a
batch looks at its own values only, however many there are. The table of the step has the result so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayflow.operators.grouping import Column, Int64Array, flat, plain_key
from rayflow.operators.keyed.cells import seeds_of, store
from rayflow.operators.keyed.scan import Scan
from rayflow.operators.keyed.segments import Numbers, Segments
from rayflow.operators.list_partials import DistinctCount
from rayflow.operators.sketches import RANKS, DistinctEstimate, elements_of, estimates_of, rank_of, register_of
from rayflow.operators.state.table import StateTable


@dataclass(frozen=True, slots=True)
class SetScan(Scan):
    """A scan with a table of its own."""

    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        raise NotImplementedError("a set is kept in a table of its own: see advance_side")


class DistinctScan(SetScan):
    """`DistinctCount`. Side table: ``<name>.value``; a row for every value of every key."""

    @staticmethod
    def of(bound: DistinctCount) -> DistinctScan:
        counts, values = pa.field(f"{bound.name}.count", pa.int64()), pa.field(f"{bound.name}.value", bound.kind)
        return DistinctScan((counts,), side=(values,))

    def advance_side(
        self, segments: Segments, table: StateTable, side: StateTable, keys: Sequence[pa.Array], values: Column
    ) -> list[pa.Array]:
        column = flat(plain_key(values))
        new = np.zeros(segments.rows, np.int64)
        rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        rows = rows[side.slots(_taken([*keys, column], rows), insert=False) < 0]
        if len(rows):
            # Sorted rows of a key are as they came: the first with a value brings it in.
            values_of_keys = Segments.of(side.slots(_taken([*keys, column], rows), insert=True))
            side.touch(values_of_keys.heads)
            new[rows[values_of_keys.order[values_of_keys.starts]]] = 1
        name = self._name(0)
        counts = segments.add(seeds_of(table, name, segments.heads, 0)[0], new)
        store(table, name, segments.heads, counts[segments.ends])
        return [pa.array(counts)]


class EstimateScan(SetScan):
    """`DistinctEstimate`, register by register. Side table: ``<name>.register``, ``<name>.rank``. The table of the step
    has how many registers of a key have each rank, from which the estimate follows, and the estimate.

    The estimate changes only with a row that raises a register, which becomes rare: of n new values about 4,096 * ln n.
    """

    @staticmethod
    def of(bound: DistinctEstimate) -> EstimateScan:
        name = bound.name
        return EstimateScan(
            (pa.field(f"{name}.ranks", pa.list_(pa.uint16())), pa.field(f"{name}.estimate", pa.int64())),
            side=(pa.field(f"{name}.register", pa.uint16()), pa.field(f"{name}.rank", pa.uint8())),
        )

    def advance_side(
        self, segments: Segments, table: StateTable, side: StateTable, keys: Sequence[pa.Array], values: Column
    ) -> list[pa.Array]:
        heads, (ranks, estimate) = segments.heads, (str(field.name) for field in self.fields)
        before = seeds_of(table, estimate, heads, 0)[0].astype(np.int64)
        rows, old, new = self._raised(side, keys, values)
        found = np.repeat(before, segments.lengths)
        if len(rows):
            owners = segments.ids()[rows]
            histograms = _histograms(table.get(heads, ranks), owners, old, new)
            estimates = np.rint(estimates_of(histograms)).astype(np.int64)
            # Each row has the estimate of the last row of its key, up to itself, that has raised a register.
            latest = np.searchsorted(rows, np.arange(segments.rows), side="right") - 1
            own = (latest >= 0) & (rows[latest] >= np.repeat(segments.starts, segments.lengths))
            found[own] = estimates[latest[own]]
            last = np.flatnonzero(np.append(owners[1:] != owners[:-1], True))
            counts = pa.array(histograms[last].ravel().astype(np.uint16))
            offsets = np.arange(len(last) + 1, dtype=np.int32) * RANKS
            table.set(heads[owners[last]], ranks, pa.ListArray.from_arrays(pa.array(offsets), counts))
        store(table, estimate, heads, found[segments.ends])
        return [pa.array(found)]

    def _raised(
        self, side: StateTable, keys: Sequence[pa.Array], values: Column
    ) -> tuple[Int64Array, Int64Array, Int64Array]:
        """(rows that raise a register, ascending; from which rank; to which); the side table then has the new ranks."""
        elements, valid = elements_of(values)
        rows = np.flatnonzero(valid)
        if len(rows) == 0:
            return rows, rows, rows
        registers = pa.array(register_of(elements).astype(np.uint16))
        segments = Segments.of(side.slots([*_taken(keys, rows), registers], insert=True))
        name = str(self.side[1].name)
        seeds = seeds_of(side, name, segments.heads, 0)[0].astype(np.int64)
        after = segments.scan(np.maximum, seeds, rank_of(elements)[segments.order])
        before = np.empty_like(after)
        before[1:] = after[:-1]
        before[segments.starts] = seeds
        raised = after > before
        store(side, name, segments.heads, after[segments.ends])
        side.touch(segments.heads)
        which = segments.order[raised]
        order = np.argsort(which)
        return rows[which[order]], before[raised][order], after[raised][order]


def _histograms(seeds: pa.Array, owners: Int64Array, old: Int64Array, new: Int64Array) -> Int64Array:
    """How many registers have each rank after each of these changes; those of a key follow one another. ``seeds`` by
    segment, null: no register in use. Registers that are not in use, of rank 0, are not counted."""
    changes = np.zeros((len(owners), RANKS), np.int64)
    each = np.arange(len(owners))
    changes[each, new] = 1
    changes[each[old > 0], old[old > 0]] -= 1
    first = np.flatnonzero(np.append(True, owners[1:] != owners[:-1]))
    known = seeds.take(pa.array(owners[first]))
    held = np.zeros((len(first), RANKS), np.int64)
    held[known.is_valid().to_numpy(zero_copy_only=False)] = known.drop_null().flatten().to_numpy().reshape(-1, RANKS)
    totals: Int64Array = np.cumsum(changes, axis=0)
    base = held - totals[first] + changes[first]
    totals += np.repeat(base, np.diff(first, append=len(owners)), axis=0)
    return totals


def _taken(columns: Sequence[pa.Array], rows: Int64Array) -> list[pa.Array]:
    some = pa.array(rows)
    return [column.take(some) for column in columns]


__all__ = ["DistinctScan", "EstimateScan"]
