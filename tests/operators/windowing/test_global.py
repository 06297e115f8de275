"""The window that never ends: totals by rows, by event time and by the clock, whatever the way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import ConfigError, DataError, PlanError, StateSchemaError
from rayflow.operators.base import MAIN, Collected, Operator, OperatorFactory
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing import totals as totals_module
from rayflow.operators.windowing.global_operator import GlobalAggregate, GlobalOperator, GlobalTimeAggregate
from rayflow.operators.windowing.global_window import global_window
from rayflow.operators.windowing.totals import Totals
from rayflow.operators.windowing.triggers import Every, every
from rayflow.operators.windows import LATE, WindowAggregate
from tests.operators.helpers import context, frozen, opened, rows
from tests.operators.windowing.helpers import SCHEMA, WAYS, Row, Way, batch, ordered, run, us, within_delay

AGGREGATES = {"n": rf.count(), "total": rf.sum("v"), "low": rf.min("v"), "end": rf.last("v")}
ROWS = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 2)), st.integers(-60, 60), st.integers(-9, 9)), max_size=60
)


def by_rows(count: int, *, event_time: str | None = "t") -> GlobalAggregate:
    spec = global_window(trigger=every(rows=count))
    return GlobalAggregate(keys=("k",), spec=spec, aggregates=AGGREGATES, event_time=event_time)


def by_time(period: int) -> GlobalTimeAggregate:
    return GlobalTimeAggregate(keys=("k",), period_us=period, aggregates=AGGREGATES, event_time="t")


def total(data: list[Row], *, timed: bool = True) -> tuple[Any, ...]:
    values = [v for _, _, v in data]
    return len(data), sum(values), min(values), max((t, v) for _, t, v in data)[1] if timed else values[-1]


def by_key(data: list[Row]) -> dict[int | None, list[Row]]:
    return {key: [row for row in data if row[0] == key] for key in {row[0] for row in data}}


def found(out: Collected) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in rows(out.batches.get(MAIN, []))]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 3, 7]), ROWS, WAYS, st.booleans())
def test_every_so_many_rows_there_is_the_total(count: int, data: list[Row], way: Way, timed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = run(by_rows(count, event_time="t" if timed else None), data, way, delay=200, scratch=Path(folder))
    expected = []
    for key, mine in by_key(data).items():
        ends = {*range(count, len(mine) + 1, count), len(mine)}
        expected += [(key, *total(mine[:end], timed=timed)) for end in ends]
    assert ordered(found(out)) == ordered(expected)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 10, 50]),
    st.sampled_from([0, 4, 20]).flatmap(lambda delay: st.tuples(st.just(delay), within_delay(delay))),
    WAYS,
)
def test_at_the_end_of_every_period_there_is_the_total(period: int, sent: tuple[int, list[Row]], way: Way) -> None:
    delay, data = sent
    with tempfile.TemporaryDirectory() as folder:
        out = run(by_time(period), data, way, delay=delay, scratch=Path(folder))
    expected = []
    for key, mine in by_key(data).items():
        ends = {(t // period + 1) * period for _, t, _ in mine}
        expected += [(key, end, *total([row for row in mine if row[1] < end])) for end in ends]
    assert ordered([(key, us(end), *rest) for key, end, *rest in found(out)]) == ordered(expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.just(1), st.integers(-40, 40), st.integers(-9, 9)), max_size=5), max_size=8))
def test_late_rows_count_with_the_next_period(sent: list[list[Row]]) -> None:
    """W1 all the same; the last result is about all rows."""
    operator, out = opened(by_time(10))
    watermark, passed_on = -(2**40), -(2**40)
    for data in sent:
        operator.process(batch(data), 0)
        watermark = max([watermark, *(row[1] for row in data)])
        emitted = len(out.batches.get(MAIN, []))
        before, passed_on = passed_on, operator.on_watermark(watermark)
        ends = [us(row["window_end"]) for row in rows(out.batches.get(MAIN, [])[emitted:])]
        assert ends == sorted(ends)
        assert all(before < end <= watermark for end in ends)
    operator.on_watermark(MAX_WATERMARK)
    assert LATE not in out.batches
    everything = [row for data in sent for row in data]
    assert [row[2:] for row in found(out)][-1:] == ([total(everything)] if everything else [])


@pytest.mark.parametrize("trigger", [every(rows=1), every(rows=7), every("1ms")])
def test_totals_with_long_lists_are_made_a_few_at_a_time(trigger: Every, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them has all values before it: those of one batch together would be of quadratic size."""
    monkeypatch.setattr(totals_module, "LIST_BYTES", 20_000)
    largest, add = 0, Totals.add

    def watched(self: Totals, partials: pa.Table) -> Iterator[pa.Table]:
        nonlocal largest
        for table in add(self, partials):
            largest = max(largest, table.nbytes)
            yield table

    monkeypatch.setattr(Totals, "add", watched)
    aggregates = {"n": rf.count(), "values": rf.count_distinct("v")}
    made: OperatorFactory
    if trigger.rows is not None:
        made = GlobalAggregate(keys=("k",), spec=global_window(trigger=trigger), aggregates=aggregates)
    else:
        made = GlobalTimeAggregate(keys=("k",), period_us=1_000, aggregates=aggregates, event_time="t")
    operator, out = opened(made)
    for begin in (0, 500):
        operator.process(batch([(at % 3 // 2, at * 1_000, at) for at in range(begin, begin + 500)]), 0)
    operator.on_watermark(MAX_WATERMARK)
    operator.on_end()
    results = [(row["k"], row["n"], row["values"]) for row in rows(out.batches[MAIN])]
    step = trigger.rows or 1
    for key, many in ((0, 667), (1, 333)):
        told = sorted({*range(step, many + 1, step), many})
        assert [row for row in results if row[0] == key] == [(key, n, n) for n in told]
    assert largest < 100_000


def by_clock(now: list[float], made: OperatorFactory | None = None) -> tuple[Operator, Collected]:
    spec = global_window(trigger=every("10s", clock="processing"))
    made = made or GlobalAggregate(keys=("k",), spec=spec, aggregates={"n": rf.count(), "end": rf.last("v")})
    operator, out = made.build(), Collected()
    operator.open(replace(context(), wall_time=lambda: now[-1]), out)
    return operator, out


def test_by_the_clock_there_is_the_total_of_keys_that_have_changed() -> None:
    now = [3.0]
    operator, out = by_clock(now)
    assert operator.next_timer() is None
    operator.process(batch([(1, 0, 5), (2, 0, 6), (1, 0, 7)]), 0)
    assert operator.next_timer() == 10
    operator.on_time(9.9)
    assert found(out) == []
    states = frozen(operator)
    operator.on_time(10.0)
    assert ordered(found(out)) == [(1, 2, 7), (2, 1, 6)]
    assert operator.next_timer() is None
    now.append(12.0)
    for value in range(100):
        operator.process(batch([(2, 0, value)]), 0)
    operator.on_time(20.0)
    assert found(out)[2:] == [(2, 101, 99)]
    operator.process(batch([(1, 0, 8)]), 0)
    operator.on_end()
    operator.on_end()
    assert found(out)[3:] == [(1, 3, 8)], "told once when the input ends, and not what was told before"
    again, out = by_clock(now)
    again.restore(states)
    again.on_time(20.0)
    assert ordered(found(out)) == [(1, 2, 7), (2, 1, 6)], "it is known what was not told"


@settings(max_examples=20, deadline=None)
@given(ROWS, WAYS)
def test_by_the_clock_the_last_result_is_the_total(data: list[Row], way: Way) -> None:
    class Struck(GlobalOperator):
        def process(self, batch: Any, input_index: int) -> None:
            super().process(batch, input_index)
            self.on_time(self.next_timer() or 0)

    class Strikes(GlobalAggregate):
        def build(self) -> Operator:
            return Struck(self)

    spec = global_window(trigger=every("1s", clock="processing"))
    with tempfile.TemporaryDirectory() as folder:
        made = Strikes(keys=("k",), spec=spec, aggregates=AGGREGATES, event_time="t")
        out = run(made, data, way, delay=200, scratch=Path(folder))
    last = {row[0]: row for row in found(out)}
    assert ordered(list(last.values())) == ordered([(key, *total(mine)) for key, mine in by_key(data).items()])


def test_totals_that_are_forgotten_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: every result is about the rows since the last batch."""
    data: list[Row] = [(1, 0, 1), (1, 1, 1), (1, 22, 1)]
    for made in (by_rows(1), by_time(10)):
        right = run(made, data, Way(cuts=[1, 2]), delay=0, scratch=tmp_path / type(made).__name__)
        assert found(right)[-1][-4:] == (3, 3, 1, 1)
    monkeypatch.setattr(Totals, "_put", lambda *_: None)
    wrong = run(by_time(10), data, Way(cuts=[1, 2]), delay=0, scratch=tmp_path)
    assert found(wrong)[-1][-4:] != (3, 3, 1, 1)


def test_the_schema_is_known_while_building() -> None:
    for made in (by_rows(1), by_time(10)):
        operator, out = opened(made)
        operator.process(batch([(1, 1, 1)]), 0)
        operator.on_watermark(MAX_WATERMARK)
        assert out.batches[MAIN][0].schema == made.output_schema(SCHEMA)
        states = made.state_schemas(SCHEMA)
        assert states is not None
        assert {state.name for state in frozen(operator)} - {"progress"} == set(states) - {"progress"}


def test_what_does_not_fit_is_refused() -> None:
    for trigger in ("10s", 5, None):
        with pytest.raises(ConfigError, match="global_window"):
            global_window(trigger=trigger)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="more than one column"):
        GlobalTimeAggregate(
            keys=("k",), period_us=1, aggregates={"__told": rf.count(), "window_end": rf.count()}, event_time="t"
        )
    windows = WindowAggregate(keys=("k",), spec=Tumbling(10), aggregates=AGGREGATES, event_time="t")
    operator, _ = opened(windows)
    operator.process(batch([(1, 1, 1)]), 0)
    operator.on_watermark(20)
    other, _ = opened(by_time(10))
    with pytest.raises(StateSchemaError, match="has a global window, its checkpoint windows that close"):
        other.restore(frozen(operator))
    other, _ = opened(by_time(20))
    operator, _ = opened(by_time(10))
    operator.process(batch([(1, 1, 1)]), 0)
    with pytest.raises(StateSchemaError, match="cannot be cut anew"):
        other.restore(frozen(operator))
    third, _ = opened(by_rows(3))
    with pytest.raises(DataError, match="knows the state 'totals', got 'windows'"):
        third.restore(frozen(operator))
    with pytest.raises(DataError, match="null in 1 of 1"):
        third.process(batch([(1, None, 1)]), 0)  # type: ignore[list-item]
    filled, _ = opened(by_rows(3))
    filled.process(batch([(1, 1, 1)]), 0)
    fourth, _ = opened(by_rows(3))
    fourth.restore(frozen(filled))
    with pytest.raises(StateSchemaError, match="the totals have the columns"):
        fourth.process(batch([(1, 1, 1)]).set_column(2, "v", pa.array([1.0])), 0)
    assert str(Every(rows=3)) == "every 3 rows"
    assert pa.types.is_timestamp(by_time(1).output_schema(SCHEMA).field("window_end").type)  # type: ignore[union-attr]
