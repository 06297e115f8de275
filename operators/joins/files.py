"""Runs of a join on local disk (``state="rocksdb"``): Arrow IPC files of one batch each that are memory-mapped.

A file holds the sorted rows and what a search needs beside them: hashes, event times, ties, and keys where they are not
just a column. So a mapped run is a `SortedRows` like any other, whose pages are read when a search touches them; they
count as resident until the kernel wants them back or `MappedFile.release` gives them back, to be read again from the
page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from rayflow.errors import StorageError
from rayflow.operators.grouping import flat, plain_key, plain_type
from rayflow.operators.joins.kernels import SortedRows
from rayflow.operators.mapping import Mapping

FRACTION: Final = 8
"""Of the memory of the operator one side may have so much in runs, and as much in one file: two sides are a quarter,
the rest is for merging and for what is joined just now."""


class MappedFile:
    """One file. Rows that were taken from it stay readable when it is dropped."""

    def __init__(self, path: Path) -> None:
        self._mapping = Mapping(path)
        self.path = path

    def read(self) -> pa.RecordBatch:
        """Its one batch, without a copy."""
        return pa.ipc.open_file(self._mapping.buffer).get_batch(0)

    def release(self) -> None:
        """Nothing of it is needed in memory just now."""
        self._mapping.release()

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)


class RowFiles:
    """Where one side of a join keeps runs that do not fit into memory."""

    def __init__(self, scratch: Callable[[str], Path], memory_bytes: int, keys: Sequence[str], where: object) -> None:
        self._scratch = scratch
        self._keys = tuple(keys)
        self._where = where
        self._folder: Path | None = None
        self._written = 0
        self.runs_bytes_max = self.file_bytes = max(1, memory_bytes // FRACTION)

    def write(self, rows: SortedRows) -> tuple[SortedRows, MappedFile]:
        """The same rows, mapped. Raises `StorageError` naming the folder when the disk is full or fails."""
        width = rows.rows.num_columns
        own = [key for name, key in zip(self._keys, rows.keys, strict=True) if not self._is_column(rows.rows, name)]
        added = [
            pa.array(rows.hashes),
            pa.array(rows.times),
            *([] if rows.ties is None else [pa.array(rows.ties)]),
            *own,
        ]
        columns = [*rows.rows.columns, *added]
        batch = pa.RecordBatch.from_arrays(columns, names=[str(i) for i in range(len(columns))])
        mapped, file = self._mapped(batch)
        found = mapped.columns
        numbers = [column.to_numpy(zero_copy_only=True) for column in found[width : width + len(added) - len(own)]]
        kept = pa.RecordBatch.from_arrays(found[:width], schema=rows.rows.schema)
        others = iter(found[len(columns) - len(own) :])
        keys = tuple(
            flat(plain_key(kept.column(name))) if self._is_column(kept, name) else next(others) for name in self._keys
        )
        ties = None if rows.ties is None else numbers[2]
        return SortedRows(kept, keys, numbers[0], numbers[1], ties), file

    @staticmethod
    def _is_column(rows: pa.RecordBatch, key: str) -> bool:
        """Whether `plain_key` gives the column as it is."""
        kind = rows.schema.field(key).type
        return bool(plain_type(kind).equals(kind)) and not pa.types.is_floating(kind)

    def _mapped(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, MappedFile]:
        path: Path | None = None
        try:
            path = self._next_path()
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            file = MappedFile(path)
            return file.read(), file
        except OSError as error:
            if path is not None:
                with suppress(OSError):
                    path.unlink()
            raise StorageError(
                f"{self._where} cannot write rows of a join to the local folder {self._folder}: {error}; free space "
                "there or give another one with JobConfig(local_dir=...); the last checkpoint is whole and the job "
                "goes on from it"
            ) from error

    def _next_path(self) -> Path:
        if self._folder is None:
            self._folder = self._scratch("join")
        self._written += 1
        return self._folder / f"rows-{self._written:06d}.arrow"


def part_of(rows: SortedRows, begin: int, end: int) -> SortedRows:
    """Rows [begin, end), without a copy."""
    return SortedRows(
        rows.rows.slice(begin, end - begin),
        tuple(key.slice(begin, end - begin) for key in rows.keys),
        rows.hashes[begin:end],
        rows.times[begin:end],
        None if rows.ties is None else rows.ties[begin:end],
    )


def hash_ranges(runs: Sequence[SortedRows], ranges: int) -> list[list[SortedRows]]:
    """The rows of all runs, in so many ranges of hashes: rows of one key are in one of them. None is empty."""
    cuts = np.array([(i << 64) // ranges for i in range(1, ranges)], np.uint64)
    found: list[list[SortedRows]] = [[] for _ in range(ranges)]
    for rows in runs:
        edges = [0, *np.searchsorted(rows.hashes, cuts, side="left").tolist(), len(rows)]
        for at, (begin, end) in enumerate(pairwise(edges)):
            if begin < end:
                found[at].append(part_of(rows, begin, end))
    return [parts for parts in found if parts]


__all__ = ["FRACTION", "MappedFile", "RowFiles", "hash_ranges", "part_of"]
