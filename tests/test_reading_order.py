"""`with_event_time(max_delay=...)` speaks of rows in reading order: refused where that order was lost on the way."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.errors import PlanError
from rayflow.stream import Stream

ROWS = 4_000
TABLE = pa.table(
    {
        "k": [f"k{i % 5}" for i in range(ROWS)],
        "t": pa.array([i * 100_000 for i in range(ROWS)], pa.timestamp("us")),
    }
)


def rows(*, parallelism: int | None = None) -> Stream:
    return rf.from_arrow(TABLE, batch_rows=10, splits=8, parallelism=parallelism)


def counted(stream: Stream) -> rf.Flow:
    return rf.Flow("counted", stream.key_by("k").window(rf.tumbling("10s")).agg(n=rf.count()).collect())


MIXED: dict[str, tuple[Callable[[], Stream], str]] = {
    "rebalance": (lambda: rows().rebalance(), "rebalance"),
    "union": (lambda: rows().union(rows()), "union"),
    "another parallelism": (lambda: rows().map_batches(lambda b: b, parallelism=3), "with_event_time"),
    "behind a filter": (lambda: rows().rebalance().filter(rf.col("k") != "k0"), "rebalance"),
}


@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize("how", MIXED)
def test_a_max_delay_is_refused_where_rows_were_mixed(how: str, parallelism: int) -> None:
    mixed, culprit = MIXED[how]
    with pytest.raises(PlanError, match=rf"'with_event_time'.* max_delay.*'{culprit}'.* mixes"):
        counted(mixed().with_event_time("t", max_delay="0s")).plan(parallelism=parallelism)


@pytest.mark.parametrize("parallelism", [1, 2, 3])
@pytest.mark.parametrize(
    "ordered",
    [
        lambda: rows().with_event_time("t", max_delay="0s"),
        lambda: rows().with_event_time("t", max_delay="0s").rebalance(),
        lambda: rows().rebalance().with_event_time("t"),
        lambda: rows(parallelism=1).rebalance().with_event_time("t", max_delay="0s"),
    ],
    ids=["at the source", "before the mixing", "in any order", "one reader"],
)
def test_nothing_is_late_where_the_order_holds(ordered: Callable[[], Stream], parallelism: int) -> None:
    config = rf.JobConfig(watermark_interval="1ms", batch_rows=16, inflight_bytes=2_000)
    result = counted(ordered()).run(local=True, parallelism=parallelism, config=config)
    assert sum(result.table()["n"].to_pylist()) == ROWS
    assert "late_rows" not in result.metrics


def test_results_of_a_window_are_in_order_again() -> None:
    timed = rf.from_arrow(TABLE, batch_rows=10, splits=8, event_time="t", max_delay="0s")
    windows = timed.rebalance().key_by("k").window(rf.tumbling("7s")).agg(n=rf.count())
    again = windows.with_event_time("window_end", max_delay="0s").key_by("k").window(rf.tumbling("10s"))
    result = rf.Flow("again", again.agg(n=rf.sum("n")).collect()).run(
        local=True, parallelism=2, config=rf.JobConfig(watermark_interval="1ms", batch_rows=16, inflight_bytes=2_000)
    )
    assert sum(result.table()["n"].to_pylist()) == ROWS
    assert "late_rows" not in result.metrics
