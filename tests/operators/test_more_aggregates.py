"""Aggregates beside the basic ones: values by type, nulls and NaN, mistakes, and `where=`."""

from __future__ import annotations

import datetime as dt
import math
import pickle
import re
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.errors import PlanError
from rayflow.expressions import col
from rayflow.operators import list_partials
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.keyed.running import RunningAggregate
from rayflow.operators.preaggregate import Preaggregation
from tests.operators.aggregating import TIME, batch_of, finalised, plan_of, result_of, times_of
from tests.operators.helpers import outputs, rows

NAN = math.nan
DAYS = [dt.date(2020, 1, 2), dt.date(2020, 1, 1)]


@pytest.mark.parametrize(
    ("aggregate", "values", "kind", "expected"),
    [
        (rf.variance("x"), [1, 2, 3, None], None, 1.0),
        (rf.variance("x", ddof=0), [1, 5], pa.int8(), 4.0),
        (rf.variance("x"), [1], None, None),
        (rf.count_distinct("x"), [1, None, 1, 3], pa.uint8(), 2),
        (rf.count_distinct("x"), [None, None], pa.string(), 0),
        (rf.count_distinct("x"), [None, None], pa.null(), 0),
        (rf.count_distinct("x"), [NAN, -NAN, 0.0, -0.0, None], None, 2),
        (rf.count_distinct("x"), ["a", "b", "a"], pa.dictionary(pa.int8(), pa.string()), 2),
        (rf.count_distinct("x"), ["a", "", None], pa.string_view(), 2),
        (rf.count_distinct("x"), [True, False, True], None, 2),
        (rf.count_distinct("x"), [Decimal("1.5"), Decimal("1.5")], pa.decimal256(40, 1), 1),
        (rf.count_distinct("x"), [b"abcd", b"abce"], pa.binary(4), 2),
        (rf.count_distinct("x"), DAYS * 2, None, 2),
        (rf.count_distinct("x"), [dt.timedelta(1), dt.timedelta(2)], pa.duration("s"), 2),
        (rf.approx_count_distinct("x"), [1, None, 1, 3], pa.uint8(), 2),
        (rf.approx_count_distinct("x"), [None, None], pa.null(), 0),
        (rf.approx_count_distinct("x"), [NAN, -NAN, 0.0, -0.0, None], None, 2),
        (rf.approx_count_distinct("x"), ["a", "b", "a"], pa.dictionary(pa.int8(), pa.string()), 2),
        (rf.approx_count_distinct("x"), DAYS * 2, None, 2),
        (rf.median("x"), [7, 7, None], pa.int64(), 7.0),
        (rf.median("x"), [None], pa.int64(), None),
        (rf.median("x"), [None], pa.null(), None),
        (rf.median("x"), [0.0, -0.0, 0.0], None, 0.0),
        (rf.median("x"), [Decimal("1.5")], pa.decimal128(4, 1), 1.5),
        (rf.quantile("x", 1), [1.0, NAN], None, NAN),
        (rf.quantile("x", [0, 1]), [3, -5, 9], None, [-5.0, 9.0]),
        (rf.quantile("x", [0, 1]), [math.inf, -math.inf, 1.0], None, [-math.inf, math.inf]),
        (rf.quantile("x", 0.5), [math.inf, -math.inf, 0.0], None, 0.0),
        (rf.quantile("x", [0.5]), [None], pa.float32(), None),
        (rf.quantile("x", [1.0, 0.0, 1.0]), [5e-324, -5e-324], None, [5e-324, -5e-324, 5e-324]),
        (rf.quantile("x", [0.0, 1.0]), [1.7e308, -1.7e308], None, [-1.7e308, 1.7e308]),
        (rf.collect("x", max=2), [3, None, 1, 2], None, [3, 1]),
        (rf.collect("x", max=9), ["b", None, "a"], pa.large_string(), ["b", "a"]),
        (rf.collect("x", max=9), [None, None], pa.string(), None),
        (rf.collect("x", max=9), [None], pa.null(), None),
        (rf.collect("x", max=9), DAYS, None, DAYS),
        (rf.collect("x", max=9), [True, False], None, [True, False]),
        (rf.arg_min("x", "t"), ["b", None, "a"], None, "b"),
        (rf.arg_max("x", "t"), ["b", "a", None], None, "a"),
        (rf.arg_max("x", col("x") * -1), [3, 1, 2, None], None, 1),
        (rf.arg_min("x", "x"), [None], pa.int64(), None),
        (rf.arg_max("x", "x"), [NAN, 1.0], None, NAN),
        (rf.arg_min("x", "x"), [NAN, 1.0], None, 1.0),
        (rf.arg_min("x", "x"), [NAN, None], None, NAN),
        (rf.arg_max("x", "k"), ["a", "c", "b"], None, "c"),
        (rf.arg_min("x", "k"), ["b", "a", "c"], None, "a"),
        (rf.count(where=col("x") > 1), [1, 2, 3, None], None, 2),
        (rf.count("x", where=col("k") == 0), [1, None], None, 1),
        (rf.sum("x", where=col("x") > 1), [1, 2, 3, None], None, 5),
        (rf.sum("x", where=col("x") > 9), [1, 2], None, None),
        (rf.mean("x", where="x"), [True, False], None, 1.0),
        (rf.max("x", where=col("x") != "z"), ["a", "z"], None, "a"),
        (rf.max("x", where=col("x") != "z"), ["a", "z"], pa.dictionary(pa.int8(), pa.string()), "a"),
        (rf.first("x", where=col("x") > 1), [1, 2, 3], None, 2),
        (rf.stddev("x", where=col("x") < 9), [1, 2, 3, 100], None, 1.0),
        (rf.count_distinct("x", where=col("x") < 9), [1, 1, 3, 100], None, 2),
        (rf.approx_count_distinct("x", where=col("x") < 9), [1, 1, 3, 100], None, 2),
        (rf.quantile("x", 1, where=col("x") < 9), [1, 1, 3, 100], None, 3.0),
        (rf.collect("x", max=9, where=col("x") < 9), [1, 1, 3, 100], None, [1, 1, 3]),
        (rf.arg_max("x", "t", where=col("x") < 9), [1, 3, 100], None, 3),
    ],
)
def test_values(aggregate: Aggregate, values: list[Any], kind: pa.DataType | None, expected: Any) -> None:
    found = result_of(aggregate, values, kind)
    assert found == expected or (isinstance(expected, float) and math.isnan(expected) and math.isnan(found))


