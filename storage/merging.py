"""The pieces of a state, as a checkpoint names them, made into the one table that the state is.

    append   the rows of all pieces, one piece after the other
    upsert   a key has one row, the one in the last piece that has it; none if that row says `DELETED`

Keys are equal as their hashes are (rule K2): a null is a key of its own, a NaN equals every NaN, -0.0 is 0.0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import CorruptCheckpointError
from rayflow.operators.base import DELETED, EXPIRES
from rayflow.operators.grouping import plain_key
from rayflow.operators.state.evolution import Outcome, compare, migrate

NOTE: Final = b"rayflow"
"""Key of the schema's metadata in a state file."""
_OWN: Final = {DELETED: pa.bool_(), EXPIRES: pa.int64()}


@dataclass(frozen=True, slots=True)
class StateKeys:
    """How the rows of a keyed state are told apart; both empty for state without keys."""

    key_columns: tuple[str, ...] = ()
    """The key group of a row is that of these (rule K2)."""
    subkey_columns: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, ...]:
        """What `merge_pieces` calls the key."""
        return self.key_columns + self.subkey_columns


def keys_of(schema: pa.Schema) -> StateKeys:
    """As the note in a state file's schema tells them. Raises `CorruptCheckpointError` for a note that is no note."""
    try:
        own = json.loads((schema.metadata or {}).get(NOTE, b"{}"))
        return StateKeys(tuple(map(str, own.get("key_columns", ()))), tuple(map(str, own.get("subkey_columns", ()))))
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(
            f"the note of rayflow in the schema of a state file cannot be read ({error}); use an earlier checkpoint"
        ) from error


def merge_pieces(
    tables: Sequence[pa.Table],
    *,
    key_columns: Sequence[str] | None,
    mode: str,
    now_us: int | None = None,
    where: str = "the state",
) -> pa.Table:
    """One table without `DELETED`; ``key_columns`` are those that tell rows apart (`StateKeys.identity`). Rows
    are in the order of the pieces; at least one piece is needed, it may be empty.

    Pieces that were written before a change of the state's columns are migrated to the newest ones. With ``now_us``
    rows that have expired by then are left out; `EXPIRES` stays. Raises `CorruptCheckpointError` beginning with
    ``where`` when the pieces cannot be pieces of one state.
    """
    if not tables:
        raise CorruptCheckpointError(f"{where} has no piece that tells its columns; use an earlier checkpoint")
    if mode not in ("append", "upsert"):
        raise CorruptCheckpointError(f"{where} has mode {mode!r}, expected 'append' or 'upsert'; upgrade rayflow")
    keys = tuple(key_columns or ())
    names = tables[0].column_names
    if any(name not in names for name in keys) or (mode == "upsert" and not keys):
        raise CorruptCheckpointError(f"{where} has key columns {list(keys)}, but its columns are {names}")
    merged = _one_schema(tables, keys, where)
    if mode == "upsert":
        rows = last_rows(merged, keys)
        if len(rows) < merged.num_rows:
            merged = merged.take(pa.array(rows))
    if DELETED in merged.column_names:
        merged = _without(merged, merged.column(DELETED)).drop_columns([DELETED])
    if now_us is not None and EXPIRES in merged.column_names:
        merged = _without(merged, pc.less_equal(merged.column(EXPIRES), pa.scalar(now_us, pa.int64())))
    return merged


def last_rows(table: pa.Table, keys: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The number of the last row of every key, ascending."""
    columns = {f"k{i}": plain_key(table.column(name)) for i, name in enumerate(keys)}
    columns["row"] = pa.array(np.arange(table.num_rows, dtype=np.int64))
    found = pa.table(columns).group_by(list(columns)[:-1]).aggregate([("row", "max")])
    return np.sort(found.column("row_max").to_numpy())


def _without(table: pa.Table, gone: pa.ChunkedArray) -> pa.Table:
    """A null in ``gone`` says no."""
    gone = pc.fill_null(gone, False)
    return table.filter(pc.invert(gone)) if pc.any(gone).as_py() else table


def _one_schema(tables: Sequence[pa.Table], keys: tuple[str, ...], where: str) -> pa.Table:
    """All rows, in the columns of the newest schema: the one that all others migrate to."""
    target = tables[0].schema
    for table in tables[1:]:
        if compare(target, table.schema, keys).outcome is not Outcome.REFUSED:
            target = table.schema
            continue
        back = compare(table.schema, target, keys)
        if back.outcome is Outcome.REFUSED:
            raise CorruptCheckpointError(f"{where} has pieces of columns that do not fit: {'; '.join(back.reasons)}")
    present = [name for name in _OWN if any(name in table.column_names for table in tables)]
    aligned = []
    for table in tables:
        table = migrate(table, target, keys=keys, where=where)
        for name in present:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(table.num_rows, _OWN[name]))
        aligned.append(table.select([n for n in table.column_names if n not in _OWN] + present))
    return pa.concat_tables(aligned).unify_dictionaries()
