"""What changed between two checkpoints: rows of every state that were added, removed or changed.

Where a state has one row a key in both (``upsert`` mode, or key columns that happen to be unique), rows are paired by
key. Elsewhere (the runs of windows, rows of a collecting sink) whole rows are compared as a multiset: a row is then
only added or removed. Values are equal as keys are: null equals null, NaN equals NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.checkpoint import Checkpoint
from rayflow.operators.base import EXPIRES
from rayflow.operators.grouping import plain_key

ADDED, REMOVED, CHANGED = "added", "removed", "changed"
CHANGE = "change"


@dataclass(frozen=True, slots=True)
class StateDifference:
    """Of one state. A state that only one checkpoint has is compared with an empty one."""

    step: str
    state: str
    added: int
    removed: int
    changed: int
    same: int
    by_key: bool
    rows: pa.Table
    """``by_key``: the key columns, ``change`` (`ADDED`, `REMOVED`, `CHANGED`), ``before`` and ``after`` (structs of the
    other columns, null where there was no row). Else all columns, ``change``, and ``times``: how often."""

    def __str__(self) -> str:
        return (
            f"{self.step}.{self.state}: {self.added:,} added, {self.removed:,} removed, "
            f"{self.changed:,} changed, {self.same:,} the same"
        )


def diff(before: Checkpoint, after: Checkpoint, *, step: str | None = None) -> list[StateDifference]:
    """The differences of every state (of one ``step``), in the order of the steps; both tables of a state in memory."""
    names = [(s, name) for cp in (before, after) for s in cp.steps() for name in cp.states(s)]
    return [_state(before, after, *name) for name in dict.fromkeys(names) if step in (None, name[0])]


def _state(before: Checkpoint, after: Checkpoint, step: str, state: str) -> StateDifference:
    there = [cp for cp in (before, after) if step in cp.steps() and state in cp.states(step)]
    tables = [
        cp.table(step, state) if cp in there else there[0].schema(step, state).empty_table() for cp in (before, after)
    ]
    keys = there[-1].info(step, state).keys.identity
    # When a row runs out is not a value of the user's; writing the same value again moves it.
    old, new = (t.drop_columns([EXPIRES]) if EXPIRES in t.column_names else t for t in tables)
    if keys and all(set(keys) <= set(t.column_names) for t in (old, new)):
        paired = _Paired.of(old, new, keys)
        if paired.unique:
            return _by_key(step, state, old, new, keys, paired)
    return _as_multiset(step, state, old, new)


@dataclass(frozen=True, slots=True)
class _Paired:
    """Distinct keys of two tables: their row in each (null where there is none) and how many rows."""

    old_rows: pa.Array
    new_rows: pa.Array
    old_counts: npt.NDArray[np.int64]
    new_counts: npt.NDArray[np.int64]

    @property
    def unique(self) -> bool:
        return bool((self.old_counts <= 1).all() and (self.new_counts <= 1).all())

    @staticmethod
    def of(old: pa.Table, new: pa.Table, names: Sequence[str]) -> _Paired:
        columns = {}
        for index, name in enumerate(names):
            both = [_groupable(table.column(name)) for table in (old, new)]
            if not both[0].type.equals(both[1].type):
                both = _same_type(*both)
            columns[f"k{index}"] = pa.chunked_array([*both[0].chunks, *both[1].chunks], both[0].type)
        rows = [pa.array(np.arange(table.num_rows)) for table in (old, new)]
        columns["old"] = pa.chunked_array([rows[0], pa.nulls(new.num_rows, pa.int64())])
        columns["new"] = pa.chunked_array([pa.nulls(old.num_rows, pa.int64()), rows[1]])
        asked = [("old", "min"), ("new", "min"), ("old", "count"), ("new", "count")]
        found = pa.TableGroupBy(pa.table(columns), list(columns)[:-2], use_threads=False).aggregate(asked)
        return _Paired(
            found.column("old_min").combine_chunks(),
            found.column("new_min").combine_chunks(),
            found.column("old_count").to_numpy(),
            found.column("new_count").to_numpy(),
        )


def _by_key(
    step: str, state: str, old: pa.Table, new: pa.Table, keys: Sequence[str], paired: _Paired
) -> StateDifference:
    added, removed = pc.is_null(paired.old_rows).to_numpy(False), pc.is_null(paired.new_rows).to_numpy(False)
    both = np.flatnonzero(~added & ~removed)
    pairs = [rows.take(pa.array(both)) for rows in (paired.old_rows, paired.new_rows)]
    values = [[name for name in table.column_names if name not in keys] for table in (old, new)]
    changed = np.zeros(len(added), np.bool_)
    if values[0] == values[1]:
        for name in values[0]:
            changed[both] |= _differ(old.column(name).take(pairs[0]), new.column(name).take(pairs[1]))
    else:  # a column more or less is a change of every row
        changed[both] = True
    shown = np.flatnonzero(added | removed | changed)
    rows = [each.take(pa.array(shown)) for each in (paired.old_rows, paired.new_rows)]
    kinds = np.where(added, ADDED, np.where(removed, REMOVED, CHANGED))[shown]
    result = {name: _either(old.column(name).take(rows[0]), new.column(name).take(rows[1])) for name in keys}
    result[CHANGE] = pa.array(kinds.tolist(), pa.string())
    result["before"] = _structs(old.select(values[0]), rows[0])
    result["after"] = _structs(new.select(values[1]), rows[1])
    more, less, other = (int(mask.sum()) for mask in (added, removed, changed))
    return StateDifference(step, state, more, less, other, len(both) - other, True, pa.table(result))


def _as_multiset(step: str, state: str, old: pa.Table, new: pa.Table) -> StateDifference:
    if old.column_names != new.column_names:
        shared = [name for name in new.column_names if name in old.column_names]
        old, new = old.select(shared), new.select(shared)
    if not new.num_columns:
        return StateDifference(step, state, 0, 0, 0, new.num_rows, False, new)
    paired = _Paired.of(old, new, new.column_names)
    more = paired.new_counts - paired.old_counts
    parts = []
    for table, rows, times, kind in (
        (old, paired.old_rows, -more, REMOVED),
        (new, paired.new_rows, more, ADDED),
    ):
        found = np.flatnonzero(times > 0)
        part = table.take(rows.take(pa.array(found)))
        part = part.append_column(CHANGE, pa.array([kind] * len(found), pa.string()))
        parts.append(part.append_column("times", pa.array(times[found], pa.int64())))
    added, removed = int(more[more > 0].sum()), int(-more[more < 0].sum())
    same = int(np.minimum(paired.old_counts, paired.new_counts).sum())
    both = pa.concat_tables(parts, promote_options="permissive")
    return StateDifference(step, state, added, removed, 0, same, False, both)


def _differ(old: pa.ChunkedArray, new: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    old, new = _groupable(old), _groupable(new)
    if not old.type.equals(new.type):
        old, new = _same_type(old, new)
    if pa.types.is_null(old.type):
        return np.zeros(len(old), np.bool_)
    equal = pc.fill_null(pc.equal(old, new), False)
    if pa.types.is_floating(old.type):
        equal = pc.or_(equal, pc.fill_null(pc.and_(pc.is_nan(old), pc.is_nan(new)), False))
    equal = pc.or_(equal, pc.and_(pc.is_null(old), pc.is_null(new)))
    found: npt.NDArray[np.bool_] = ~equal.to_numpy()
    return found


def _same_type(old: pa.ChunkedArray, new: pa.ChunkedArray) -> list[pa.ChunkedArray]:
    """After a migration one side is wider; what no cast brings together differs, told by its text."""
    for a, b in ((old, new), (new, old)):
        try:
            cast = a.cast(b.type)
        except pa.ArrowException:
            continue
        return [cast, b] if a is old else [b, cast]
    return [pa.chunked_array([pa.array([repr(v) for v in c.to_pylist()], pa.string())]) for c in (old, new)]


def _groupable(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """As `plain_key`; lists, structs and maps, which Arrow cannot group or compare, become their text."""
    if pa.types.is_nested(column.type):
        return pa.chunked_array(
            [pa.array([None if v is None else repr(v) for v in column.to_pylist()], pa.string())], pa.string()
        )
    plain = plain_key(column)
    return plain if isinstance(plain, pa.ChunkedArray) else pa.chunked_array([plain])


def _either(old: pa.ChunkedArray, new: pa.ChunkedArray) -> pa.ChunkedArray:
    """A key stands in both, or in one of them; a key that is null is null in both."""
    if not old.type.equals(new.type):
        old, new = _same_type(old, new)
    return pc.coalesce(new, old)


def _structs(values: pa.Table, rows: pa.Array) -> pa.Array:
    """The values of these rows; null where there is no row."""
    taken = values.take(rows)
    arrays = [taken.column(i).combine_chunks() for i in range(taken.num_columns)]
    if not arrays:
        return pa.nulls(len(rows), pa.struct([]))
    return pa.StructArray.from_arrays(arrays, fields=list(values.schema), mask=pc.is_null(rows))