@pytest.mark.parametrize(
    ("aggregate", "kind", "result"),
    [
        (rf.variance("x"), pa.int8(), pa.float64()),
        (rf.count_distinct("x"), pa.string_view(), pa.int64()),
        (rf.approx_count_distinct("x"), pa.duration("ms"), pa.int64()),
        (rf.median("x"), pa.float16(), pa.float64()),
        (rf.quantile("x", [0.5]), pa.decimal128(5, 2), pa.list_(pa.float64())),
        (rf.collect("x", max=3), pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.string())),
        (rf.arg_min("x", "x"), pa.timestamp("ns", "UTC"), pa.timestamp("ns", "UTC")),
        (rf.count(where=col("x") > 1), pa.int8(), pa.int64()),
        (rf.sum("x", where=col("x") > 1), pa.uint8(), pa.uint64()),
    ],
)
def test_types_are_known_from_the_schema(aggregate: Aggregate, kind: pa.DataType, result: pa.DataType) -> None:
    again = pickle.loads(pickle.dumps(aggregate))
    bound = again.bind("out", pa.schema([("x", kind)]))
    assert bound.result_type == result
    assert again.bind_partial("out", pa.schema(bound.parts)) == bound, "the state alone tells the types"


@pytest.mark.parametrize(
    ("aggregate", "kind", "message"),
    [
        (rf.count_distinct("y"), pa.int64(), r"out=count_distinct\('y'\) needs a column 'y'"),
        (rf.count_distinct("x"), pa.list_(pa.int64()), "told apart as keys can, got list"),
        (rf.approx_count_distinct("x"), pa.struct([("a", pa.int64())]), "told apart"),
        (rf.variance("x"), pa.string(), "needs numbers, got string"),
        (rf.median("x"), pa.timestamp("us"), r"out=quantile\('x', 0.5\) needs numbers, got timestamp"),
        (rf.quantile("x", [0.1, 0.2]), pa.string(), r"quantile\('x', \[0.1, 0.2\]\)"),
        (rf.collect("x", max=3), pa.list_(pa.int64()), "have an order"),
        (rf.arg_min("x", "y"), pa.int64(), "needs a column 'y'"),
        (rf.arg_max("x", "x"), pa.struct([("a", pa.int64())]), "have an order"),
        (rf.count(where=col("x") + 1), pa.int64(), "needs a condition as where=, which is bool, got int64"),
        (rf.sum("x", where="y"), pa.int64(), "needs a column 'y'"),
    ],
)
def test_what_cannot_be_aggregated_is_refused_while_building(
    aggregate: Aggregate, kind: pa.DataType, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        aggregate.bind("out", pa.schema([("x", kind)]))


def test_options_that_cannot_be_are_refused() -> None:
    for q in (1.5, -0.1, NAN, [], [0.5, 2]):
        with pytest.raises(PlanError, match="from 0 to 1"):
            rf.quantile("x", q)
    for bound in (0, -1, True, 2.0):
        with pytest.raises(PlanError, match=r"collect\(max\)"):
            rf.collect("x", max=bound)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"variance\(ddof\)"):
        rf.variance("x", ddof=-1)


