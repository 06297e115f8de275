"""Rows of a batch by key."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import DataError

_ROW = "__rayflow_row"


def check_key(table: pa.Table, key: Sequence[str], where: object) -> None:
    """Raises `DataError` for a key with a null: no unique index tells two of those apart."""
    for name in key:
        nulls = table.column(name).null_count
        if nulls:
            raise DataError(
                f"{where} upserts by {', '.join(key)}, but column {name!r} is null in {nulls} of {table.num_rows} rows;"
                " filter them out or choose another key"
            )


def last_by_key(table: pa.Table, key: Sequence[str], where: object) -> pa.Table:
    """The last row of every key, in order of the key, so that two writers lock rows in the same order.

    Raises `DataError` for a null in a key.
    """
    check_key(table, key, where)
    numbered = table.select(list(key)).append_column(_ROW, pa.array(np.arange(table.num_rows)))
    last = numbered.group_by(list(key)).aggregate([(_ROW, "max")])
    order = pc.sort_indices(last, sort_keys=[(name, "ascending") for name in key])
    return table.take(last.column(f"{_ROW}_max").take(order))
