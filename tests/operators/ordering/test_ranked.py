"""Top n and deduplication of windows: equal to plain Python whatever the way the rows take."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import PlanError, StateSchemaError
from rayflow.operators.base import MAIN
from rayflow.operators.ordering import ranked as module
from rayflow.operators.ordering.ranked import Ranking, RankPlan, WindowRank
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windows import LATE
from tests.operators.helpers import frozen, opened, rows
from tests.operators.windowing.helpers import SCHEMA, WAYS, Row, Way, batch, ordered, run, us, within_delay

SPECS: list[Tumbling | Sliding] = [Tumbling(10, 3), Tumbling(25), Sliding(10, 5, 3), Sliding(7, 3, 1), Sliding(12, 1)]
RANKINGS = [
    Ranking(n=1, time="t", descending=True, ranked=False),
    Ranking(n=1, time="t", descending=False, ranked=False),
    Ranking(n=2, time="t", by="v"),
    Ranking(n=3, time="t", by="v", descending=False),
]


def factory(spec: Tumbling | Sliding, ranking: Ranking, schema: pa.Schema = SCHEMA, **options: Any) -> WindowRank:
    return WindowRank(keys=("k",), spec=spec, ranking=ranking, event_time="t", schema=schema, **options)


def starts_of(spec: Tumbling | Sliding, time: int) -> list[int]:
    every = spec.size_us if isinstance(spec, Tumbling) else spec.every_us
    start = (time - spec.offset_us) // every * every + spec.offset_us
    return [s for s in range(start, start - spec.size_us, -every) if s + spec.size_us > time]


def best(data: list[Row], ranking: Ranking) -> list[Row]:
    sign = -1 if ranking.descending else 1
    if ranking.by is None:
        return sorted(data, key=lambda row: (sign * row[1], row[2]))[:1]
    return sorted(data, key=lambda row: (sign * row[2], row[1]))[: ranking.n]


def oracle(data: list[Row], spec: Tumbling | Sliding, ranking: Ranking) -> list[tuple[Any, ...]]:
    windows: dict[tuple[int | None, int], list[Row]] = {}
    for row in data:
        for start in starts_of(spec, row[1]):
            windows.setdefault((row[0], start), []).append(row)
    return ordered(
        [
            (k, start, start + spec.size_us, t, v, *([rank] if ranking.ranked else []))
            for (k, start), among in windows.items()
            for rank, (_, t, v) in enumerate(best(among, ranking), 1)
        ]
    )


def found_by(out: Any) -> list[tuple[Any, ...]]:
    found = []
    for row in rows(out.batches.get(MAIN, [])):
        k, start, end, t, *rest = row.values()
        found.append((k, us(start), us(end), us(t), *rest))
    return ordered(found)


SENT = st.sampled_from([0, 4, 50]).flatmap(lambda d: st.tuples(st.just(d), within_delay(d)))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(SPECS), st.sampled_from(RANKINGS), SENT, WAYS)
def test_equals_the_oracle_whatever_the_way(
    spec: Tumbling | Sliding, ranking: Ranking, sent: tuple[int, list[Row]], way: Way
) -> None:
    delay, data = sent
    with tempfile.TemporaryDirectory() as folder:
        out = run(factory(spec, ranking), data, way, delay=delay, scratch=Path(folder))
    assert LATE not in out.batches
    assert found_by(out) == oracle(data, spec, ranking)


def test_ties_that_go_by_arrival_are_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Broken on purpose: of equal times the row that came first."""
    data: list[Row] = [(1, 5, 2), (1, 5, 1), (1, 5, 3)]
    last = RANKINGS[0]
    good = found_by(run(factory(SPECS[0], last), data, Way(), delay=0, scratch=tmp_path))
    assert good == oracle(data, SPECS[0], last)
    monkeypatch.setattr(module, "order_of", lambda rows, numbers, ties: np.lexsort(numbers[::-1]))
    broken = found_by(run(factory(SPECS[0], last), data, Way(), delay=0, scratch=tmp_path))
    assert broken != good


