"""Which Arrow types hold every value of another one, exactly.

`widens` answers for values, `same_hash` for keys: whether equal values of two types lie in one key group (rule K2), so
that files sorted by key group stay true when the column's type changes.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa

types = pa.types

_DIGITS: Final = {8: 3, 16: 5, 32: 10, 64: 20}
"""Decimal digits of the largest integer of so many bits, signed or not."""
_MANTISSA: Final = {16: 11, 32: 24, 64: 53}
"""Integers of so many bits are exact in a float of that width."""
_UNITS: Final = ("s", "ms", "us", "ns")


def widens(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether every value of ``old`` is a value of ``new``, and `pyarrow.compute.cast` finds it.

    Instants and durations may become finer up to microseconds: then one that lies more than 292,000 years from the
    epoch has no place, and the cast of that value fails. Nanoseconds are refused, because they end in the year 2262.
    """
    if old.equals(new) or types.is_null(old):
        return True
    if types.is_dictionary(old):
        return _dictionary_widens(old, new)
    if types.is_nested(old) or types.is_nested(new):
        return _nested_widens(old, new)
    return _number_widens(old, new) or _bytes_widens(old, new) or _time_widens(old, new)


def same_hash(old: pa.DataType, new: pa.DataType) -> bool:
    """Whether equal values of the two types have one key hash (version 1 of `rayflow.partition.hashing`)."""
    classes = _hash_class(old), _hash_class(new)
    return "null" in classes or (classes[0] == classes[1] and classes[0] != "")


def _number_widens(old: pa.DataType, new: pa.DataType) -> bool:
    if types.is_integer(old):
        bits, signed = old.bit_width, types.is_signed_integer(old)
        if types.is_integer(new):
            # A sign needs a bit of its own; an unsigned type has no place for one.
            return bool(new.bit_width > bits and (types.is_signed_integer(new) or not signed))
        if types.is_floating(new):
            return bool(bits - signed <= _MANTISSA[new.bit_width])
        return bool(types.is_decimal(new) and new.scale >= 0 and new.precision - new.scale >= _DIGITS[bits])
    if types.is_floating(old):
        return bool(types.is_floating(new) and new.bit_width > old.bit_width)
    if types.is_decimal(old) and types.is_decimal(new):
        whole = new.precision - new.scale >= old.precision - old.scale
        return bool(whole and new.scale >= old.scale and new.bit_width >= old.bit_width)
    return False


def _bytes_widens(old: pa.DataType, new: pa.DataType) -> bool:
    # From a large or a view type back to 32 bit offsets two gigabytes of values may not fit.
    if types.is_string(old):
        return bool(types.is_large_string(new) or types.is_string_view(new))
    if types.is_string_view(old):
        return bool(types.is_large_string(new))
    if types.is_binary(old) or types.is_fixed_size_binary(old):
        wider = types.is_large_binary(new) or types.is_binary_view(new)
        return bool(wider or (types.is_fixed_size_binary(old) and types.is_binary(new)))
    return bool(types.is_binary_view(old) and types.is_large_binary(new))


def _time_widens(old: pa.DataType, new: pa.DataType) -> bool:
    if types.is_date32(old):
        plain = types.is_timestamp(new) and new.tz is None and new.unit in ("s", "ms")
        return bool(types.is_date64(new) or plain)
    if types.is_timestamp(old) and types.is_timestamp(new):
        return (old.tz is None) == (new.tz is None) and _finer(old.unit, new.unit)
    if types.is_duration(old) and types.is_duration(new):
        return _finer(old.unit, new.unit)
    # A time of day fits in any unit that is fine enough.
    return types.is_time(old) and types.is_time(new) and _UNITS.index(new.unit) >= _UNITS.index(old.unit)


def _finer(old: str, new: str) -> bool:
    return old == new or (new != "ns" and _UNITS.index(new) > _UNITS.index(old))


def _dictionary_widens(old: pa.DataType, new: pa.DataType) -> bool:
    if not types.is_dictionary(new):
        return widens(old.value_type, new)
    values = old.value_type.equals(new.value_type) and old.ordered == new.ordered
    indices = old.index_type.equals(new.index_type) or _number_widens(old.index_type, new.index_type)
    return values and indices


def _nested_widens(old: pa.DataType, new: pa.DataType) -> bool:
    if types.is_struct(old) and types.is_struct(new):
        return _struct_widens(list(old), list(new))
    if types.is_map(old) and types.is_map(new):
        return widens(old.key_type, new.key_type) and _field_widens(old.item_field, new.item_field)
    if types.is_list(old) and (types.is_list(new) or types.is_large_list(new)):
        return _field_widens(old.value_field, new.value_field)
    if types.is_large_list(old) and types.is_large_list(new):
        return _field_widens(old.value_field, new.value_field)
    return False


def _struct_widens(old: list[pa.Field], new: list[pa.Field]) -> bool:
    """The old fields in their order, each as wide or wider, and new ones that may be null."""
    if len({field.name for field in new}) < len(new):
        return False
    left = list(old)
    for field in new:
        if left and left[0].name == field.name:
            if not _field_widens(left.pop(0), field):
                return False
        elif not field.nullable:
            return False
    return not left


def _field_widens(old: pa.Field, new: pa.Field) -> bool:
    return (new.nullable or not old.nullable) and widens(old.type, new.type)


def _hash_class(kind: pa.DataType) -> str:
    if isinstance(kind, pa.BaseExtensionType):
        return _hash_class(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _hash_class(kind.value_type)
    for name, belongs in _HASH_CLASSES:
        if belongs(kind):
            return name
    return ""


_HASH_CLASSES: Final = (
    ("null", types.is_null),
    ("integer", types.is_integer),
    ("bool", types.is_boolean),
    ("float", types.is_floating),
    ("date", types.is_date),
    ("timestamp", types.is_timestamp),
    ("time", types.is_time),
    ("duration", types.is_duration),
    ("decimal", types.is_decimal),
    ("bytes", lambda kind: _bytes_like(kind)),
)


def _bytes_like(kind: pa.DataType) -> bool:
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
    )
    return any(test(kind) for test in tests)
