"""Kernels that pyarrow lacks or defines otherwise than Python, each composed of pyarrow's own on whole arrays.

All take and return arrays or scalars, keep nulls, and raise `pa.ArrowException` on types or values they refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_TICKS_PER_SECOND: Final = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}


def add(a: Any, b: Any) -> Any:
    """Sum, or the concatenation of two strings."""
    return concat(a, b, separator="") if _is_text(a) and _is_text(b) else pc.add_checked(a, b)


def true_divide(a: Any, b: Any) -> Any:
    """Python's and Polars' ``/``: integers divide as float64; a zero divisor gives inf or nan, not an error."""
    if not (pa.types.is_decimal(a.type) or pa.types.is_decimal(b.type) or pa.types.is_temporal(a.type)):
        a, b = _integer_as_double(a), _integer_as_double(b)
    return pc.divide(a, b)


def floor_divide(a: Any, b: Any) -> Any:
    """Python's ``//``: rounds towards minus infinity; an integer zero divisor is an error."""
    if _is_float(a) or _is_float(b):
        return pc.floor(true_divide(a, b))
    _require_integers("//", a, b)
    quotient = pc.divide_checked(a, b)
    remainder = pc.subtract(a, pc.multiply(quotient, b))
    return pc.subtract(quotient, pc.cast(_wrong_sign(remainder, b), quotient.type))


def modulo(a: Any, b: Any) -> Any:
    """Python's ``%``: the sign of the divisor; an integer zero divisor is an error."""
    if _is_float(a) or _is_float(b):
        with np.errstate(invalid="ignore", divide="ignore"):
            result = np.mod(_as_numpy(a), _as_numpy(b))
        if isinstance(a, pa.Scalar) and isinstance(b, pa.Scalar):
            return pa.scalar(float(result) if a.is_valid and b.is_valid else None, pa.float64())
        known = pc.and_(pc.is_valid(a), pc.is_valid(b))
        return pc.if_else(known, pa.array(result, pa.float64()), pa.scalar(None, pa.float64()))
    _require_integers("%", a, b)
    remainder = pc.subtract(a, pc.multiply(pc.divide_checked(a, b), b))
    return pc.if_else(_wrong_sign(remainder, b), pc.add(remainder, b), remainder)


def fill_null(values: Any, fill: Any) -> Any:
    """``fill`` where null; a scalar takes the type of the column, so that the column keeps it."""
    return pc.coalesce(values, _like(fill, values))


def clip(values: Any, lower: Any, upper: Any) -> Any:
    """Values below ``lower`` become it, above ``upper`` become that; a null bound does not bound."""
    if not (isinstance(lower, pa.Scalar) and not lower.is_valid):
        values = pc.max_element_wise(values, _like(lower, values), skip_nulls=False)
    if not (isinstance(upper, pa.Scalar) and not upper.is_valid):
        values = pc.min_element_wise(values, _like(upper, values), skip_nulls=False)
    return values


def is_in(values: Any, *, value_set: pa.Array) -> Any:
    """Membership; null only belongs if ``value_set`` holds a null, and the answer is never null."""
    if pa.types.is_null(value_set.type):  # no values, or None alone
        value_set = value_set.cast(_value_type(values))
    return pc.is_in(values, value_set=value_set)


def round_half_even(values: Any, *, decimals: int) -> Any:
    """Python's ``round``; integers stay as they are where ``decimals`` is not negative."""
    if pa.types.is_integer(values.type) and decimals >= 0:
        return values
    return pc.round(values, ndigits=decimals, round_mode="half_to_even")


def floor(values: Any) -> Any:
    return values if pa.types.is_integer(values.type) else pc.floor(values)


def ceil(values: Any) -> Any:
    return values if pa.types.is_integer(values.type) else pc.ceil(values)


