"""Changes of a state's schema: what is taken over loses nothing and moves no key, all else is refused by name."""

from __future__ import annotations

import datetime as dt
from decimal import Context, Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import StateSchemaError
from rayflow.operators.base import DELETED, EXPIRES
from rayflow.operators.state.evolution import Outcome, compare, migrate
from rayflow.operators.state.widening import same_hash, widens
from rayflow.partition import hash_columns

INTEGERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
FLOATS = [pa.float16(), pa.float32(), pa.float64()]
TEXTS = [pa.string(), pa.large_string(), pa.string_view()]
BYTES = [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3)]
DATES = [pa.date32(), pa.date64()]
CLOCKS = [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]
INSTANTS = [pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")] + [pa.timestamp(u, "UTC") for u in ("s", "us")]
SPANS = [pa.duration(unit) for unit in ("s", "ms", "us", "ns")]
DECIMALS = [pa.decimal128(5, 2), pa.decimal128(10, 2), pa.decimal128(22, 2), pa.decimal256(60, 4)]
FLAT = [*INTEGERS, *FLOATS, *TEXTS, *BYTES, *DATES, *CLOCKS, *INSTANTS, *SPANS, *DECIMALS, pa.bool_()]
PAIRS = [(old, new) for old in FLAT for new in FLAT if not old.equals(new)]


def values_of(kind: pa.DataType) -> st.SearchStrategy[Any]:
    """Every value of the type, the extremes among them."""
    if pa.types.is_integer(kind):
        info = np.iinfo(kind.to_pandas_dtype())
        return st.integers(int(info.min), int(info.max)) | st.sampled_from([int(info.min), int(info.max)])
    if pa.types.is_floating(kind):
        return st.floats(width=kind.bit_width, allow_nan=False)
    if pa.types.is_decimal(kind):
        limit = 10**kind.precision - 1
        return st.integers(-limit, limit).map(lambda n: decimal(n, kind.scale))
    if kind in TEXTS:
        return st.text(max_size=5)
    if pa.types.is_fixed_size_binary(kind):
        return st.binary(min_size=3, max_size=3)
    if kind in BYTES:
        return st.binary(max_size=5)
    if pa.types.is_date(kind):
        return st.dates()
    if pa.types.is_time(kind):
        coarse = {"s": 1_000_000, "ms": 1000}.get(kind.unit, 1)
        return st.integers(0, 86_400_000_000 // coarse - 1).map(lambda n: clock(n * coarse))
    if pa.types.is_boolean(kind):
        return st.booleans()
    # Instants and spans: the whole range up to where the cast must refuse, which has a test of its own.
    return st.integers(-9_000_000_000_000, 9_000_000_000_000).map(lambda n: pa.scalar(n, pa.int64()).cast(kind))


def decimal(unscaled: int, scale: int) -> Decimal:
    return Decimal(unscaled).scaleb(-scale, Context(prec=80))


def clock(micros: int) -> dt.time:
    return (dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=micros)).time()  # noqa: DTZ001


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    plain = [v.value if isinstance(v, pa.TimestampScalar | pa.DurationScalar) else v for v in values]
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        return pa.array(plain, pa.int64()).cast(kind)
    if kind == pa.float16():
        return pa.array([None if v is None else np.float16(v) for v in plain], kind)
    return pa.array(plain, kind)


def comparable(column: pa.Array) -> list[Any]:
    """Python values that tell any two different ones apart, and only those."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit]
        return [None if v is None else v * (10**9 // per_second) for v in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return [None if v is None else clock(v // 1000) for v in column.cast(pa.int64()).to_pylist()]
    if pa.types.is_date64(kind):
        return [None if v is None else v for v in column.cast(pa.date32()).to_pylist()]
    return list(column.to_pylist())


@pytest.mark.parametrize(("old", "new"), [p for p in PAIRS if widens(*p)], ids=str)
def test_a_wider_type_loses_nothing_and_says_so_about_the_hash(old: pa.DataType, new: pa.DataType) -> None:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.none() | values_of(old), max_size=20))
    def holds(values: list[Any]) -> None:
        table = pa.table({"v": array(values, old)})
        migrated = migrate(table, pa.schema([("v", new)]), where="state 's'")
        assert migrated.schema.equals(pa.schema([("v", new)]))
        before, after = table["v"].combine_chunks(), migrated["v"].combine_chunks()
        if pa.types.is_date32(old) and pa.types.is_timestamp(new):
            after = after.cast(pa.date32())
        assert comparable(after) == comparable(before)
        if same_hash(old, new):
            assert hash_columns([after]).tolist() == hash_columns([before]).tolist()

    holds()


def test_what_no_wider_type_may_do() -> None:
    """Spot checks of the other direction: each of these would lose something for some value."""
    lossy = [
        (pa.int64(), pa.int32()),
        (pa.int64(), pa.float64()),
        (pa.int32(), pa.float32()),
        (pa.int64(), pa.uint64()),
        (pa.int8(), pa.uint64()),
        (pa.uint64(), pa.int64()),
        (pa.float64(), pa.float32()),
        (pa.float64(), pa.int64()),
        (pa.large_string(), pa.string()),
        (pa.string(), pa.int64()),
        (pa.int64(), pa.string()),
        (pa.binary(), pa.string()),
        (pa.timestamp("us"), pa.timestamp("ms")),
        (pa.timestamp("us"), pa.timestamp("ns")),
        (pa.timestamp("us"), pa.timestamp("us", "UTC")),
        (pa.date64(), pa.date32()),
        (pa.date32(), pa.timestamp("us")),
        (pa.decimal128(10, 2), pa.decimal128(10, 4)),
        (pa.decimal128(10, 2), pa.decimal128(9, 2)),
        (pa.int64(), pa.decimal128(18, 0)),
        (pa.bool_(), pa.int8()),
        (pa.list_(pa.int64()), pa.list_(pa.int8())),
        (pa.struct([("a", pa.int8())]), pa.struct([("b", pa.int8())])),
        (pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int8()), pa.field("b", pa.int8(), nullable=False)])),
    ]
    assert [pair for pair in lossy if widens(*pair)] == []


def test_nested_types_widen_inside() -> None:
    old = pa.table({"l": pa.array([[1, None], None]), "s": pa.array([{"a": 1}, None], pa.struct([("a", pa.int8())]))})
    new = pa.schema(
        [
            ("l", pa.large_list(pa.int64())),
            ("s", pa.struct([("a", pa.int32()), ("b", pa.string())])),
            ("m", pa.map_(pa.string(), pa.int64())),
        ]
    )
    migrated = migrate(old, new, where="x")
    assert migrated.schema.equals(new)
    assert migrated.to_pydict() == {"l": [[1, None], None], "s": [{"a": 1, "b": None}, None], "m": [None, None]}


def test_same_schemas_are_the_same_whatever_their_metadata_and_own_columns() -> None:
    old = pa.schema([("k", pa.int64()), ("v", pa.string()), (DELETED, pa.bool_())], metadata={"a": "b"})
    new = pa.schema([("k", pa.int64()), ("v", pa.string()), (EXPIRES, pa.int64())])
    assert compare(old, new, ["k"]).outcome is Outcome.SAME


def test_allowed_changes_are_listed_and_made() -> None:
    old = pa.table(
        {"k": pa.array([1, 2], pa.int32()), "a": pa.array([1, None], pa.int8()), "b": ["x", "y"], DELETED: [True, None]}
    )
    new = pa.schema([("k", pa.int64()), ("b", pa.string()), ("a", pa.int64()), ("new", pa.float64())])
    found = compare(old.schema, new, ["k"])
    assert found.outcome is Outcome.MIGRATES
    assert found.changes == (
        "column 'k' from int32 to int64",
        "column 'a' from int8 to int64",
        "new column 'new' (double), null in old rows",
        "columns in another order",
    )
    migrated = migrate(old, new, keys=["k"], where="state 's'")
    assert migrated.schema.equals(pa.schema([*new, pa.field(DELETED, pa.bool_())]))
    assert migrated.to_pylist()[0] == {"k": 1, "b": "x", "a": 1, "new": None, DELETED: True}
    assert migrated.to_pylist()[1] == {"k": 2, "b": "y", "a": None, "new": None, DELETED: None}


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (pa.schema([("k", pa.int32())]), "column 'v' was removed"),
        (pa.schema([("v", pa.int64())]), "key column 'k' was removed"),
        (pa.schema([("k", pa.int32()), ("v", pa.int32())]), "'v' was int64 and is int32"),
        (pa.schema([("k", pa.float64()), ("v", pa.int64())]), "'k' was int32 and is double, which moves its keys"),
        (pa.schema([("k", pa.string()), ("v", pa.int64())]), "'k' was int32 and is string"),
        (pa.schema([("k", pa.int32()), pa.field("v", pa.int64(), nullable=False)]), "'v' may no longer be null"),
        (
            pa.schema([("k", pa.int32()), ("v", pa.int64()), pa.field("w", pa.int8(), nullable=False)]),
            "new column 'w' may not be null",
        ),
        (pa.schema([("k", pa.int32()), ("v", pa.int64()), ("v", pa.int64())]), "column 'v' stands there twice"),
    ],
)
def test_refused_changes_name_the_reason(new: pa.Schema, reason: str) -> None:
    old = pa.schema([("k", pa.int32()), ("v", pa.int64())])
    found = compare(old, new, ["k"])
    assert found.outcome is Outcome.REFUSED
    assert any(reason in each for each in found.reasons), found.reasons
    with pytest.raises(StateSchemaError, match="^state 's' of step 'x' cannot be restored") as raised:
        migrate(old.empty_table(), new, keys=["k"], where="state 's' of step 'x'")
    assert reason in str(raised.value)


def test_new_key_columns_and_another_order_of_them_are_refused() -> None:
    old = pa.schema([("a", pa.int32()), ("b", pa.int32())])
    swapped = pa.schema([("b", pa.int32()), ("a", pa.int32())])
    assert compare(old, swapped, ["b", "a"]).outcome is Outcome.REFUSED
    assert compare(old, swapped, ["a"]).outcome is Outcome.MIGRATES
    wider = pa.schema([("a", pa.int32()), ("b", pa.int32()), ("c", pa.int32())])
    assert "key column 'c' is new" in compare(old, wider, ["a", "c"]).reasons[0]


def test_an_instant_out_of_range_is_an_error_that_names_the_column_and_changes_nothing() -> None:
    table = pa.table({"at": pa.array([2**61], pa.int64()).cast(pa.timestamp("s"))})
    with pytest.raises(
        StateSchemaError, match=r"x: a value of column 'at' does not fit .* keep the type timestamp\[s\]"
    ):
        migrate(table, pa.schema([("at", pa.timestamp("us"))]), where="x")
