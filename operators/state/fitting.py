"""What user code gives for a state, made into an Arrow array of the state's type, or refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.operators.grouping import flat


class StateProblem(Exception):
    """What is wrong with a value; whoever knows step, subtask and state puts them in front."""


def fitted(values: Any, kind: pa.DataType, rows: int, per: str) -> pa.Array:
    """An array of ``rows`` values of type ``kind``. Numbers may change their width where no value is lost; nothing is
    parsed. A scalar is repeated."""
    if isinstance(values, pa.Scalar | str | bytes) or not hasattr(values, "__len__"):
        raw = values.as_py() if isinstance(values, pa.Scalar) else values
        if isinstance(values, pa.Scalar) and not _compatible(values.type, kind):
            raise StateProblem(f"holds {kind}, got {values.type}; cast the values to its type")
        return pa.repeat(_converted([raw], kind)[0], rows)
    if len(values) != rows:
        raise StateProblem(f"got {len(values)} values, expected {rows}, one per {per}; pass one for each")
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return _cast(flat(values), kind)
    if isinstance(values, np.ndarray) and values.dtype != object:
        return _cast(pa.array(values), kind)
    return _converted(values, kind)


def fitted_mask(mask: Any, rows: int, per: str) -> pa.Array | None:
    """A bool array without nulls (null is false), or None for no mask."""
    if mask is None:
        return None
    try:
        found = flat(mask) if isinstance(mask, pa.Array | pa.ChunkedArray) else pa.array(mask)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise StateProblem(f"needs a mask of true and false, got {type(mask).__name__}: {error}") from error
    if not pa.types.is_boolean(found.type) and not (len(found) == 0 and pa.types.is_null(found.type)):
        raise StateProblem(f"needs a mask of true and false, got {found.type}; compare the values")
    if len(found) != rows:
        raise StateProblem(f"got a mask of {len(found)} entries, expected {rows}, one per {per}; pass one for each")
    return found.cast(pa.bool_()).fill_null(False)


def _cast(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if values.type.equals(kind):
        return values
    if not _compatible(values.type, kind):
        raise StateProblem(f"holds {kind}, got {values.type}; cast the values to its type")
    try:
        return values.cast(kind)
    except (pa.ArrowException, ValueError) as error:
        raise StateProblem(f"holds {kind}, got {values.type} values that do not fit: {error}") from error


def _converted(values: Any, kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        wrong = next((v for v in values if not _fits(v, kind)), None)
        raise StateProblem(f"holds {kind}, got {wrong!r} ({type(wrong).__name__}): {error}") from error


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _compatible(got: pa.DataType, kind: pa.DataType) -> bool:
    """Whether a checked cast between the two keeps the meaning."""
    types = pa.types

    def family(t: pa.DataType) -> object:
        if types.is_dictionary(t) or types.is_run_end_encoded(t):
            return family(t.value_type)
        if types.is_integer(t) or types.is_floating(t) or types.is_decimal(t):
            return "number"
        if types.is_string(t) or types.is_large_string(t) or types.is_string_view(t):
            return "string"
        if types.is_binary(t) or types.is_large_binary(t) or types.is_binary_view(t):
            return "binary"
        if types.is_list(t) or types.is_large_list(t) or types.is_fixed_size_list(t):
            return "list", family(t.value_type)
        if types.is_timestamp(t):
            return "timestamp", t.tz is None
        return t.id

    return types.is_null(got) or family(got) == family(kind)


__all__ = ["StateProblem", "fitted", "fitted_mask"]