def concat(*values: Any, separator: str) -> Any:
    """Strings joined row by row; null where any of them is."""
    wide = any(pa.types.is_large_string(value.type) for value in values)
    kind = pa.large_string() if wide else pa.string()
    for value in values:
        if not _is_text(value):
            raise pa.ArrowNotImplementedError(f"only strings can be joined, got {value.type}; cast it first")
    same = [value if value.type == kind else pc.cast(value, kind) for value in values]
    return pc.binary_join_element_wise(*same, pa.scalar(separator, kind))


def split_part(values: Any, *, separator: str, index: int) -> Any:
    """Element ``index`` of the split string, null where it is too short."""
    if isinstance(values, pa.Scalar):
        return split_part(pa.array([values.as_py()], values.type), separator=separator, index=index)[0]
    pieces = pc.split_pattern(values, pattern=separator)
    offsets = pieces.offsets.to_numpy()
    wanted = offsets[:-1].astype(np.int64) + index
    return pieces.values.take(pa.array(wanted, mask=wanted >= offsets[1:]))


def extract_group(values: Any, *, pattern: str) -> Any:
    """The only group of ``pattern``; null where it does not match."""
    found = pc.extract_regex(values, pattern=pattern)
    return pc.struct_field(found, [0])


def epoch(values: Any, *, unit: str) -> Any:
    """Whole ``unit`` ticks since the epoch, floored; a date counts from its midnight."""
    if pa.types.is_date(values.type):
        values = pc.cast(values, pa.timestamp("ms"))
    if not pa.types.is_timestamp(values.type):
        raise pa.ArrowNotImplementedError(f"epoch needs a timestamp or a date, got {values.type}")
    have, want = _TICKS_PER_SECOND[values.type.unit], _TICKS_PER_SECOND[unit]
    ticks = pc.cast(values, pa.int64())
    if want >= have:
        return pc.multiply_checked(ticks, pa.scalar(want // have))
    return floor_divide(ticks, pa.scalar(have // want))


# What a `Call` finds by name before it looks into `pyarrow.compute`. Names, not functions, stand in the
# expressions, because pyarrow's functions and options cannot be pickled.
COMPOSED: Final[dict[str, Callable[..., Any]]] = {
    function.__name__: function
    for function in (
        add, true_divide, floor_divide, modulo, fill_null, clip, is_in, round_half_even, floor, ceil, concat,
        split_part, extract_group, epoch
    )
}  # fmt: skip


def _is_text(value: Any) -> bool:
    kind = value.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_float(value: Any) -> bool:
    return bool(pa.types.is_floating(value.type))


def _require_integers(symbol: str, a: Any, b: Any) -> None:
    if not (pa.types.is_integer(a.type) and pa.types.is_integer(b.type)):
        raise pa.ArrowNotImplementedError(f"{symbol} needs integers or floats, got {a.type} and {b.type}")


def _wrong_sign(remainder: Any, divisor: Any) -> Any:
    """Where division has truncated towards zero and not towards minus infinity."""
    differs = pc.xor(pc.less(remainder, pa.scalar(0)), pc.less(divisor, pa.scalar(0)))
    return pc.and_(pc.not_equal(remainder, pa.scalar(0)), differs)


def _integer_as_double(value: Any) -> Any:
    # Not safe: above 2**53 a double rounds, which is what Python and Polars do too.
    return pc.cast(value, pa.float64(), safe=False) if pa.types.is_integer(value.type) else value


def _like(bound: Any, values: Any) -> Any:
    """A scalar in the type of the values; a value that does not fit raises."""
    if not isinstance(bound, pa.Scalar) or bound.type == values.type or pa.types.is_null(values.type):
        return bound
    return bound.cast(_value_type(values))


def _value_type(values: Any) -> pa.DataType:
    return values.type.value_type if pa.types.is_dictionary(values.type) else values.type


def _as_numpy(value: Any) -> Any:
    value = _integer_as_double(value)
    if isinstance(value, pa.Scalar):
        return np.float64(value.as_py() if value.is_valid else np.nan)
    return value.to_numpy(zero_copy_only=False)
