"""The rows of one side of a join: immutable sorted runs in a log-structured merge tree (O'Neil et al. 1996).

Small runs are merged in pairs, when one has grown to half of the one before it. Large ones are merged `FAN_IN` at a
time: to copy rows costs more than to look at a few more runs, and what was merged is uploaded again. So there are
logarithmically many runs, and a row is copied by few merges once its run is large.

What has expired stays where it is, in memory and in checkpoints, until it is the larger half of its run: **rows that no
row to come can match must therefore match none, and be decided no second time, by their event time alone** (the
operators see to it). So freezing is copying references, a run is uploaded once (`Piece`), and nothing about a row ever
changes.

With `RowFiles` the oldest runs go to local disk when there are too many bytes of them; they stay what they are, mapped
instead of in memory, and no run becomes larger than a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from rayflow.operators.base import FrozenTable, Piece, new_piece
from rayflow.operators.grouping import Int64Array
from rayflow.operators.joins.files import MappedFile, RowFiles, hash_ranges
from rayflow.operators.joins.kernels import SortedRows, merged, same_as_next
from rayflow.operators.runs import PIECE_BYTES

RUN_BYTES_MAX: Final = 512 * 1024 * 1024
"""Larger runs are not merged any more: a string column has room for 2 GiB."""
SMALL_RUN_BYTES: Final = 1024 * 1024
FAN_IN: Final = 8
"""So many large runs of about one size become one. Processor time beside merging in pairs, run by turns in one process,
Nexmark of 1 M events: q20 0.74 -> 0.55 s, q4 0.60 -> 0.43 s, q9 0.76 -> 0.60 s."""
PRUNE_ROWS: Final = 65_536


@dataclass(slots=True)
class BufferedRun:
    sorted: SortedRows
    low: int
    """Earliest event time in it, us."""
    high: int
    half: int
    """Half of its rows are older."""
    nbytes: int
    piece: Piece | None = None
    file: MappedFile | None = None
    """None: in memory."""

    @staticmethod
    def of(rows: SortedRows, piece: Piece | None = None) -> BufferedRun:
        times = rows.times
        half = int(np.partition(times, len(times) // 2)[len(times) // 2])
        return BufferedRun(rows, int(times.min()), int(times.max()), half, int(rows.rows.nbytes), piece)

    @property
    def level(self) -> int:
        """Of its size: runs of a level are up to `FAN_IN` times as large as one another; -1 is small."""
        level = -1
        while self.nbytes >= SMALL_RUN_BYTES * FAN_IN ** (level + 1):
            level += 1
        return level


class Buffer:
    """Rows of one side that may still be needed, and some that are not needed any more."""

    def __init__(self, files: RowFiles | None = None) -> None:
        self.runs: list[BufferedRun] = []
        self._files = files
        self._run_bytes_max = RUN_BYTES_MAX if files is None else min(RUN_BYTES_MAX, files.file_bytes)
        self._pruned_rows = 0

    @property
    def rows(self) -> int:
        return sum(len(run.sorted) for run in self.runs)

    def append(self, rows: SortedRows) -> None:
        if not len(rows):
            return
        runs = self.runs
        runs.append(BufferedRun.of(rows))
        while count := _to_merge(runs, self._run_bytes_max):
            together = runs[-count:]
            runs[-count:] = [BufferedRun.of(merged([run.sorted for run in together]))]
            _drop(together)
        self._spill(runs)

    def near(self, low: Int64Array | None, high: Int64Array | None) -> Iterator[SortedRows]:
        """Runs that may have rows with an event time in one of the ranges [low, high]; None: no bound."""
        first = None if low is None else int(low.min())
        last = None if high is None else int(high.max())
        for run in self.runs:
            if (first is None or run.high >= first) and (last is None or run.low <= last):
                yield run.sorted

    def between(self, low: int, high: int) -> Iterator[SortedRows]:
        """The rows with low <= event time < high, run by run."""
        for run in self.runs:
            if run.high < low or run.low >= high:
                continue
            if run.low >= low and run.high < high:
                yield run.sorted
                continue
            times = run.sorted.times
            inside = (times >= max(low, run.low)) & (times <= min(high - 1, run.high))
            if inside.any():
                yield run.sorted.take(inside)

    def expire(self, horizon: int) -> None:
        """Rows with an event time before ``horizon`` are not needed any more."""
        kept = []
        for run in self.runs:
            if run.high < horizon:
                _drop([run])
                continue
            if run.half < horizon:
                _drop([run])
                run = BufferedRun.of(run.sorted.take(run.sorted.times >= horizon))
            kept.append(run)
        self._spill(kept)
        self.runs = kept

    def prune(self, time: int) -> None:
        """Of the rows of a key that are not after ``time`` only the last is needed. Done when it is worth it."""
        if self.rows <= 2 * self._pruned_rows + PRUNE_ROWS:
            return
        ranges = max(1, -(-sum(run.nbytes for run in self.runs) // self._run_bytes_max))
        kept: list[BufferedRun] = []
        for parts in hash_ranges([run.sorted for run in self.runs], ranges):
            whole = merged(parts)
            superseded = same_as_next(whole)
            superseded[:-1] &= whole.times[1:] <= time
            kept.append(BufferedRun.of(whole.take(~superseded) if superseded.any() else whole))
            self._spill(kept)
        _drop(self.runs)
        self.runs = kept
        self._pruned_rows = self.rows

    def _spill(self, runs: list[BufferedRun]) -> None:
        """The oldest go to disk, as long as too much is in memory."""
        if self._files is None:
            return
        over = sum(run.nbytes for run in runs if run.file is None) - self._files.runs_bytes_max
        for run in runs:
            if over <= 0:
                return
            if run.file is None:
                over -= run.nbytes
                run.sorted, run.file = self._files.write(run.sorted)
                if run.piece is not None:
                    run.piece = Piece(run.piece.id, (run.sorted.rows,))

    def release(self) -> None:
        """What was read from disk need not stay in memory."""
        for run in self.runs:
            if run.file is not None:
                run.file.release()

    def clear(self) -> None:
        _drop(self.runs)
        self.runs = []

    def freeze(self, name: str, schema: pa.Schema, keys: Sequence[str]) -> FrozenTable:
        """Takes references only."""
        pieces, small = [], []
        for run in self.runs:
            if run.piece is None and run.sorted.rows.nbytes >= PIECE_BYTES:
                run.piece = new_piece([run.sorted.rows])
            if run.piece is None:
                small.append(run.sorted.rows)
            else:
                pieces.append(run.piece)
        return FrozenTable(name, tuple(small), schema=schema, key_columns=tuple(keys), pieces=tuple(pieces))

    def restore(self, rows: SortedRows, piece: str) -> None:
        """Rows of a snapshot, as the piece that they were ("": none)."""
        if len(rows):
            self.runs.append(BufferedRun.of(rows, Piece(piece, (rows.rows,)) if piece else None))
            self._spill(self.runs)


def _drop(runs: Sequence[BufferedRun]) -> None:
    for run in runs:
        if run.file is not None:
            run.file.drop()


def _to_merge(runs: Sequence[BufferedRun], bytes_max: int) -> int:
    """How many of the newest runs are to become one; 0: none."""
    if len(runs) < 2:
        return 0
    older, newer = runs[-2:]
    if newer.level < 0 and older.level <= 0:
        fits = older.nbytes + newer.nbytes <= bytes_max
        return 2 if fits and len(older.sorted) <= 2 * len(newer.sorted) else 0
    level, alike, nbytes = newer.level, 0, 0
    for count, run in enumerate(reversed(runs), 1):
        nbytes += run.nbytes
        if run.level > level or nbytes > bytes_max:
            return 0
        alike += run.level == level
        if alike == FAN_IN:
            return count
    return 0


def clipped(time: int) -> int:
    """``time`` as it fits in 64 bits, which is enough to compare event times with."""
    return max(-(2**63), min(2**63 - 1, time))


def shifted(times: Int64Array, by: int | None) -> Int64Array | None:
    return None if by is None else times + by


__all__ = ["Buffer", "BufferedRun", "clipped", "shifted"]
