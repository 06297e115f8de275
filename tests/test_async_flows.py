"""`Stream.map_batches_async`, from the builder to the result."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import rayflow as rf
from rayflow.operators.async_map import AsyncMapOperator
from rayflow.operators.base import RestoredState


async def doubled(rows: pa.RecordBatch) -> pa.RecordBatch:
    await asyncio.sleep(0)
    return rows.set_column(rows.schema.get_field_index("v"), "v", pc.multiply(rows.column("v"), 2))


class FailsOnce:
    """Raises when it has answered so often, the first time a flow comes so far."""

    def __init__(self, marker: str, after: int) -> None:
        self._marker, self._left = Path(marker), after

    async def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        self._left -= 1
        if self._left < 0 and not self._marker.exists():
            self._marker.touch()
            raise RuntimeError("once")
        return await doubled(rows)


def _data(rows: int = 2_000) -> pa.Table:
    times = pa.array([row * 100_000 for row in range(rows)], pa.timestamp("us"))
    return pa.table({"k": [row % 7 for row in range(rows)], "v": list(range(rows)), "t": times})


def _source(data: pa.Table) -> rf.Stream:
    return rf.from_arrow(data, event_time="t", max_delay="0s", batch_rows=50)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("parallelism", [1, 2])
def test_rows_keep_their_order_and_windows_wait_for_them(ordered: bool, parallelism: int) -> None:
    data = _data()
    stream = _source(data).map_batches_async(doubled, schema=data.schema, concurrency=3, ordered=ordered)
    windows = stream.key_by("k").window(rf.tumbling("10s"))
    counted = windows.agg(n=rf.count(), total=rf.sum("v"))
    late = counted.late.collect(name="late")
    flow = rf.Flow("async", counted.collect(name="counted"), stream.collect(name="rows"), late)
    result = flow.run(parallelism=parallelism, local=True, progress=False)
    assert sorted(result.table("rows").column("v").to_pylist()) == [2 * v for v in range(2_000)]
    assert sum(result.table("counted").column("total").to_pylist()) == 2 * sum(range(2_000))
    assert result.table("late").num_rows == 0


@pytest.mark.parametrize("state", ["memory", "fs"])
def test_rows_in_flight_come_out_once_after_a_failure(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called_again = []
    restore = AsyncMapOperator.restore

    def watched(self: AsyncMapOperator, states: Sequence[RestoredState]) -> None:
        called_again.append(sum(each.table.num_rows for each in states))
        restore(self, states)

    monkeypatch.setattr(AsyncMapOperator, "restore", watched)
    data = _data()
    stream = _source(data).map_batches_async(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 25), schema=data.schema, concurrency=4
    )
    result = rf.Flow("async", stream.collect()).run(
        parallelism=1,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1ms", min_pause="0s"),
        config=rf.JobConfig(state=state, restart=rf.Restart.fixed(delay="0s")),  # type: ignore[arg-type]
    )
    assert (tmp_path / "failed").exists()
    assert result.restarts == 1
    assert len(called_again) == 2
    assert called_again[1] > 0, "the failure must meet a checkpoint with rows in flight"
    assert result.table().column("v").to_pylist() == [2 * v for v in range(2_000)]


def test_what_fails_is_named() -> None:
    async def broken(rows: pa.RecordBatch) -> pa.RecordBatch:
        raise ValueError("no")

    data = _data(10)
    stream = _source(data).map_batches_async(broken, schema=data.schema)
    with pytest.raises(rf.JobFailedError, match="broken raised ValueError: no on a batch of 10 rows"):
        stream.to_arrow()


def test_mistakes_are_found_while_building() -> None:
    stream = _source(_data(10))
    with pytest.raises(rf.ConfigError, match="needs an async function"):
        stream.map_batches_async(lambda rows: rows)
    with pytest.raises(rf.ConfigError, match="timeout"):
        stream.map_batches_async(doubled, timeout="0s")
    mixed = stream.map_batches_async(doubled, schema=_data(1).schema, ordered=False)
    with pytest.raises(rf.PlanError, match="give the event time before that step"):
        rf.Flow("mixed", mixed.with_event_time("t", max_delay="1s").collect()).plan(parallelism=1)
