"""Asynchronous user code on real Ray: rows that were in flight when their process was killed come out once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.operators.async_map import STATE
from tests.cluster.ray_harness import kill_and_recover, newest, pid_of, until

SCHEMA = pa.schema([("v", pa.int64())])
BATCHES, ROWS, CONCURRENCY = 40, 10, 4


def read(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
    for at in range(position, BATCHES * ROWS, ROWS):
        yield pa.record_batch([pa.array([2 * v + split for v in range(at, at + ROWS)])], schema=SCHEMA)


@dataclass(frozen=True)
class Waits:
    """Answers for the first half of the rows; for the others when the gate is open."""

    gate: Path

    async def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        while rows.column("v")[0].as_py() >= BATCHES * ROWS and not self.gate.exists():
            await asyncio.sleep(0.005)
        return rows


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("ordered", [True, False])
def test_rows_in_flight_come_out_once_when_their_process_is_killed(ordered: bool, tmp_path: Path, gate: Path) -> None:
    numbers = rf.from_generator(read, splits=2, schema=SCHEMA)
    answered = numbers.map_batches_async(Waits(gate), schema=SCHEMA, concurrency=CONCURRENCY, ordered=ordered)
    job = rf.Flow("async", answered.collect()).submit(
        parallelism=2,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="50ms"),
        config=rf.JobConfig(restart=rf.Restart.exponential(initial="10ms")),
    )

    def in_flight() -> list[int]:
        """Rows in flight by subtask, in the newest checkpoint."""
        if not job.checkpoints():
            return []
        handles = [state for each in newest(job, tmp_path).subtasks for state in each.states]
        return [handle.rows for handle in handles if handle.name == STATE]

    until(lambda: in_flight() == [CONCURRENCY * ROWS] * 2, "all that may be in flight is in a checkpoint")
    kill_and_recover(job, pid_of(job, "map_batches_async"))
    gate.touch()
    result = job.wait(60)
    assert result.restarts == 1
    assert sorted(result.table().column("v").to_pylist()) == list(range(2 * BATCHES * ROWS))
