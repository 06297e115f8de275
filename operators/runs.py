"""State as a log-structured merge tree of immutable Arrow runs (after O'Neil et al. 1996), with two levels.

A run holds partial results of one or several windows. New runs are kept as they come. When their rows outnumber those
of the *base* two to one, all is merged into a new base: a row of the base is merged again only after twice as many
others have come, so the work is linear in the rows that come in, and memory stays below three times the distinct keys
(and windows) plus ``PENDING_ROWS``. Small runs are merged among themselves before that, ``SMALL_RUNS`` at a time, so
there is hardly more than one run for each ``SMALL_ROWS`` rows. Rows of a run are never changed: freezing the state is
copying references, and a run that a checkpoint has uploaded is not uploaded again (`Piece`).

When windows close, the runs that hold others too stay as they are and remember up to where they are closed: what is
closed is dead, in memory and in the checkpoint, until it is the larger part; then the rest is copied to a new run.

With a `Spill` runs that pass its bound go to local files, and merging and firing work on them in stretches.

Tried and left: a cascade of merged runs of doubling size. It bounds the runs by a logarithm, but merges every row a
logarithmic number of times: taking in 7.9 M distinct keys of one window, batch by batch of 65,536, ran at 1.5 M rows/s
on one core, this at 5.6 to 7.8 (both before the last merge, when the window fires).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Final, TypeAlias

import numpy as np
import pyarrow as pa

from rayflow.operators.base import Piece, new_piece
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.spill import Ordered, Part, Spill, SpilledTable, stretches

PENDING_ROWS: Final = 524_288
"""Rows kept unmerged however small the base is. Smaller: more merging of hot keys; larger: more memory."""
SMALL_ROWS: Final = 4_096
SMALL_RUNS: Final = 64
PIECE_BYTES: Final = 65_536
"""Runs that are smaller are written anew in every checkpoint: an object of their own would cost more."""

Merge: TypeAlias = Callable[[pa.Table, int | None], pa.Table]
"""(partial results, their window start or None if there are several) -> the same with keys and windows made unique."""


@dataclass(slots=True)
class Run:
    """Immutable rows of windows; those that are open start between ``low`` and ``high`` (us, both inclusive)."""

    table: pa.Table
    low: int
    high: int
    merged: bool
    """(key, window start) is unique in it."""
    ordered: bool = False
    """Rows are in ascending order of the window start."""
    closed: int | None = None
    """Rows of windows that start here or before are dead; None: there are none."""
    dead: int = 0
    """How many those are."""
    piece: Piece | None = None
    """What it is called in checkpoints, once it has been in one. All rows of ``table``, dead ones too."""
    disk: SpilledTable | None = None
    """Where the table is mapped from; then its rows are in the order of `RowOrder`."""

    @property
    def rows(self) -> int:
        """Rows of open windows."""
        return int(self.table.num_rows) - self.dead

    @property
    def memory_bytes(self) -> int:
        return 0 if self.disk is not None else int(self.table.nbytes)


@dataclass(frozen=True, slots=True)
class Frozen:
    """What a `RunStore` gives to a checkpoint. Rows of closed windows may be among it."""

    pieces: tuple[Piece, ...]
    small: tuple[pa.Table, ...]
    """Runs that are too small to be pieces."""
    base: tuple[str, ...]
    """Ids of the pieces in which, all together, no key and window is twice."""
    merged: tuple[str, ...]
    """Ids of others, in each of which by itself no key and window is twice."""


class RunStore:
    """The open windows of one operator instance."""

    def __init__(self, merge: Merge, start_column: str, spill: Spill | None = None) -> None:
        self._merge = merge
        self._start_column = start_column
        self._spill = spill
        self._base: list[Run] = []
        """(key, window start) is unique over all of them. One run, or several files or restored pieces."""
        self._pending: list[Run] = []
        """As they came, oldest first. `_small` is how many at the end are small."""
        self._small = 0
        self._pending_rows = 0
        self._memory_bytes = 0
        """Of pending runs that are not on disk, as if nothing was shared; with a spill, else nobody asks."""

    @property
    def low(self) -> int | None:
        """Start of the earliest open window; None when there is none."""
        return min((run.low for run in self.runs()), default=None)

    @property
    def rows(self) -> int:
        return sum(run.rows for run in self.runs())

    def runs(self) -> tuple[Run, ...]:
        return (*self._base, *self._pending)

    def starts_of(self, table: pa.Table) -> Int64Array:
        starts: Int64Array = flat(table.column(self._start_column)).view(pa.int64()).to_numpy()
        return starts

    # -------------------------------------------------------------------------------------------------- checkpoints

    def freeze(self) -> Frozen:
        """Takes references only. Rows of closed windows may be among them: who restores must know up to where."""
        pieces, small = [], []
        for run in self.runs():
            if run.piece is None and run.table.nbytes >= PIECE_BYTES:
                run.piece = new_piece([run.table])
            if run.piece is None:
                small.append(run.table)
            else:
                pieces.append(run.piece)
        merged = [run for run in self._pending if run.merged]
        return Frozen(tuple(pieces), tuple(small), base=_named(self._base), merged=_named(merged))

    def restore(
        self, table: pa.Table, *, piece: str = "", base: bool = False, merged: bool = False, closed: int | None = None
    ) -> None:
        """Rows of a snapshot, as the piece that it was. Windows that start at ``closed`` or before are closed: their
        rows stay closed (rule W3). ``base`` and ``merged`` as `Frozen` tells of the piece."""
        if not table.num_rows:
            return
        starts = self.starts_of(table)
        is_open = np.ones(len(starts), bool) if closed is None else starts > closed
        left = int(is_open.sum())
        if not left:
            return
        if 2 * left < len(starts):
            table, starts, is_open, piece = table.filter(pa.array(is_open)), starts[is_open], is_open[is_open], ""
        dead = len(starts) - left if len(starts) > left else 0
        run = Run(
            table,
            int(starts[is_open].min()),
            int(starts.max()),
            merged=merged or base,
            ordered=bool(np.all(starts[1:] >= starts[:-1])),
            closed=closed if dead else None,
            dead=dead,
            piece=Piece(piece, (table,)) if piece else None,
        )
        if base:
            self._base.append(run)
            self._keep_bound()
        else:
            self.append(run)

    def close(self) -> None:
        """Remove the files."""
        for run in self.runs():
            _drop(run)
        self._base, self._pending = [], []
        self._count()

    # ---------------------------------------------------------------------------------------------------------- rows

    def append(self, run: Run) -> None:
        """Add rows; merges when enough have come together."""
        if run.rows == 0:
            return
        self._pending.append(run)
        self._pending_rows += run.rows
        self._memory_bytes += 0 if self._spill is None else run.memory_bytes
        self._small = self._small + 1 if _is_small(run) else 0
        if self._pending_rows >= max(PENDING_ROWS, 2 * sum(base.rows for base in self._base)):
            self._compact()
        elif self._small >= SMALL_RUNS:
            together = self._union(self._pending[-self._small :])
            self._pending[-self._small :] = [together]
            self._count()
        self._keep_bound()

    def take(self, last_start: int) -> Iterator[pa.Table]:
        """Remove all windows that start at ``last_start`` or before. Returns their rows, with keys and windows made
        unique, in order of the window start; several tables only where some are on disk."""
        touched = [run for run in self.runs() if run.low <= last_start]
        if not touched:
            return iter(())
        if any(run.disk is not None for run in touched):
            due: Iterator[pa.Table] = self._stretched(touched, last_start)
        else:
            due = iter([self._union(touched, last_start).table])
        self._base = self._without(self._base, last_start)
        self._pending = self._without(self._pending, last_start)
        self._count()
        return due

    def drop(self, last_start: int) -> None:
        """Remove all windows that start at ``last_start`` or before."""
        if all(run.low > last_start for run in self.runs()):
            return
        self._base = self._without(self._base, last_start)
        self._pending = self._without(self._pending, last_start)
        self._count()

    def starts_from(self, first_start: int) -> Int64Array:
        """The starts, ascending, of the windows that start at ``first_start`` or later and have rows."""
        tables = [self._open_rows(run, None, first_start) for run in self.runs() if run.high >= first_start]
        found: Int64Array = np.unique(np.concatenate([np.zeros(0, np.int64), *map(self.starts_of, tables)]))
        return found

    def peek(self, first_start: int, last_start: int) -> pa.Table | None:
        """Rows of the windows that start between these, both inclusive, with keys and windows made unique, in order of
        the window start; removes nothing. None if there are none. What is on disk is mapped, but the result of a merge
        is in memory."""
        runs = [run for run in self.runs() if run.low <= last_start and run.high >= first_start]
        tables = [table for run in runs if (table := self._open_rows(run, last_start, first_start)).num_rows]
        if not tables:
            return None
        if len(tables) == 1 and all(run.merged for run in runs):
            return self._by_start(tables[0])
        table = self._merge(pa.concat_tables(tables), first_start if first_start == last_start else None)
        return self._by_start(table)

    def _count(self) -> None:
        self._pending_rows = sum(run.rows for run in self._pending)
        self._memory_bytes = 0 if self._spill is None else sum(run.memory_bytes for run in self._pending)
        self._small = sum(1 for _ in takewhile(_is_small, reversed(self._pending)))

    def _without(self, runs: Sequence[Run], last_start: int) -> list[Run]:
        kept = []
        for run in runs:
            if run.low > last_start:
                kept.append(run)
            elif run.high <= last_start:
                _drop(run)
            else:
                kept.append(self._closed(run, last_start))
        return kept

    def _closed(self, run: Run, last_start: int) -> Run:
        """The run without its windows up to ``last_start``; there are others."""
        if run.disk is not None:
            dead = run.disk.find((last_start + 1, 0))
            low = int(self.starts_of(run.table.slice(dead, 1))[0])
        elif run.ordered:
            starts = self.starts_of(run.table)
            dead = int(np.searchsorted(starts, last_start, side="right"))
            low = int(starts[dead])
        else:
            starts = self.starts_of(run.table)
            later = starts[starts > last_start]
            dead, low = len(starts) - len(later), int(later.min())
        left = replace(run, low=low, closed=last_start, dead=dead)
        if 2 * dead <= run.table.num_rows:
            return left
        rest = self._open_rows(left)
        if run.disk is None:
            rest = rest.take(pa.array(np.arange(rest.num_rows))) if run.ordered else rest
            return Run(rest, low, run.high, merged=run.merged, ordered=run.ordered)
        assert self._spill is not None
        _drop(run)
        return _on_disk(self._spill.write_one(rest), low, run.high, merged=run.merged)

    def _open_rows(self, run: Run, last_start: int | None = None, first_start: int | None = None) -> pa.Table:
        """Rows of open windows, from those that start at ``first_start`` up to those that start at ``last_start``."""
        closed = run.closed
        if first_start is not None and first_start > run.low:
            closed = first_start - 1 if closed is None else max(closed, first_start - 1)
        to_end = last_start is None or run.high <= last_start
        if closed is None and to_end:
            return run.table
        if run.disk is not None:
            part = _part(run, last_start, closed)
            return run.table.slice(part.begin, part.end - part.begin)
        starts = self.starts_of(run.table)
        if run.ordered:
            begin = 0 if closed is None else int(np.searchsorted(starts, closed, side="right"))
            end = len(starts) if last_start is None else int(np.searchsorted(starts, last_start, side="right"))
            return run.table.slice(begin, end - begin)
        wanted = np.ones(len(starts), bool) if closed is None else starts > closed
        if last_start is not None:
            wanted &= starts <= last_start
        return run.table.filter(pa.array(wanted))

    # -------------------------------------------------------------------------------------------------------- merging

    def _union(self, runs: Sequence[Run], last_start: int | None = None) -> Run:
        """Open rows of runs in memory, up to ``last_start``, as one run that is merged and ordered."""
        low = min(run.low for run in runs)
        high = max(run.high for run in runs)
        if len(runs) == 1 and runs[0].merged and runs[0].ordered:
            if last_start is None:
                return runs[0]
            return Run(self._open_rows(runs[0], last_start), low, high, merged=True, ordered=True)
        tables = [self._open_rows(run, last_start) for run in runs]
        one = low if low in (high, last_start) else None
        table = tables[0] if len(runs) == 1 and runs[0].merged else self._merge(pa.concat_tables(tables), one)
        if one is None:
            table = self._by_start(table)
        return Run(table, low, high, merged=True, ordered=True)

    def _by_start(self, table: pa.Table) -> pa.Table:
        starts = self.starts_of(table)
        if np.any(starts[1:] < starts[:-1]):
            return table.take(pa.array(np.argsort(starts, kind="stable")))
        return table

    def _compact(self) -> None:
        """Merge all into a new base."""
        spill = self._spill
        if spill is None or (
            not any(run.disk is not None for run in self.runs())
            and sum(run.memory_bytes for run in self.runs()) <= spill.runs_bytes_max
        ):
            self._base = [self._union(self.runs())]
        else:
            before = self.runs()
            self._base = self._written(self._stretched(before, None))
            for run in before:
                _drop(run)
        self._pending = []
        self._count()

    # ---------------------------------------------------------------------------------------------------- local disk

    def _keep_bound(self) -> None:
        """Write runs to disk when they pass the bound: first the base; the others only if merging does not help."""
        spill = self._spill
        if spill is None:
            return
        if self._memory_bytes + sum(run.memory_bytes for run in self._base) <= spill.runs_bytes_max:
            return
        self._base = [moved for run in self._base for moved in self._moved(run)]
        if self._memory_bytes <= spill.runs_bytes_max // 2:
            return
        enough = spill.runs_bytes_max // 4
        settled = [run for run in self._pending if run.disk is not None or (run.merged and run.memory_bytes > enough)]
        fresh = [run for run in self._pending if not any(run is other for other in settled)]
        if sum(run.memory_bytes for run in fresh) > spill.runs_bytes_max // 2:
            together = self._union(fresh)
            fresh = self._moved(together) if together.memory_bytes > enough else [together]
        self._pending = [*(moved for run in settled for moved in self._moved(run)), *fresh]
        self._count()

    def _moved(self, run: Run) -> list[Run]:
        """The run on disk. It stays the same piece of checkpoints, unless it is so large that it is better cut up."""
        spill = self._spill
        assert spill is not None
        if run.disk is not None:
            return [run]
        if run.piece is None or run.memory_bytes > 2 * spill.file_bytes:
            return self._written([spill.order.arrange(self._open_rows(run).combine_chunks())])
        moved = _on_disk(
            spill.write_one(spill.order.arrange(run.table.combine_chunks())), run.low, run.high, merged=run.merged
        )
        return [replace(moved, closed=run.closed, dead=run.dead, piece=Piece(run.piece.id, (moved.table,)))]

    def _stretched(self, runs: Sequence[Run], last_start: int | None) -> Iterator[pa.Table]:
        """Open rows of the runs, up to ``last_start``, merged and in order, as much at a time as memory is for.

        The runs may be dropped before the result is read."""
        spill = self._spill
        assert spill is not None
        parts = [_part(run, last_start, run.closed) for run in runs if run.disk is not None]
        in_memory = [run for run in runs if run.disk is None]
        if in_memory:
            rows = Ordered.of(self._open_rows(self._union(in_memory, last_start), last_start), spill.order)
            parts.append(Part(rows, 0, rows.table.num_rows))
        return self._merged(parts, spill)

    def _merged(self, parts: Sequence[Part], spill: Spill) -> Iterator[pa.Table]:
        for table in stretches(parts, spill.runs_bytes_max // 2):
            starts = self.starts_of(table)
            low = int(starts.min())
            yield spill.order.arrange(self._merge(table, low if low == int(starts.max()) else None))

    def _written(self, tables: Iterable[pa.Table]) -> list[Run]:
        """Tables in order, without a key and window twice, as files."""
        spill = self._spill
        assert spill is not None
        done: list[Run] = []
        try:
            for file in spill.write(tables):
                last = file.table.slice(file.table.num_rows - 1)
                low, high = (int(self.starts_of(row)[0]) for row in (file.table.slice(0, 1), last))
                done.append(_on_disk(file, low, high, merged=True))
        except BaseException:
            for run in done:
                _drop(run)
            raise
        return done


def _part(run: Run, last_start: int | None, closed: int | None) -> Part:
    assert run.disk is not None
    begin = 0 if closed is None else run.disk.find((closed + 1, 0))
    end = run.table.num_rows if last_start is None else run.disk.find((last_start + 1, 0))
    return Part(run.disk, begin, end)


def _on_disk(file: SpilledTable, low: int, high: int, *, merged: bool) -> Run:
    return Run(file.table, low, high, merged=merged, ordered=True, disk=file)


def _named(runs: Iterable[Run]) -> tuple[str, ...]:
    return tuple(run.piece.id for run in runs if run.piece is not None)


def _is_small(run: Run) -> bool:
    return run.rows < SMALL_ROWS and run.disk is None


def _drop(run: Run) -> None:
    if run.disk is not None:
        run.disk.drop()


__all__ = ["PENDING_ROWS", "PIECE_BYTES", "SMALL_ROWS", "SMALL_RUNS", "Frozen", "Run", "RunStore"]
