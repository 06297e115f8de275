"""One pass of Arrow's hash aggregation for any number of aggregates.

An aggregate describes its part of the pass as a generator: it yields what it asks of the group-by (an `Ask`), is sent
the answer (a `Grouped`) and returns its columns, one row a group. So all aggregates of a step share one hash table.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Column: TypeAlias = pa.Array | pa.ChunkedArray
Int64Array: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Ask:
    """Kernels to run as (column, name of a pyarrow group-by aggregation); whether row-to-group ids are needed.

    ``(None, "count_all")`` counts rows."""

    kernels: tuple[tuple[Column | None, str], ...] = ()
    ids: bool = False


@dataclass(frozen=True, slots=True)
class Grouped:
    """The answer: results of the asked kernels in order, one row a group."""

    results: tuple[pa.Array, ...]
    groups: int
    ids: Int64Array | None = None
    """Group of every input row; only if asked for."""


Combining: TypeAlias = Generator[Ask, Grouped, list[pa.Array]]


def group(keys: Sequence[Column], combinings: Sequence[Combining]) -> tuple[list[pa.Array], list[list[pa.Array]]]:
    """Group by ``keys`` (at least one; a null is a key like any other) and run all ``combinings`` on it.

    Returns the key columns and the columns of each combining, all with one row a group, groups in the order in which
    they first appear: equal input gives equal output.
    """
    asks = [next(combining) for combining in combinings]
    columns: dict[str, Column] = {f"k{i}": key for i, key in enumerate(keys)}
    names: dict[int, str] = {}
    wanted: dict[tuple[tuple[str, ...], str], None] = {}

    def request(column: Column | None, function: str) -> str:
        if column is None:
            wanted[((), function)] = None
            return function
        name = names.setdefault(id(column), f"v{len(names)}")
        columns[name] = column
        wanted[((name,), function)] = None
        return f"{name}_{function}"

    handles = [[request(column, function) for column, function in ask.kernels] for ask in asks]
    if any(ask.ids for ask in asks):
        columns["row"] = pa.array(np.arange(len(keys[0]), dtype=np.int64))
        wanted[(("row",), "list")] = None
    result = pa.TableGroupBy(pa.table(columns), [f"k{i}" for i in range(len(keys))], use_threads=False).aggregate(
        list(wanted)
    )
    ids = _ids(flat(result.column("row_list"))) if "row" in columns else None
    answers: list[list[pa.Array]] = []
    for combining, asked in zip(combinings, handles, strict=True):
        found = tuple(flat(result.column(name)) for name in asked)
        answers.append(finish(combining, Grouped(found, result.num_rows, ids)))
    return [flat(result.column(f"k{i}")) for i in range(len(keys))], answers


def finish(combining: Combining, grouped: Grouped) -> list[pa.Array]:
    """The columns of a combining that has asked, from the answer."""
    try:
        combining.send(grouped)
    except StopIteration as stop:
        columns: list[pa.Array] = stop.value
        return columns
    raise AssertionError("a combining asks once")


def _ids(rows: pa.Array) -> Int64Array:
    """Group of every row from the lists of rows of each group."""
    members = rows.flatten().to_numpy()
    ids = np.empty(len(members), np.int64)
    ids[members] = np.repeat(np.arange(len(rows), dtype=np.int64), pc.list_value_length(rows).to_numpy())
    return ids


def flat(column: Column) -> pa.Array:
    """One array; without a copy when it is one already."""
    if not isinstance(column, pa.ChunkedArray):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def plain_type(kind: Any) -> pa.DataType:
    """The type that `plain` gives: what Arrow's hash aggregation can work on."""
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    return kind


def plain(column: Column) -> Column:
    """Decoded: no dictionary, run-end, view or extension types."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return plain(flat(column).storage)
    target = plain_type(kind)
    if target.equals(kind):
        return column
    if pa.types.is_run_end_encoded(kind):
        return plain(pc.run_end_decode(column))
    return column.cast(target)


def plain_key(column: Column) -> Column:
    """As `plain`, and equal keys have equal bits: one zero and one NaN, as the key hash has them (rule K2)."""
    column = plain(column)
    if pa.types.is_floating(column.type) and len(column):
        nan, zero = pa.scalar(float("nan"), column.type), pa.scalar(0.0, column.type)
        column = pc.if_else(pc.is_nan(column), nan, pc.add(column, zero))
    return column
