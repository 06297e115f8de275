"""Firing: from the panes in a `RunStore` to the windows that have ended.

Sliding windows by two stacks (Tangwongsan, Hirzel, Schneider, Wu: "General incremental sliding-window aggregation",
VLDB 2015), for merges that have no inverse. The panes of a window are two parts: of the older half the merges of all
suffixes are kept, each made from the next with one merge; of the newer half the merge of all. A window is one suffix
merged with the newer half. When the suffixes are used up, those of the whole window are made. So a window costs at most
three merges of tables of its keys, however many panes it has.

All of that is derived from the store and is not part of checkpoints. Suffixes are held up to a number of bytes; beyond
it every second one is dropped, and is made again from the next one kept when its window fires.

Rows that come for a pane that has been merged already (late for some of its windows, in time for others) make the
merges void: the next window begins anew from the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import pyarrow as pa

from rayflow.operators.preaggregate import Preaggregation
from rayflow.operators.runs import RunStore
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windowing.updates import at

SUFFIX_BYTES: Final = 64 * 1024 * 1024


class Firing(Protocol):
    """What fires the windows of one operator instance. Never asked about windows that have fired."""

    def due(self, runs: RunStore, plan: Preaggregation, since: int, until: int, keep: int) -> Iterator[pa.Table]:
        """Partial results by key and window, in order of the window, of those that start at ``since`` or later and
        before ``until``; removes panes before ``keep``, which is ``until`` or less. To be read to its end before
        anything else."""

    def touched(self, low: int) -> None:
        """Rows have come for panes from ``low`` on."""


class PaneIsWindow:
    """Tumbling windows."""

    def due(self, runs: RunStore, plan: Preaggregation, since: int, until: int, keep: int) -> Iterator[pa.Table]:
        if keep == until:
            runs.drop(since - 1)  # have fired, and were kept for updates
            return runs.take(until - 1)
        rows = runs.peek(since, until - 1)
        runs.drop(keep - 1)
        return iter([] if rows is None else [rows])

    def touched(self, low: int) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Suffix:
    """The rows of all panes from ``start`` up to where the newer half begins, keys unique."""

    after: int
    """No pane that starts behind this and before ``start`` has rows: good for windows that start in between, too."""
    start: int
    table: pa.Table


class TwoStacks:
    """Sliding windows: see the top of this file."""

    def __init__(self, spec: Sliding, *, suffix_bytes: int = SUFFIX_BYTES) -> None:
        self._spec = spec
        self._suffix_bytes = suffix_bytes
        self._older: list[Suffix] = []
        """By start, descending, of panes before `_middle`."""
        self._middle = 0
        self._newer: pa.Table | None = None
        """Rows of the panes from `_middle` up to `_edge`, keys unique."""
        self._edge: int | None = None
        """All panes before it that a later window needs are in the merges. None: nothing is merged."""

    def touched(self, low: int) -> None:
        if self._edge is not None and low < self._edge:
            self._edge = None

    def due(self, runs: RunStore, plan: Preaggregation, since: int, until: int, keep: int) -> Iterator[pa.Table]:
        start = since
        while start < until:
            low = runs.low
            if low is not None and low < start:  # that pane is kept for updates
                low = next(iter(runs.starts_from(start).tolist()), None)
            if low is None:
                break
            start = max(start, self._spec.first_open(low))  # windows before have no rows
            if start >= until:
                break
            window = self._window(runs, plan, start)
            if window is not None:
                yield at(window, start, plan)
            start += self._spec.every_us
            runs.drop(min(start, keep) - 1)
        runs.drop(keep - 1)

    def _window(self, runs: RunStore, plan: Preaggregation, start: int) -> pa.Table | None:
        end = start + self._spec.size_us
        if self._edge is None or start >= self._middle:  # the suffixes are used up, or void
            self._older, self._newer, self._middle, self._edge = [], None, end, end
        elif self._edge < end:
            self._newer = _merged(self._newer, runs.peek(self._edge, end - 1), plan, runs)
            self._edge = end
        while self._older and self._older[-1].start < start:
            self._older.pop()
        if not self._older or self._older[-1].after >= start:
            self._extend(runs, plan, start)
        return _merged(self._older[-1].table if self._older else None, self._newer, plan, runs)

    def _extend(self, runs: RunStore, plan: Preaggregation, start: int) -> None:
        """Make the suffixes from ``start`` on up to the earliest there is."""
        table = self._older[-1].table if self._older else None
        rows = runs.peek(start, (self._older[-1].start if self._older else self._middle) - 1)
        if rows is None:
            return
        every = self._spec.every_us
        begins = (runs.starts_of(rows) - start) // every * every + start
        cuts = [0, *(np.flatnonzero(np.diff(begins)) + 1).tolist(), len(begins)]
        held = sum(suffix.table.nbytes for suffix in self._older)
        for cut in reversed(range(len(cuts) - 1)):
            table = _merged(table, rows.slice(cuts[cut], cuts[cut + 1] - cuts[cut]), plan, runs)
            assert table is not None
            after = int(begins[cuts[cut] - 1]) if cut else start - 1
            self._older.append(Suffix(after, int(begins[cuts[cut]]), table))
            held += table.nbytes
            if held > self._suffix_bytes and len(self._older) > 2:
                self._older = [*self._older[:-1:2], self._older[-1]]
                held = sum(suffix.table.nbytes for suffix in self._older)


def _merged(one: pa.Table | None, other: pa.Table | None, plan: Preaggregation, runs: RunStore) -> pa.Table | None:
    """Rows by key, whatever their panes. ``one`` has unique keys; ``other`` may be several panes, in their order."""
    if other is None:
        return one
    if one is None:
        starts = runs.starts_of(other)
        if starts[0] == starts[-1]:
            return other
    both = other if one is None else pa.concat_tables([one, other])
    return plan.merge(both if plan.keys else at(both, 0, plan), 0)


__all__ = ["Firing", "PaneIsWindow", "TwoStacks"]
