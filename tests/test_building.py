"""Mistakes are found while building, in one sentence that names the step, the line, what came and what there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.errors import ConfigError, PlanError, RayflowError
from rayflow.stream import Stream

ROWS = pa.table({"k": [1, 2, 3], "v": [10, 20, 30], "t": pa.array([0, 1, 2], pa.timestamp("us")), "l": [[1], [], None]})


def rows() -> Stream:
    return rf.from_arrow(ROWS, event_time="t", max_delay="0s")


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "column in a filter": (lambda: rows().filter(rf.col("vv") > 1), "'vv' is not in the schema"),
    "column in a select": (lambda: rows().select("k", "nope"), "'nope' is not in the schema"),
    "column in with_columns": (lambda: rows().with_columns(x=rf.col("nope") + 1), "'nope' is not in the schema"),
    "column in a rename": (lambda: rows().rename({"nope": "x"}), "nope"),
    "column in a drop": (lambda: rows().drop("nope"), "nope"),
    "key": (lambda: rows().key_by("nope"), "'nope' is not in the schema"),
    "no key": (lambda: rows().key_by(), "at least one column"),
    "key that cannot be hashed": (lambda: rows().key_by("l"), "list"),
    "aggregate of a missing column": (
        lambda: rows().key_by("k").window(rf.tumbling("1s")).agg(s=rf.sum("nope")),
        "needs a column 'nope'",
    ),
    "sum of a list": (lambda: rows().key_by("k").window(rf.tumbling("1s")).agg(s=rf.sum("l")), "l"),
    "no aggregate": (lambda: rows().key_by("k").window(rf.tumbling("1s")).agg(), "at least one aggregate"),
    "not an aggregate": (
        lambda: rows().key_by("k").window(rf.tumbling("1s")).agg(n=3),  # type: ignore[arg-type]
        "must be an aggregate",
    ),
    "window without event time": (lambda: rf.from_arrow(ROWS).key_by("k").window(rf.tumbling("1s")), "no event time"),
    "window of no size": (lambda: rf.tumbling("0s"), "at least"),
    "duration": (lambda: rf.tumbling("ten minutes"), "must be a duration"),
    "event time of a wrong type": (lambda: rf.from_arrow(ROWS).with_event_time("v"), "'v'"),
    "event time that is missing": (lambda: rf.from_arrow(ROWS).with_event_time("nope"), "nope"),
    "event time of a source": (lambda: rf.from_arrow(ROWS, event_time="nope"), "nope"),
    "event time of a source of a wrong type": (lambda: rf.from_arrow(ROWS, event_time="v"), "'v'"),
    "idle timeout without a delay": (lambda: rows().with_event_time("t", idle_timeout="1s"), "needs max_delay"),
    "delay without a column": (lambda: rf.from_arrow(ROWS, max_delay="1s"), "event_time="),
    "union of different rows": (lambda: rows().union(rows().select("k")), "different schemas"),
    "flow without a sink": (lambda: rf.Flow("x"), "has no sink"),
    "flow of a stream": (lambda: rf.Flow("x", rows()), "takes sinks, got Stream"),  # type: ignore[arg-type]
    "flow without a name": (lambda: rf.Flow(" ", rows().collect()), "needs a name"),
    "checkpoint mode": (lambda: rf.CheckpointConfig("x", mode="never"), "mode"),  # type: ignore[arg-type]
    "checkpoint url": (lambda: rf.CheckpointConfig(""), "url"),
    "retained checkpoints": (lambda: rf.CheckpointConfig("x", retain=0), "retain"),
    "state": (lambda: rf.JobConfig(state="disk"), "state"),  # type: ignore[arg-type]
    "batch rows": (lambda: rf.JobConfig(batch_rows=0), "batch_rows"),
    "inflight bytes": (lambda: rf.JobConfig(inflight_bytes=3), "inflight_bytes"),
    "state without a place": (
        lambda: rf.Flow("x", rows().collect()).run(local=True, config=rf.JobConfig(state="fs")),
        "needs a place",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_named(name: str) -> None:
    build, expected = BAD[name]
    with pytest.raises(RayflowError, match=expected) as caught:
        build()
    assert isinstance(caught.value, PlanError | rf.DataError)
    assert "\n" not in str(caught.value)


def test_the_message_names_step_and_line() -> None:
    with pytest.raises(PlanError, match=r"step 'filter' \(test_building.py:\d+\)"):
        rows().filter(rf.col("vv") > 1)


def test_building_does_not_look_at_files_and_planning_does(tmp_path: Path) -> None:
    stream = rf.read_parquet(str(tmp_path / "missing.parquet")).filter(rf.col("x") > 1)
    flow = rf.Flow("x", stream.collect())
    with pytest.raises(RayflowError, match=r"missing\.parquet"):
        flow.run(local=True)


def test_columns_of_files_are_checked_before_anything_starts(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(ROWS, tmp_path / "a.parquet")
    flow = rf.Flow("x", rf.read_parquet(str(tmp_path)).filter(rf.col("nope") > 1).write_parquet(str(tmp_path / "out")))
    with pytest.raises(PlanError, match="'nope' is not in the schema"):
        flow.run(local=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("read", [rf.read_csv, rf.read_json])
def test_a_declared_schema_is_checked_without_looking_at_files(read: Callable[..., Stream]) -> None:
    stream = read("no/such/file", schema=ROWS.schema, event_time="t")
    with pytest.raises(PlanError, match="'nope' is not in the schema"):
        stream.filter(rf.col("nope") > 1)
    with pytest.raises(PlanError, match="'v'"):
        read("no/such/file", schema=ROWS.schema, event_time="v")
    read("no/such/file").filter(rf.col("nope") > 1)


def test_a_stream_is_immutable() -> None:
    base = rows()
    base.filter(rf.col("v") > 10)
    assert base.to_arrow().num_rows == 3


@pytest.mark.parametrize(
    ("text", "micros"),
    [("10s", 10_000_000), ("1h30m", 5_400_000_000), ("250ms", 250_000), (2, 2_000_000), (0.5, 500_000)],
)
def test_durations(text: str | float, micros: int) -> None:
    from rayflow.config import duration_us

    assert duration_us(text) == micros


@pytest.mark.parametrize("text", ["", "10", "s", "10 s s", "-1s", "1x", True, None])
def test_bad_durations(text: object) -> None:
    from rayflow.config import duration_us

    with pytest.raises(ConfigError, match="must be"):
        duration_us(text, what="size")  # type: ignore[arg-type]
