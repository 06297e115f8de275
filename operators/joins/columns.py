"""What joins take and give: names, types, and the columns of pairs and of rows without a partner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import PlanError
from rayflow.partition import check_key_type

How: TypeAlias = Literal["inner", "left", "right", "full", "semi", "anti"]
HOWS: Final[tuple[str, ...]] = get_args(How)
LEFT: Final = 0
RIGHT: Final = 1
SIDES: Final = ("left", "right")
"""By input index; also the names of the states."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JoinSpec:
    """What all joins are told. The schemas are those of the rows that come, where planning could tell."""

    left_keys: tuple[str, ...]
    right_keys: tuple[str, ...]
    how: How = "inner"
    suffix: str = "_right"
    left_time: str | None = None
    right_time: str | None = None
    left_schema: pa.Schema | None = None
    right_schema: pa.Schema | None = None

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise PlanError(f"how= must be one of {', '.join(HOWS)}, got {self.how!r}")
        if len(self.left_keys) != len(self.right_keys):
            raise PlanError(
                f"both sides need the same number of keys, the left one is keyed by {', '.join(self.left_keys)}, the "
                f"right one by {', '.join(self.right_keys)}; call key_by with columns that belong together"
            )

    def keys_of(self, side: int) -> tuple[str, ...]:
        return self.right_keys if side == RIGHT else self.left_keys

    def time_of(self, side: int) -> str | None:
        return self.right_time if side == RIGHT else self.left_time

    def schema_of(self, side: int) -> pa.Schema | None:
        return self.right_schema if side == RIGHT else self.left_schema


class JoinColumns:
    """The output of a join of rows of two schemas.

    Schema out: the columns of the left side, those of the right side without its keys, and the ``added`` ones; semi and
    anti: without those of the right side. A column of the right side whose name the left one has gets the suffix.
    Dictionary and run-end encoded columns come out decoded, views as strings, and every column may be null.
    """

    def __init__(self, spec: JoinSpec, left: pa.Schema, right: pa.Schema, added: Sequence[pa.Field] = ()) -> None:
        self.spec = spec
        self.sides = (decoded_schema(left), decoded_schema(right))
        """Schemas of the rows as they are kept, by input index."""
        _check_keys(spec, *self.sides)
        pairs = spec.how not in ("semi", "anti")
        self._rest = [field for field in self.sides[RIGHT] if pairs and field.name not in spec.right_keys]
        taken = set(self.sides[LEFT].names)
        fields = [
            *self.sides[LEFT],
            *(pa.field(f.name + spec.suffix if f.name in taken else f.name, f.type) for f in self._rest),
            *added,
        ]
        names = [field.name for field in fields]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PlanError(
                f"the result would have the column {twice[0]!r} twice; pass another suffix= than {spec.suffix!r}, or "
                "rename or drop a column before the join"
            )
        self.schema = pa.schema(fields)

    def pairs(self, left: pa.RecordBatch, right: pa.RecordBatch, *added: pa.Array) -> pa.RecordBatch:
        """Rows i of both sides, side by side."""
        rest = [right.column(field.name) for field in self._rest]
        return pa.RecordBatch.from_arrays([*left.columns, *rest, *added], schema=self.schema)

    def left_only(self, left: pa.RecordBatch, *added: pa.Array) -> pa.RecordBatch:
        """Rows of the left side without a partner."""
        rest = [pa.nulls(left.num_rows, field.type) for field in self._rest]
        return pa.RecordBatch.from_arrays([*left.columns, *rest, *added], schema=self.schema)

    def right_only(self, right: pa.RecordBatch, *added: pa.Array) -> pa.RecordBatch:
        """Rows of the right side without a partner: they have their key, and null in the columns of the left side."""
        key_of = dict(zip(self.spec.left_keys, self.spec.right_keys, strict=True))
        left = [
            right.column(key_of[field.name]) if field.name in key_of else pa.nulls(right.num_rows, field.type)
            for field in self.sides[LEFT]
        ]
        rest = [right.column(field.name) for field in self._rest]
        return pa.RecordBatch.from_arrays([*left, *rest, *added], schema=self.schema)


def decoded_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, _decoded(field.type)) for field in schema])


def decode(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """``batch`` with the types of ``schema``, the decoded ones of its own."""
    columns = []
    for column, field in zip(batch.columns, schema, strict=True):
        if pa.types.is_run_end_encoded(column.type):
            column = pc.run_end_decode(column)
        columns.append(column if column.type.equals(field.type) else column.cast(field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _decoded(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _decoded(kind.value_type)
    if pa.types.is_string_view(kind):  # Arrow has no kernel that takes rows of it
        return pa.string()
    return pa.binary() if pa.types.is_binary_view(kind) else kind


def _check_keys(spec: JoinSpec, left: pa.Schema, right: pa.Schema) -> None:
    for schema, keys, side in ((left, spec.left_keys, "left"), (right, spec.right_keys, "right")):
        for key in keys:
            if schema.get_field_index(key) < 0:
                raise PlanError(
                    f"the key {key!r} must be one column of the {side} side, which has {', '.join(schema.names)}; "
                    "name another in key_by"
                )
            check_key_type(key, schema.field(key).type)
    for mine, theirs in zip(spec.left_keys, spec.right_keys, strict=True):
        kinds = left.field(mine).type, right.field(theirs).type
        if not kinds[0].equals(kinds[1]):
            raise PlanError(
                f"keys that are compared must have one type, {mine!r} of the left side is {kinds[0]}, {theirs!r} of "
                f'the right side {kinds[1]}; cast one of them, for example with_columns({theirs}=col("{theirs}").cast('
                f'"{kinds[0]}"))'
            )


__all__ = ["HOWS", "LEFT", "RIGHT", "SIDES", "How", "JoinColumns", "JoinSpec", "decode", "decoded_schema"]
