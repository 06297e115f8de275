"""Arrow columns as numpy arrays and back: fixed-width values as numbers, and their place in a `StateTable`."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.operators.grouping import Column, Int64Array, flat
from rayflow.operators.keyed.segments import Numbers
from rayflow.operators.state.table import StateTable

BoolArray = npt.NDArray[np.bool_]

_TEMPORAL: Final = (
    pa.types.is_timestamp,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_duration,
)


def is_number(kind: pa.DataType) -> bool:
    """Whether values of the type are numbers of 1 to 8 bytes or, as dates and times, are held as such."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_temporal(kind))


def is_temporal(kind: pa.DataType) -> bool:
    return any(check(kind) for check in _TEMPORAL)


def integers_of(column: pa.Array) -> pa.Array:
    """Dates and times as their integers, without a copy; other columns as they are."""
    if not is_temporal(column.type):
        return column
    return column.view(pa.int32() if column.type.bit_width == 32 else pa.int64())


def numbers_of(column: Column, default: Any) -> tuple[Numbers, BoolArray | None]:
    """(values, which are there or None for all); ``default`` where there is none. For types with `is_number`."""
    plain = integers_of(flat(column))
    if plain.null_count == 0:
        return plain.to_numpy(zero_copy_only=False), None
    valid = plain.is_valid().to_numpy(zero_copy_only=False)
    # fill_null takes a scalar of the very type: uint64 has defaults that int64 does not hold.
    return plain.fill_null(pa.scalar(default, plain.type)).to_numpy(zero_copy_only=False), valid


def array_of(values: Numbers, kind: pa.DataType, valid: BoolArray | None = None) -> pa.Array:
    """The inverse of `numbers_of`."""
    mask = None if valid is None or valid.all() else ~valid
    if not is_temporal(kind):
        return pa.array(values, kind, mask=mask)
    return pa.array(values, pa.int32() if kind.bit_width == 32 else pa.int64(), mask=mask).view(kind)


def seeds_of(table: StateTable, column: str, slots: Int64Array, default: Any) -> tuple[Numbers, BoolArray]:
    """(values, which are there) of these slots; ``default`` where there is none."""
    valid = table.valid(column)[slots]
    values = table.numbers(column)[slots]
    if not valid.all():
        values[~valid] = default
    return values, valid


def store(table: StateTable, column: str, slots: Int64Array, values: Numbers, valid: BoolArray | None = None) -> None:
    """Write values in place; the caller touches the slots."""
    table.numbers(column)[slots] = values
    table.valid(column)[slots] = True if valid is None else valid


__all__ = ["BoolArray", "array_of", "integers_of", "is_number", "is_temporal", "numbers_of", "seeds_of", "store"]
