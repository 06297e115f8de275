"""An order of rows that depends on nothing but what is in them, so that results do not depend on the way rows took.

Rows are sorted by numbers first (groups, values, times), which is fast; only those that are equal in all of them are
compared column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Column, Int64Array, flat, plain, plain_type
from rayflow.operators.keyed.cells import integers_of, is_temporal

BoolArray = npt.NDArray[np.bool_]
TIE: Final = "tie"


def has_order(kind: pa.DataType) -> bool:
    """Whether values of the type can be ranked."""
    kind = plain_type(kind)
    return not (pa.types.is_nested(kind) or pa.types.is_interval(kind) or pa.types.is_null(kind))


def scores(column: Column, *, descending: bool) -> Int64Array:
    """A number for each value, the lower the better; equal for equal values. NaN is the largest number. No nulls."""
    values = integers_of(flat(plain(column)))
    kind = values.type
    if pa.types.is_signed_integer(kind) or is_temporal(kind):
        numbers: Int64Array = values.to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        numbers = pc.rank(values, sort_keys="ascending", tiebreaker="dense").to_numpy().astype(np.int64)
    return ~numbers if descending else numbers


def order_of(rows: pa.Table, numbers: Sequence[Int64Array], ties: Sequence[str]) -> Int64Array:
    """Row numbers in ascending order of ``numbers`` (the first counts most), then of the columns ``ties``, then of all
    columns from the first to the last. Null and NaN come last; lists and structs are compared by their text."""
    order: Int64Array = np.lexsort(tuple(reversed(numbers)))
    if len(order) < 2:
        return order
    same = np.ones(len(order) - 1, np.bool_)
    for number in numbers:
        sorted_number = number[order]
        same &= sorted_number[1:] == sorted_number[:-1]
    if not same.any():
        return order
    tied: BoolArray = np.zeros(len(order), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    among = order[tied]
    places = np.zeros(len(order), np.int64)
    places[among[_by_columns(rows.take(pa.array(among)), ties)]] = np.arange(len(among))
    again: Int64Array = np.lexsort((places, *reversed(numbers)))
    return again


def _by_columns(rows: pa.Table, ties: Sequence[str]) -> Int64Array:
    names = [*ties, *(name for name in rows.column_names if name not in ties)]
    keys = {f"{TIE}.{i}": _comparable(rows.column(name)) for i, name in enumerate(names)}
    order: Int64Array = pc.sort_indices(pa.table(keys), sort_keys=[(key, "ascending") for key in keys]).to_numpy()
    return order.astype(np.int64)


def _comparable(column: Column) -> pa.Array:
    if pa.types.is_null(column.type):
        return pa.array(np.zeros(len(column), np.int8))
    if has_order(column.type):
        return integers_of(flat(plain(column)))
    return pa.array([repr(value) for value in column.to_pylist()], pa.string())


def first_of_runs(ids: Int64Array) -> Int64Array:
    """For every element the position where its run of equal elements begins."""
    if not len(ids):
        return ids
    begins = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]]))
    starts: Int64Array = np.repeat(begins, np.diff(np.append(begins, len(ids))))
    return starts


__all__ = ["first_of_runs", "has_order", "order_of", "scores"]