@pytest.mark.parametrize(
    "aggregate",
    [
        rf.median("x"),
        rf.quantile("x", [0.1, 0.9]),
        rf.collect("x", max=3),
    ],
    ids=repr,
)
def test_without_a_running_form_the_build_says_so(aggregate: Aggregate) -> None:
    running = RunningAggregate(keys=("k",), aggregates={"out": aggregate})
    with pytest.raises(PlanError, match=r"'out' has no running form.*put \.window"):
        running.output_schema(pa.schema([("k", pa.int64()), ("x", pa.int64())]))


def test_running_variance_and_conditions() -> None:
    aggregates = {
        "spread": rf.variance("x", ddof=0),
        "some": rf.count(where=col("x") > 1),
        "total": rf.sum("x", where=col("x") > 1),
        "top": rf.max("x", where=col("x") < 4),
    }
    running = RunningAggregate(keys=("k",), aggregates=aggregates)
    batches = [batch_of([1, 3], keys=[0, 0]), batch_of([5, None, 2], keys=[0, 0, 1])]
    found = [tuple(row.values()) for row in rows(outputs(running, batches))]
    assert found == [
        (0, 0.0, 0, None, 1),
        (0, 1.0, 1, 3, 3),
        (0, pytest.approx(8 / 3), 2, 8, 3),
        (0, pytest.approx(8 / 3), 2, 8, 3),
        (1, 0.0, 1, 2, 2),
    ]


def test_the_page_on_aggregates_has_all_of_them() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "aggregates.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `")]
    running = {name: row.endswith("yes |") for row in table for name in re.findall(r"`(\w+)\(", row.split("|")[1])}
    assert running.keys() == set(rf.__all__) - {"Aggregate"}
    assert {name for name, there in running.items() if not there} == {"aggregate", "collect", "median", "quantile"}


def test_a_state_of_other_aggregates_is_refused() -> None:
    batch = batch_of([1, 2])
    partials = plan_of(batch, a=rf.count_distinct("x")).schema
    for other in (rf.approx_count_distinct("x"), rf.median("x"), rf.arg_min("x", "t"), rf.collect("x", max=1)):
        with pytest.raises(PlanError, match=r"a\."):
            Preaggregation.of_partials(("k",), {"a": other}, partials)


# ------------------------------------------------------------------------------- any cut, any grouping, any order