def test_pruning_that_forgets_the_window_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Broken on purpose: the best of a key over all windows together."""
    data: list[Row] = [(1, 5, 2), (1, 15, 1), (1, 25, 3)]
    spec, ranking = Tumbling(10), RANKINGS[2]
    assert found_by(run(factory(spec, ranking), data, Way(), delay=50, scratch=tmp_path)) == oracle(data, spec, ranking)
    ranks = RankPlan._ranks
    monkeypatch.setattr(RankPlan, "_ranks", lambda self, rows, by_start: ranks(self, rows, by_start=False))
    broken = found_by(run(factory(spec, ranking), data, Way(), delay=50, scratch=tmp_path))
    assert broken != oracle(data, spec, ranking)


def _ranked(values: pa.Array, *, n: int = 2, descending: bool = True, **more: pa.Array) -> list[dict[str, Any]]:
    count = len(values)
    columns = {"k": pa.array([1] * count), "t": pa.array([0] * count, pa.timestamp("us")), "v": values, **more}
    table = pa.RecordBatch.from_pydict(columns)
    ranking = Ranking(n=n, time="t", by="v", descending=descending)
    operator, out = opened(factory(Tumbling(10), ranking, table.schema))
    for at in range(count):
        operator.process(table.slice(at, 1), 0)
    operator.on_watermark(MAX_WATERMARK)
    return rows(out.batches.get(MAIN, []))


@pytest.mark.parametrize(
    ("values", "best", "worst"),
    [
        (pa.array([1.0, float("nan"), None, -5.0]), float("nan"), -5.0),
        (pa.array([1, 2**64 - 1, 7], pa.uint64()), 2**64 - 1, 1),
        (pa.array([-(2**63), 2**63 - 1, 0], pa.int64()), 2**63 - 1, -(2**63)),
        (pa.array(["a", "b", None]), "b", "a"),
        (pa.array([False, True]), True, False),
        (pa.array(["x", "y", "x"]).dictionary_encode(), "y", "x"),
    ],
)
def test_values_of_every_kind_have_an_order(values: pa.Array, best: Any, worst: Any) -> None:
    assert repr(_ranked(values, n=1)[0]["v"]) == repr(best)
    assert repr(_ranked(values, n=1, descending=False)[0]["v"]) == repr(worst)


def test_rows_without_a_value_are_not_ranked() -> None:
    assert _ranked(pa.array([None, None], pa.int64())) == []
    assert [row["rank"] for row in _ranked(pa.array([None, 4, 9], pa.int64()), n=5)] == [1, 2]


@pytest.mark.parametrize("spec", [Tumbling(10), Sliding(10, 5)])
@pytest.mark.parametrize("times", [(0, 25, 40), (25, 0, 40), (0, 0, 25)])
def test_a_window_of_which_no_row_is_ranked_closes_like_others(
    spec: Tumbling | Sliding, times: tuple[int, ...]
) -> None:
    """A batch has rows of several windows, and those of the first or of the last ones have no value."""
    data = [(1, t, None if t == 25 else t) for t in times]
    operator, out = opened(factory(spec, Ranking(n=2, time="t", by="v")))
    operator.process(batch(data, SCHEMA), 0)  # type: ignore[arg-type]
    for watermark in (12, 32, 45, MAX_WATERMARK):
        operator.on_watermark(watermark)
    ranked: list[Row] = [(k, t, v) for k, t, v in data if v is not None]
    assert found_by(out) == oracle(ranked, spec, Ranking(n=2, time="t", by="v"))


def test_lists_decide_between_rows_that_are_else_equal() -> None:
    lists = [[3], [1, 2], None, [1]]
    there = [row["l"] for row in _ranked(pa.array([5] * 4), n=2, l=pa.array(lists, pa.list_(pa.int64())))]
    back = [row["l"] for row in _ranked(pa.array([5] * 4), n=2, l=pa.array(lists[::-1], pa.list_(pa.int64())))]
    assert there == back


def test_late_rows_come_out_aside() -> None:
    operator, out = opened(factory(Tumbling(10), RANKINGS[2]))
    operator.process(batch([(1, 15, 1)]), 0)
    operator.on_watermark(12)
    operator.process(batch([(1, 9, 7), (1, 12, 2)]), 0)
    operator.on_watermark(MAX_WATERMARK)
    assert [us(row["t"]) for row in rows(out.batches[LATE])] == [9]
    assert [row["v"] for row in rows(out.batches[MAIN])] == [2, 1]


def test_another_n_does_not_take_over_state() -> None:
    operator, _ = opened(factory(Tumbling(10), RANKINGS[2]))
    operator.process(batch([(1, 5, 1)]), 0)
    other, _ = opened(factory(Tumbling(10), Ranking(n=5, time="t", by="v")))
    with pytest.raises(StateSchemaError, match="rows that it needs may be gone"):
        other.restore(frozen(operator))


@pytest.mark.parametrize(
    ("ranking", "schema", "message"),
    [
        (Ranking(n=0, time="t", by="v"), SCHEMA, "whole number"),
        (Ranking(n=1, time="t", by="nothing"), SCHEMA, "needs a column of that name"),
        (Ranking(n=1, time="v", by="v"), SCHEMA, "event time column of type timestamp"),
        (Ranking(n=1, time="t", by="v"), SCHEMA.append(pa.field("rank", pa.int64())), "rename them"),
        (Ranking(n=1, time="t", by="l"), SCHEMA.append(pa.field("l", pa.list_(pa.int64()))), "that have an order"),
    ],
)
def test_what_cannot_be_ranked_is_said_while_building(ranking: Ranking, schema: pa.Schema, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        factory(Tumbling(10), ranking, schema)
