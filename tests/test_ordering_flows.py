"""Steps that order rows, from the builder to the result: parallelism, back ends, checkpoints, against DuckDB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest

import rayflow as rf
from tests.failing import FailsOnce, rows_of, run_with_checkpoints

BACK_ENDS: list[Literal["memory", "fs", "rocksdb"]] = ["memory", "fs", "rocksdb"]
DELAY_S = 20


def _data(rows: int = 2_500, keys: int = 60) -> pa.Table:
    """No row is more than `DELAY_S` behind the newest before it; several have the same time."""
    rng = np.random.default_rng(7)
    times = np.arange(rows) // 4
    order = np.argsort(times + rng.integers(0, DELAY_S, rows), kind="stable")
    data = pa.table(
        {
            "k": rng.integers(0, keys, rows),
            "v": pa.array(rng.integers(-50, 50, rows), mask=rng.random(rows) < 0.1),
            "t": pa.array(times * 1_000_000 - 300_000_000, pa.timestamp("us")),
            "row": rng.permutation(rows),
        }
    )
    return data.take(pa.array(order))


def _stream(table: pa.Table) -> rf.KeyedStream:
    return rf.from_arrow(table, event_time="t", max_delay=f"{DELAY_S}s", batch_rows=400).key_by("k")


MINUTE = """select *, time_bucket(interval 1 minute, t) s from data"""
SLIDES = """select *, time_bucket(interval 20 second, t) - n * interval 20 second s
            from data, (values (0), (1), (2)) slide(n)"""
STEPS: dict[str, tuple[Callable[[rf.KeyedStream], rf.Stream], str]] = {
    "last": (
        lambda s: s.window(rf.tumbling("1m")).deduplicate(keep="last"),
        f"""select k, s window_start, s + interval 1 minute window_end, v, t, row from ({MINUTE})
            qualify row_number() over (partition by k, s order by t desc, v nulls last, row) = 1""",
    ),
    "first": (
        lambda s: s.window(rf.tumbling("1m")).deduplicate(),
        f"""select k, s window_start, s + interval 1 minute window_end, v, t, row from ({MINUTE})
            qualify row_number() over (partition by k, s order by t, v nulls last, row) = 1""",
    ),
    "top": (
        lambda s: s.window(rf.tumbling("1m")).top(3, by="v"),
        f"""select k, s window_start, s + interval 1 minute window_end, v, t, row,
                   row_number() over (partition by k, s order by v desc, t, row) as rank
            from ({MINUTE}) where v is not null qualify rank <= 3""",
    ),
    "last of calendar days": (
        lambda s: s.window(rf.tumbling("1d", zone="Africa/Abidjan")).deduplicate(keep="last"),
        """select k, s window_start, s + interval 1 day window_end, v, t, row
           from (select *, time_bucket(interval 1 day, t) s from data)
           qualify row_number() over (partition by k, s order by t desc, v nulls last, row) = 1""",
    ),
    "top of sliding windows": (
        lambda s: s.window(rf.sliding("1m", every="20s")).top(2, by="v", descending=False),
        f"""select k, s window_start, s + interval 1 minute window_end, v, t, row,
                   row_number() over (partition by k, s order by v, t, row) as rank
            from ({SLIDES}) where v is not null qualify rank <= 2""",
    ),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("parallelism", [1, 2, 4])
def test_steps_equal_duckdb_at_every_parallelism(step: str, parallelism: int) -> None:
    build, query = STEPS[step]
    data = _data()
    flow = rf.Flow("steps", build(_stream(data)).collect())
    found = flow.run(parallelism=parallelism, local=True, progress=False).table().to_pylist()
    assert sorted(found, key=repr) == rows_of(query, data)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", BACK_ENDS)
def test_steps_go_on_from_a_checkpoint_as_if_nothing_had_happened(
    step: str, state: Literal["memory", "fs", "rocksdb"], tmp_path: Path
) -> None:
    build, query = STEPS[step]
    data = _data()
    failing = _stream(data).map_batches(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 1_000), schema=data.schema
    )
    flow = rf.Flow("steps", build(failing.key_by("k")).collect())
    config = rf.JobConfig(state=state, state_memory_bytes=1 << 20, restart=rf.Restart.fixed(delay="0s"))
    assert run_with_checkpoints(flow, tmp_path, config) == rows_of(query, data)


def test_other_windows_are_refused_while_building() -> None:
    windows = _stream(_data(10)).window(rf.tumbling("1m"))
    with pytest.raises(rf.PlanError, match="keep must be"):
        windows.deduplicate(keep="both")  # type: ignore[arg-type]
    with pytest.raises(rf.PlanError, match="whole number"):
        windows.top(0, by="v")
    with pytest.raises(rf.PlanError, match="needs a column of that name"):
        windows.top(2, by="none")


class Numbered:
    """The rows of each key in the order in which they come: a column that counts them."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        numbers = []
        for key in batch.column("k").to_pylist():
            self._seen[key] = self._seen.get(key, 0) + 1
            numbers.append(self._seen[key])
        return batch.append_column("number", pa.array(numbers, pa.int64()))


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("state", BACK_ENDS)
def test_rows_of_each_key_come_sorted_at_every_parallelism(
    parallelism: int, state: Literal["memory", "fs", "rocksdb"], tmp_path: Path
) -> None:
    data = _data()
    ordered = _stream(data).sort_by_event_time("row")
    schema = data.schema.append(pa.field("number", pa.int64()))
    result = rf.Flow("sorted", ordered.map_batches(Numbered, schema=schema).collect()).run(
        parallelism=parallelism,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="5ms"),
        config=rf.JobConfig(state=state, state_memory_bytes=1 << 20),
    )
    query = "select *, row_number() over (partition by k order by t, row) as number from data"
    assert sorted(result.table().to_pylist(), key=repr) == rows_of(query, data)


@pytest.mark.parametrize("keyed", [True, False])
def test_the_sort_goes_on_from_a_checkpoint_as_if_nothing_had_happened(keyed: bool, tmp_path: Path) -> None:
    """The collected rows of one subtask come back in the order in which it got them."""
    data = _data()
    failing = rf.from_arrow(data, event_time="t", max_delay=f"{DELAY_S}s", batch_rows=200).map_batches(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 1_000), schema=data.schema
    )
    ordered = (failing.key_by("k") if keyed else failing).sort_by_event_time("row")
    result = rf.Flow("sorted", ordered.collect()).run(
        parallelism=1,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1ms", min_pause="0s"),
        config=rf.JobConfig(restart=rf.Restart.fixed(delay="0s")),
    )
    assert (tmp_path / "failed").exists()
    expected = data.sort_by([("t", "ascending"), ("row", "ascending")])
    assert result.table().column("row").to_pylist() == expected.column("row").to_pylist()


def test_a_sort_without_event_time_or_column_is_refused_while_building() -> None:
    with pytest.raises(rf.PlanError, match="has no event time"):
        rf.from_arrow(_data(10)).sort_by_event_time()
    with pytest.raises(rf.PlanError, match="needs a column of that name"):
        _stream(_data(10)).sort_by_event_time("none")
