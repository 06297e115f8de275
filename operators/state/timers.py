"""Timers of keyed state: event time and processing time, a row each in the table ``timers`` (keys, time, kind).

As in Flink a timer is (key, kind, time): setting one that is there changes nothing. Timers fire in the order of their
time. A timer that fires is deleted first, so that it is in a checkpoint or its effects are, never both (rule A3).

The table is the truth. Beside it, `TimerQueue` keeps (time, key) of what was set in runs sorted by time, so that the
due ones are found by bisection and taken as slices: additions are sorted when a time comes that reaches them, and runs
of like size are merged, as in a log-structured merge tree. What was deleted stays in the queue until its time comes
and is then found to be gone from the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.declared import TIMERS, free_name
from rayflow.operators.state.keyed import KeyedState

TimerKind = Literal["event", "processing"]
KINDS: Final[tuple[TimerKind, ...]] = ("event", "processing")
TIME_TYPE: Final = pa.timestamp("us", tz="UTC")


@dataclass(slots=True)
class _Run:
    times: Int64Array
    """Ascending."""
    keys: pa.RecordBatch
    begin: int = 0
    """What lies before was taken."""

    @property
    def rows(self) -> int:
        return len(self.times) - self.begin


class TimerQueue:
    """(time, key) of one kind of timers; duplicates are allowed and come out as such."""

    def __init__(self, keys: pa.Schema) -> None:
        self._schema = keys
        self._runs: list[_Run] = []
        self._added: list[tuple[Int64Array, pa.RecordBatch]] = []
        self._added_first: int | None = None

    def add(self, times: Int64Array, keys: pa.RecordBatch) -> None:
        if len(times):
            self._added.append((times, keys))
            first = int(times.min())
            self._added_first = first if self._added_first is None else min(first, self._added_first)

    def first(self) -> int | None:
        """The earliest time; perhaps of a timer that was deleted since."""
        firsts = [int(run.times[run.begin]) for run in self._runs]
        if self._added_first is not None:
            firsts.append(self._added_first)
        return min(firsts, default=None)

    def take(self, until: int) -> tuple[Int64Array, pa.RecordBatch] | None:
        """Remove and return those at or before ``until``, ascending in time; None if there are none."""
        if self._added_first is not None and self._added_first <= until:
            self._seal()
        pieces: list[tuple[Int64Array, pa.RecordBatch]] = []
        for run in self._runs:
            end = int(np.searchsorted(run.times, until, side="right"))
            if end > run.begin:
                pieces.append((run.times[run.begin : end], run.keys.slice(run.begin, end - run.begin)))
                run.begin = end
        self._runs = [run for run in self._runs if run.rows]
        return _sorted(pieces) if pieces else None

    def _seal(self) -> None:
        """The additions become a run; then runs are merged while one is not twice as large as the next."""
        self._runs.append(_Run(*_sorted(self._added)))
        self._added, self._added_first = [], None
        while len(self._runs) > 1 and self._runs[-2].rows <= 2 * self._runs[-1].rows:
            last, before = self._runs.pop(), self._runs.pop()
            both = [(r.times[r.begin :], r.keys.slice(r.begin)) for r in (before, last)]
            self._runs.append(_Run(*_sorted(both)))


def _sorted(pieces: list[tuple[Int64Array, pa.RecordBatch]]) -> tuple[Int64Array, pa.RecordBatch]:
    times = np.concatenate([times for times, _ in pieces])
    keys = pa.concat_batches([keys for _, keys in pieces])
    if len(times) > 1 and bool((times[1:] < times[:-1]).any()):
        order = np.argsort(times, kind="stable")
        times, keys = times[order], keys.take(pa.array(order))
    return times, keys


@dataclass(frozen=True, slots=True)
class Due:
    """Timers that fire together; row i of all three belongs together, times ascend."""

    keys: pa.RecordBatch
    times: Int64Array
    kind: TimerKind


class Timers:
    """All timers of one operator instance. Made when the types of the keys are known."""

    def __init__(self, state: KeyedState, keys: pa.Schema) -> None:
        self._keys = keys
        schema = timer_schema(keys)
        self._table = state.table(TIMERS, schema, pa.schema([]), subkeys=2)
        self._queues: dict[TimerKind, TimerQueue] = {kind: TimerQueue(keys) for kind in KINDS}
        for batch in self._table.scan():
            self._restored(batch)

    def _restored(self, batch: pa.RecordBatch) -> None:
        width = len(self._keys)
        keys, times = batch.select(range(width)), batch.column(width).view(pa.int64()).to_numpy()
        for kind in KINDS:
            rows = np.flatnonzero(pc.equal(batch.column(width + 1), kind).to_numpy(zero_copy_only=False))
            self._queues[kind].add(times[rows], _plain(keys.take(pa.array(rows)), self._keys))

    def add(self, keys: pa.RecordBatch, times: Int64Array, kind: TimerKind) -> None:
        """A timer a row; those that are there already are left as they are."""
        columns = self._columns(keys, times, kind)
        new = np.flatnonzero(self._table.slots(columns, insert=False) < 0)
        if len(new) == 0:
            return
        slots = self._table.slots([c.take(pa.array(new)) for c in columns], insert=True)
        _, once = np.unique(slots, return_index=True)
        new = new[np.sort(once)]
        self._queues[kind].add(times[new], keys.take(pa.array(new)))

    def delete(self, keys: pa.RecordBatch, times: Int64Array, kind: TimerKind) -> None:
        """Those that are not there are left out."""
        if len(times):
            self._table.delete(self._table.slots(self._columns(keys, times, kind), insert=False))

    def take_due(self, kind: TimerKind, until: int) -> Due | None:
        """The timers at or before ``until``, deleted; None if there are none."""
        queue = self._queues[kind]
        while (taken := queue.take(until)) is not None:
            times, keys = taken
            slots = self._table.slots(self._columns(keys, times, kind), insert=False)
            # A timer that was deleted and set again stands twice in the queue.
            _, once = np.unique(slots, return_index=True)
            rows = np.sort(once[slots[once] >= 0])
            if len(rows):
                self._table.delete(slots[rows])
                return Due(keys.take(pa.array(rows)), times[rows], kind)
        return None

    def first(self, kind: TimerKind) -> int | None:
        """When `take_due` may have something."""
        return self._queues[kind].first()

    def pending(self) -> Iterator[pa.RecordBatch]:
        """All of them: keys, time, kind."""
        return self._table.scan()

    def _columns(self, keys: pa.RecordBatch, times: Int64Array, kind: TimerKind) -> list[pa.Array]:
        return [*keys.columns, pa.array(times, pa.int64()).view(TIME_TYPE), pa.repeat(kind, len(times))]


def timer_schema(keys: pa.Schema) -> pa.Schema:
    """Columns of the table: the keys, ``time`` and ``kind`` (with ``_`` behind where a key column is called so)."""
    return pa.schema([*keys, (free_name("time", keys.names), TIME_TYPE), (free_name("kind", keys.names), pa.string())])


def _plain(keys: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(keys.columns, schema=schema)


__all__ = ["KINDS", "TIME_TYPE", "Due", "TimerKind", "TimerQueue", "Timers", "timer_schema"]
