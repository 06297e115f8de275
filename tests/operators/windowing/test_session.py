"""Sessions: cut right whatever the batches, merged when rows close a gap, each once."""

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

import rayflow.operators.aggregates as rf
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import ConfigError, DataError, ProtocolError, StateSchemaError
from rayflow.operators.base import MAIN
from rayflow.operators.windowing.progress import Emit
from rayflow.operators.windowing.session import Session, Sessions, session
from rayflow.operators.windowing.session_operator import SessionAggregate, SessionOperator
from rayflow.operators.windows import LATE
from tests.operators.helpers import frozen, opened, rows
from tests.operators.windowing.helpers import SCHEMA, WAYS, Row, Way, batch, ordered, results, run, us, within_delay

AGGREGATES = {"n": rf.count(), "total": rf.sum("v"), "low": rf.min("v"), "end": rf.last("v")}


def factory(gap: int, **options: Any) -> SessionAggregate:
    return SessionAggregate(keys=("k",), spec=Session(gap), aggregates=AGGREGATES, event_time="t", **options)


def oracle(data: list[Row], gap: int) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for key in {row[0] for row in data}:
        open_rows: list[Row] = []
        for row in sorted((row for row in data if row[0] == key), key=lambda row: row[1]):
            if open_rows and row[1] - open_rows[-1][1] >= gap:
                found.append(_result(open_rows, gap))
                open_rows = []
            open_rows.append(row)
        found.append(_result(open_rows, gap))
    return ordered(found)


def _result(data: list[Row], gap: int) -> tuple[Any, ...]:
    values, times = [v for _, _, v in data], [t for _, t, _ in data]
    last = max((t, v) for _, t, v in data)[1]
    return data[0][0], min(times), max(times) + gap, len(data), sum(values), min(values), last


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([1, 2, 5, 13, 200]),
    st.sampled_from([0, 4, 50]).flatmap(lambda delay: st.tuples(st.just(delay), within_delay(delay))),
    WAYS,
)
def test_equals_the_oracle_whatever_the_way(gap: int, sent: tuple[int, list[Row]], way: Way) -> None:
    delay, data = sent
    with tempfile.TemporaryDirectory() as folder:
        out = run(factory(gap), data, way, delay=delay, scratch=Path(folder))
    assert LATE not in out.batches
    assert results(out) == oracle(data, gap)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([3, 10]),
    st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(-40, 40), st.integers(-9, 9)), max_size=5), max_size=8),
)
def test_late_rows_never_touch_a_session_that_has_fired(gap: int, sent: list[list[Row]]) -> None:
    """Sessions of a key do not overlap, results come behind the watermark passed on, every row is somewhere once."""
    operator, out = opened(factory(gap))
    watermark, passed_on = MIN_WATERMARK, MIN_WATERMARK
    for data in sent:
        operator.process(batch(data), 0)
        watermark = max([watermark, *(row[1] for row in data)])
        emitted = len(out.batches.get(MAIN, []))
        before, passed_on = passed_on, operator.on_watermark(watermark)
        starts = [us(row["window_start"]) for row in rows(out.batches.get(MAIN, [])[emitted:])]
        assert starts == sorted(starts)
        assert before <= passed_on <= watermark
        assert all(start >= before for start in starts), "W1"
    operator.on_watermark(MAX_WATERMARK)
    found = results(out)
    late = rows(out.batches.get(LATE, []))
    assert sum(row[3] for row in found) + len(late) == sum(map(len, sent))
    assert isinstance(operator, SessionOperator)
    assert operator.late_rows == len(late)
    for key in (0, 1):
        spans = [(start, end) for k, start, end, *_ in found if k == key]
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "W3"


@pytest.mark.parametrize("emit", ["final", "update"])
def test_a_session_that_grows_for_long_is_kept_in_mind_once(emit: Emit) -> None:
    """Memory is that of open sessions, not of the rows of so much time as a gap has."""
    operator, out = opened(factory(100, emit=emit))
    assert isinstance(operator, SessionOperator)
    data: list[Row] = [(key, time, 1) for time in range(300) for key in (1, 2)]
    for at in range(0, len(data), 2):
        operator.process(batch(data[at : at + 2]), 0)
        operator.on_watermark(data[at][1])
        queue = operator._queue
        assert sum(run.rows for run in queue._runs) + sum(len(times) for times, _ in queue._added) <= 2
    operator.on_watermark(MAX_WATERMARK)
    assert [row[:-1] if emit == "update" else row for row in results(out)] == oracle(data, 100)


