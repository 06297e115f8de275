"""Sliding windows: every row in all its windows, each key and window once, whatever the way the rows take."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import ConfigError, ProtocolError, StateSchemaError
from rayflow.operators.base import MAIN, Operator
from rayflow.operators.windowing.panes import TwoStacks
from rayflow.operators.windowing.progress import Progress
from rayflow.operators.windowing.sliding import Sliding, sliding
from rayflow.operators.windows import LATE, LocalCombine, WindowAggregate, WindowOperator
from tests.operators.helpers import frozen, opened, rows
from tests.operators.windowing.helpers import SCHEMA, WAYS, Row, Way, batch, ordered, results, run, us, within_delay

AGGREGATES = {"n": rf.count(), "total": rf.sum("v"), "low": rf.min("v"), "end": rf.last("v")}
SPECS = [Sliding(10, 5, 3), Sliding(12, 1), Sliding(7, 3, 1), Sliding(9, 9), Sliding(40, 2), Sliding(3, 2)]


def factory(spec: Sliding, **options: Any) -> WindowAggregate:
    return WindowAggregate(keys=("k",), spec=spec, aggregates=AGGREGATES, event_time="t", schema=SCHEMA, **options)


def oracle(data: list[Row], spec: Sliding) -> list[tuple[Any, ...]]:
    found: dict[tuple[int | None, int], list[Row]] = {}
    for row in data:
        start = (row[1] - spec.offset_us) // spec.every_us * spec.every_us + spec.offset_us
        while start + spec.size_us > row[1]:
            found.setdefault((row[0], start), []).append(row)
            start -= spec.every_us
    return ordered([(k, start, start + spec.size_us, *_aggregates(rows)) for (k, start), rows in found.items()])


def _aggregates(data: list[Row]) -> tuple[int, int, int, int]:
    values = [v for _, _, v in data]
    return len(data), sum(values), min(values), max((t, v) for _, t, v in data)[1]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.sampled_from([0, 4, 50]).flatmap(lambda d: st.tuples(st.just(d), within_delay(d))),
    WAYS,
    st.booleans(),
    st.sampled_from([1, 500, 10**6]),
)
def test_equals_the_oracle_whatever_the_way(
    spec: Sliding, sent: tuple[int, list[Row]], way: Way, combined: bool, suffix_bytes: int
) -> None:
    delay, data = sent

    def bounded(operator: Operator) -> None:
        assert isinstance(operator, WindowOperator)
        operator._firing = TwoStacks(spec, suffix_bytes=suffix_bytes)

    with tempfile.TemporaryDirectory() as folder:
        combine = LocalCombine(keys=("k",), spec=spec, aggregates=AGGREGATES, event_time="t") if combined else None
        out = run(
            factory(spec, input_is_partial=combined), data, way, delay=delay, scratch=Path(folder), before=bounded,
            combine=combine,
        )  # fmt: skip
    assert LATE not in out.batches
    assert results(out) == oracle(data, spec)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.lists(st.lists(st.tuples(st.just(1), st.integers(-60, 60), st.integers(-9, 9)), max_size=5), max_size=10),
)
def test_rows_behind_the_watermark_are_in_the_windows_that_are_open(spec: Sliding, sent: list[list[Row]]) -> None:
    """A row is late when all its windows have ended; else it is in those that have not."""
    operator, out = opened(factory(spec))
    watermark, passed_on = MIN_WATERMARK, MIN_WATERMARK
    expected: dict[int, list[Row]] = {}
    late = []
    for data in sent:
        for row in data:
            start = (row[1] - spec.offset_us) // spec.every_us * spec.every_us + spec.offset_us
            starts = [s for s in range(start, start - spec.size_us, -spec.every_us) if s + spec.size_us > row[1]]
            in_time = [s for s in starts if s + spec.size_us > watermark]
            for s in in_time:
                expected.setdefault(s, []).append(row)
            if not in_time:
                late.append(row[1])
        operator.process(batch(data), 0)
        watermark = max([watermark, *(row[1] for row in data)])
        emitted = len(out.batches.get(MAIN, []))
        before, passed_on = passed_on, operator.on_watermark(watermark)
        starts = [us(row["window_start"]) for row in rows(out.batches.get(MAIN, [])[emitted:])]
        assert starts == sorted(starts)
        assert all(before <= s < passed_on for s in starts), "W1"
    operator.on_watermark(MAX_WATERMARK)
    assert results(out) == ordered([(1, s, s + spec.size_us, *_aggregates(data)) for s, data in expected.items()])
    assert [us(row["t"]) for row in rows(out.batches.get(LATE, []))] == late


def _count_merges(panes: int, keys_of: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch) -> float:
    """Rows that go through merges for each row of results in the steady state."""
    import rayflow.operators.windowing.panes as module

    operator, out = opened(factory(Sliding(panes, 1)))
    merged, before = 0, 0
    original = module._merged

    def counting(tables: Any, plan: Any) -> Any:
        nonlocal merged
        merged += sum(table.num_rows for table in tables) if len(tables) > 1 else 0
        return original(tables, plan)

    monkeypatch.setattr(module, "_merged", counting)
    for time in range(4 * panes):
        if time == panes:
            merged, before = 0, sum(part.num_rows for part in out.batches.get(MAIN, []))
        operator.process(batch([(k, time, 1) for k in keys_of(time)]), 0)
        operator.on_watermark(time)
    monkeypatch.undo()
    return merged / float(sum(part.num_rows for part in out.batches[MAIN]) - before)


def test_a_window_costs_three_merges_however_many_panes_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [_count_merges(panes, lambda _: list(range(5)), monkeypatch) for panes in (2, 10, 100)]
    assert all(cost <= 6 for cost in costs), f"three merges of two tables of the keys each, got {costs}"


def test_panes_with_few_of_the_keys_cost_one_merge_and_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a merge for every pane it is 1.9 and more."""
    costs = [_count_merges(panes, lambda time: [time], monkeypatch) for panes in (10, 100)]
    assert all(cost <= 1.3 for cost in costs), costs


