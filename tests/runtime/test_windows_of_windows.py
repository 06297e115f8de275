"""A window over the results of a window: their event time is the start of the first, which lies behind its end."""

from __future__ import annotations

import pyarrow as pa
import pytest

import rayflow as rf

ROWS = 2_000


@pytest.mark.parametrize(("first", "second"), [("5s", "10s"), ("7s", "10s"), ("60s", "10s")])
def test_results_of_the_first_window_are_never_late_for_the_second(first: str, second: str) -> None:
    times = pa.array([i * 100_000 for i in range(ROWS)], pa.timestamp("us"))
    table = pa.table({"k": ["a"] * ROWS, "t": times})
    counted = (
        rf.from_arrow(table, batch_rows=10, event_time="t", max_delay="0s")
        .key_by("k")
        .window(rf.tumbling(first))
        .agg(n=rf.count())
        .key_by("k")
        .window(rf.tumbling(second))
        .agg(total=rf.sum("n"))
    )
    result = rf.Flow("twice", counted.collect()).run(
        local=True, parallelism=2, config=rf.JobConfig(watermark_interval="1ms", batch_rows=16)
    )
    assert sum(result.table()["total"].to_pylist()) == ROWS
    assert "late_rows" not in result.metrics
