"""`StateTable`: rows by key in memory, addressed by slot; the hot layer of keyed state on every back end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.operators.grouping import Int64Array


class StateTable:
    """One keyed state of one operator instance. Made by `KeyedState.table`.

    A row is its key columns and its value columns; a key has one row or none. A **slot** is the number of a row; slots
    are valid until the next call of `slots` (which may move rows between memory and disk). Values are null until set.
    """

    name: str
    keys: pa.Schema
    values: pa.Schema

    @property
    def rows(self) -> int:
        """Rows there are (under ``rocksdb`` those in memory)."""
        raise NotImplementedError

    def slots(self, keys: Sequence[pa.Array], *, insert: bool) -> Int64Array:
        """The slot of each row's key, -1 where there is none; with ``insert`` rows are made (all values null).

        Keys may repeat: equal keys get equal slots. Null is a key like any other. Rows whose time to live has passed
        are not there.
        """
        raise NotImplementedError

    def key_arrays(self, slots: Int64Array) -> list[pa.Array]:
        """The keys of these rows, a column each."""
        raise NotImplementedError

    def get(self, slots: Int64Array, column: str) -> pa.Array:
        """Values in the column's type; null where the slot is -1."""
        raise NotImplementedError

    def set(self, slots: Int64Array, column: str, values: pa.Array) -> None:
        """Of several rows with one slot the last counts. No slot may be -1."""
        raise NotImplementedError

    def numbers(self, column: str) -> npt.NDArray[Any]:
        """The values of a fixed-width column by slot, to be read and written in place by kernels of the engine.

        Integers, floats and bool as themselves, temporal types as their integers. Valid until the next `slots`. Writers
        call `touch`. Null is not seen here: see `valid`.
        """
        raise NotImplementedError

    def valid(self, column: str) -> npt.NDArray[np.bool_]:
        """Which slots hold a value, by slot; as `numbers`."""
        raise NotImplementedError

    def touch(self, slots: Int64Array) -> None:
        """These rows were changed through `numbers` or `valid`: the next checkpoint must have them."""
        raise NotImplementedError

    def delete(self, slots: Int64Array) -> None:
        """Remove the rows; -1 and repeated slots are allowed."""
        raise NotImplementedError

    def clear(self) -> None:
        """Remove every row."""
        raise NotImplementedError

    def scan(self, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """All rows, keys then values, on disk and in memory, each once; the table must not be changed meanwhile."""
        raise NotImplementedError

    def with_prefix(self, prefixes: Sequence[pa.Array]) -> pa.RecordBatch:
        """All rows (keys then values) whose key begins with one of these; for tables with a subkey.

        ``prefixes`` are the first columns of the key, distinct. Rows come grouped by prefix, in no order within.
        """
        raise NotImplementedError
