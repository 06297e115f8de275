"""Sessions: rows of a key that follow each other closely, and how intervals of a key become them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pyarrow as pa

from rayflow.config import Duration
from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.distinct import distinct
from rayflow.operators.tumbling import window_size


@dataclass(frozen=True, slots=True)
class Session:
    """A row at t makes [t, t + gap) of its key a part of a session; parts that overlap are one session."""

    gap_us: int

    def __str__(self) -> str:
        return f"session gap {timedelta(microseconds=self.gap_us)}"


def session(*, gap: Duration) -> Session:
    """Windows that end when a key has no row for ``gap``: from its first row to ``gap`` behind its last.

    Rows of a key that are ``gap`` or more apart are in different sessions. Raises `ConfigError` for a bad duration.
    """
    return Session(window_size(gap, what="session(gap)"))


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """Intervals [start, end) of keys, joined where they overlap."""

    of_row: Int64Array
    """Session of each interval."""
    starts: Int64Array

    @staticmethod
    def of(keys: Sequence[pa.Array], starts: Int64Array, ends: Int64Array) -> Sessions:
        """Intervals of equal keys that overlap; those that only touch do not. At least one row."""
        _, owners = distinct(keys)
        order = _sorted(owners, starts)
        owner, start = owners[order], starts[order]
        cut = np.ones(len(order), np.bool_)
        cut[1:] = (owner[1:] != owner[:-1]) | (start[1:] >= _highest(owner, ends[order])[:-1])
        heads = np.flatnonzero(cut)
        of_row = np.empty(len(order), np.int64)
        of_row[order] = np.cumsum(cut) - 1
        return Sessions(of_row, start[heads])

    @property
    def members(self) -> Int64Array:
        """How many intervals each session is made of."""
        return np.bincount(self.of_row, minlength=len(self.starts))


def _sorted(owners: Int64Array, starts: Int64Array) -> Int64Array:
    """Rows in order of their owner and then of their start."""
    low = int(starts.min())
    bits = (int(starts.max()) - low).bit_length()
    if bits + int(owners.max()).bit_length() < 63:  # one sort of both packed is several times faster
        return np.argsort((owners << bits) | (starts - low), kind="stable")
    return np.lexsort((starts, owners))


def _highest(owners: Int64Array, ends: Int64Array) -> Int64Array:
    """The highest end so far among the rows of each owner; rows are in the order of their owners.

    One running maximum over (number of the owner, rank of the end) packed, in which owners ascend."""
    if np.all((ends[1:] >= ends[:-1]) | (owners[1:] != owners[:-1])):
        return ends
    by_end = np.argsort(ends, kind="stable")
    rank = np.empty(len(ends), np.int64)
    rank[by_end] = np.arange(len(ends))
    highest = np.maximum.accumulate(owners * len(ends) + rank)
    found: Int64Array = ends[by_end[highest % len(ends)]]
    return found


__all__ = ["Session", "Sessions", "session"]
