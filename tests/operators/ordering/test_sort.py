"""Sorting by event time: in order for each key or subtask, whatever the way the rows take."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import DataError, PlanError
from rayflow.operators.base import MAIN, Collected, RestoredState
from rayflow.operators.ordering import sort as module
from rayflow.operators.ordering.sort import LATE, SortByTime, SortOperator
from tests.operators.helpers import frozen, opened, rows
from tests.operators.windowing.helpers import SCHEMA, WAYS, Row, Way, batch, run, us, within_delay

SENT = st.sampled_from([0, 4, 50]).flatmap(lambda d: st.tuples(st.just(d), within_delay(d)))


def factory(*ties: str, keys: tuple[str, ...] = ("k",), **options: Any) -> SortByTime:
    return SortByTime(event_time="t", ties=ties, keys=keys, **options)


def emitted(out: Collected) -> list[Row]:
    return [(row["k"], us(row["t"]), row["v"]) for row in rows(out.batches.get(MAIN, []))]  # type: ignore[misc]


def of_key(data: list[Row], key: int | None) -> list[Row]:
    return [row for row in data if row[0] == key]


@settings(max_examples=80, deadline=None)
@given(SENT, WAYS)
def test_rows_of_each_key_come_in_order_whatever_the_way(sent: tuple[int, list[Row]], way: Way) -> None:
    delay, data = sent
    with tempfile.TemporaryDirectory() as folder:
        out = run(factory("v"), data, way, delay=delay, scratch=Path(folder))
    assert LATE not in out.batches
    found = emitted(out)
    assert len(found) == len(data)
    for key in (None, 0, 1, 2):
        assert of_key(found, key) == sorted(of_key(data, key), key=lambda row: row[1:])


def test_a_sort_that_lets_arrival_decide_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data: list[Row] = [(1, 5, 2), (1, 5, 1), (1, 4, 9)]
    assert emitted(run(factory("v"), data, Way(), delay=5, scratch=tmp_path)) == [(1, 4, 9), (1, 5, 1), (1, 5, 2)]
    monkeypatch.setattr(module, "order_of", lambda rows, numbers, ties: np.argsort(numbers[0], kind="stable"))
    assert emitted(run(factory("v"), data, Way(), delay=5, scratch=tmp_path)) == [(1, 4, 9), (1, 5, 2), (1, 5, 1)]


def test_rows_at_the_watermark_wait_and_rows_behind_it_are_late() -> None:
    operator, out = opened(factory())
    operator.process(batch([(1, 7, 1), (1, 5, 2), (1, 3, 3)]), 0)
    assert operator.on_watermark(5) == 5
    assert emitted(out) == [(1, 3, 3)]
    operator.process(batch([(1, 4, 4), (1, 5, 0)]), 0)
    assert [us(row["t"]) for row in rows(out.batches[LATE])] == [4]
    assert operator.on_watermark(6) == 6
    assert emitted(out) == [(1, 3, 3), (1, 5, 0), (1, 5, 2)]
    assert operator.on_watermark(MAX_WATERMARK) == MAX_WATERMARK
    assert emitted(out)[-1] == (1, 7, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.just(1), st.integers(-20, 20), st.integers(0, 999)), max_size=6), max_size=8),
    st.lists(st.integers(-20, 20), max_size=8),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_without_keys_nothing_is_lost_or_twice_when_subtasks_of_different_times_are_rescaled(
    sent: list[list[Row]], watermarks: list[int], after: int, pieces: bool
) -> None:
    """Each of two subtasks is as far as its own input; both are dealt out to one, two or three."""
    out = Collected()
    operators = [opened(factory(keys=()), index, 2, out)[0] for index in range(2)]
    for number, (data, time) in enumerate(itertools.zip_longest(sent, watermarks)):
        if data:
            operators[number % 2].process(batch(data), 0)
        if time is not None:
            operators[number % 2].on_watermark(max(time, operators[number % 2]._watermark))  # type: ignore[attr-defined]
        if number == len(sent) // 2:
            states = [frozen(operator, pieces=pieces) for operator in operators]
            emitted_before = len(out.batches.get(MAIN, []))
            operators = [opened(factory(keys=()), index, after, out)[0] for index in range(after)]
            for index, operator in enumerate(operators):
                given_to = []
                for old, state in itertools.chain.from_iterable(
                    ((o, s) for s in each) for o, each in enumerate(states)
                ):
                    if state.name == "rows" and after != 2:
                        dealt = state.table.take(pa.array(np.arange(index, state.table.num_rows, after)))
                        state = RestoredState(state.name, dealt, state.meta)
                    elif state.name == "rows" and old != index:
                        continue
                    given_to.append(state)
                operator.restore(given_to)
            assert len(out.batches.get(MAIN, [])) == emitted_before
            operators = operators if after > 1 else operators * 2
    for operator in operators:
        operator.on_watermark(MAX_WATERMARK)
    found = emitted(out) + [(r["k"], us(r["t"]), r["v"]) for r in rows(out.batches.get(LATE, []))]
    assert sorted(found) == sorted(itertools.chain.from_iterable(sent))


def test_a_subtask_goes_on_from_its_own_watermark() -> None:
    operators = [opened(factory(keys=()), index, 2)[0] for index in range(2)]
    for operator, time in zip(operators, (10, 30), strict=True):
        operator.on_watermark(time)
    operators[1].process(batch([(1, 20, 1)]), 0)
    states = [state for operator in operators for state in frozen(operator)]
    for workers, expected in ((2, [10, 30]), (1, [10]), (3, [10, 10, 10])):
        again = [opened(factory(keys=()), index, workers)[0] for index in range(workers)]
        for operator in again:
            assert isinstance(operator, SortOperator)
            operator.restore(states)
        assert [operator._watermark for operator in again] == expected  # type: ignore[attr-defined]
        assert sum(operator.late_rows for operator in again) == 1  # type: ignore[attr-defined]


def test_no_watermark_yet_is_restored_as_such() -> None:
    operator, _ = opened(factory())
    operator.process(batch([(1, -5, 1)]), 0)
    again, out = opened(factory())
    again.restore(frozen(operator))
    assert again.on_watermark(MIN_WATERMARK) == MIN_WATERMARK
    again.on_watermark(MAX_WATERMARK)
    assert emitted(out) == [(1, -5, 1)]


def test_what_cannot_be_sorted_is_said() -> None:
    with pytest.raises(PlanError, match="needs a column of that name"):
        factory("nothing").output_schema(SCHEMA)
    with pytest.raises(PlanError, match="different names"):
        factory().output_schema(SCHEMA.append(pa.field("__time", pa.int64())))
    with pytest.raises(PlanError, match="event time column of type timestamp"):
        SortByTime(event_time="v").output_schema(SCHEMA)
    operator, _ = opened(factory())
    with pytest.raises(DataError, match="is null"):
        operator.process(pa.RecordBatch.from_pylist([{"k": 1, "t": None, "v": 1}], schema=SCHEMA), 0)


@pytest.mark.parametrize("pieces", [True, False])
def test_rows_that_came_out_do_not_come_back_in_a_subtask_that_is_less_far(pieces: bool) -> None:
    """A run keeps rows that have come out until they are the larger part."""
    operators = [opened(factory(keys=()), index, 2)[0] for index in range(2)]
    operators[0].on_watermark(10)
    operators[1].process(batch([(1, 15, 1), (1, 25, 2), (1, 35, 3)]), 0)
    operators[1].on_watermark(20)
    merged, _ = opened(factory(keys=()))
    merged.restore([state for operator in operators for state in frozen(operator, pieces=pieces)])
    again, out = opened(factory(keys=()))
    again.restore(frozen(merged))
    again.on_watermark(MAX_WATERMARK)
    assert emitted(out) == [(1, 25, 2), (1, 35, 3)]