def last_of_each(emitted: list[dict[str, object]]) -> list[tuple[Any, ...]]:
    """What a table that is written by key and start holds in the end. Of a session that is not told nothing may be
    retracted."""
    found: dict[Any, tuple[Any, ...]] = {}
    for row in emitted:
        key, start, end, *rest, retracted = row.values()
        told = key, us(start), us(end), *rest
        if retracted:
            assert found.pop(told[:2]) == told, "what is retracted is what was told"
        else:
            assert found.get(told[:2]) != told, "a result that says nothing new"
            found[told[:2]] = told
    return ordered(list(found.values()))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 5, 13]),
    st.sampled_from([0, 4, 20]).flatmap(lambda late: st.tuples(st.just(late), within_delay(late))),
    WAYS,
    st.sampled_from(["final", "update"]),
)
def test_rows_that_come_within_the_allowed_lateness_count(
    gap: int, sent: tuple[int, list[Row]], way: Way, emit: Emit
) -> None:
    """The watermark takes rows to be in order; they are later by up to the allowed lateness."""
    lateness, data = sent
    with tempfile.TemporaryDirectory() as folder:
        made = factory(gap, allowed_lateness_us=lateness, emit=emit)
        out = run(made, data, way, delay=0, scratch=Path(folder))
    assert LATE not in out.batches
    if emit == "final":
        assert results(out) == oracle(data, gap)
    else:
        assert last_of_each(rows(out.batches.get(MAIN, []))) == oracle(data, gap)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([3, 10]),
    st.sampled_from([0, 6]),
    st.lists(st.lists(st.tuples(st.integers(0, 1), st.integers(-40, 40), st.integers(-9, 9)), max_size=5), max_size=8),
    st.integers(0, 8),
)
def test_updates_with_late_rows_of_any_age(gap: int, lateness: int, sent: list[list[Row]], restore_at: int) -> None:
    """W1; the sessions told last do not overlap, and every row is in one of them or late."""
    made = factory(gap, allowed_lateness_us=lateness, emit="update")
    operator, out = opened(made)
    watermark, passed_on = MIN_WATERMARK, MIN_WATERMARK
    for number, data in enumerate(sent):
        emitted = len(out.batches.get(MAIN, []))
        operator.process(batch(data), 0)
        watermark = max([watermark, *(row[1] for row in data)])
        before, passed_on = passed_on, operator.on_watermark(watermark)
        assert before <= passed_on
        assert all(us(row["window_start"]) >= before for row in rows(out.batches.get(MAIN, [])[emitted:])), "W1"
        if number == restore_at:
            states = frozen(operator)
            operator, _ = opened(made, out=out)
            operator.restore(states)
    operator.on_watermark(MAX_WATERMARK)
    assert isinstance(operator, SessionOperator)
    assert operator._plan is None or operator._table.rows == 0
    found = last_of_each(rows(out.batches.get(MAIN, [])))
    late = rows(out.batches.get(LATE, []))
    assert sum(row[3] for row in found) + len(late) == sum(map(len, sent))
    for key in (0, 1):
        spans = sorted((start, end) for k, start, end, *_ in found if k == key)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_sessions_that_become_one_are_retracted() -> None:
    operator, out = opened(factory(10, allowed_lateness_us=50, emit="update"))

    def told() -> list[tuple[Any, ...]]:
        found = [(us(r["window_start"]), us(r["window_end"]), r["n"], r["retracted"]) for r in rows(out.batches[MAIN])]
        out.batches[MAIN].clear()
        return found

    operator.process(batch([(1, 0, 1), (1, 15, 1)]), 0)
    operator.on_watermark(30)
    assert told() == [(0, 10, 1, False), (15, 25, 1, False)]
    operator.process(batch([(1, 8, 1)]), 0)
    assert told() == [(15, 25, 1, True), (0, 25, 3, False)]
    operator.process(batch([(1, 24, 1)]), 0)
    assert told() == [(0, 25, 3, True)], "it goes on until 34, and is told when the watermark is there"
    operator.on_watermark(34)
    assert told() == [(0, 34, 4, False)]
    assert operator.on_watermark(83) == 0
    assert operator.on_watermark(84) == 34


