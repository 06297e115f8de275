"""State on local disk (``rocksdb``): what a store of rows by key must be able to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.operators.contracts.state import FrozenFolder, RestoredFolder

UInt16Array = npt.NDArray[np.uint16]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Change:
    """Rows to be put or, with ``values`` None, keys to be deleted. Row i of all three belongs together."""

    groups: UInt16Array
    keys: pa.RecordBatch
    values: pa.RecordBatch | None


class ColdTable(Protocol):
    """One table of a `ColdStore`: rows by key, sorted by key group. Keys are unique; the last columns of the key may be
    a subkey (map keys, list positions) that `scan_prefix` leaves open. All methods work on whole batches."""

    def get(self, groups: UInt16Array, keys: pa.RecordBatch) -> tuple[BoolArray, pa.RecordBatch]:
        """(which keys are there, their values; null rows where not). Reads, here and below, see what was frozen."""

    def write(self, change: Change) -> None:
        """Put or delete. Finishes an outstanding freeze first, so that the change is not in it."""

    def scan(self, groups: range | None = None, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """All rows, keys and values, in ascending order of the key group; the store must not be written meanwhile."""

    def scan_prefix(self, groups: UInt16Array, prefixes: pa.RecordBatch) -> pa.RecordBatch:
        """All rows whose key begins with one of the prefixes (distinct; the first columns of the key)."""


class ColdStore(Protocol):
    """The state of one operator instance on local disk (``rocksdb``). One thread uses it, but for what `freeze`
    gives to the uploader. Raises `StorageError` naming the folder when the disk is full or fails: nothing of an earlier
    checkpoint is lost by that."""

    def table(self, name: str, keys: pa.Schema, values: pa.Schema, *, subkeys: int = 0) -> ColdTable:
        """The table, made if it is not there; one that was restored with other columns is migrated where that is
        possible (`rayflow.operators.state.evolution`), else `StateSchemaError`.

        The last ``subkeys`` columns of ``keys`` are not of the stream's key. The meta of the folder tells their number,
        because a reader computes key groups from the others.
        """

    def tables(self) -> Mapping[str, tuple[pa.Schema, pa.Schema]]:
        """(key schema, value schema) of the tables there are, by name."""

    def freeze(self, changes: Mapping[str, Sequence[Change]]) -> FrozenFolder:
        """O(1) and without touching the disk: the state is what has been written and, on top, ``changes`` by table.

        Whoever comes first performs it: the uploader (`FrozenFolder.finish`), or the next `write`.
        """

    def restore(self, folders: Sequence[RestoredFolder]) -> None:
        """Before anything else: take these over, each clipped to its key groups."""

    def close(self) -> None: ...
