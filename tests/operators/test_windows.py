"""Tumbling windows: DuckDB as the oracle, whatever the batching, order, restores and combiner."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
import rayflow.operators.runs as runs_module
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.core.keygroups import owner_of
from rayflow.errors import ConfigError, DataError, ExpressionError, PlanError, ProtocolError, StateSchemaError
from rayflow.expressions import col
from rayflow.operators.base import MAIN, Collected, FrozenState, Operator, RestoredState
from rayflow.operators.grouping import flat
from rayflow.operators.windowing.progress import Progress
from rayflow.operators.windows import (
    LATE,
    Combiner,
    LocalCombine,
    WindowAggregate,
    WindowOperator,
    tumbling,
)
from rayflow.partition import hash_columns, key_groups
from tests.operators.helpers import frozen, opened, outputs, rows

SCHEMA = pa.schema(
    [("k", pa.int32()), ("s", pa.string()), ("t", pa.timestamp("us", "UTC")), ("v", pa.int64()), ("f", pa.float64())]
)
AGGREGATES = {
    "n": rf.count(),
    "c": rf.count("v"),
    "total": rf.sum("v"),
    "avg": rf.mean("v"),
    "lo": rf.min("v"),
    "hi": rf.max("s"),
    "one": rf.first("v"),
    "end": rf.last("v"),
    "sd": rf.stddev("f"),
    "twice": rf.sum(col("v") * 2),
}
KEYS = ("k", "s")
ORACLE = """
    select k, s, make_timestamp(
            (epoch_us(t) - {offset} - (((epoch_us(t) - {offset}) % {size}) + {size}) % {size} + {offset})) as w,
        count(*) n, count(v) c, sum(v)::bigint total, avg(v) av, min(v) lo, max(s) hi,
        min(v) filter (t1 and v is not null) one, max(v) filter (t2 and v is not null) "end",
        stddev(f) sd, sum(v * 2)::bigint twice
    from (select *, t = min(t) filter (v is not null) over p t1, t = max(t) filter (v is not null) over p t2 from (
        select *, floor((epoch_us(t) - {offset}) / {size}) b from data) window p as (partition by k, s, b))
    group by all