def test_far_apart_rows_cost_their_windows_only() -> None:
    """Empty windows between 1 BC and the year 10,000, one each 10 us, are not gone through."""
    operator, out = opened(factory(Sliding(20, 10)))
    far = 2**57
    operator.process(batch([(1, -far, 1), (1, far, 2), (1, 2**62, 3)]), 0)
    operator.on_watermark(far)
    operator.on_watermark(MAX_WATERMARK)
    column = pa.Table.from_batches(out.batches[MAIN]).column("window_start").cast(pa.int64()).to_pylist()
    assert len(column) == 6
    assert column == sorted(column)


def test_a_pane_counted_twice_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: rows for panes that are merged already do not make the merges void."""
    data: list[Row] = [(1, 0, 1), (1, 12, 1), (1, 5, 1), (1, 30, 1)]
    spec, way = Sliding(10, 1), Way(cuts=[1, 2, 3])
    right = results(run(factory(spec), data, way, delay=3, scratch=tmp_path / "a"))
    assert (1, 0, 10, 2, 2, 1, 1) in right, "the row at 5 is behind the watermark 9, but not late for this window"
    monkeypatch.setattr(TwoStacks, "touched", lambda self, low: None)
    assert results(run(factory(spec), data, way, delay=3, scratch=tmp_path / "b")) != right


def test_windows_that_fire_again_after_a_restore_are_refused() -> None:
    """Broken on purpose: a watermark that goes back behind windows that have fired (W3)."""
    operator, out = opened(factory(Sliding(10, 5)))
    operator.process(batch([(1, 1, 1), (1, 8, 1)]), 0)
    operator.on_watermark(10)
    states = frozen(operator)
    again, _ = opened(factory(Sliding(10, 5)), out=out)
    again.restore(states)
    again.on_watermark(MAX_WATERMARK)
    starts = [us(row["window_start"]) for row in rows(out.batches[MAIN])]
    assert starts == [-5, 0, 5]
    broken, _ = opened(factory(Sliding(10, 5)))
    broken.restore(states)
    assert isinstance(broken, WindowOperator)
    broken._progress = Progress().next(30)
    with pytest.raises(ProtocolError, match="W3"):
        broken.on_watermark(40)


def test_other_windows_are_refused_on_restore() -> None:
    operator, _ = opened(factory(Sliding(10, 5)))
    operator.process(batch([(1, 1, 1)]), 0)
    for spec in (Sliding(10, 2), Sliding(20, 5)):
        other, _ = opened(factory(spec))
        with pytest.raises(StateSchemaError, match="10 us every 5 us"):
            other.restore(frozen(operator))


def test_mistakes_are_found_while_building() -> None:
    for size, every in (("0s", "1s"), ("10s", "0s"), ("10s", "11s"), ("ten", "1s"), ("99999999999999d", "1d")):
        with pytest.raises(ConfigError, match=r"sliding\((size|every)\)"):
            sliding(size, every=every)
    spec = sliding("10s", every="4s", offset="9s")
    assert (spec.size_us, spec.every_us, spec.offset_us) == (10_000_000, 4_000_000, 1_000_000)
    assert spec.panes.size_us == math.gcd(10_000_000, 4_000_000)
    for time in range(-50_000_000, 50_000_000, 999_983):
        first = spec.first_open(time)
        assert first + spec.size_us > time >= first - spec.every_us + spec.size_us
