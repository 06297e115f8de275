"""Allowed lateness, updated results and early ones, for tumbling and sliding windows."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import PlanError
from rayflow.operators.base import MAIN, Collected, Operator
from rayflow.operators.tumbling import Tumbling, WindowSpec
from rayflow.operators.windowing.progress import Emit
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windows import LATE, LocalCombine, WindowAggregate, WindowOperator
from tests.operators.helpers import context, frozen, opened, rows
from tests.operators.windowing.helpers import SCHEMA, WAYS, Row, Way, batch, ordered, results, run, us, within_delay

AGGREGATES = {"n": rf.count(), "total": rf.sum("v")}
SPECS: list[Tumbling | Sliding] = [Tumbling(10, 3), Tumbling(1), Sliding(10, 5), Sliding(7, 3, 1), Sliding(20, 2)]
SENT = st.sampled_from([0, 4, 20]).flatmap(lambda late: st.tuples(st.just(late), within_delay(late)))


def factory(spec: WindowSpec, lateness: int, emit: Emit, **options: Any) -> WindowAggregate:
    what: dict[str, Any] = {"keys": ("k",), "spec": spec, "aggregates": AGGREGATES, "event_time": "t"} | options
    return WindowAggregate(allowed_lateness_us=lateness, emit=emit, schema=SCHEMA, **what)


def starts_of(spec: Tumbling | Sliding, time: int) -> list[int]:
    every = spec.size_us if isinstance(spec, Tumbling) else spec.every_us
    start = (time - spec.offset_us) // every * every + spec.offset_us
    return [s for s in range(start, start - spec.size_us, -every) if s + spec.size_us > time]


def oracle(data: list[Row], spec: Tumbling | Sliding) -> list[tuple[Any, ...]]:
    found: dict[tuple[int | None, int], list[int]] = {}
    for k, t, v in data:
        for start in starts_of(spec, t):
            found.setdefault((k, start), []).append(v)
    return ordered([(k, s, s + spec.size_us, len(values), sum(values)) for (k, s), values in found.items()])


def last_of_each(emitted: list[dict[str, object]]) -> list[tuple[Any, ...]]:
    found = {}
    for row in emitted:
        k, start, end, n, total = row.values()
        found[k, us(start)] = (k, us(start), us(end), n, total)
    return ordered(list(found.values()))


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(SPECS),
    SENT,
    WAYS,
    st.booleans(),
    st.sampled_from(["final", "update"]),
    st.sampled_from([None, 1, 7]),
)
def test_rows_that_come_within_the_allowed_lateness_count(
    spec: Tumbling | Sliding, sent: tuple[int, list[Row]], way: Way, combined: bool, emit: Emit, early: int | None
) -> None:
    """The watermark takes rows to be in order; they are later by up to the allowed lateness. "final": each result once
    and right. "update": the last result of each key and window is right."""
    lateness, data = sent
    options: dict[str, Any] = {"early_us": early} if emit == "update" else {}
    combine = LocalCombine(keys=("k",), spec=spec, aggregates=AGGREGATES, event_time="t") if combined else None
    with tempfile.TemporaryDirectory() as folder:
        out = run(
            factory(spec, lateness, emit, input_is_partial=combined, **options), data, way, delay=0,
            scratch=Path(folder), combine=combine,
        )  # fmt: skip
    assert LATE not in out.batches
    if emit == "final":
        assert results(out) == oracle(data, spec)
    else:
        emitted = rows(out.batches.get(MAIN, []))
        assert last_of_each(emitted) == oracle(data, spec)
        if early is None:
            told = [(row["k"], row["window_start"], row["n"]) for row in emitted]
            assert len(told) == len(set(told)), "a result that says nothing new"


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.sampled_from([0, 5]),
    st.sampled_from(["final", "update"]),
    st.lists(st.lists(st.tuples(st.just(1), st.integers(-40, 40), st.integers(-9, 9)), max_size=5), max_size=8),
    st.integers(0, 8),
)
def test_no_result_comes_behind_the_watermark_that_was_passed_on(
    spec: Tumbling | Sliding, lateness: int, emit: Emit, sent: list[list[Row]], restore_at: int
) -> None:
    """W1, with late rows of any age; every row is late or in all its windows that were still there."""
    operator, out = opened(factory(spec, lateness, emit))
    watermark, passed_on, late = MIN_WATERMARK, MIN_WATERMARK, 0
    expected: dict[int, list[int]] = {}
    for number, data in enumerate(sent):
        emitted = len(out.batches.get(MAIN, []))
        operator.process(batch(data), 0)
        for _, t, v in data:
            there = [s for s in starts_of(spec, t) if s + spec.size_us + lateness > watermark]
            late += not there
            for start in there:
                expected.setdefault(start, []).append(v)
        watermark = max([watermark, *(row[1] for row in data)])
        before, passed_on = passed_on, operator.on_watermark(watermark)
        assert passed_on >= before
        assert all(us(row["window_start"]) >= before for row in rows(out.batches.get(MAIN, [])[emitted:])), "W1"
        if number == restore_at:
            states = frozen(operator)
            operator, _ = opened(factory(spec, lateness, emit), out=out)
            operator.restore(states)
    operator.on_watermark(MAX_WATERMARK)
    assert isinstance(operator, WindowOperator)
    assert operator.late_rows == late
    wanted = [(1, s, s + spec.size_us, len(values), sum(values)) for s, values in expected.items()]
    assert last_of_each(rows(out.batches.get(MAIN, []))) == ordered(wanted)


def _emitted(operator: Operator, out: Any, *steps: list[Row] | int) -> list[tuple[int, int, int]]:
    """(key, start, count) of what comes out for these batches and watermarks."""
    before = len(out.batches.get(MAIN, []))
    for step in steps:
        if isinstance(step, int):
            operator.on_watermark(step)
        else:
            operator.process(batch(step), 0)
    return [(r["k"], us(r["window_start"]), r["n"]) for r in rows(out.batches.get(MAIN, [])[before:])]  # type: ignore[misc]


@pytest.mark.parametrize("spec", [Tumbling(10), Sliding(10, 10)])
def test_an_update_tells_of_the_keys_that_changed_only(spec: WindowSpec) -> None:
    operator, out = opened(factory(spec, 5, "update"))
    assert _emitted(operator, out, [(1, 0, 1), (2, 0, 1), (1, 12, 1)], 9) == []
    assert sorted(_emitted(operator, out, 12)) == [(1, 0, 1), (2, 0, 1)]
    assert _emitted(operator, out, [(1, 3, 1), (1, 13, 1)]) == [(1, 0, 2)]
    assert operator.on_watermark(14) == 0
    assert operator.on_watermark(15) == 10
    assert _emitted(operator, out, [(1, 3, 1)]) == []
    assert len(rows(out.batches[LATE])) == 1
    assert _emitted(operator, out, MAX_WATERMARK) == [(1, 10, 2)]


def test_final_results_wait_for_late_rows() -> None:
    operator, out = opened(factory(Tumbling(10), 5, "final"))
    assert _emitted(operator, out, [(1, 0, 1), (1, 14, 1)], 14) == []
    assert _emitted(operator, out, [(1, 9, 1)], 15) == [(1, 0, 2)]


def test_early_results_come_each_period() -> None:
    operator, out = opened(factory(Tumbling(100), 0, "update", early_us=10))
    assert _emitted(operator, out, [(1, 1, 1)], 1) == [(1, 0, 1)], "the first watermark passes a multiple of 10"
    assert _emitted(operator, out, [(1, 2, 1)], 9) == []
    assert _emitted(operator, out, [(1, 150, 1)], 11) == [(1, 0, 2)], "the window from 100 on has not begun"
    assert _emitted(operator, out, 11, 12) == []
    assert _emitted(operator, out, 100) == [(1, 0, 2), (1, 100, 1)]


def by_clock(spec: WindowSpec, seconds: list[float], lateness: int = 0) -> tuple[Operator, Any]:
    """Early results each 10 s of a clock that shows ``seconds[-1]``."""
    operator, out = (
        factory(spec, lateness, "update", early_us=10_000_000, early_clock="processing").build(),
        Collected(),
    )
    operator.open(replace(context(), wall_time=lambda: seconds[-1]), out)
    return operator, out


def test_early_results_by_the_clock_tell_of_windows_that_have_changed() -> None:
    now = [1_003.0]
    operator, out = by_clock(Tumbling(100), now)
    assert operator.next_timer() is None
    assert _emitted(operator, out, [(1, 1, 1), (2, 150, 1)]) == []
    assert operator.next_timer() == 1_010
    operator.on_time(1_009)
    assert _emitted(operator, out) == []
    now.append(1_010)
    assert _at(operator, out, 1_010) == [(1, 0, 1), (2, 100, 1)], "event time has not even begun"
    assert operator.next_timer() is None, "nothing has changed since"
    assert _emitted(operator, out, [(2, 150, 1)]) == []
    assert operator.next_timer() == 1_020
    states = frozen(operator)
    assert _at(operator, out, 1_020) == [(2, 100, 2)]
    operator.process(batch([(1, 2, 1)]), 0)
    assert _emitted(operator, out, 100) == [(1, 0, 2)]
    assert _at(operator, out, 1_020) == [], "it has fired"
    restored, out = by_clock(Tumbling(100), now)
    restored.restore(states)
    assert _at(restored, out, 1_020) == [(1, 0, 1), (2, 100, 2)], "what was told is not known: all is told again"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SPECS), SENT, WAYS)
def test_early_results_by_the_clock_change_nothing_in_the_last_ones(
    spec: Tumbling | Sliding, sent: tuple[int, list[Row]], way: Way
) -> None:
    """The clock strikes between any two batches."""

    class Struck(WindowOperator):
        def process(self, batch: Any, input_index: int) -> None:
            super().process(batch, input_index)
            self.on_time(self.next_timer() or 0)

    class Strikes(WindowAggregate):
        def build(self) -> Operator:
            return Struck(self)

    lateness, data = sent
    made = Strikes(
        keys=("k",), spec=spec, aggregates=AGGREGATES, event_time="t", schema=SCHEMA, allowed_lateness_us=lateness,
        emit="update", early_us=10, early_clock="processing",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = run(made, data, way, delay=0, scratch=Path(folder))
    assert last_of_each(rows(out.batches.get(MAIN, []))) == oracle(data, spec)


def _at(operator: Operator, out: Any, now: float) -> list[tuple[int, int, int]]:
    before = len(out.batches.get(MAIN, []))
    operator.on_time(now)
    return [(r["k"], us(r["window_start"]), r["n"]) for r in rows(out.batches.get(MAIN, [])[before:])]  # type: ignore[misc]


@pytest.mark.parametrize(("before", "after"), [(0, 50), (50, 0), (5, 50)])
@pytest.mark.parametrize("emits", [("update", "final"), ("final", "update"), ("update", "update")])
def test_another_lateness_after_a_restore_gives_no_result_of_a_part(
    before: int, after: int, emits: tuple[Emit, Emit]
) -> None:
    """What has gone stays gone: a late row for a window of which rows are gone is late, whatever is allowed now."""
    operator, out = opened(factory(Tumbling(10), before, emits[0]))
    operator.process(batch([(1, 0, 1), (1, 31, 1)]), 0)
    operator.on_watermark(31)
    states = frozen(operator)
    operator, _ = opened(factory(Tumbling(10), after, emits[1]), out=out)
    operator.restore(states)
    operator.process(batch([(1, 1, 1)]), 0)
    operator.on_watermark(MAX_WATERMARK)
    found = [row for row in last_of_each(rows(out.batches[MAIN])) if row[1] == 0]
    late = len(rows(out.batches.get(LATE, [])))
    assert found[0][3] + late == 2


def test_updates_that_are_forgotten_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: late rows are taken in, but nobody is told."""
    import rayflow.operators.windows as module

    data: list[Row] = [(1, 0, 1), (1, 12, 1), (1, 5, 1)]
    made, way = factory(Tumbling(10), 10, "update"), Way(cuts=[1, 2])
    right = rows(run(made, data, way, delay=0, scratch=tmp_path / "a").batches[MAIN])
    assert last_of_each(right) == oracle(data, Tumbling(10))
    monkeypatch.setattr(module, "updated", lambda *_: [])
    wrong = rows(run(made, data, way, delay=0, scratch=tmp_path / "b").batches[MAIN])
    assert last_of_each(wrong) != oracle(data, Tumbling(10))


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(PlanError, match='emit must be "final" or "update"'):
        factory(Tumbling(10), 0, "always")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="early= needs"):
        factory(Tumbling(10), 0, "final", early_us=5)
