"""Aggregates: types, values, and that partial results may be merged in any way."""

from __future__ import annotations

import datetime as dt
import math
import pickle
import statistics
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.errors import DataError, KeyHashError, PlanError
from rayflow.expressions import col
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.preaggregate import Preaggregation
from tests.operators.aggregating import TIME, batch_of, finalised, plan_of, result_of, times_of


@pytest.mark.parametrize(
    ("aggregate", "values", "kind", "expected"),
    [
        (rf.count(), [1, None, 3], None, 3),
        (rf.count("x"), [1, None, 3], None, 2),
        (rf.count("x"), [None, None], pa.string(), 0),
        (rf.sum("x"), [1, None, 3], pa.int8(), 4),
        (rf.sum("x"), [127, 127], pa.int8(), 254),
        (rf.sum("x"), [None, None], pa.int64(), None),
        (rf.sum("x"), [2**64 - 2, 1], pa.uint64(), 2**64 - 1),
        (rf.sum("x"), [True, True, None, False], None, 2),
        (rf.sum("x"), [0.5, 0.25], pa.float32(), 0.75),
        (rf.sum("x"), [Decimal("1.10"), Decimal("2.20")], pa.decimal128(10, 2), Decimal("3.30")),
        (rf.sum("x"), [Decimal(9 * 10**37)] * 2, pa.decimal128(38, 0), Decimal(18 * 10**37)),
        (rf.sum("x"), [Decimal("1.5"), None], pa.decimal64(4, 1), Decimal("1.5")),
        (rf.mean("x"), [1, None, 2], pa.int32(), 1.5),
        (rf.mean("x"), [None], pa.int32(), None),
        (rf.mean("x"), [2**63 - 1, 2**63 - 1, 2**63 - 1], pa.int64(), float(2**63)),
        (rf.mean("x"), [Decimal("1.5"), Decimal("2.5")], pa.decimal128(4, 1), 2.0),
        (rf.min("x"), ["b", None, "a"], None, "a"),
        (rf.max("x"), ["b", None, "a"], pa.large_string(), "b"),
        (rf.max("x"), ["b", None, "a"], pa.string_view(), "b"),
        (rf.max("x"), ["b", None, "a"], pa.dictionary(pa.int8(), pa.string()), "b"),
        (rf.min("x"), [b"b", b"a"], None, b"a"),
        (rf.min("x"), [True, False], None, False),
        (rf.max("x"), [dt.date(2020, 1, 1), dt.date(2021, 1, 1)], None, dt.date(2021, 1, 1)),
        (rf.max("x"), [dt.timedelta(1), dt.timedelta(2)], None, dt.timedelta(2)),
        (rf.min("x"), [None], pa.int64(), None),
        (rf.min("x"), [math.nan, 1.0], None, 1.0),
        (rf.max("x"), [math.nan, 1.0], None, math.nan),
        (rf.min("x"), [math.nan, None], None, math.nan),
        (rf.first("x"), [None, "b", "a"], None, "b"),
        (rf.last("x"), ["b", "a", None], None, "a"),
        (rf.first("x"), [None, None], pa.string(), None),
        (rf.stddev("x"), [1, 2, 3, None], None, 1.0),
        (rf.stddev("x", ddof=0), [1, 3], None, 1.0),
        (rf.stddev("x"), [5, None], None, None),
        (rf.sum(col("x") * 2), [1, 2], None, 6),
    ],
)
def test_values(aggregate: Aggregate, values: list[Any], kind: pa.DataType | None, expected: Any) -> None:
    found = result_of(aggregate, values, kind)
    assert found == expected or (isinstance(expected, float) and math.isnan(expected) and math.isnan(found))


@pytest.mark.parametrize(
    ("aggregate", "kind", "result"),
    [
        (rf.count(), pa.string(), pa.int64()),
        (rf.sum("x"), pa.int16(), pa.int64()),
        (rf.sum("x"), pa.uint16(), pa.uint64()),
        (rf.sum("x"), pa.float32(), pa.float64()),
        (rf.sum("x"), pa.decimal128(28, 3), pa.decimal128(38, 3)),
        (rf.sum("x"), pa.decimal128(29, 3), pa.decimal256(76, 3)),
        (rf.mean("x"), pa.decimal128(29, 3), pa.float64()),
        (rf.min("x"), pa.timestamp("ns", "UTC"), pa.timestamp("ns", "UTC")),
        (rf.last("x"), pa.dictionary(pa.int8(), pa.string()), pa.string()),
        (rf.stddev("x"), pa.int8(), pa.float64()),
    ],
)
def test_types_are_known_from_the_schema(aggregate: Aggregate, kind: pa.DataType, result: pa.DataType) -> None:
    bound = pickle.loads(pickle.dumps(aggregate)).bind("out", pa.schema([("x", kind)]))
    assert bound.result_type == result
    again = aggregate.bind_partial("out", pa.schema(bound.parts))
    assert again == bound, "the state alone tells the types"