def test_retractions_that_are_forgotten_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: nobody is told that a session has become part of another."""
    data: list[Row] = [(1, 0, 1), (1, 15, 1), (1, 40, 1), (1, 8, 1)]
    made, way = factory(10, allowed_lateness_us=50, emit="update"), Way(cuts=[1, 2, 3])
    right = run(made, data, way, delay=0, scratch=tmp_path / "a")
    assert last_of_each(rows(right.batches[MAIN])) == oracle(data, 10)
    merge = SessionOperator._merge

    def silent(self: SessionOperator, new: pa.Table) -> tuple[pa.Table, pa.Table]:
        before, now = merge(self, new)
        return before.slice(0, 0), now

    monkeypatch.setattr(SessionOperator, "_merge", silent)
    wrong = run(made, data, way, delay=0, scratch=tmp_path / "b")
    assert last_of_each(rows(wrong.batches[MAIN])) != oracle(data, 10)


@pytest.mark.parametrize("emits", [("update", "final"), ("final", "update")])
def test_another_way_to_emit_after_a_restore(emits: tuple[Emit, Emit]) -> None:
    """A session that was told is not told again where there are no more updates."""
    operator, out = opened(factory(10, allowed_lateness_us=50, emit=emits[0]))
    operator.process(batch([(1, 0, 1), (1, 50, 1)]), 0)
    operator.on_watermark(50)
    states = frozen(operator)
    operator, _ = opened(factory(10, allowed_lateness_us=50, emit=emits[1]), out=out)
    operator.restore(states)
    operator.process(batch([(1, 60, 1)]), 0)
    operator.on_watermark(MAX_WATERMARK)
    assert [(us(r["window_start"]), r["n"]) for r in rows(out.batches[MAIN])] == [(0, 1), (50, 1), (60, 1)]


def test_a_row_that_closes_the_gap_merges_two_sessions() -> None:
    operator, out = opened(factory(10))
    operator.process(batch([(1, 0, 1), (1, 15, 2)]), 0)
    operator.process(batch([(1, 8, 4)]), 0)
    assert operator.on_watermark(24) == 0
    assert MAIN not in out.batches
    assert operator.on_watermark(25) == 25
    assert results(out) == [(1, 0, 25, 3, 7, 1, 2)]
    operator.process(batch([(1, 24, 1)]), 0)
    assert len(rows(out.batches[LATE])) == 1, "it would extend the session that has fired"


def test_rows_behind_the_watermark_join_the_open_session_they_lie_in() -> None:
    operator, out = opened(factory(10))
    operator.process(batch([(1, 0, 1), (1, 9, 1), (2, 9, 1)]), 0)
    operator.on_watermark(12)
    operator.process(batch([(1, 5, 1), (2, 5, 1)]), 0)
    assert [(row["k"], us(row["t"])) for row in rows(out.batches[LATE])] == [(2, 5)], "2 has no session there"
    operator.on_watermark(MAX_WATERMARK)
    assert [row[:4] for row in results(out)] == [(1, 0, 19, 3), (2, 9, 19, 1)]


def test_the_watermark_waits_for_the_open_session() -> None:
    """Many sessions of other keys come and go meanwhile."""
    operator, _ = opened(factory(10))
    for time in range(0, 1_000, 5):
        operator.process(batch([(1, time, 1), (time + 2, time, 1)]), 0)
        assert operator.on_watermark(time) == min(0, time)
    operator.process(batch([(7, 2_000, 1)]), 0)
    assert operator.on_watermark(1_500) == 1_500
    assert operator.on_watermark(2_005) == 2_000


@pytest.mark.parametrize("times", [[0, 2**61], [-(2**62), 2**62], [-1, 0]])
def test_times_far_apart(times: list[int]) -> None:
    operator, out = opened(factory(3))
    operator.process(batch([(1, 0, 1)]).slice(0, 0), 0)
    data = pa.RecordBatch.from_arrays(
        [pa.array([1, 1]), pa.array(times).view(pa.timestamp("us", "UTC")), pa.array([1, 1])], schema=SCHEMA
    )
    operator.process(data, 0)
    operator.on_watermark(MAX_WATERMARK)
    starts = pa.Table.from_batches(out.batches[MAIN]).column("window_start").cast(pa.int64()).to_pylist()
    assert starts == (times if times[1] - times[0] >= 3 else times[:1])


def test_nested_intervals_are_cut_at_their_highest_end() -> None:
    found = Sessions.of([pa.array([1, 1, 1, 2])], np.array([0, 2, 50, 60]), np.array([100, 5, 60, 70]))
    assert found.starts.tolist() == [0, 60]
    assert found.of_row.tolist() == [0, 0, 0, 1]


def test_a_forgotten_merge_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: the new sessions of a batch are put beside the open ones."""
    data: list[Row] = [(1, 0, 1), (1, 3, 1), (1, 4, 1)]
    way = Way(cuts=[1, 2])
    assert results(run(factory(5), data, way, delay=0, scratch=tmp_path / "a")) == oracle(data, 5)

    def beside(self: SessionOperator, new: pa.Table) -> tuple[pa.Table, pa.Table]:
        self._put(new)
        return new, new

    monkeypatch.setattr(SessionOperator, "_merge", beside)
    assert results(run(factory(5), data, way, delay=0, scratch=tmp_path / "b")) != oracle(data, 5)


def test_firing_again_after_a_restore_is_refused() -> None:
    """Broken on purpose: a checkpoint that still holds a session that had fired by its watermark (W1, W3)."""
    operator, _ = opened(factory(5))
    operator.process(batch([(1, 0, 1)]), 0)
    states = [state for state in frozen(operator) if state.name == "sessions"]
    operator.on_watermark(100)
    states += [state for state in frozen(operator) if state.name == "progress"]
    again, _ = opened(factory(5))
    again.restore(states)
    with pytest.raises(ProtocolError, match="W1"):
        again.on_watermark(101)


def test_what_does_not_fit_is_refused() -> None:
    operator, _ = opened(factory(5))
    operator.process(batch([(1, 0, 1)]), 0)
    states = frozen(operator)
    other, _ = opened(factory(6))
    with pytest.raises(StateSchemaError, match=r"gap of 6 us.*of 5 us"):
        other.restore(states)
    again, _ = opened(factory(5))
    again.restore(states)
    as_float = batch([(1, 0, 1)]).set_column(2, "v", pa.array([1.0]))
    with pytest.raises(DataError, match="restore with the aggregates and types"):
        again.process(as_float, 0)
    for gap in ("0s", "x", "99999999999999d"):
        with pytest.raises(ConfigError, match=r"session\(gap\)"):
            session(gap=gap)
