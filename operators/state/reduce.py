"""Adding values to accumulators, many keys at a time: what reducing and aggregating states are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Int64Array, flat

Merge: TypeAlias = Callable[[pa.Array, pa.Array], pa.Array]
"""Element by element; both arrays, of equal length, are without nulls."""


def merge_of(reduce: str | Callable[[Any, Any], Any], kind: pa.DataType, *, vectorized: bool) -> Merge:
    """The reduction as a function of arrays."""
    if isinstance(reduce, str):
        return _KNOWN[reduce]
    if vectorized:
        return lambda a, b: _as_many(as_array(reduce(a, b), kind), len(a))
    return lambda a, b: pa.array([reduce(x, y) for x, y in zip(a.to_pylist(), b.to_pylist(), strict=True)], kind)


def as_array(values: Any, kind: pa.DataType) -> pa.Array:
    found = flat(values) if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, kind)
    return found if found.type.equals(kind) else found.cast(kind)


def _as_many(found: pa.Array, rows: int) -> pa.Array:
    if len(found) != rows:
        raise ValueError(f"the function gave {len(found)} values for {rows}; give one for each")
    return found


def _add(a: pa.Array, b: pa.Array) -> pa.Array:
    return pc.add_checked(a, b)


_KNOWN: dict[str, Merge] = {"sum": _add, "min": pc.min_element_wise, "max": pc.max_element_wise}


def reduce_groups(index: Int64Array, values: pa.Array, reduce: Any, merge: Merge) -> tuple[Int64Array, pa.Array]:
    """(group, reduction of its values) for every group that has a value; null values are left out.

    Sums, minima and maxima are one pass of Arrow's hash aggregation; functions reduce pairs of neighbours, in order,
    so that a batch takes as many calls as the logarithm of the largest group.
    """
    if values.null_count:
        present = values.is_valid()
        index, values = index[present.to_numpy(zero_copy_only=False)], values.filter(present)
    if len(values) == 0:
        return index[:0], values
    if isinstance(reduce, str) and not pa.types.is_boolean(values.type):
        return _hash_reduced(index, values, reduce)
    return _pairwise(index, values, merge)


def _hash_reduced(index: Int64Array, values: pa.Array, reduce: str) -> tuple[Int64Array, pa.Array]:
    table = pa.table({"group": pa.array(index), "value": values})
    found = pa.TableGroupBy(table, "group", use_threads=False).aggregate([("value", reduce)])
    # The sum of small integers comes as 64 bits: a sum that does not fit the state's type is an error, no wrap.
    reduced = flat(found.column(f"value_{reduce}"))
    return flat(found.column("group")).to_numpy(), reduced.cast(values.type)


def _pairwise(index: Int64Array, values: pa.Array, merge: Merge) -> tuple[Int64Array, pa.Array]:
    order = np.argsort(index, kind="stable")
    groups, values = index[order], values.take(pa.array(order))
    while True:
        begins = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
        if len(begins) == len(groups):
            return groups, values
        sizes = np.diff(np.append(begins, len(groups)))
        rank = np.arange(len(groups)) - np.repeat(begins, sizes)
        kept = np.flatnonzero(rank % 2 == 0)
        paired = kept + 1 < len(groups)
        paired[paired] = groups[kept[paired] + 1] == groups[kept[paired]]
        left = kept[paired]
        merged = merge(values.take(pa.array(left)), values.take(pa.array(left + 1)))
        source = kept.copy()
        source[paired] = len(values) + np.arange(len(left))
        values = pa.concat_arrays([values, merged]).take(pa.array(source))
        groups = groups[kept]


__all__ = ["Merge", "as_array", "merge_of", "reduce_groups"]
