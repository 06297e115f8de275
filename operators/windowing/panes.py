"""Firing: from the panes in a `RunStore` to the windows that have ended.

Sliding windows by two stacks (Tangwongsan, Hirzel, Schneider, Wu: "General incremental sliding-window aggregation",
VLDB 2015), for merges that have no inverse. The panes of a window are two parts: of the older half the merges of all
suffixes are kept, each made from the next with one merge; of the newer half the merge of all. A window is one suffix
merged with the newer half. When the suffixes are used up, those of the whole window are made. So a window costs at most
three merges of tables of its keys, however many panes it has.

Where a pane has few of the keys of its window, two of these three would do little for their price: a half is a merged
table and rows that came since, which are merged into it only when they are more than half as many. The last merge,
which makes the result, takes in all of that.

All of that is derived from the store and is not part of checkpoints. Suffixes are held up to a number of bytes; beyond
it every second one is dropped, and is made again from the next one kept when its window fires.

Rows that come for a pane that has been merged already (late for some of its windows, in time for others) make the
merges void: the next window begins anew from the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    half: Half


@dataclass(frozen=True, slots=True)
class Half:
    """Rows of panes: those of ``merged`` have unique keys, ``more`` are as they came, not many."""

    merged: pa.Table
    more: tuple[pa.Table, ...] = ()

    def with_rows(self, rows: pa.Table, plan: Preaggregation) -> Half:
        more = (*self.more, rows)
        if 2 * sum(table.num_rows for table in more) <= self.merged.num_rows:
            return Half(self.merged, more)
        return Half(_merged([self.merged, *more], plan))


class TwoStacks:
    """Sliding windows: see the top of this file."""

    def __init__(self, spec: Sliding, *, suffix_bytes: int = SUFFIX_BYTES) -> None:
        self._spec = spec
        self._suffix_bytes = suffix_bytes
        self._older: list[Suffix] = []
        """By start, descending, of panes before `_middle`."""
        self._middle = 0
        self._newer: Half | None = None
        """Rows of the panes from `_middle` up to `_edge`."""
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
            rows = runs.peek(self._edge, end - 1)
            self._newer = self._newer if rows is None else _grown(self._newer, rows, plan, runs)
            self._edge = end
        while self._older and self._older[-1].start < start:
            self._older.pop()
        if not self._older or self._older[-1].after >= start:
            self._extend(runs, plan, start)
        halves = [*(suffix.half for suffix in self._older[-1:]), *([self._newer] if self._newer is not None else [])]
        tables = [table for half in halves for table in (half.merged, *half.more)]
        return _merged(tables, plan) if len(tables) > 1 else next(iter(tables), None)

    def _extend(self, runs: RunStore, plan: Preaggregation, start: int) -> None:
        """Make the suffixes from ``start`` on up to the earliest there is."""
        half = self._older[-1].half if self._older else None
        rows = runs.peek(start, (self._older[-1].start if self._older else self._middle) - 1)
        if rows is None:
            return
        every = self._spec.every_us
        begins = (runs.starts_of(rows) - start) // every * every + start
        cuts = [0, *(np.flatnonzero(np.diff(begins)) + 1).tolist(), len(begins)]
        held = self._held()
        for cut in reversed(range(len(cuts) - 1)):
            before, half = half, _grown(half, rows.slice(cuts[cut], cuts[cut + 1] - cuts[cut]), plan, runs)
            after = int(begins[cuts[cut] - 1]) if cut else start - 1
            self._older.append(Suffix(after, int(begins[cuts[cut]]), half))
            held += half.merged.nbytes if before is None or half.merged is not before.merged else 0
            if held > self._suffix_bytes and len(self._older) > 2:
                self._older = [*self._older[:-1:2], self._older[-1]]
                held = self._held()

    def _held(self) -> int:
        return sum({id(suffix.half.merged): int(suffix.half.merged.nbytes) for suffix in self._older}.values())


def _grown(half: Half | None, rows: pa.Table, plan: Preaggregation, runs: RunStore) -> Half:
    """``rows`` may be of several panes, in their order, with unique keys in each."""
    if half is not None:
        return half.with_rows(rows, plan)
    starts = runs.starts_of(rows)
    return Half(rows if starts[0] == starts[-1] else _merged([rows], plan))


def _merged(tables: Sequence[pa.Table], plan: Preaggregation) -> pa.Table:
    """Rows by key, whatever their panes."""
    together = pa.concat_tables(tables)
    return plan.merge(together if plan.keys else at(together, 0, plan), 0)


__all__ = ["Firing", "PaneIsWindow", "TwoStacks"]