"""

ROW = st.tuples(
    st.one_of(st.none(), st.integers(0, 2)),
    st.sampled_from([None, "a", "b"]),
    st.integers(-40, 40),
    st.one_of(st.none(), st.integers(-100, 100)),
    st.one_of(st.none(), st.integers(-100, 100).map(lambda n: 1e9 + n / 4)),
)


def _factory(*, size: str = "10us", offset: str = "0s", partial: bool = False, **options: Any) -> WindowAggregate:
    what: dict[str, Any] = {"keys": KEYS, "aggregates": AGGREGATES, "event_time": "t", "schema": SCHEMA} | options
    return WindowAggregate(spec=tumbling(size, offset=offset), input_is_partial=partial, **what)


def _combine(*, size: str = "10us", offset: str = "0s") -> LocalCombine:
    return LocalCombine(keys=KEYS, spec=tumbling(size, offset=offset), aggregates=AGGREGATES, event_time="t")


def _table(data: Sequence[tuple[Any, ...]]) -> pa.Table:
    arrays = [pa.array([row[i] for row in data], field.type) for i, field in enumerate(SCHEMA)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _batch(*data: tuple[Any, ...]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([c.combine_chunks() for c in _table(data).columns], schema=SCHEMA)


def _simple(*rows: tuple[int, int]) -> pa.RecordBatch:
    """Batch of (key, time)."""
    return _batch(*((k, "a", t, 1, 1.0) for k, t in rows))


def _expected(data: pa.Table, size: int, offset: int) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    with duckdb.connect() as db:
        db.execute("set timezone = 'UTC'")
        db.register("data", data)
        found = db.execute(ORACLE.format(size=size, offset=offset)).fetchall()
    return {(k, s, _us(w)): tuple(rest) for k, s, w, *rest in found}


def _us(moment: Any) -> int:
    return int(np.datetime64(moment.replace(tzinfo=None), "us").astype(np.int64))


def _check(found: Sequence[pa.RecordBatch], expected: dict[tuple[Any, ...], tuple[Any, ...]], size: int) -> None:
    seen: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for row in rows(found):
        k, s, start, end, *rest = row.values()
        assert _us(end) - _us(start) == size
        assert (k, s, _us(start)) not in seen, "W3"
        seen[(k, s, _us(start))] = tuple(rest)
    assert seen.keys() == expected.keys()
    for key, values in seen.items():
        for got, want in zip(values, expected[key], strict=True):
            assert got == (pytest.approx(want, rel=1e-9, abs=1e-5) if isinstance(want, float) else want), key


@dataclass(frozen=True)
class Case:
    """One run: the same rows in some order, cut into batches, with or without combiner and restores."""

    data: list[tuple[Any, ...]]
    cuts: list[int]
    combined: bool
    restore: bool
    size: int
    offset: int
    workers: list[int]


CASES = st.builds(
    Case,
    data=st.lists(ROW, max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    combined=st.booleans(),
    restore=st.booleans(),
    size=st.sampled_from([1, 7, 10, 1000]),
    offset=st.sampled_from([0, 3]),
    workers=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
)


@settings(max_examples=120, deadline=None)
@given(CASES)
def test_equals_duckdb_whatever_the_way(case: Case) -> None:
    """Any order and batching, restored at another parallelism after every batch, with a combiner or not."""
    edges = sorted({0, len(case.data), *(c for c in case.cuts if c < len(case.data))})
    batches = [_batch(*case.data[a:b]) for a, b in pairwise(edges)]
    options = {"size": f"{case.size}us", "offset": f"{case.offset}us"}
    if case.combined:
        batches = outputs(_combine(**options), batches)
    factory, out = _factory(partial=case.combined, **options), Collected()
    workers = case.workers[0]
    operators = [opened(factory, i, workers, out)[0] for i in range(workers)]
    for at, batch in enumerate(batches):
        _deal(batch, operators)
        if case.restore:
            states = [frozen(operator) for operator in operators]
            workers = case.workers[at % len(case.workers)]
            operators = _restored(factory, states, workers, out)
    for operator in operators:
        assert operator.on_watermark(MAX_WATERMARK) == MAX_WATERMARK
    _check(out.batches.get(MAIN, []), _expected(_table(case.data), case.size, case.offset), case.size)
    assert LATE not in out.batches


def _deal(batch: pa.RecordBatch, operators: Sequence[Operator]) -> None:
    """What the hash exchange does (K1-K3)."""
    owners = _owners(batch, len(operators))
    for index, operator in enumerate(operators):
        operator.process(batch.filter(pa.array(owners == index)), 0)


def _owners(batch: pa.RecordBatch | pa.Table, workers: int) -> Any:
    groups = key_groups(hash_columns([flat(batch.column(k)) for k in KEYS]), 128)
    return np.array([owner_of(int(g), workers, 128) for g in groups])


def _restored(
    factory: WindowAggregate, states: Sequence[Sequence[RestoredState]], workers: int, out: Collected
) -> list[Operator]:
    """What the snapshot store does on a change of parallelism: every new subtask gets its rows of every old one."""
    operators = []
    for index in range(workers):
        operator, _ = opened(factory, index, workers, out)
        given_back = []
        for state in (state for old in states for state in old):
            mine = _owners(state.table, workers) == index if state.table.num_rows else np.zeros(0, bool)
            mine_only = state.table.filter(pa.array(mine, pa.bool_()))
            given_back.append(RestoredState(state.name, mine_only, state.meta, state.piece))
        operator.restore(given_back)
        operators.append(operator)
    return operators


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(ROW, max_size=8), max_size=8), st.integers(0, 30), st.booleans(), st.integers(0, 8))
def test_watermarks_and_late_rows(
    batches: list[list[tuple[Any, ...]]], delay: int, combined: bool, restore_at: int
) -> None:
    """On-time rows are aggregated, late ones come out at the side or are counted: every row is somewhere, once."""
    factory = _factory(partial=combined)
    operator, out = opened(factory)
    watermark, newest = MIN_WATERMARK, None
    passed_on = MIN_WATERMARK
    on_time: list[tuple[Any, ...]] = []
    late: list[tuple[Any, ...]] = []
    for at, data in enumerate(batches):
        for row in data:
            (late if (row[2] // 10) * 10 + 10 <= watermark else on_time).append(row)
        for batch in outputs(_combine(), [_batch(*data)]) if combined else [_batch(*data)]:
            operator.process(batch, 0)
        newest = max([r[2] for r in data] + ([] if newest is None else [newest]), default=None)
        watermark = watermark if newest is None else max(watermark, newest - delay)
        before = len(out.batches.get(MAIN, []))
        passed_before = passed_on
        passed_on = operator.on_watermark(watermark)
        assert passed_on == (MIN_WATERMARK if watermark == MIN_WATERMARK else watermark // 10 * 10)
        starts = [_us(r["window_start"]) for r in rows(out.batches.get(MAIN, [])[before:])]
        assert starts == sorted(starts)
        assert all(s >= passed_before for s in starts), "W1: a result behind the watermark that was passed on"
        assert all(s + 10 <= watermark for s in starts)
        if at == restore_at:
            states = frozen(operator)
            operator, _ = opened(factory, out=out)
            operator.restore(states)
    operator.on_watermark(MAX_WATERMARK)
    _check(out.batches.get(MAIN, []), _expected(_table(on_time), 10, 0), 10)
    assert isinstance(operator, WindowOperator)
    assert operator.late_rows == len(late)
    if not combined:
        found = [tuple(r.values())[:2] + tuple(r.values())[3:] for r in rows(out.batches.get(LATE, []))]
        assert found == [(k, s, v, f) for k, s, _, v, f in late]
        assert all(b.schema == SCHEMA for b in out.batches.get(LATE, []))


def test_a_window_closes_at_its_end_and_not_before() -> None:
    operator, out = opened(_factory())
    operator.process(_simple((1, 9), (1, 10)), 0)
    assert operator.on_watermark(9) == 0, "the window from 0 on is open"
    assert MAIN not in out.batches
    operator.on_watermark(10)
    assert [_us(r["window_start"]) for r in rows(out.batches[MAIN])] == [0]
    operator.process(_simple((1, 9)), 0)
    assert [r["k"] for r in rows(out.batches[LATE])] == [1]


def test_negative_times_and_offsets() -> None:
    spec = tumbling("10us", offset="13us")
    assert spec.offset_us == 3
    for time in range(-50, 50):
        start = spec.start_of(time)
        assert start <= time < start + 10
        assert (start - 3) % 10 == 0
        assert spec.starts_of(np.array([time])).tolist() == [start]
    with pytest.raises(ConfigError):
        tumbling("0s")
    with pytest.raises(ConfigError):
        tumbling("ten")


def test_the_schema_is_known_while_building() -> None:
    factory = _factory()
    schema = factory.output_schema(SCHEMA)
    assert schema is not None
    assert schema.names == ["k", "s", "window_start", "window_end", *AGGREGATES]
    assert schema.field("window_end").type == pa.timestamp("us", "UTC")
    partial = _combine().output_schema(SCHEMA)
    assert _factory(partial=True).output_schema(partial) == schema
    assert _factory(partial=True).output_schema(SCHEMA) == schema
    assert factory.output_schema(None) is None
    (emitted,) = outputs(_combine(), [_simple((1, 1))])
    assert emitted.schema == partial
    operator, out = opened(pickle.loads(pickle.dumps(factory)))
    operator.process(_simple((1, 1)), 0)
    operator.on_watermark(MAX_WATERMARK)
    assert out.batches[MAIN][0].schema == schema
    assert (factory.stateful, _combine().stateful) == (True, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_time": "x"}, "needs the event time column 'x'"),
        ({"event_time": "v"}, "is int64"),
        ({"keys": ("x",)}, "key column 'x'"),
        ({"aggregates": {"n": rf.sum("x")}}, "needs a column 'x'"),
        ({"aggregates": {}}, "at least one aggregate"),
        ({"aggregates": {"k": rf.count()}}, "more than one column"),
    ],
)
def test_mistakes_are_found_while_building(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        _factory(**options)


def test_null_times_fail_or_are_skipped_and_counted() -> None:
    batch = _batch((1, "a", None, 1, 1.0), (2, "a", 5, 1, 1.0))
    with pytest.raises(DataError, match="'under test' subtask 0/1.*null in 1 of 2"):
        outputs(_factory(), [batch])
    with pytest.raises(DataError, match="null in 1 of 2"):
        outputs(_combine(), [batch])
    operator, out = opened(_factory(on_error="skip"))
    operator.process(batch, 0)
    operator.on_watermark(MAX_WATERMARK)
    assert [r["k"] for r in rows(out.batches[MAIN])] == [2]
    assert isinstance(operator, WindowOperator)
    assert operator.skipped_rows == 1


def test_an_overflow_names_the_step() -> None:
    with pytest.raises(ExpressionError, match="'under test' subtask 0/1.*overflow"):
        outputs(_factory(), [_batch((1, "a", 1, 2**62, 1.0))])
    operator, _ = opened(_factory(aggregates={"total": rf.sum("v")}))
    operator.process(_batch((1, "a", 1, 2**62, 1.0), (1, "a", 1, 2**61, 1.0)), 0)
    operator.process(_batch((1, "a", 1, 2**61, 1.0)), 0)
    with pytest.raises(DataError, match="'under test'.*does not fit in int64"):
        operator.on_watermark(MAX_WATERMARK)


def test_output_batches_are_bounded() -> None:
    operator, out = opened(_factory(batch_rows=3))
    operator.process(_simple(*((k, t) for k in range(4) for t in (0, 10))), 0)
    operator.on_watermark(MAX_WATERMARK)
    assert [b.num_rows for b in out.batches[MAIN]] == [3, 3, 2]


def test_empty_batches_and_windows_without_keys() -> None:
    factory = WindowAggregate(keys=(), spec=tumbling("10us"), aggregates={"n": rf.count()}, event_time="t")
    operator, out = opened(factory)
    operator.process(_simple().slice(0, 0), 0)
    operator.on_watermark(-100)
    operator.process(_simple((1, 1), (2, 2), (3, 11)), 0)
    operator.process(_simple((1, 1)), 0)
    operator.on_watermark(MAX_WATERMARK)
    assert [r["n"] for r in rows(out.batches[MAIN])] == [3, 1]
    assert outputs(_combine(), [_simple()]) == []


def test_watermarks_never_go_back() -> None:
    """W1, and after a restore too, where the sources begin again below the watermark of the checkpoint."""
    operator, _ = opened(_factory())
    assert operator.on_watermark(50) == 50
    assert operator.on_watermark(20) == 50
    again, out = opened(_factory())
    again.restore(frozen(operator))
    assert again.on_watermark(MIN_WATERMARK) == 50
    again.process(_simple((1, 49), (1, 50)), 0)
    assert len(rows(out.batches[LATE])) == 1, "its window ended at 50"


def test_the_lowest_watermark_is_restored_and_late_rows_are_counted_once() -> None:
    states = []
    for index, watermark in enumerate((30, 20)):
        operator, _ = opened(_factory(), index, 2)
        operator.on_watermark(watermark)
        operator.process(_simple((1, 1)), 0)
        states.append(frozen(operator))
    for workers in (1, 2, 3):
        operators = _restored(_factory(), states, workers, Collected())
        assert [o.on_watermark(MIN_WATERMARK) for o in operators] == [20] * workers
        assert sum(o.late_rows for o in operators if isinstance(o, WindowOperator)) == 2


def test_a_fresh_start_and_a_state_that_does_not_fit() -> None:
    operator, _ = opened(_factory())
    operator.restore(())
    operator.process(_simple((1, 1)), 0)
    state, progress = frozen(operator)
    other, _ = opened(_factory(aggregates={"total": rf.max("v")}))
    with pytest.raises(DataError, match=r"cannot restore.*'total\.value'"):
        other.restore([state, progress])
    with pytest.raises(DataError, match="'sessions'"):
        other.restore([RestoredState("sessions", state.table)])
    typed, _ = opened(_factory(schema=None, aggregates={"n": rf.min("v")}))
    typed.process(_simple((1, 1)), 0)
    again, _ = opened(_factory(schema=None, aggregates={"n": rf.min("f")}))
    again.restore(frozen(typed))
    with pytest.raises(DataError, match=r"n\.value: int64.*n\.value: double"):
        again.process(_simple((1, 1)), 0)
    wider = SCHEMA.set(0, pa.field("k", pa.int64()))
    drifting = [_simple((1, 1)), _simple((1, 1)).cast(wider)]
    with pytest.raises(DataError, match="k: int32.*k: int64"):
        outputs(_factory(), drifting)
    partials = [outputs(_combine(), [batch])[0] for batch in drifting]
    with pytest.raises(DataError, match="k: int32.*k: int64"):
        outputs(_factory(partial=True), partials)


def test_the_combiner_stops_grouping_when_keys_do_not_repeat() -> None:
    """And the way of a batch changes nothing in the result."""
    distinct = [_simple(*((k, 1) for k in range(n, n + 10))) for n in range(0, 200, 10)]
    repeated = [_simple(*((1, 1) for _ in range(10)))] * 20
    found = outputs(_combine(), distinct + repeated)
    sizes = [b.num_rows for b in found]
    assert sizes[:20] == [10] * 20
    assert sizes[-8:] == [1] * 8, "tried again after a while"
    assert 10 in sizes[20:], f"single rows for up to {Combiner.SKIPPED_BATCHES} batches"
    operator, out = opened(_factory(partial=True))
    for batch in found:
        operator.process(batch, 0)
    operator.on_watermark(MAX_WATERMARK)
    whole = pa.Table.from_batches(distinct + repeated)
    _check(out.batches[MAIN], _expected(whole, 10, 0), 10)


def test_a_snapshot_costs_references_only() -> None:
    operator, _ = opened(_factory())
    operator.process(_simple(*((k, 1) for k in range(50_000))), 0)
    before = pa.total_allocated_bytes()
    state = operator.snapshot(CheckpointId(1))
    assert isinstance(state, FrozenState)
    assert pa.total_allocated_bytes() == before
    (piece,) = state.tables[0].pieces
    assert sum(t.num_rows for t in piece.batches) == 50_000
    assert state.tables[0].key_columns == KEYS


# ------------------------------------------------------------------------------------------------- broken variants


def _snapshot_holds(operator_class: type[WindowOperator]) -> bool:
    """Whether a snapshot still says what it said, after more rows and a fired window."""
    operator, out = operator_class(_factory()), Collected()
    opened_like = opened(_factory())[0].ctx
    operator.open(opened_like, out)
    operator.process(_simple((1, 1), (2, 11)), 0)
    state = operator.snapshot(CheckpointId(1))
    before = int(sum(t.num_rows for t in state.tables[0].batches))
    operator.process(_simple((3, 1), (3, 11)), 0)
    operator.on_watermark(10)
    return before == int(sum(t.num_rows for t in state.tables[0].batches)) == 2


class _SharesItsList(WindowOperator):
    """Broken: gives the live list away instead of a copy."""

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        state = super().snapshot(checkpoint)
        live: Any = _Live(self)
        object.__setattr__(state.tables[0], "batches", live)
        return state


class _Live:
    def __init__(self, operator: WindowOperator) -> None:
        self._operator = operator

    def __iter__(self) -> Any:
        assert self._operator._runs is not None
        return iter([run.table for run in self._operator._runs.runs()])


def test_a_snapshot_does_not_see_what_comes_later() -> None:
    assert _snapshot_holds(WindowOperator)
    assert not _snapshot_holds(_SharesItsList), "the broken variant is caught"


class _FiresTwice(WindowOperator):
    """Broken: forgets to drop the window that fired."""

    def _fire(self, before: Progress, now: Progress) -> None:
        assert self._runs is not None
        kept = self._runs.runs()
        super()._fire(before, now)
        for run in kept:
            self._runs.append(run)


class _ForgetsTheWatermark(WindowOperator):
    """Broken: opens closed windows again after a restore."""

    def restore(self, states: Sequence[RestoredState]) -> None:
        super().restore(states)
        self._progress = Progress()


def test_a_window_that_would_fire_twice_is_caught() -> None:
    operator = _FiresTwice(_factory())
    operator.open(opened(_factory())[0].ctx, Collected())
    operator.process(_simple((1, 1)), 0)
    operator.on_watermark(10)
    with pytest.raises(ProtocolError, match="W3"):
        operator.on_watermark(20)


@pytest.mark.parametrize(("kind", "fired"), [(WindowOperator, 1), (_ForgetsTheWatermark, 2)])
def test_a_closed_window_stays_closed_after_a_restore(kind: type[WindowOperator], fired: int) -> None:
    out = Collected()
    operator: WindowOperator = kind(_factory())
    operator.open(opened(_factory())[0].ctx, out)
    operator.process(_simple((1, 1)), 0)
    operator.on_watermark(10)
    states = frozen(operator)
    operator = kind(_factory())
    operator.open(opened(_factory())[0].ctx, out)
    operator.restore(states)
    operator.process(_simple((1, 2)), 0)
    operator.on_watermark(MAX_WATERMARK)
    assert len(rows(out.batches[MAIN])) == fired, "W3; the broken variant fires twice"


def test_a_part_of_the_base_is_a_base_after_a_change_of_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rayflow.core.restore.clip` names parts; they are not merged anew, so the next checkpoint writes little."""
    monkeypatch.setattr(runs_module, "PIECE_BYTES", 0)
    monkeypatch.setattr(runs_module, "PENDING_ROWS", 1)
    operator, _ = opened(_factory())
    operator.process(_simple(*((k, 1) for k in range(10))), 0)
    windows, progress = frozen(operator)
    assert progress.meta["base"] == [windows.piece]
    part = RestoredState(windows.name, windows.table.slice(0, 4), windows.meta, f"{windows.piece}@0-64")
    again, _ = opened(_factory(), 0, 2)
    again.restore([part, progress])
    once_more, progress = frozen(again)
    assert once_more.piece == part.piece
    assert progress.meta["base"] == [part.piece]


def test_windows_of_another_size_are_refused() -> None:
    operator, _ = opened(_factory())
    operator.process(_simple((1, 1)), 0)
    other, _ = opened(_factory(size="20us"))
    with pytest.raises(StateSchemaError, match=r"'under test' subtask 0/1 has windows of 20 us.*of 10 us.*name="):
        other.restore(frozen(operator))


def test_the_dry_run_of_a_restore_knows_the_states() -> None:
    for factory, schema in ((_factory(), SCHEMA), (_factory(partial=True), _combine().output_schema(SCHEMA))):
        operator, _ = opened(_factory())
        operator.process(_simple((1, 1)), 0)
        states = {state.name: state.table.schema for state in frozen(operator)}
        assert factory.state_schemas(schema) == states
    assert _factory(schema=None).state_schemas(None) is None
