"""What running aggregates have in common: `Scan`, and the count of rows or values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from rayflow.operators.grouping import Column
from rayflow.operators.keyed.cells import seeds_of, store
from rayflow.operators.keyed.segments import Numbers, Segments
from rayflow.operators.state.table import StateTable


@dataclass(frozen=True, slots=True)
class Scan(ABC):
    """One running aggregate of known types."""

    fields: tuple[pa.Field, ...]
    """Its columns in the table."""
    side: tuple[pa.Field, ...] = field(default=(), kw_only=True)
    """A scan that keeps more than one row a key has a table of its own for them: first the field that is its key,
    beside that of the stream, then its values. Empty: none."""

    @abstractmethod
    def advance(self, segments: Segments, table: StateTable, values: Column, times: Numbers) -> list[pa.Array]:
        """Partial results after each row (sorted); the table then holds those after the last row of each key.

        ``values`` and ``times`` are sorted; a row of equal ``times`` ties. The caller touches the slots.
        """

    def advance_side(
        self, segments: Segments, table: StateTable, side: StateTable, keys: Sequence[pa.Array], values: Column
    ) -> list[pa.Array]:
        """`advance` of a scan with a ``side`` table. ``keys`` and ``values`` are sorted."""
        raise NotImplementedError

    def _name(self, part: int) -> str:
        return str(self.fields[part].name)


def count(segments: Segments, table: StateTable, name: str, values: pa.Array | None) -> Numbers:
    """Running count of values that are not null (None: of rows), kept in the int64 column ``name``."""
    seeds, _ = seeds_of(table, name, segments.heads, 0)
    if values is None or values.null_count == 0:
        counts = np.repeat(seeds, segments.lengths) + segments.occurrence() + 1
    else:
        counts = segments.add(seeds, values.is_valid().to_numpy(zero_copy_only=False).astype(np.int64))
    store(table, name, segments.heads, counts[segments.ends])
    return counts


__all__ = ["Scan", "count"]
