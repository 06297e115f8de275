"""Running aggregates: DuckDB's window functions as the oracle, and those of windows for what both must share."""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import ConfigError, DataError, KeyHashError, PlanError, SchemaChangedError
from rayflow.expressions import col
from rayflow.operators.base import Collected
from rayflow.operators.grouping import group
from rayflow.operators.keyed.running import RunningAggregate
from rayflow.operators.state.table import StateTable
from rayflow.operators.windows import WindowAggregate, tumbling
from tests.operators.helpers import frozen, opened, rows
from tests.operators.keyed.rig import WAYS, Way, by_key, run, table_of

SCHEMA = pa.schema(
    [
        ("k", pa.int32()),
        ("s", pa.string()),
        ("t", pa.timestamp("us", "UTC")),
        ("v", pa.int64()),
        ("f", pa.float64()),
        ("w", pa.string()),
        ("d", pa.decimal128(10, 2)),
        ("b", pa.bool_()),
        ("day", pa.date32()),
        ("u", pa.uint8()),
    ]
)
KEYS = ("k", "s")
AGGREGATES = {
    "n": rf.count(),
    "c": rf.count("v"),
    "total": rf.sum("v"),
    "floats": rf.sum("f"),
    "exact": rf.sum("d"),
    "trues": rf.sum("b"),
    "small": rf.sum("u"),
    "avg": rf.mean("v"),
    "favg": rf.mean("f"),
    "davg": rf.mean("d"),
    "lo": rf.min("v"),
    "hi": rf.max("f"),
    "flo": rf.min("f"),
    "whi": rf.max("w"),
    "dlo": rf.min("d"),
    "ball": rf.min("b"),
    "dayhi": rf.max("day"),
    "sd": rf.stddev("f"),
    "psd": rf.stddev("v", ddof=0),
    "twice": rf.sum(col("v") * 2),
    "vs": rf.variance("v"),
    "pvs": rf.variance("v", ddof=0),
    "many": rf.count_distinct("v"),
    "words": rf.count_distinct("w", where=col("b")),
    "fmany": rf.count_distinct("f"),
    "dmany": rf.count_distinct("d"),
    "days": rf.count_distinct("day"),
    "which": rf.arg_max("v", "f"),
    "whose": rf.arg_min("w", "v", where=col("v") > 0),
    "latest": rf.arg_max("d", "t"),
}
ORACLE = """
    select k, s, count(*) over w n, count(v) over w c, (sum(v) over w)::bigint total, sum(f) over w floats,
        sum(d) over w exact, (sum(b::int) over w)::bigint trues, (sum(u) over w)::ubigint small,
        avg(v) over w av, avg(f) over w favg, avg(d) over w davg, min(v) over w lo, max(f) over w hi, min(f) over w flo,
        max(w) over w whi, min(d) over w dlo, min(b) over w ball, max(day) over w dayhi, stddev(f) over w sd,
        stddev_pop(v) over w psd, (sum(v * 2) over w)::bigint twice, var_samp(v) over w vs, var_pop(v) over w pvs,
        count(distinct v) over w many, count(distinct w) filter (b) over w words, count(distinct f) over w fmany,
        count(distinct d) over w dmany, count(distinct day) over w ndays,
        (max({'by': f, 'x': v}) filter (f is not null and v is not null) over w).x which,
        (min({'by': v, 'x': w}) filter (v > 0 and w is not null) over w).x whose,
        (max({'by': t, 'x': d}) filter (d is not null) over w).x latest
    from (select *, row_number() over () r from data)
    window w as (partition by k, s order by r rows unbounded preceding) order by r
"""
FLOATS = st.one_of(st.none(), st.integers(-100, 100).map(lambda n: 1e9 + n / 4))
ROW = st.tuples(
    st.one_of(st.none(), st.integers(0, 2)),
    st.sampled_from([None, "a", "b"]),
    st.integers(-40, 40),
    st.one_of(st.none(), st.integers(-100, 100)),
    FLOATS,
    st.sampled_from([None, "", "x", "yy", "é"]),
    st.one_of(st.none(), st.integers(-(10**10) + 1, 10**10 - 1).map(lambda n: decimal.Decimal(n).scaleb(-2))),
    st.sampled_from([None, True, False]),
    st.one_of(st.none(), st.integers(0, 30)),
    st.one_of(st.none(), st.integers(0, 255)),
)


def _factory(**options: Any) -> RunningAggregate:
    return RunningAggregate(**({"keys": KEYS, "aggregates": AGGREGATES, "event_time": "t"} | options))


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-5) or (math.isnan(found) and math.isnan(wanted))
    return bool(found == wanted)