ROWS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.one_of(st.none(), st.integers(-6, 6)),
        st.one_of(st.none(), st.sampled_from(["a", "b", "c", ""])),
        st.integers(0, 5),
        st.one_of(st.none(), st.sampled_from([0.0, -1.5, 2.25, 1e9, NAN])),
    ),
    min_size=1,
    max_size=40,
)
EXACT = {
    "distinct_v": rf.count_distinct("v"),
    "distinct_s": rf.count_distinct("s"),
    "distinct_f": rf.count_distinct("f"),
    "spread": rf.variance("v"),
    "low": rf.arg_min("s", "v"),
    "high": rf.arg_max("s", "f"),
    "listed": rf.collect("s", max=4),
    "some": rf.count(where=col("v") > 0),
    "total": rf.sum("v", where=col("s") == "a"),
}
ORACLE = """
    select k, count(distinct v), count(distinct s), count(distinct f), var_samp(v),
        min(s) filter (v = low), max(s) filter (f = high),
        (list(s order by t, s) filter (s is not null))[:4],
        count(*) filter (v > 0), (sum(v) filter (s = 'a'))::bigint
    from (select *, min(v) filter (s is not null) over (partition by k) low,
        max(f) filter (s is not null) over (partition by k) high from data) group by k
"""
APPROXIMATE = {
    "about_v": rf.approx_count_distinct("v"),
    "about_s": rf.approx_count_distinct("s"),
    "middle": rf.quantile("f", [0.0, 0.3, 0.5, 1.0]),
    "user": rf.median("v", where=col("s") == "a"),
}


def _table(rows: list[tuple[Any, ...]]) -> pa.Table:
    kinds = {"k": pa.int64(), "v": pa.int64(), "s": pa.string(), "t": TIME, "f": pa.float64()}
    columns = [pa.array([row[i] for row in rows], kind) for i, kind in enumerate(kinds.values())]
    return pa.Table.from_arrays(columns, names=list(kinds))


def _merged(plan: Preaggregation, table: pa.Table, cuts: list[int], shape: list[int], single: list[bool]) -> pa.Table:
    """Cut at ``cuts``, made partial in two ways, merged as ``shape`` says, in a tree that leans as it likes."""
    edges = sorted({0, table.num_rows, *(cut for cut in cuts if cut < table.num_rows)})
    parts = []
    for i, (a, b) in enumerate(pairwise(edges)):
        batch = table.slice(a, b - a).combine_chunks().to_batches()[0]
        times = batch.column("t").view(pa.int64())
        parts.append((plan.singles if single[i % len(single)] else plan.combine_rows)(batch, times, 0))
    for at in shape:
        if len(parts) > 1:
            one, other = parts.pop(at % len(parts)), parts.pop(at % len(parts))
            parts.append(plan.merge(pa.concat_tables([one, other]), 0 if at % 2 else None))
    return plan.merge(pa.concat_tables(parts), 0)


def _rows(table: pa.Table) -> dict[Any, tuple[Any, ...]]:
    """Result columns by key; NaN as a word, for it equals nothing."""
    return {row[0]: tuple(map(_plain, row[3:])) for row in zip(*(c.to_pylist() for c in table.columns), strict=True)}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return "nan" if math.isnan(value) else pytest.approx(value, rel=1e-9, abs=1e-9)
    return value


