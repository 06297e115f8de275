"""What may change in the schema of a state between two versions of a flow, and the migration of its rows.

Allowed, because no row loses anything and no key moves to another key group (rule K2):

- a new column that may be null (old rows have null there);
- a type that holds every old value exactly (`rayflow.operators.state.widening`); in a key only if the hash stays;
- another order of the columns that are not keys; "may be null" where it was "never null".

Everything else is refused with the reason. Metadata of schemas does not matter. The engine's own columns (`DELETED`,
`EXPIRES`) are none of the user's: they are not compared and are kept behind the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import StateSchemaError
from rayflow.operators.base import DELETED, EXPIRES
from rayflow.operators.state.widening import same_hash, widens

ENGINE_COLUMNS: Final = (DELETED, EXPIRES)


class Outcome(Enum):
    SAME = "same"
    """Rows can be used as they are."""
    MIGRATES = "migrates"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Comparison:
    """``changes`` where it migrates, ``reasons`` where it is refused: short phrases, one a column."""

    outcome: Outcome
    changes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def compare(old: pa.Schema, new: pa.Schema, keys: Sequence[str] = ()) -> Comparison:
    """Whether rows of schema ``old`` can become rows of ``new``. ``keys``: the columns that key groups depend on,
    or that the rows are found by."""
    old_fields, new_fields = _user_fields(old), _user_fields(new)
    twice = _repeated(old_fields) + _repeated(new_fields)
    if twice:
        return Comparison(Outcome.REFUSED, reasons=tuple(f"column {name!r} stands there twice" for name in twice))
    before = {field.name: field for field in old_fields}
    after = {field.name: field for field in new_fields}
    reasons = [_removed(name, keys) for name in before if name not in after]
    reasons += [f"key column {name!r} is in neither" for name in keys if name not in before and name not in after]
    changes: list[str] = []
    for field in new_fields:
        if field.name not in before:
            _judge_added(field, keys, changes, reasons)
        else:
            _judge_kept(before[field.name], field, keys, changes, reasons)
    common_before = [name for name in before if name in after]
    common_after = [name for name in after if name in before]
    if [k for k in common_before if k in keys] != [k for k in common_after if k in keys]:
        reasons.append("the key columns are in another order, which gives keys another hash")
    elif common_before != common_after:
        changes.append("columns in another order")
    if reasons:
        return Comparison(Outcome.REFUSED, reasons=tuple(reasons))
    return Comparison(Outcome.MIGRATES, changes=tuple(changes)) if changes else Comparison(Outcome.SAME)


def migrate(table: pa.Table, expected: pa.Schema, *, keys: Sequence[str] = (), where: str) -> pa.Table:
    """``table`` with the columns, types and order of ``expected``, followed by the engine's columns it has.

    Raises `StateSchemaError` that begins with ``where`` (state, step, subtask) if `compare` refuses it, or if a value
    of a widened type does not fit (an instant 292,000 years off); the table itself is never changed.
    """
    found = compare(table.schema, expected, keys)
    if found.outcome is Outcome.REFUSED:
        raise StateSchemaError(refusal(where, found))
    own = [table.schema.field(name) for name in ENGINE_COLUMNS if name in table.column_names]
    fields = [field.remove_metadata() for field in _user_fields(expected)] + own
    columns = []
    for field in fields:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        column = table.column(field.name)
        try:
            columns.append(column if column.type.equals(field.type) else pc.cast(column, field.type))
        except pa.ArrowException as error:
            raise StateSchemaError(
                f"{where}: a value of column {field.name!r} does not fit from {column.type} into {field.type} "
                f"({error}); keep the type {column.type}"
            ) from error
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def refusal(where: str, found: Comparison) -> str:
    """One sentence on why rows cannot be taken over."""
    return (
        f"{where} cannot be restored into the columns it has now: {'; '.join(found.reasons)}; "
        "give it the old columns back, or give the new state another name and allow the old one to be dropped"
    )


def _user_fields(schema: pa.Schema) -> list[pa.Field]:
    return [field for field in schema if field.name not in ENGINE_COLUMNS]


def _repeated(fields: Sequence[pa.Field]) -> list[str]:
    names = [field.name for field in fields]
    return sorted({name for name in names if names.count(name) > 1})


def _removed(name: str, keys: Sequence[str]) -> str:
    return f"{'key column' if name in keys else 'column'} {name!r} was removed, its values would be lost"


def _judge_added(field: pa.Field, keys: Sequence[str], changes: list[str], reasons: list[str]) -> None:
    if field.name in keys:
        reasons.append(f"key column {field.name!r} is new, old rows have no value for it")
    elif not field.nullable:
        reasons.append(f"new column {field.name!r} may not be null, but old rows have no value for it")
    else:
        changes.append(f"new column {field.name!r} ({field.type}), null in old rows")


def _judge_kept(old: pa.Field, new: pa.Field, keys: Sequence[str], changes: list[str], reasons: list[str]) -> None:
    if old.nullable and not new.nullable:
        reasons.append(f"column {old.name!r} may no longer be null, old rows may have nulls there")
        return
    if old.type.equals(new.type):
        if new.nullable and not old.nullable:
            changes.append(f"column {old.name!r} may be null now")
    elif not widens(old.type, new.type):
        reasons.append(f"column {old.name!r} was {old.type} and is {new.type}, which cannot hold every value of it")
    elif old.name in keys and not same_hash(old.type, new.type):
        reasons.append(
            f"key column {old.name!r} was {old.type} and is {new.type}, which moves its keys to other key groups"
        )
    else:
        changes.append(f"column {old.name!r} from {old.type} to {new.type}")