def _check(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]], keys: Sequence[str] = KEYS) -> None:
    assert len(found) == len(wanted)
    ours, theirs = by_key(found, keys), by_key(wanted, keys)
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        for at, (got, want) in enumerate(zip(ours[key], expected, strict=True)):
            for name in want:
                assert _same(got[name], want[name]), (key, at, name, got[name], want[name])


@settings(max_examples=50, deadline=None)
@given(st.lists(ROW, max_size=40), WAYS)
def test_equals_duckdb_whatever_the_way(data: list[tuple[Any, ...]], way: Way) -> None:
    table = table_of(SCHEMA, data)
    with duckdb.connect() as db:
        db.register("data", table)
        names = ["k", "s", *AGGREGATES]
        wanted = [dict(zip(names, row, strict=True)) for row in db.execute(ORACLE).fetchall()]
    _check(run(_factory(), table, way), wanted)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40), WAYS)
def test_the_last_row_of_a_key_equals_a_window_over_all(data: list[tuple[Any, ...]], way: Way) -> None:
    """One window that holds everything: first and last by event time, and ties, among the rest."""
    aggregates = AGGREGATES | {"one": rf.first("v"), "end": rf.last("w"), "fend": rf.last("f"), "bone": rf.first("b")}
    table = table_of(SCHEMA, data)
    window = WindowAggregate(keys=KEYS, aggregates=aggregates, event_time="t", spec=tumbling("1000d", offset="500d"))
    operator, out = opened(window)
    for batch in table.to_batches():
        operator.process(batch, 0)
    operator.on_watermark(MAX_WATERMARK)
    wanted = [{n: row[n] for n in [*KEYS, *aggregates]} for row in rows(out.batches["main"])]
    ours = by_key(run(_factory(aggregates=aggregates), table, way), KEYS)
    _check([found[-1] for found in ours.values()], wanted)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(width=32)), min_size=1, max_size=200), WAYS)
def test_sums_of_floats_are_those_of_a_loop_to_the_last_bit(data: list[tuple[int, float]], way: Way) -> None:
    """Neither the batches nor restores change how a float is rounded; NaN and infinities included."""
    schema = pa.schema([("k", pa.int64()), ("f", pa.float64())])
    state: dict[int, float] = {}
    wanted = []
    for key, value in data:
        state[key] = state.get(key, -0.0) + value
        wanted.append({"k": key, "total": state[key]})
    factory = RunningAggregate(keys=("k",), aggregates={"total": rf.sum("f")})
    found = run(factory, table_of(schema, data), way)
    ours, theirs = by_key(found, ("k",)), by_key(wanted, ("k",))
    assert {k: [repr(r["total"]) for r in v] for k, v in ours.items()} == {
        k: [repr(r["total"]) for r in v] for k, v in theirs.items()
    }


def test_rows_come_out_in_the_order_they_came_with_keys_and_event_time() -> None:
    data = [(2, "a", 5, 1), (1, "b", 3, 2), (2, "a", 1, 10), (1, None, 9, 4)]
    table = table_of(SCHEMA, [(*row, *[None] * 6) for row in data])
    found = run(_factory(aggregates={"total": rf.sum("v")}), table, Way())
    assert [list(row) for row in found] == [["k", "s", "t", "total"]] * 4
    assert [(r["k"], r["s"], r["t"].microsecond, r["total"]) for r in found] == [
        (2, "a", 5, 1),
        (1, "b", 3, 2),
        (2, "a", 1, 11),
        (1, None, 9, 4),
    ]


def test_first_and_last_go_by_event_time_and_without_one_by_arrival() -> None:
    schema = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.string())])
    table = table_of(schema, [(1, 5, None), (1, 5, "b"), (1, 3, "c"), (1, 9, None), (1, 5, "d")])
    what: dict[str, Any] = {"keys": ("k",), "aggregates": {"one": rf.first("v"), "end": rf.last("v")}}
    timed = run(RunningAggregate(event_time="t", **what), table, Way([1, 3], restores=True))
    assert [(r["one"], r["end"]) for r in timed] == [(None, None), ("b", "b"), ("c", "b"), ("c", "b"), ("c", "d")]
    plain = run(RunningAggregate(**what), table, Way([1, 3], restores=True))
    assert [(r["one"], r["end"]) for r in plain] == [(None, None), ("b", "b"), ("b", "c"), ("b", "c"), ("b", "d")]


