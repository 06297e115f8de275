"""The rows of one batch by key, and scans over them: what a key's value is after each of its rows.

A scan gives for every row ``f(... f(f(seed, v1), v2) ..., vr)`` over the rows of its key so far, in exactly this order
of additions, so that sums of floats do not depend on how the stream was cut into batches. No Python loop runs over
rows or keys: keys of about equally many rows (up to the next power of two) are laid into the columns of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rayflow.operators.grouping import Int64Array

Numbers: TypeAlias = npt.NDArray[Any]

# Up to this many rows a key a matrix is scanned row by row of the matrix, which is fastest over many keys.
_SHORT: Final = 64


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Rows of a batch sorted by slot, rows of a slot as they came. "Sorted" arrays are in this order."""

    order: Int64Array
    """Row of each sorted position."""
    heads: Int64Array
    """Slot of each segment, ascending: every slot of the batch once."""
    starts: Int64Array
    """Sorted position of the first row of each segment."""
    lengths: Int64Array
    _ladders: list[Int64Array] = field(default_factory=list)

    @staticmethod
    def of(slots: Int64Array) -> Segments:
        """From the slot of every row, none of which is -1."""
        rows = len(slots)
        bits = max(1, rows - 1).bit_length()
        # One sort of (slot, row) packed in 64 bits is stable by itself and several times faster than a stable argsort.
        packed = np.sort((slots << bits) | np.arange(rows, dtype=np.int64))
        order = packed & ((1 << bits) - 1)
        by_slot = packed >> bits
        first = np.empty(rows, np.bool_)
        first[:1] = True
        np.not_equal(by_slot[1:], by_slot[:-1], out=first[1:])
        starts = np.flatnonzero(first)
        lengths = np.diff(starts, append=rows)
        return Segments(order, by_slot[starts], starts, lengths)

    @property
    def rows(self) -> int:
        return len(self.order)

    @property
    def distinct(self) -> bool:
        """No key occurs twice."""
        return len(self.starts) == len(self.order)

    @property
    def ends(self) -> Int64Array:
        """Sorted position of the last row of each segment."""
        return self.starts + self.lengths - 1

    def inverse(self) -> Int64Array:
        """Sorted position of each row."""
        found = np.empty(self.rows, np.int64)
        found[self.order] = np.arange(self.rows, dtype=np.int64)
        return found

    def ids(self) -> Int64Array:
        """Segment of each sorted position."""
        return np.repeat(np.arange(len(self.starts), dtype=np.int64), self.lengths)

    def occurrence(self) -> Int64Array:
        """0 for the first row of each key, 1 for the second, ...; sorted."""
        return np.arange(self.rows, dtype=np.int64) - np.repeat(self.starts, self.lengths)

    def add(self, seeds: Numbers, values: Numbers) -> Numbers:
        """Running sums of integers, modulo 2**64; seeds by segment, values and result sorted."""
        if self.distinct:
            single: Numbers = np.add(seeds, values, dtype=values.dtype)
            return single
        total: Numbers = np.cumsum(values, dtype=values.dtype)
        before = total[self.starts] - values[self.starts] - seeds
        total -= np.repeat(before, self.lengths)
        return total

    def scan(self, function: np.ufunc, seeds: Numbers, values: Numbers) -> Numbers:
        """Running ``function`` in the order of the rows; seeds by segment, values and result sorted."""
        if self.distinct:
            found: Numbers = function(seeds, values)
            return found
        out = np.empty(self.rows + 1, values.dtype)
        out[:-1] = values
        out[-1] = values[0]
        out[self.starts] = function(seeds, values[self.starts])
        for places in self.ladders():
            matrix = out[places]
            if len(matrix) <= _SHORT:
                for step in range(1, len(matrix)):
                    function(matrix[step - 1], matrix[step], out=matrix[step])
            else:
                matrix = function.accumulate(matrix, axis=0)
            out[places] = matrix
        return out[:-1]

    def ladders(self) -> list[Int64Array]:
        """Matrices of sorted positions, a column for each segment of more than one row, going down its rows.

        Places behind the end of a segment are ``rows``: one position more than there is, for what nobody reads.
        """
        if not self._ladders and not self.distinct:
            long = np.flatnonzero(self.lengths > 1)
            starts, lengths = self.starts[long], self.lengths[long]
            classes = np.ceil(np.log2(lengths)).astype(np.int64)
            for each in np.unique(classes):
                members = classes == each
                some, depth = lengths[members], int(lengths[members].max())
                steps = np.arange(depth, dtype=np.int64)[:, None]
                self._ladders.append(np.where(steps < some, starts[members] + steps, self.rows))
        return self._ladders


__all__ = ["Numbers", "Segments"]