@pytest.mark.parametrize(
    ("aggregate", "kind", "message"),
    [
        (rf.sum("y"), pa.int64(), r"needs a column 'y', the input has \['x'\]"),
        (rf.count("y"), pa.int64(), "needs a column 'y'"),
        (rf.sum("x"), pa.string(), "needs numbers, got string"),
        (rf.mean("x"), pa.date32(), "needs numbers"),
        (rf.stddev("x"), pa.string(), "needs numbers"),
        (rf.sum("x"), pa.decimal256(70, 1), "needs numbers"),
        (rf.max("x"), pa.list_(pa.int64()), "have an order"),
        (rf.first("x"), pa.struct([("a", pa.int64())]), "have an order"),
        (rf.max(col("y") + 1), pa.int64(), "y"),
    ],
)
def test_what_cannot_be_aggregated_is_refused_while_building(
    aggregate: Aggregate, kind: pa.DataType, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        aggregate.bind("out", pa.schema([("x", kind)]))


def test_names_that_meet_and_keys_that_cannot_be_are_refused() -> None:
    schema = pa.schema([("k", pa.int64()), ("window_start", pa.int64()), ("l", pa.list_(pa.int64())), ("t", TIME)])

    def plan(keys: tuple[str, ...], **aggregates: Aggregate) -> Preaggregation:
        return Preaggregation.of_rows(keys, aggregates, schema, TIME)

    with pytest.raises(PlanError, match=r"more than one column named \['k'\]"):
        plan(("k",), k=rf.count())
    with pytest.raises(PlanError, match="window_start"):
        plan(("window_start",), n=rf.count())
    with pytest.raises(PlanError, match="key column 'z'"):
        plan(("z",), n=rf.count())
    with pytest.raises(KeyHashError):
        plan(("l",), n=rf.count())
    with pytest.raises(PlanError, match="at least one aggregate"):
        plan(("k",))
    with pytest.raises(PlanError, match="needs an aggregate"):
        plan(("k",), n="count")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="ddof"):
        rf.stddev("x", ddof=-1)


WORDS = [0, 1, -1, 2**31, 2**32 - 1, -(2**32), 2**62, -(2**62), 2**63 - 1, -(2**63)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(WORDS), st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=12))
def test_a_sum_that_overflows_raises_and_any_other_is_exact(values: list[int]) -> None:
    """pyarrow's hash_sum wraps. Whether the true sum fits decides, not the order or the way of batching."""
    total = int(sum(values))
    if -(2**63) <= total < 2**63:
        assert result_of(rf.sum("x"), values, pa.int64()) == total
    else:
        with pytest.raises(DataError, match="'out' does not fit in int64"):
            result_of(rf.sum("x"), values, pa.int64())
    assert result_of(rf.mean("x"), values, pa.int64()) == pytest.approx(total / len(values), rel=1e-12, abs=1024)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1]), min_size=1, max_size=6))
def test_unsigned_sums_too(values: list[int]) -> None:
    total = int(sum(values))
    if total < 2**64:
        assert result_of(rf.sum("x"), values, pa.uint64()) == total
    else:
        with pytest.raises(DataError, match="does not fit in uint64"):
            result_of(rf.sum("x"), values, pa.uint64())


def test_the_oracle_of_overflow_is_not_blind() -> None:
    """The broken variant: Arrow's own sum gives a wrong number without a word."""
    wrapped = pa.table({"k": [0, 0], "x": pa.array([2**63 - 1, 1])}).group_by("k").aggregate([("x", "sum")])
    assert wrapped.column("x_sum").to_pylist() == [-(2**63)]


