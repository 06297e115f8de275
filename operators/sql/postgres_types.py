"""Arrow types and those of PostgreSQL columns.

Rows go in by binary COPY, and the server takes eight bytes for whatever the column holds: an int64 in a float8 column
is another number, without an error. So every column is cast to exactly the type that its column has, and a value that
does not fit is found here, with its column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import DataError, PlanError

_UTC_US = pa.timestamp("us", "UTC")
_EXACT: Final[Mapping[str, pa.DataType]] = {
    "bool": pa.bool_(),
    "int2": pa.int16(),
    "int4": pa.int32(),
    "int8": pa.int64(),
    "float4": pa.float32(),
    "float8": pa.float64(),
    "text": pa.string(),
    "varchar": pa.string(),
    "bpchar": pa.string(),
    "name": pa.string(),
    "json": pa.string(),
    "jsonb": pa.string(),
    "bytea": pa.binary(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "timestamptz": _UTC_US,
    "time": pa.time64("us"),
    "interval": pa.duration("us"),
    "uuid": pa.binary(16),
}
"""The Arrow type whose bytes a column of this type (``pg_type.typname``) takes."""
_TEXTS = ("text", "varchar", "bpchar", "name", "json", "jsonb")


def column_type(kind: pa.DataType) -> str | None:
    """The type of a column made for rows of this Arrow type; None where there is none."""
    t = pa.types
    if t.is_dictionary(kind):
        return column_type(kind.value_type)
    if t.is_list(kind) or t.is_large_list(kind):
        inner = column_type(kind.value_type)
        return f"{inner}[]" if inner in ("bigint", "integer", "double precision", "text", "boolean") else None
    if t.is_uint64(kind):
        return "numeric(20, 0)"
    if t.is_decimal(kind):
        return f"numeric({kind.precision}, {kind.scale})"
    for test, name in (
        (t.is_boolean, "boolean"),
        (lambda k: t.is_int8(k) or t.is_int16(k) or t.is_uint8(k), "smallint"),
        (lambda k: t.is_int32(k) or t.is_uint16(k), "integer"),
        (lambda k: t.is_int64(k) or t.is_uint32(k), "bigint"),
        (lambda k: t.is_float16(k) or t.is_float32(k), "real"),
        (t.is_float64, "double precision"),
        (lambda k: t.is_string(k) or t.is_large_string(k) or t.is_string_view(k) or t.is_null(k), "text"),
        (
            lambda k: t.is_binary(k) or t.is_large_binary(k) or t.is_binary_view(k) or t.is_fixed_size_binary(k),
            "bytea",
        ),
        (t.is_date, "date"),
        (t.is_time, "time"),
        (t.is_duration, "interval"),
    ):
        if test(kind):
            return name
    if t.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    return None


def check_types(schema: pa.Schema, step: str) -> None:
    """Raises `PlanError` for a column that no type of PostgreSQL is made for."""
    for field in schema:
        if column_type(field.type) is None:
            raise PlanError(
                f"{step} cannot write column {field.name!r} of type {field.type} to PostgreSQL; select what is in it, "
                "or cast it to a string (JSON)"
            )


def takes(kind: pa.DataType, column: str) -> bool:
    """Whether rows of this Arrow type can go into a column of this type (``pg_type.typname``)."""
    t = pa.types
    made = column_type(kind)
    if t.is_null(kind):
        return True
    if column == "numeric":
        return bool(t.is_integer(kind) or t.is_decimal(kind))
    if column.startswith("_"):
        return made == {
            "_int8": "bigint[]", "_int4": "integer[]", "_float8": "double precision[]", "_text": "text[]",
            "_bool": "boolean[]",
        }.get(column)  # fmt: skip
    if column == "uuid":
        return bool(kind == pa.binary(16))
    if column in ("float4", "float8"):
        return bool(t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind))
    if column in ("int2", "int4", "int8"):
        return bool(t.is_integer(kind))
    if column in ("date", "timestamp", "timestamptz"):
        return bool(t.is_timestamp(kind) or t.is_date(kind)) and not (column == "date" and t.is_timestamp(kind))
    if column in _TEXTS or column not in _EXACT:  # enumerations and other types whose binary form is their text
        return made == "text"
    return made == {"bool": "boolean", "bytea": "bytea", "time": "time", "interval": "interval"}[column]


def fitted(table: pa.Table, columns: Mapping[str, str], where: object) -> pa.Table:
    """``table`` with the types that the columns take. Raises `DataError` naming column and value."""
    arrays = [_fitted(table.column(name), columns[name], f"{where} column {name!r}") for name in table.column_names]
    return pa.Table.from_arrays(arrays, names=table.column_names)


def _fitted(values: Any, column: str, where: str) -> Any:
    kind = values.type
    target = _EXACT.get(column)
    try:
        if column == "numeric":
            return values if pa.types.is_decimal(kind) else values.cast(pa.decimal128(20, 0))
        if target is None:
            return values.cast(pa.string()) if pa.types.is_null(kind) else values
        if column == "float4" and not pa.types.is_null(kind):
            return values.cast(target, safe=False)
        if pa.types.is_timestamp(target) or pa.types.is_duration(target) or pa.types.is_time(target):
            values = pc.cast(values, options=pc.CastOptions(target, allow_time_truncate=True))
        elif kind != target:
            values = values.cast(target)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where} holds a value that a column of type {column} cannot take: {error}") from error
    return _versioned(values) if column == "jsonb" else values


def _versioned(values: Any) -> Any:
    """The binary form of jsonb is its version, 1, and the text."""
    return pc.binary_join_element_wise(pa.scalar(b"\x01"), values.cast(pa.binary()), pa.scalar(b""))
