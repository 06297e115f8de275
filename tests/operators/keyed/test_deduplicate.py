"""Deduplicate: a loop over rows as the oracle, with and without a bound in event time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import DataError, PlanError
from rayflow.operators.base import MAIN, Collected
from rayflow.operators.keyed.deduplicate import STATE, Deduplicate, DeduplicateWithinOperator, passing_rows
from rayflow.operators.keyed.segments import Segments
from rayflow.operators.windows import LATE
from tests.operators.helpers import frozen, opened, rows
from tests.operators.keyed.rig import WAYS, Way, by_key, restored, run, table_of

SCHEMA = pa.schema([("k", pa.int64()), ("s", pa.string()), ("t", pa.timestamp("us")), ("row", pa.int64())])
KEYS = ("k", "s")
ROW = st.tuples(st.one_of(st.none(), st.integers(0, 2)), st.sampled_from([None, "a"]), st.integers(-50, 50))


def _within(us: int = 10) -> Deduplicate:
    return Deduplicate(keys=KEYS, within_us=us, event_time="t")


def _table(data: list[tuple[Any, ...]]) -> pa.Table:
    return table_of(SCHEMA, [(*row, at) for at, row in enumerate(data)])


def _model(data: list[tuple[Any, ...]], within: int | None) -> list[int]:
    passed: dict[Any, int] = {}
    found = []
    for at, (k, s, t) in enumerate(data):
        if (k, s) not in passed or (within is not None and t >= passed[k, s] + within):
            passed[k, s] = t
            found.append(at)
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, max_size=60), WAYS, st.sampled_from([None, 1, 7, 30, 1000]))
def test_equals_a_loop_whatever_the_way(data: list[tuple[Any, ...]], way: Way, within: int | None) -> None:
    factory = Deduplicate(keys=KEYS) if within is None else _within(within)
    table = _table(data)
    found = run(factory, table, way)
    wanted = table.take(pa.array(_model(data, within), pa.int64())).to_pylist()
    assert by_key(found, KEYS) == by_key(wanted, KEYS)
    if way.workers == [1]:
        assert found == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(ROW, max_size=10), max_size=10), st.integers(0, 40), st.integers(1, 20), st.integers(0, 9))
def test_forgetting_keys_changes_nothing(
    batches: list[list[tuple[Any, ...]]], delay: int, within: int, restore_at: int
) -> None:
    """Watermarks that follow the rows: a row passes or not as if nothing were forgotten; late ones are given out."""
    factory = _within(within)
    operators, out = [opened(factory)[0]], Collected()
    operators[0].out = out
    watermark, newest, number = MIN_WATERMARK, None, 0
    on_time: list[tuple[Any, ...]] = []
    numbers: list[int] = []
    late: list[int] = []
    for at, data in enumerate(batches):
        operator = operators[-1]
        for row in data:
            if row[2] < watermark:
                late.append(number)
            else:
                on_time.append(row)
                numbers.append(number)
            number += 1
        table = table_of(SCHEMA, [(*row, number - len(data) + i) for i, row in enumerate(data)])
        for batch in table.to_batches():
            operator.process(batch, 0)
        newest = max([row[2] for row in data] + ([] if newest is None else [newest]), default=None)
        if newest is not None:
            watermark = max(watermark, newest - delay)
            assert operator.on_watermark(watermark) == watermark
        if at == restore_at:
            operators = restored(factory, [frozen(operator)], 1, out)
    assert [r["row"] for r in rows(out.batches.get(MAIN, []))] == [numbers[i] for i in _model(on_time, within)]
    assert [r["row"] for r in rows(out.batches.get(LATE, []))] == late
    final = operators[-1]
    assert isinstance(final, DeduplicateWithinOperator)
    assert final.late_rows == len(late)
    final.on_watermark(MAX_WATERMARK)


def test_state_stays_within_a_small_multiple_of_the_live_keys() -> None:
    """100 keys a batch that never come back, each live for two batches."""
    operator, _ = opened(_within(20))
    most = 0
    for at in range(200):
        data = [(at * 100 + i, None, at * 10) for i in range(100)]
        operator.process(_table(data).to_batches()[0], 0)
        operator.on_watermark(at * 10)
        most = max(most, _live_rows(operator))
    assert most <= 800
    operator.on_watermark(MAX_WATERMARK)
    assert _live_rows(operator) == 0


def _live_rows(operator: Any) -> int:
    return int(operator._table.rows)


def test_late_rows_stay_late_after_a_restore() -> None:
    """The key has been forgotten before the checkpoint: without the watermark its late row would pass again."""
    factory, out = _within(10), Collected()
    operator, _ = opened(factory, out=out)
    operator.process(_table([(1, "a", 0)]).to_batches()[0], 0)
    operator.on_watermark(30)
    assert _live_rows(operator) == 0
    (again,) = restored(factory, [frozen(operator)], 1, out)
    again.process(_table([(1, "a", 5)]).to_batches()[0], 0)
    assert (len(rows(out.batches[MAIN])), len(rows(out.batches[LATE]))) == (1, 1)


def test_late_rows_are_counted_once_after_a_change_of_parallelism() -> None:
    factory, out = _within(10), Collected()
    operator, _ = opened(factory, out=out)
    operator.process(_table([(1, "a", 50)]).to_batches()[0], 0)
    operator.on_watermark(50)
    operator.process(_table([(1, "a", 5)] * 3).to_batches()[0], 0)
    later: list[Any] = restored(factory, [frozen(operator)], 4, out)
    assert sum(each.late_rows for each in later) == 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-30, 30)), min_size=1, max_size=80), st.integers(1, 25))
def test_the_next_row_that_passes_is_found_by_bisection(data: list[tuple[int, int]], within: int) -> None:
    slots, times = (np.array(column, np.int64) for column in zip(*data, strict=True))
    segments = Segments.of(slots)
    found = passing_rows(segments, times[segments.order], within)[segments.inverse()]
    assert np.flatnonzero(found).tolist() == _model([(int(s), None, int(t)) for s, t in data], within)


def test_a_hot_key_of_which_every_row_passes_takes_no_loop() -> None:
    count = 200_000
    times = np.arange(count, dtype=np.int64)
    assert passing_rows(Segments.of(np.zeros(count, np.int64)), times, 1).all()
    assert passing_rows(Segments.of(np.zeros(count, np.int64)), times, 3).sum() == -(-count // 3)


def test_state_is_named_as_declared() -> None:
    for factory in (_within(), Deduplicate(keys=KEYS)):
        operator, _ = opened(factory)
        operator.process(_table([(1, "a", 1)]).to_batches()[0], 0)
        declared = factory.state_schemas(SCHEMA)
        assert declared is not None
        assert {s.name: s.table.schema for s in frozen(operator) if s.name == STATE} == declared


def test_a_null_time_is_refused() -> None:
    operator, _ = opened(_within())
    with pytest.raises(DataError, match="step 'under test' subtask 0/1: the event time 't' is null in 1 of 1 rows"):
        operator.process(_table([(1, "a", None)]).to_batches()[0], 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"within_us": 0, "event_time": "t"}, "must be longer than zero"),
        ({"within_us": 2**62, "event_time": "t"}, "must be below"),
        ({"within_us": 5}, "needs event time"),
        ({"within_us": 5, "event_time": "k"}, "event time column of type timestamp"),
        ({"keys": ("nope",)}, "'nope' is not among"),
    ],
)
def test_mistakes_are_found_while_building(options: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        Deduplicate(**({"keys": KEYS} | options)).output_schema(SCHEMA)
