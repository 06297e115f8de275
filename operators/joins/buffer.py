"""The rows of one side of a join: immutable sorted runs in a log-structured merge tree (O'Neil et al. 1996).

A run is merged with the one before it when it has grown to half of its rows, so there are logarithmically many. What
has expired stays where it is, in memory and in checkpoints, until it is the larger half of its run: **rows that no row
to come can match must therefore match none, and be decided no second time, by their event time alone** (the operators
see to it). So freezing is copying references, a run is uploaded once (`Piece`), and nothing about a row ever changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa

from rayflow.operators.base import FrozenTable, Piece, new_piece
from rayflow.operators.grouping import Int64Array
from rayflow.operators.joins.kernels import SortedRows, merged, same_as_next
from rayflow.operators.runs import PIECE_BYTES

RUN_BYTES_MAX: Final = 512 * 1024 * 1024
"""Larger runs are not merged any more: a string column has room for 2 GiB."""
PRUNE_ROWS: Final = 65_536


@dataclass(slots=True)
class BufferedRun:
    sorted: SortedRows
    low: int
    """Earliest event time in it, us."""
    high: int
    half: int
    """Half of its rows are older."""
    piece: Piece | None = None

    @staticmethod
    def of(rows: SortedRows, piece: Piece | None = None) -> BufferedRun:
        times = rows.times
        half = int(np.partition(times, len(times) // 2)[len(times) // 2])
        return BufferedRun(rows, int(times.min()), int(times.max()), half, piece)


class Buffer:
    """Rows of one side that may still be needed, and some that are not needed any more."""

    def __init__(self) -> None:
        self.runs: list[BufferedRun] = []
        self._pruned_rows = 0

    @property
    def rows(self) -> int:
        return sum(len(run.sorted) for run in self.runs)

    def append(self, rows: SortedRows) -> None:
        if not len(rows):
            return
        runs = self.runs
        runs.append(BufferedRun.of(rows))
        while len(runs) > 1 and _mergeable(runs[-2], runs[-1]):
            newer, older = runs.pop(), runs.pop()
            runs.append(BufferedRun.of(merged([older.sorted, newer.sorted])))

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
                continue
            if run.half < horizon:
                run = BufferedRun.of(run.sorted.take(run.sorted.times >= horizon))
            kept.append(run)
        self.runs = kept

    def prune(self, time: int) -> None:
        """Of the rows of a key that are not after ``time`` only the last is needed. Done when it is worth it."""
        if self.rows <= 2 * self._pruned_rows + PRUNE_ROWS:
            return
        whole = merged([run.sorted for run in self.runs])
        superseded = same_as_next(whole)
        superseded[:-1] &= whole.times[1:] <= time
        left = whole.take(~superseded) if superseded.any() else whole
        self.runs = [BufferedRun.of(left)]
        self._pruned_rows = len(left)

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


def _mergeable(older: BufferedRun, newer: BufferedRun) -> bool:
    if len(older.sorted) > 2 * len(newer.sorted):
        return False
    return bool(older.sorted.rows.nbytes + newer.sorted.rows.nbytes <= RUN_BYTES_MAX)


def clipped(time: int) -> int:
    """``time`` as it fits in 64 bits, which is enough to compare event times with."""
    return max(-(2**63), min(2**63 - 1, time))


def shifted(times: Int64Array, by: int | None) -> Int64Array | None:
    return None if by is None else times + by


__all__ = ["Buffer", "BufferedRun", "clipped", "shifted"]
