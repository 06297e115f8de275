"""Runs on local disk: uncompressed Arrow IPC files that are memory-mapped, for state larger than memory.

Rows of a file are in ascending order of (window start, hash of the key). That makes a merge of any number of files
work in stretches of that order, each small enough for memory: the rows of one key and window lie in one stretch. Every
file carries a sparse index of the order in memory, an entry for about each ``BLOCK_ROWS`` rows; what lies between two
entries is hashed again when a stretch begins there.

Pages of a mapping that were read count as resident until the kernel wants them back. After each pass they are given
back (MADV_DONTNEED): the file keeps them in the page cache, the process is as small as it says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.errors import StorageError
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.mapping import Mapping
from rayflow.partition import hash_columns

BLOCK_ROWS: Final = 8_192

Place: TypeAlias = tuple[int, int]
"""(window start in us, hash of the key): the order of rows in a file."""
UInt64Array: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class RowOrder:
    """How rows of partial results are ordered."""

    start_column: str
    key_columns: tuple[str, ...]

    def starts(self, table: pa.Table) -> Int64Array:
        starts: Int64Array = flat(table.column(self.start_column)).view(pa.int64()).to_numpy()
        return starts

    def hashes(self, table: pa.Table) -> UInt64Array:
        if not self.key_columns or not table.num_rows:
            return np.zeros(table.num_rows, np.uint64)
        return hash_columns([flat(table.column(key)) for key in self.key_columns], self.key_columns)

    def arrange(self, table: pa.Table) -> pa.Table:
        """The rows in order; the table itself where they are already."""
        starts, hashes = self.starts(table), self.hashes(table)
        order = np.argsort(hashes, kind="stable")
        if np.any(starts[1:] != starts[:-1]):
            order = order[np.argsort(starts[order], kind="stable")]
        if np.array_equal(order, np.arange(len(order))):
            return table
        return table.take(pa.array(order))

    def places(self, table: pa.Table) -> list[Place]:
        """The place of every row."""
        return list(zip(self.starts(table).tolist(), self.hashes(table).tolist(), strict=True))


@dataclass(slots=True)
class SparseIndex:
    """Places of some rows, ascending, the first row among them."""

    order: RowOrder
    places: list[Place] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    end: int = 0

    def add(self, table: pa.Table) -> None:
        """The next rows, in one chunk."""
        at = np.arange(0, table.num_rows, BLOCK_ROWS)
        self.places.extend(self.order.places(table.take(pa.array(at))))
        self.rows.extend((at + self.end).tolist())
        self.end += table.num_rows

    def find(self, table: pa.Table, place: Place) -> int:
        """The first row at ``place`` or behind it, of the rows that were added, which are ``table``."""
        block = bisect_left(self.places, place)
        if block == 0:
            return 0
        begin, end = self.rows[block - 1], self.rows[block] if block < len(self.rows) else self.end
        part = table.slice(begin, end - begin)
        starts = self.order.starts(part)
        low, high = np.searchsorted(starts, place[0], "left"), np.searchsorted(starts, place[0], "right")
        if low == high or place[1] == 0:
            return begin + int(low)
        hashes = self.order.hashes(part.slice(low, high - low))
        return begin + int(low) + int(np.searchsorted(hashes, np.uint64(place[1]), "left"))


class Ordered:
    """A table in order with its index; in memory, or the content of a file."""

    def __init__(self, table: pa.Table, index: SparseIndex) -> None:
        self.table = table
        self.index = index

    @staticmethod
    def of(table: pa.Table, order: RowOrder) -> Ordered:
        index = SparseIndex(order)
        table = order.arrange(table.combine_chunks())
        if table.num_rows:
            index.add(table)
        return Ordered(table, index)

    def find(self, place: Place) -> int:
        return self.index.find(self.table, place)

    def release(self) -> None:
        """Nothing of it is needed in memory just now."""

    def drop(self) -> None:
        """It is not needed any more; whoever still has the table may go on reading it."""


class SpilledTable(Ordered):
    """An `Ordered` whose table is a mapped file."""

    def __init__(self, path: Path, index: SparseIndex) -> None:
        self._mapping = Mapping(path)
        super().__init__(pa.ipc.open_file(self._mapping.buffer).read_all(), index)
        self.path = path

    def release(self) -> None:
        self._mapping.release()

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)


class Spill:
    """Where one operator instance keeps runs that do not fit into memory.

    ``memory_bytes`` bounds what the operator needs at any moment, roughly: a quarter of it may be runs in memory, the
    rest is for merging them and for reading files in stretches.
    """

    def __init__(self, scratch: Callable[[str], Path], memory_bytes: int, order: RowOrder, where: object) -> None:
        self._scratch = scratch
        self._where = where
        self._folder: Path | None = None
        self._files = 0
        self.order = order
        self.runs_bytes_max = max(1, memory_bytes // 4)
        self.file_bytes = max(1, memory_bytes // 8)
        self.bytes_written = 0

    def write(self, tables: Iterable[pa.Table]) -> Iterator[SpilledTable]:
        """Rows that are in order over all tables, as files of about ``file_bytes``.

        Raises `StorageError` naming the folder when the disk is full or fails; the file it was about is gone then.
        """
        open_file: list[_Writer] = []
        try:
            for table in tables:
                for part in self._portions(table):
                    if not open_file:
                        open_file.append(_Writer(self._next_path(), part.schema, self.order))
                    open_file[0].add(part)
                    if open_file[0].nbytes >= self.file_bytes:
                        yield self._finish(open_file.pop())
            if open_file:
                yield self._finish(open_file.pop())
        except OSError as error:
            raise self._failed(error) from error
        finally:
            for file in open_file:
                file.abandon()

    def write_one(self, table: pa.Table) -> SpilledTable:
        """As `write`, all in one file, however large. The table must be in order."""
        writer: _Writer | None = None
        try:
            writer = _Writer(self._next_path(), table.schema, self.order)
            writer.add(table.combine_chunks())
            return self._finish(writer)
        except OSError as error:
            if writer is not None:
                writer.abandon()
            raise self._failed(error) from error

    def _portions(self, table: pa.Table) -> Iterator[pa.Table]:
        """Pieces of one chunk each, none of which fills a file by much."""
        table = table.combine_chunks()
        portions = max(1, -(-int(table.nbytes) // self.file_bytes))
        step = max(1, -(-table.num_rows // portions))
        for begin in range(0, table.num_rows, step):
            yield table.slice(begin, step)

    def _finish(self, writer: _Writer) -> SpilledTable:
        try:
            done = writer.finish()
        except OSError:
            writer.abandon()
            raise
        self.bytes_written += writer.nbytes
        return done

    def _next_path(self) -> Path:
        if self._folder is None:
            self._folder = self._scratch("runs")
        self._files += 1
        return self._folder / f"run-{self._files:06d}.arrow"

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._where} cannot write its runs to the local folder {self._folder}: {error}; free space there or "
            "give another one with JobConfig(local_dir=...); the last checkpoint is whole and the job goes on from it"
        )


class _Writer:
    """One file being written."""

    def __init__(self, path: Path, schema: pa.Schema, order: RowOrder) -> None:
        self._path = path
        self._index = SparseIndex(order)
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)
        self.nbytes = 0

    def add(self, table: pa.Table) -> None:
        self._index.add(table)
        self._writer.write_table(table, max_chunksize=BLOCK_ROWS * 8)
        self.nbytes += int(table.nbytes)

    def finish(self) -> SpilledTable:
        self._writer.close()
        self._sink.close()
        return SpilledTable(self._path, self._index)

    def abandon(self) -> None:
        for step in (self._writer.close, self._sink.close, self._path.unlink):
            with suppress(OSError, pa.ArrowException):
                step()


@dataclass(frozen=True, slots=True)
class Part:
    """Rows ``begin`` to ``end`` of an ordered table."""

    source: Ordered
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return int(self.source.table.slice(self.begin, self.end - self.begin).nbytes)


def stretches(parts: Sequence[Part], bytes_max: int) -> Iterator[pa.Table]:
    """All rows of the parts, as tables of which each holds what lies between two places in the order: no key and
    window is in two of them, and their order is that of the places. Rows within a table are in no order.

    A table has at most ``bytes_max`` bytes, or one index entry's rows of every part if that is more.
    """
    parts = [part for part in parts if part.end > part.begin]
    rows = sum(part.end - part.begin for part in parts)
    if not rows:
        return
    nbytes = sum(part.nbytes for part in parts)
    if nbytes <= bytes_max:
        yield _together([part.source.table.slice(part.begin, part.end - part.begin) for part in parts])
        return
    entries = max(1, bytes_max * rows // nbytes // BLOCK_ROWS - len(parts))
    places = sorted(place for part in parts for place in _entries(part))
    cuts = dict.fromkeys(places[entries::entries])
    at = [part.begin for part in parts]
    for cut in (*cuts, None):
        to = [part.end if cut is None else min(max(part.source.find(cut), part.begin), part.end) for part in parts]
        found = [
            part.source.table.slice(begin, end - begin)
            for part, begin, end in zip(parts, at, to, strict=True)
            if end > begin
        ]
        at = to
        if found:
            yield _together(found)
            for part in parts:
                part.source.release()


def _together(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables)


def _entries(part: Part) -> Iterator[Place]:
    index = part.source.index
    for place, row in zip(index.places, index.rows, strict=True):
        if part.begin < row < part.end:
            yield place


__all__ = ["BLOCK_ROWS", "Ordered", "Part", "Place", "RowOrder", "Spill", "SpilledTable", "stretches"]