def test_nan_is_the_largest_number_and_skipped_by_min() -> None:
    schema = pa.schema([("k", pa.int64()), ("f", pa.float32())])
    table = table_of(schema, [(1, math.nan), (1, 2.0), (1, None), (1, math.nan), (2, None), (2, math.inf)])
    factory = RunningAggregate(keys=("k",), aggregates={"lo": rf.min("f"), "hi": rf.max("f")})
    for cuts in ([], [1, 2, 3, 4, 5]):
        found = run(factory, table, Way(cuts, restores=True))
        assert [repr((r["lo"], r["hi"])) for r in found] == [
            "(nan, nan)", "(2.0, nan)", "(2.0, nan)", "(2.0, nan)", "(None, None)", "(inf, inf)",
        ]  # fmt: skip


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.int8()])
@pytest.mark.parametrize("cuts", [[], [1, 2, 3]])
def test_sums_are_exact_up_to_the_last_integer_and_refused_beyond(kind: pa.DataType, cuts: list[int]) -> None:
    """int8 is summed in 64 bits. The mean goes on where the sum does not fit."""
    signed = kind != pa.uint64()
    most = (2**63 if signed else 2**64) - 1
    top = most if kind != pa.int8() else 127
    schema = pa.schema([("k", pa.int64()), ("v", kind)])
    total = RunningAggregate(keys=("k",), aggregates={"total": rf.sum("v")})
    fits = table_of(schema, [(1, top), (1, 0), (2, top), (2, None), (1, None)])
    assert [r["total"] for r in run(total, fits, Way(cuts, restores=True))] == [top] * 5
    if kind == pa.int8():
        return
    beyond = table_of(schema, [(1, top), (2, 1), (1, 1)])
    with pytest.raises(DataError, match=r"step 'under test' subtask 0/1: sum 'total' does not fit in u?int64"):
        run(total, beyond, Way(cuts))
    mean = RunningAggregate(keys=("k",), aggregates={"mean": rf.mean("v")})
    assert [r["mean"] for r in run(mean, beyond, Way(cuts, restores=True))] == [float(top), 1.0, (top + 1) / 2]
    if signed:
        back = table_of(schema, [(1, -(2**63)), (1, 2**63 - 1), (1, 1), (1, -5)])
        assert [r["total"] for r in run(total, back, Way(cuts, restores=True))] == [-(2**63), -1, 0, -5]


def test_once_a_batch_gives_the_last_row_of_each_key() -> None:
    schema = pa.schema([("k", pa.string()), ("t", pa.timestamp("us")), ("v", pa.int64())])
    table = table_of(schema, [("b", 1, 1), ("a", 2, 2), ("b", 3, 3), ("c", 4, 4), ("a", 0, 5), ("b", 6, 6)])
    factory = RunningAggregate(
        keys=("k",), aggregates={"total": rf.sum("v"), "n": rf.count()}, event_time="t", emit="batch"
    )
    found = run(factory, table, Way([4]))
    assert [(r["k"], r["t"].microsecond, r["total"], r["n"]) for r in found] == [
        ("a", 2, 2, 1), ("b", 3, 4, 2), ("c", 4, 4, 1), ("a", 0, 7, 2), ("b", 6, 10, 3),
    ]  # fmt: skip


def test_keys_keep_their_type_and_equal_ones_are_one() -> None:
    """Dictionaries differ from batch to batch; 0.0 and -0.0 are one key, and all NaN."""
    words = [pa.array(["x", "y", "x"]).dictionary_encode(), pa.array(["y", "z", "x"]).dictionary_encode()]
    factory = RunningAggregate(keys=("k",), aggregates={"n": rf.count(), "w": rf.max("k")})
    operator, out = opened(factory)
    for column in words:
        operator.process(pa.RecordBatch.from_arrays([column], ["k"]), 0)
    table = out.table()
    assert table is not None
    assert table.column("k").to_pylist() == ["x", "y", "x", "y", "z", "x"]
    assert table.schema == factory.output_schema(pa.schema([("k", words[0].type)]))
    assert table.column("n").to_pylist() == [1, 1, 2, 2, 1, 3]
    zeros = table_of(pa.schema([("k", pa.float64())]), [(0.0,), (-0.0,), (math.nan,), (-math.nan,)])
    assert [r["n"] for r in run(RunningAggregate(keys=("k",), aggregates={"n": rf.count()}), zeros, Way())] == [
        1,
        2,
        1,
        2,
    ]


