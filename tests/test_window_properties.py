"""What windows, ranks and sorts give depends on the rows alone: whole flows in this process, through a failure.

A flow of random rows runs twice: in order of time, in one batch, by one subtask, without a failure; and in another
order within the delay, in small batches, by several subtasks, on any back end, failing once in the middle and going on
from a checkpoint. Whether the first is right is what the tests of the operators say (`tests/operators/windowing`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow as rf
from tests.failing import FailsOnce

DELAY_S = 20
Row = tuple[int, int, int, int]
"""(key, time in s, value, how late it comes in s)"""
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-100, 100), st.integers(-9, 9), st.integers(0, DELAY_S)),
    min_size=1,
    max_size=40,
)


@dataclass(frozen=True)
class Setting:
    parallelism: int = 1
    source_rows: int = 1_000
    batch_rows: int = 1_000
    linger: str = "0s"
    state: Literal["memory", "fs", "rocksdb"] = "memory"
    fails_after: int | None = None


SETTINGS = st.builds(
    Setting,
    parallelism=st.sampled_from([1, 2, 3]),
    source_rows=st.integers(3, 20),
    batch_rows=st.sampled_from([4, 1_000]),
    linger=st.sampled_from(["0s", "5ms"]),
    state=st.sampled_from(["memory", "fs", "rocksdb"]),
    fails_after=st.one_of(st.none(), st.integers(0, 20)),
)

AGGREGATES: dict[str, Any] = {
    "n": rf.count(), "total": rf.sum("v"), "mean": rf.mean("v"), "low": rf.min("v"), "values": rf.count_distinct("v"),
    "mid": rf.median("v"),
}  # fmt: skip


def windowed(spec: Any, **options: Any) -> Callable[[rf.KeyedStream], rf.Stream]:
    return lambda keyed: keyed.window(spec, **options).agg(name=None, **AGGREGATES)


FINAL: dict[str, Callable[[rf.KeyedStream], rf.Stream]] = {
    "tumbling": windowed(rf.tumbling("30s", offset="7s")),
    "days": windowed(rf.tumbling("1d", zone="Asia/Kathmandu")),
    "sliding": windowed(rf.sliding("30s", every="10s")),
    "sliding unevenly": windowed(rf.sliding("30s", every="7s")),
    "session": windowed(rf.session(gap="9s")),
    "global": windowed(rf.global_window(trigger=rf.every("25s"))),
    "deduplicate": lambda keyed: keyed.window(rf.tumbling("30s")).deduplicate(keep="last"),
    "top": lambda keyed: keyed.window(rf.sliding("30s", every="10s")).top(2, by="v"),
}
ARRIVAL: dict[str, Callable[[rf.KeyedStream], rf.Stream]] = {
    "count": windowed(rf.count_window(3)),
    "global by rows": windowed(rf.global_window(trigger=rf.every(rows=3))),
}
"""These depend on the order in which rows come, too."""
UPDATED: dict[str, Callable[[rf.KeyedStream], rf.Stream]] = {
    "tumbling": windowed(rf.tumbling("30s"), allowed_lateness="20s", emit="update", early="10s"),
    "sliding": windowed(
        rf.sliding("30s", every="10s"), allowed_lateness="20s", emit="update",
        early=rf.every("1ms", clock="processing"),
    ),
    "session": windowed(rf.session(gap="9s"), allowed_lateness="20s", emit="update"),
}  # fmt: skip


def table_of(data: list[Row], *, mixed: bool) -> pa.Table:
    """In order of time, or in the order in which they come if each is as late as it says."""
    data = sorted(data, key=lambda row: row[1] + row[3]) if mixed else sorted(data, key=lambda row: row[:3])
    times = pa.array([row[1] * 1_000_000 for row in data], pa.timestamp("us", "UTC"))
    return pa.table({"k": [row[0] for row in data], "t": times, "v": [row[2] for row in data]})


def run(
    build: Callable[[rf.KeyedStream], rf.Stream], table: pa.Table, setting: Setting, *, max_delay: str = f"{DELAY_S}s"
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stream = rf.from_arrow(table, event_time="t", max_delay=max_delay, batch_rows=setting.source_rows)
        checkpoints = None
        if setting.state != "memory" or setting.fails_after is not None:
            checkpoints = rf.CheckpointConfig(str(folder / "checkpoints"), interval="5ms", min_pause="0s")
        if setting.fails_after is not None:
            arguments = (str(folder / "failed"), setting.fails_after)
            stream = stream.map_batches(FailsOnce, fn_constructor_args=arguments, schema=table.schema)
        config = rf.JobConfig(
            batch_rows=setting.batch_rows, linger=setting.linger, state=setting.state, watermark_interval="1ms",
            state_memory_bytes=1 << 20, restart=rf.Restart.fixed(delay="0s"),
        )  # fmt: skip
        flow = rf.Flow("windows", build(stream.key_by("k")).collect())
        result = flow.run(
            local=True, parallelism=setting.parallelism, config=config, checkpoints=checkpoints, progress=False
        )
        return result.table().to_pylist() if result.table().num_rows else []


@pytest.mark.parametrize("kind", FINAL)
@settings(max_examples=5, deadline=None)
@given(ROWS, SETTINGS)
def test_final_results_depend_on_the_rows_alone(kind: str, data: list[Row], setting: Setting) -> None:
    expected = run(FINAL[kind], table_of(data, mixed=False), Setting())
    found = run(FINAL[kind], table_of(data, mixed=True), setting)
    assert sorted(map(str, found)) == sorted(map(str, expected))


@pytest.mark.parametrize("kind", ARRIVAL)
@settings(max_examples=5, deadline=None)
@given(ROWS, SETTINGS)
def test_windows_of_rows_depend_on_their_order_alone(kind: str, data: list[Row], setting: Setting) -> None:
    table = table_of(data, mixed=True)
    assert sorted(map(str, run(ARRIVAL[kind], table, setting))) == sorted(
        map(str, run(ARRIVAL[kind], table, Setting()))
    )


@pytest.mark.parametrize("kind", UPDATED)
@settings(max_examples=5, deadline=None)
@given(ROWS, SETTINGS)
def test_the_last_updates_depend_on_the_rows_alone(kind: str, data: list[Row], setting: Setting) -> None:
    """The watermark takes rows to be in order; those that are late come within the allowed lateness."""
    expected = run(UPDATED[kind], table_of(data, mixed=False), Setting())
    found = run(UPDATED[kind], table_of(data, mixed=True), setting, max_delay="0s")
    assert last_of_each(found) == last_of_each(expected)


def last_of_each(results: list[dict[str, Any]]) -> list[str]:
    found: dict[Any, dict[str, Any]] = {}
    for row in results:
        found[row["k"], row["window_start"]] = row
    return sorted(str(row) for row in found.values() if not row.get("retracted"))


@settings(max_examples=5, deadline=None)
@given(ROWS, SETTINGS)
def test_sorted_rows_depend_on_the_rows_alone(data: list[Row], setting: Setting) -> None:
    """Of each key, in this order."""

    def by_key(results: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        return {key: [row for row in results if row["k"] == key] for key in range(4)}

    def build(keyed: rf.KeyedStream) -> rf.Stream:
        return keyed.sort_by_event_time("v")

    expected = run(build, table_of(data, mixed=False), Setting())
    assert by_key(run(build, table_of(data, mixed=True), setting)) == by_key(expected)


def test_a_delay_that_is_promised_too_short_is_caught() -> None:
    """Broken on purpose: rows come later than the flow was told."""
    data = [(1, t, 1, 0 if t % 3 else DELAY_S) for t in range(0, 100, 2)]
    build, setting = FINAL["tumbling"], Setting(source_rows=1)
    expected = run(build, table_of(data, mixed=False), Setting())
    assert run(build, table_of(data, mixed=True), setting) == expected
    assert run(build, table_of(data, mixed=True), setting, max_delay="0s") != expected
