"""What changed in a table, as pieces that are uploaded once: incremental checkpoints under ``memory`` and ``fs``.

A **run** is an immutable piece: rows as they were when it was sealed, and keys that were removed until then. A key
comes at most once in a run, and a later run replaces what an earlier one says of a key. The state is the live runs in
order.

Changed slots are logged once each and sealed into a run when there are `SEAL_ROWS` of them (fewer of a wide table), and
at a freeze. So that runs can be let go, each run also takes rows of a **window** that moves over the table, as many
slots as have changed (at a freeze twice as many), but for rows sealed since the window was last at the beginning. When
it comes to the end, every row stands in a run of this **lap**, and all runs before the lap are dropped, with the
removed keys they tell.
Cost: a checkpoint writes at most three times what changed; live runs hold at most four times the rows of the table.

Many small runs are sealed anew as one, so that a manifest does not name thousands; that adds at most a thirty-second of
the table to one checkpoint in eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.operators.base import DELETED, Piece, new_piece
from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.columns import BoolArray, grown
from rayflow.operators.state.index import KeyIndex

SEAL_ROWS: Final = 262_144
SEAL_CELLS: Final = 1_048_576
"""Rows times columns: so many are sealed, too, because a freeze copies what is left cell by cell. Measured with rows
alone: 100,000 changed rows of 26 columns among 10 M took 63 ms."""
"""A freeze writes at most so many changed rows, those of one batch more, and twice as many unchanged ones."""
SMALL_ROWS: Final = 65_536
"""Runs of fewer rows may be joined,"""
SMALL_RUNS: Final = 32
"""if there are so many of them,"""
JOIN_RUNS: Final = 8
"""and so many together have at most `JOIN_ROWS` rows, or one in `JOIN_SHARE` of the table: that much more a checkpoint
may upload than what changed asks for."""
JOIN_ROWS: Final = 4_096
JOIN_SHARE: Final = 32
_WINDOW_MIN: Final = 64
_DENSE: Final = 16
"""Where at least one slot of so many has changed, the table is looked through instead of the log."""


class Rows(Protocol):
    """What a journal needs of its table."""

    index: KeyIndex

    @property
    def width(self) -> int:
        """Columns of a row in a checkpoint."""

    def gather(self, slots: Int64Array) -> pa.RecordBatch:
        """Copies of the rows: keys, values, and `EXPIRES` where there is a time to live."""

    def outdated(self, slots: Int64Array) -> BoolArray | None:
        """Which rows have passed their time to live; None: none."""

    def drop(self, slots: Int64Array) -> None:
        """Remove rows: distinct, all there. Calls `Journal.removing`."""


@dataclass(frozen=True, slots=True)
class Run:
    number: int
    piece: Piece
    rows: int
    slots: Int64Array | None
    """Of small runs: where the rows were, to seal them anew."""
    gone: tuple[list[pa.Array], ...]
    """Of small runs: the removed keys."""


class Journal:
    """The changes of one table."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._log: list[Int64Array] = []
        self._logged = 0
        self._dirty: BoolArray = np.zeros(0, np.bool_)
        """By slot: it is in the log, and its row has changed since it was sealed."""
        self._run_of: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        """By slot: number of the run that holds its newest sealed row; 0: its key is in no run."""
        self._gone: list[list[pa.Array]] = []
        """Keys that are in a run and whose rows were removed; some may be back."""
        self._gone_rows = 0
        self._runs: list[Run] = []
        self._next_run = 1
        self._lap = 1
        """The first run of the lap."""
        self._cursor = 0

    def grow(self, capacity: int) -> None:
        self._dirty, self._run_of = grown(self._dirty, capacity), grown(self._run_of, capacity)

    def touched(self, slots: Int64Array) -> None:
        """These rows have changed or are about to, before the next `settle` or `freeze`."""
        fresh = slots[~self._dirty[slots]]
        if len(fresh):
            self._dirty[fresh] = True
            self._log.append(fresh)
            self._logged += len(fresh)

    def removing(self, slots: Int64Array) -> Int64Array:
        """These rows, distinct ones, are about to go; returns all of them."""
        self._dirty[slots] = False
        sealed = slots[self._run_of[slots] > 0]
        if len(sealed):
            self._gone.append(self._rows.index.keys(sealed))
            self._gone_rows += len(sealed)
            self._run_of[sealed] = 0
        return slots

    def settle(self) -> None:
        """Seal if there is much to seal. Only when nobody holds slots: who touches a row may write it later."""
        if self._logged + self._gone_rows >= min(SEAL_ROWS, SEAL_CELLS // self._rows.width):
            self._seal(1)

    def freeze(self) -> tuple[Piece, ...]:
        """The state as it is now."""
        self._seal(2)
        return tuple(run.piece for run in self._runs)

    def adopt(self, piece: Piece, rows: int, slots: Int64Array) -> None:
        """A piece of a checkpoint has been put into the table: ``slots`` hold its rows."""
        number = self._number()
        live = slots[self._rows.index.alive[slots]] if len(slots) else slots
        self._run_of[live] = number
        self._dirty[live] = False
        self._runs.append(Run(number, piece, rows, None, ()))

    def forget_removed(self) -> None:
        """All of a checkpoint is in the table: its pieces tell themselves what they have removed."""
        self._gone, self._gone_rows = [], 0

    def clear(self) -> None:
        """There are no rows any more, and no slots."""
        self.reset()
        self._gone, self._gone_rows, self._runs = [], 0, []
        self._lap, self._cursor = self._next_run, 0

    def reset(self) -> None:
        """The table starts anew with no slots."""
        self._log, self._logged = [], 0
        self._dirty, self._run_of = np.zeros(0, np.bool_), np.zeros(0, np.int64)

    # -------------------------------------------------------------------------------------------------------- sealing

    def _number(self) -> int:
        number = self._next_run
        self._next_run += 1
        return number

    def _seal(self, window: int) -> None:
        changed = self._distinct(self._log)
        self._log, self._logged = [], 0
        changed = self._without_outdated(changed)
        self._dirty[changed] = False
        number = self._number()
        self._run_of[changed] = number
        passed, ended = self._pass(window * (len(changed) + self._gone_rows))
        self._run_of[passed] = number
        again = self._small_runs()
        older = self._without_outdated(self._still_of(again))
        self._run_of[older] = number
        if self._rows.index.count == 0:
            self._gone, self._gone_rows, self._runs = [], 0, []
            self._lap, self._cursor = self._next_run, 0
            return
        self._write(number, np.concatenate([changed, passed, older]), [keys for run in again for keys in run.gone])
        if ended:
            self._runs = [run for run in self._runs if run.number >= self._lap]
            self._lap, self._cursor = self._next_run, 0

    def _distinct(self, log: Sequence[Int64Array]) -> Int64Array:
        if not log:
            return np.zeros(0, np.int64)
        if self._logged * _DENSE > self._rows.index.high:
            return np.flatnonzero(self._dirty[: self._rows.index.high])  # in order of the slots: faster to copy, too
        slots = np.concatenate(log)
        slots = slots[self._dirty[slots]]  # the others were removed meanwhile
        # The last place of each slot wins; nobody needs what `_run_of` said of it any more, but whether it was sealed.
        before = self._run_of[slots]
        places = np.arange(len(slots))
        self._run_of[slots] = places
        once = self._run_of[slots] == places
        self._run_of[slots] = before
        distinct: Int64Array = slots[once]
        return distinct

    def _without_outdated(self, slots: Int64Array) -> Int64Array:
        outdated = self._rows.outdated(slots)
        if outdated is None or not outdated.any():
            return slots
        self._rows.drop(slots[outdated])
        return slots[~outdated]

    def _pass(self, count: int) -> tuple[Int64Array, bool]:
        """Move the window over so many slots: (rows in it to be sealed, whether it is at the end)."""
        if count == 0:
            return np.zeros(0, np.int64), False
        low, high = self._cursor, min(self._cursor + max(count, _WINDOW_MIN), self._rows.index.high)
        self._cursor = high
        alive = self._rows.index.alive[low:high] & (self._run_of[low:high] < self._lap)
        slots = self._without_outdated(np.flatnonzero(alive) + low)
        return slots, high >= self._rows.index.high

    def _small_runs(self) -> list[Run]:
        """Runs that are to be sealed anew."""
        small = [run for run in self._runs if run.slots is not None]
        if len(small) < SMALL_RUNS:
            return []
        most = min(SEAL_ROWS, max(JOIN_ROWS, self._rows.index.count // JOIN_SHARE))
        small.sort(key=lambda run: run.rows)
        total, taken = 0, []
        for run in small:
            total += run.rows
            if total > most:
                break
            taken.append(run)
        return taken if len(taken) >= JOIN_RUNS else []

    def _still_of(self, runs: Sequence[Run]) -> Int64Array:
        """Slots whose newest sealed row is in one of these runs."""
        found = [
            run.slots[self._run_of[run.slots] == run.number] for run in runs if run.slots is not None and len(run.slots)
        ]
        if not runs:
            return np.zeros(0, np.int64)
        numbers = {run.number for run in runs}
        self._runs = [run for run in self._runs if run.number not in numbers]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _write(self, number: int, slots: Int64Array, older: list[list[pa.Array]]) -> None:
        gone = self._removed([*older, *self._gone])
        self._gone, self._gone_rows = [], 0
        batches: list[pa.RecordBatch] = []
        removed = len(gone[0]) if gone else 0
        if len(slots):
            batches.append(self._rows.gather(slots))
            if removed:
                flags = pa.array(np.zeros(len(slots), np.bool_))
                batches[0] = batches[0].append_column(DELETED, flags)
        if removed:
            batches.append(self._tombstones(gone))
        if not batches:
            return
        small = len(slots) + removed < SMALL_ROWS
        self._runs.append(
            Run(
                number,
                new_piece(batches, transient=True),
                len(slots) + removed,
                slots if small else None,
                (gone,) if small and removed else (),
            )
        )

    def _removed(self, gone: Sequence[list[pa.Array]]) -> list[pa.Array]:
        """The keys that really have no row now."""
        if not gone:
            return []
        keys = [pa.concat_arrays(parts) for parts in zip(*gone, strict=True)]
        absent = self._rows.index.find(keys) < 0
        return keys if absent.all() else [array.filter(pa.array(absent)) for array in keys]

    def _tombstones(self, keys: Sequence[pa.Array]) -> pa.RecordBatch:
        template = self._rows.gather(np.zeros(0, np.int64))
        count = len(keys[0])
        columns = list(keys)
        columns += [pa.nulls(count, field.type) for field in list(template.schema)[len(keys) :]]
        return pa.RecordBatch.from_arrays(columns, schema=template.schema).append_column(
            DELETED, pa.array(np.ones(count, np.bool_))
        )
