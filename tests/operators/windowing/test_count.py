"""Count windows: the rows of a key in the order they come, cut every so many, whatever the batches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.errors import ConfigError, DataError, PlanError, StateSchemaError
from rayflow.operators.base import MAIN
from rayflow.operators.windowing.count import CountAggregate, CountOperator, CountWindow, count_window
from tests.operators.helpers import frozen, opened, rows
from tests.operators.windowing.helpers import SCHEMA, WAYS, Row, Way, batch, ordered, run, us

AGGREGATES = {"n": rf.count(), "total": rf.sum("v"), "low": rf.min("v"), "one": rf.first("v"), "end": rf.last("v")}
ROWS = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 2)), st.integers(-60, 60), st.integers(-9, 9)), max_size=60
)


def factory(count: int, *, event_time: str | None = "t", **options: Any) -> CountAggregate:
    what: dict[str, Any] = {"keys": ("k",), "aggregates": AGGREGATES} | options
    return CountAggregate(spec=CountWindow(count), event_time=event_time, **what)


def oracle(data: list[Row], count: int, *, timed: bool) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for key in {row[0] for row in data}:
        mine = [row for row in data if row[0] == key]
        for at in range(0, len(mine) - count + 1, count):
            window = mine[at : at + count]
            values, times = [v for _, _, v in window], [t for _, t, _ in window]
            if timed:
                ends = min((t, v) for _, t, v in window)[1], max((t, v) for _, t, v in window)[1]
                found.append((key, min(times), max(times), count, sum(values), min(values), *ends))
            else:
                found.append((key, count, sum(values), min(values), values[0], values[-1]))
    return ordered(found)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 7]), ROWS, WAYS, st.booleans())
def test_equals_the_oracle_whatever_the_way(count: int, data: list[Row], way: Way, timed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = factory(count, event_time="t" if timed else None)
        out = run(made, data, way, delay=200, scratch=Path(folder))
    found = []
    for row in rows(out.batches.get(MAIN, [])):
        key, *rest = row.values()
        found.append((key, us(rest[0]), us(rest[1]), *rest[2:]) if timed else (key, *rest))
    assert ordered(found) == oracle(data, count, timed=timed)


def test_the_schema_is_known_while_building() -> None:
    for timed in (True, False):
        made = factory(2, event_time="t" if timed else None)
        schema = made.output_schema(SCHEMA)
        operator, out = opened(made)
        operator.process(batch([(1, 1, 1), (1, 2, 2)]), 0)
        assert out.batches[MAIN][0].schema == schema
        assert schema is not None
        assert schema.names == ["k", *(["window_start", "window_end"] if timed else []), *AGGREGATES]


def test_a_full_window_leaves_nothing_behind() -> None:
    operator, _ = opened(factory(2))
    operator.process(batch([(1, 1, 1), (2, 1, 1), (1, 2, 2)]), 0)
    assert isinstance(operator, CountOperator)
    assert operator._table.rows == 1


def test_rows_forgotten_between_batches_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: open windows are not put back."""
    data: list[Row] = [(1, 0, 1), (1, 1, 1), (1, 2, 1)]
    monkeypatch.setattr(CountOperator, "_keep", lambda *_: None)
    out = run(factory(2), data, Way(cuts=[1, 2]), delay=0, scratch=tmp_path)
    assert MAIN not in out.batches


def test_what_does_not_fit_is_refused() -> None:
    operator, _ = opened(factory(2))
    operator.process(batch([(1, 1, 1)]), 0)
    other, _ = opened(factory(3))
    with pytest.raises(StateSchemaError, match=r"windows of 3 rows.*of 2"):
        other.restore(frozen(operator))
    with pytest.raises(DataError, match="null in 1 of 1"):
        operator.process(batch([(1, None, 1)]), 0)  # type: ignore[list-item]
    for rows_ in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="count_window"):
            count_window(rows_)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="more than one column"):
        factory(2, aggregates={"window_end": rf.count()})
