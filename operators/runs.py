"""State as a log-structured merge tree of immutable Arrow runs (O'Neil et al. 1996; tiered, with geometric sizes).

A run holds partial results of one or several windows. New runs are collected as they come; when there are too many, or
too many rows in them, they are merged into one, and merged runs again whenever a younger one has grown to half of an
older one. So every row is merged a logarithmic number of times, and the number of runs is bounded by
``PENDING_RUNS + log2(rows)``. Runs are never changed: freezing the state is copying a tuple of references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa

from rayflow.operators.grouping import Int64Array, flat

# Measured at 65,536-row batches, half of the rows on 100 hot keys: see benchmarks in the report of this module's tests.
PENDING_ROWS: Final = 262_144
PENDING_RUNS: Final = 64

Merge: TypeAlias = Callable[[pa.Table, int | None], pa.Table]
"""(partial results, their window start or None if there are several) -> the same with keys and windows made unique."""


@dataclass(frozen=True, slots=True)
class Run:
    """Immutable rows of windows that start between ``low`` and ``high`` (us, both inclusive)."""

    table: pa.Table
    low: int
    high: int
    merged: bool
    """(key, window start) is unique in it, and rows are in ascending order of the window start."""
    held: int = 0
    """Rows of the run that this one is a slice of, whose memory it keeps."""

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)


class RunStore:
    """The open windows of one operator instance."""

    def __init__(self, merge: Merge, start_column: str) -> None:
        self._merge = merge
        self._start_column = start_column
        self._merged: list[Run] = []
        """Oldest first, keys unique; each was at least twice as long as the next before windows closed."""
        self._pending: list[Run] = []
        self._pending_rows = 0

    @property
    def low(self) -> int | None:
        """Start of the earliest open window; None when there is none."""
        return min((run.low for run in self.runs()), default=None)

    @property
    def rows(self) -> int:
        return sum(run.rows for run in self.runs())

    def runs(self) -> tuple[Run, ...]:
        return (*self._merged, *self._pending)

    def starts_of(self, table: pa.Table) -> Int64Array:
        starts: Int64Array = flat(table.column(self._start_column)).view(pa.int64()).to_numpy()
        return starts

    def append(self, run: Run) -> None:
        """Add rows; merges when enough have come together."""
        if run.rows == 0:
            return
        self._pending.append(run)
        self._pending_rows += run.rows
        if self._pending_rows >= PENDING_ROWS or len(self._pending) >= PENDING_RUNS:
            self._compact()

    def restore(self, table: pa.Table) -> None:
        """Rows of a snapshot; keys may come several times."""
        if table.num_rows:
            starts = self.starts_of(table)
            self.append(Run(table, int(starts.min()), int(starts.max()), merged=False))

    def take(self, last_start: int) -> Run | None:
        """Remove all windows that start at ``last_start`` or before; returns them merged, in order of their start."""
        due: list[Run] = []
        self._merged = self._without(self._merged, last_start, due)
        self._pending = self._without(self._pending, last_start, due)
        self._pending_rows = sum(run.rows for run in self._pending)
        return self._union(due) if due else None

    def _without(self, runs: Sequence[Run], last_start: int, due: list[Run]) -> list[Run]:
        kept = []
        for run in runs:
            if run.high <= last_start:
                due.append(run)
            elif run.low > last_start:
                kept.append(run)
            else:
                gone, left = self._split(run, last_start)
                due.append(gone)
                kept.append(left)
        return kept

    def _split(self, run: Run, last_start: int) -> tuple[Run, Run]:
        """Rows of windows up to ``last_start``, and the rest; there are some of both."""
        starts = self.starts_of(run.table)
        if not run.merged:
            closing = starts <= last_start
            gone, left = starts[closing], starts[~closing]
            return (
                Run(run.table.filter(pa.array(closing)), run.low, int(gone.max()), merged=False),
                Run(run.table.filter(pa.array(~closing)), int(left.min()), run.high, merged=False),
            )
        cut = int(np.searchsorted(starts, last_start, side="right"))
        rest, held = run.table.slice(cut), max(run.held, run.rows)
        if 2 * rest.num_rows < held:  # a slice keeps the memory of the whole: copy before that becomes the larger part
            rest, held = rest.take(pa.array(np.arange(rest.num_rows))), 0
        return (
            Run(run.table.slice(0, cut), run.low, int(starts[cut - 1]), merged=True),
            Run(rest, int(starts[cut]), run.high, merged=True, held=held),
        )

    def _compact(self) -> None:
        self._merged.append(self._union(self._pending))
        self._pending, self._pending_rows = [], 0
        while len(self._merged) > 1 and self._merged[-2].rows < 2 * self._merged[-1].rows:
            self._merged[-2:] = [self._union(self._merged[-2:])]

    def _union(self, runs: Sequence[Run]) -> Run:
        if len(runs) == 1 and runs[0].merged:
            return runs[0]
        low, high = min(run.low for run in runs), max(run.high for run in runs)
        table = self._merge(pa.concat_tables([run.table for run in runs]), low if low == high else None)
        if low != high:
            starts = self.starts_of(table)
            if np.any(starts[1:] < starts[:-1]):
                table = table.take(pa.array(np.argsort(starts, kind="stable")))
        return Run(table, low, high, merged=True)


__all__ = ["PENDING_ROWS", "PENDING_RUNS", "Run", "RunStore"]