@pytest.mark.parametrize("offset", [0.0, 1e9, -1e12])
def test_the_deviation_is_safe_far_from_zero(offset: float) -> None:
    rng = np.random.default_rng(7)
    values = (offset + rng.integers(-8, 9, 1_000) / 8).tolist()
    expected = statistics.stdev(values)
    assert result_of(rf.stddev("x"), values) == pytest.approx(expected, rel=1e-9)
    naive = np.sqrt((np.sum(np.square(values)) - np.sum(values) ** 2 / 1_000) / 999)
    if offset:
        assert naive != pytest.approx(expected, rel=1e-3), "the sum of squares would not do"


def test_the_deviation_of_groups_that_lie_far_apart() -> None:
    """One pivot for all groups would lose one of them."""
    values = [1e12, 1e12 + 1, 1e12 + 2, 1.0, 1.5, 2.0]
    batch = batch_of(values, keys=[1, 1, 1, 2, 2, 2])
    plan = plan_of(batch, out=rf.stddev("x"))
    merged = plan.merge(plan.singles(batch, times_of(batch), 0), 0)
    assert finalised(plan, merged).column("out").to_pylist() == [1.0, 0.5]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_of_two_zeros_the_extreme_is_the_plain_one(kind: pa.DataType) -> None:
    """They are equal; which one came first in which batch must not show."""
    for values in ([0.0, -0.0], [-0.0, 0.0], [-0.0]):
        for aggregate in (rf.min("x"), rf.max("x")):
            assert math.copysign(1, result_of(aggregate, values, kind)) == 1


def test_first_and_last_do_not_depend_on_arrival() -> None:
    """Ties in time: the smallest value is first, the largest last."""
    values, times = ["b", "a", "c", None], [5, 5, 5, 1]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        batch = batch_of([values[i] for i in order])
        plan = plan_of(batch, a=rf.first("x"), z=rf.last("x"))
        stamps = pa.array([times[i] for i in order], pa.int64())
        (row,) = finalised(plan, plan.combine_rows(batch, stamps, 0)).to_pylist()
        assert (row["a"], row["z"]) == ("a", "c")


@pytest.mark.parametrize(
    ("keys", "kind", "groups"),
    [
        ([1, None, 1, None], pa.int64(), [1, None]),
        (["a", "b", "a", None], pa.dictionary(pa.int8(), pa.string()), ["a", "b", None]),
        (["a", "b", "a"], pa.string_view(), ["a", "b"]),
        ([0.0, -0.0, 1.0], pa.float64(), [0.0, 1.0]),
        ([True, None, True], pa.bool_(), [True, None]),
        ([Decimal("1.0"), Decimal("1.0")], pa.decimal128(3, 1), [Decimal("1.0")]),
        ([b"x", b"x"], pa.binary(1), [b"x"]),
        ([dt.date(2020, 1, 1)] * 2, pa.date32(), [dt.date(2020, 1, 1)]),
        ([None, None], pa.null(), [None]),
    ],
)
def test_keys_of_every_type(keys: list[Any], kind: pa.DataType, groups: list[Any]) -> None:
    schema = pa.schema([("k", kind), ("t", TIME)])
    batch = pa.record_batch([pa.array(keys, kind), pa.array(range(len(keys)), TIME)], schema=schema)
    plan = Preaggregation.of_rows(("k",), {"n": rf.count()}, schema, TIME)
    table = finalised(plan, plan.combine_rows(batch, times_of(batch), 0))
    assert table.column("k").to_pylist() == groups
    assert sum(table.column("n").to_pylist()) == len(keys)


def test_one_nan_is_one_key() -> None:
    other = np.array([0x7FF8000000000001], np.uint64).view(np.float64)[0]
    batch = pa.record_batch({"k": pa.array(np.array([math.nan, other])), "t": pa.array([0, 1], TIME)})
    plan = plan_of(batch, n=rf.count())
    assert plan.combine_rows(batch, times_of(batch), 0).num_rows == 1


def test_a_state_of_other_aggregates_is_refused() -> None:
    batch = batch_of([1, 2])
    partials = plan_of(batch, a=rf.sum("x")).schema
    with pytest.raises(PlanError, match=r"'b\.value'"):
        Preaggregation.of_partials(("k",), {"b": rf.max("x")}, partials)
    with pytest.raises(PlanError, match="z"):
        Preaggregation.of_partials(("z",), {"a": rf.sum("x")}, partials)