def test_state_is_named_as_declared() -> None:
    factory = _factory()
    operator, _ = opened(factory)
    operator.process(table_of(SCHEMA, [(1, "a", 1, *[None] * 7)]).to_batches()[0], 0)
    state = operator.snapshot(1)  # type: ignore[arg-type]
    assert state is not None
    declared = factory.state_schemas(SCHEMA)
    assert declared is not None
    assert {table.name: table.schema for table in state.tables} == declared


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"aggregates": {}}, PlanError, "at least one aggregate"),
        ({"aggregates": {"n": 3}}, PlanError, r"agg\(n=...\) needs an aggregate"),
        ({"aggregates": {"k": rf.count()}}, PlanError, r"more than one column named \['k'\]"),
        ({"aggregates": {"t": rf.count()}}, PlanError, r"more than one column named \['t'\]"),
        ({"aggregates": {"n": rf.sum("nope")}}, PlanError, "nope"),
        ({"aggregates": {"n": rf.sum("w")}}, PlanError, "needs numbers"),
        ({"keys": ("nope",)}, PlanError, "'nope' is not among"),
        ({"event_time": "v"}, PlanError, "event time column of type timestamp"),
        ({"emit": "never"}, ConfigError, '"every" or "batch"'),
    ],
)
def test_mistakes_are_found_while_building(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        _factory(**options).output_schema(SCHEMA)
    with pytest.raises(KeyHashError):
        RunningAggregate(keys=("k",), aggregates={"n": rf.count()}).output_schema(
            pa.schema([("k", pa.list_(pa.int8()))])
        )


def test_rows_of_another_schema_and_null_times_are_refused() -> None:
    factory = RunningAggregate(keys=("k",), aggregates={"n": rf.first("v")}, event_time="t")
    schema = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.int64())])
    operator, _ = opened(factory, out=Collected())
    operator.process(table_of(schema, [(1, 1, 1)]).to_batches()[0], 0)
    with pytest.raises(DataError, match="step 'under test' subtask 0/1: the event time 't' is null in 1 of 1 rows"):
        operator.process(table_of(schema, [(1, None, 1)]).to_batches()[0], 0)
    other = schema.set(2, pa.field("v", pa.int32()))
    with pytest.raises(SchemaChangedError, match="expected those before it"):
        operator.process(table_of(other, [(1, 1, 1)]).to_batches()[0], 0)


VALUES = st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(0, 10**6))), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(VALUES, WAYS)
def test_the_running_estimate_is_that_of_a_window_over_the_rows_so_far(
    data: list[tuple[int, int | None]], way: Way
) -> None:
    schema = pa.schema([("k", pa.int64()), ("v", pa.int64())])
    factory = RunningAggregate(keys=("k",), aggregates={"n": rf.approx_count_distinct("v"), "c": rf.count("v")})
    found = by_key(run(factory, table_of(schema, data), way), ("k",))
    bound = rf.approx_count_distinct("v").bind("n", schema)
    for key, told in found.items():
        values = [v for k, v in data if k == told[0]["k"]]
        for at, row in enumerate(told, 1):
            column = pa.array(values[:at], pa.int64())
            (_, (parts,)) = group([pa.array([0] * at)], [bound.from_rows(column, column)])
            assert row["n"] == bound.finalise(parts, pa.array([at])).to_pylist()[0], (key, at)


def test_the_running_estimate_stays_within_its_error_and_changes_only_upwards() -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(0, 30_000, 120_000)
    table = pa.table({"k": pa.array(np.zeros(len(values), np.int64)), "v": pa.array(values)})
    both = {"n": rf.approx_count_distinct("v"), "exact": rf.count_distinct("v")}
    operator, out = opened(RunningAggregate(keys=("k",), aggregates=both))
    for batch in table.to_batches(max_chunksize=16_384):
        operator.process(batch, 0)
    told = out.table()
    assert told is not None
    estimates, exact = told["n"].to_numpy(), told["exact"].to_numpy()
    assert (np.diff(estimates) >= 0).all()
    assert exact[-1] == len(np.unique(values))
    assert np.abs(estimates[1_000:] / exact[1_000:] - 1).max() < 0.06


def test_different_values_are_kept_in_a_table_of_their_own_that_grows_by_what_is_new() -> None:
    factory = RunningAggregate(
        keys=("k",), aggregates={"n": rf.count_distinct("v"), "e": rf.approx_count_distinct("v")}
    )
    schema = pa.schema([("k", pa.int64()), ("v", pa.int64())])
    operator, _ = opened(factory)
    operator.process(table_of(schema, [(1, 5), (1, 5), (2, 5), (1, None)]).to_batches()[0], 0)
    states = {state.name: state.table for state in frozen(operator)}
    assert {name: table.schema for name, table in states.items()} == factory.state_schemas(schema)
    assert sorted(map(str, states["n.value"].to_pylist())) == ["{'k': 1, 'n.value': 5}", "{'k': 2, 'n.value': 5}"]
    assert states["e.register"].num_rows == 2
    assert states["running"]["n.count"].to_pylist() == [1, 1]


def test_a_distinct_count_that_forgets_what_it_has_seen_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: new rows of the side table are kept from the next checkpoint."""
    data = [(1, v % 5) for v in range(40)]
    table = table_of(pa.schema([("k", pa.int64()), ("v", pa.int64())]), data)
    factory = RunningAggregate(keys=("k",), aggregates={"n": rf.count_distinct("v")})
    way = Way([10, 20], restores=True)
    assert run(factory, table, way)[-1]["n"] == 5
    real = StateTable.touch
    monkeypatch.setattr(StateTable, "touch", lambda self, slots: None if self.name == "n.value" else real(self, slots))
    assert run(factory, table, way)[-1]["n"] != 5