@settings(max_examples=120, deadline=None)
@given(
    ROWS,
    st.lists(st.integers(1, 39), max_size=5),
    st.lists(st.integers(0, 9), max_size=6),
    st.lists(st.booleans(), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_any_cut_any_grouping_and_any_order_is_duckdb(
    rows: list[tuple[Any, ...]], cuts: list[int], shape: list[int], single: list[bool], random: Any
) -> None:
    aggregates = EXACT | APPROXIMATE
    table = _table(rows)
    plan = Preaggregation.of_rows(("k",), aggregates, table.schema, TIME)
    whole = finalised(
        plan, plan.combine_rows(table.combine_chunks().to_batches()[0], times_of(table.to_batches()[0]), 0)
    )
    shuffled = list(rows)
    random.shuffle(shuffled)
    parts = finalised(plan, _merged(plan, _table(shuffled), cuts, shape, single))
    found = _rows(parts)
    assert found == _rows(whole), "merged in any way it is what it is at once"
    with duckdb.connect() as db:
        db.register("data", table)
        expected = {k: tuple(map(_plain, rest)) for k, *rest in db.execute(ORACLE).fetchall()}
    assert {k: values[: len(EXACT)] for k, values in found.items()} == expected
    for k, values in found.items():
        assert values[len(EXACT) : len(EXACT) + 2] == expected[k][:2], "so few distinct values are estimated exactly"


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(
        [pa.int8(), pa.int64(), pa.uint64(), pa.date32(), pa.time32("s"), pa.timestamp("ns"), pa.duration("s")]
    ),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 5, -1, -(2**63), 2**63 - 1, 2**64 - 1, 100]))),
    st.sampled_from([0, 8]),
)
def test_distinct_whole_numbers_of_any_range(kind: pa.DataType, rows: list[tuple[int, int]], share: int) -> None:
    """By words that are sorted, by a bitmap, or where the range is too wide for a word by Arrow's hash table."""
    unsigned, narrow = kind == pa.uint64(), kind.bit_width < 64
    allowed = range(0 if unsigned else -(2**63), 2**64 if unsigned else 2**63)
    rows = [(k, v) for k, v in rows if v in allowed and (not narrow or 0 <= v < 128)]
    if not rows:
        return
    values = pa.array([v for _, v in rows], pa.uint64() if unsigned else pa.int64())
    stored = values if unsigned else values.cast(pa.int32()).cast(kind) if narrow else values.cast(kind)
    batch = batch_of(stored, kind, keys=[k for k, _ in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_partials, "_BITMAP_SHARE", share)
        plan = plan_of(batch, out=rf.count_distinct("x"))
        merged = plan.merge(plan.singles(batch, times_of(batch), 0), 0)
    for row in plan.combine_rows(batch, times_of(batch), 0), merged:
        found = finalised(plan, row).to_pylist()
        assert {r["k"]: r["out"] for r in found} == {k: len({v for o, v in rows if o == k}) for k, _ in rows}
        kept = row.column("out.values").combine_chunks()
        assert kept.type == pa.large_list(kind)
        as_number = kind if pa.types.is_integer(kind) else values.type if not narrow else pa.int32()
        assert set(kept.flatten().cast(as_number).to_pylist()) == {v for _, v in rows}


def test_the_test_of_merging_is_not_blind() -> None:
    """Broken variants: adding the counts of parts, and taking the median of medians, give something else."""
    rows = [(0, v, "a", 0, float(v)) for v in (1, 1, 9, 1, 9, 9, 9)]
    table = _table(rows)
    plan = Preaggregation.of_rows(("k",), {"n": rf.count_distinct("v"), "m": rf.median("v")}, table.schema, TIME)
    halves = [finalised(plan, _merged(plan, part, [], [], [False])) for part in (table.slice(0, 4), table.slice(4))]
    whole = finalised(plan, _merged(plan, table, [4], [], [False])).to_pylist()[0]
    assert sum(half.column("n")[0].as_py() for half in halves) == 3 != whole["n"]
    assert np.median([half.column("m")[0].as_py() for half in halves]) == pytest.approx(5, rel=0.01) != whole["m"]
    assert whole["m"] == pytest.approx(9, rel=0.01)


@pytest.mark.parametrize("kind", [pa.string(), pa.duration("us"), pa.decimal128(5, 1), pa.binary(1), pa.bool_(), TIME])
def test_collected_values_of_one_microsecond_are_in_their_own_order(kind: pa.DataType) -> None:
    of_kind: dict[pa.DataType, list[Any]] = {
        pa.string(): ["c", "a", "b"],
        pa.binary(1): [b"c", b"a", b"b"],
        pa.bool_(): [True, False, True],
        pa.decimal128(5, 1): [Decimal(3), Decimal(-1), Decimal(2)],
        pa.duration("us"): [dt.timedelta(3), dt.timedelta(1), dt.timedelta(2)],
        TIME: [dt.datetime(2020, 1, day) for day in (3, 1, 2)],  # noqa: DTZ001
    }
    values = of_kind[kind]
    batch = batch_of(values, kind)
    plan = plan_of(batch, out=rf.collect("x", max=2))
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        shuffled = batch.take(pa.array(order))
        parts = [plan.combine_rows(shuffled.slice(i, 1), pa.array([7]), 0) for i in range(3)]
        (row,) = finalised(plan, plan.merge(pa.concat_tables(parts), 0)).to_pylist()
        assert row["out"] == sorted(values)[:2]
