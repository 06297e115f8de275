"""A running job: a savepoint of it, a look into that, and more parallelism, with every row counted once.

Meters send readings; the running total of each is kept in state. Half-way the program takes a savepoint of the job that
runs, reads the totals out of it as an Arrow table, and lets the job go on with two subtasks where there was one.

    python examples/rescale.py      (on a Ray of its own)
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import rayflow as rf

METERS = 1_000
READINGS = 60
"""Of each meter; the second half comes when the file ``rest`` is there."""
BATCH = 10_000
SCHEMA = pa.schema([("meter", pa.int64()), ("kwh", pa.int64())])


class Readings:
    """Row i is of meter i % METERS and says i // METERS + 1."""

    def __init__(self, rest: Path) -> None:
        self.rest = rest

    def __call__(self, split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for start in range(position, METERS * READINGS, BATCH):
            while start >= METERS * READINGS // 2 and not self.rest.exists():
                yield None  # nothing yet: ask again
            i = np.arange(start, start + BATCH)
            yield pa.record_batch([i % METERS, i // METERS + 1], schema=SCHEMA)


def total(readings: int) -> int:
    return readings * (readings + 1) // 2


def main() -> None:
    os.environ.setdefault("RAY_ADDRESS", "local")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        readings = rf.from_generator(Readings(folder / "rest"), schema=SCHEMA, parallelism=1)
        totals = readings.key_by("meter").agg(n=rf.count(), total=rf.sum("kwh"), name="totals")
        flow = rf.Flow("meters", totals.write_parquet(str(folder / "out")))
        job = flow.submit(parallelism=1, checkpoints=rf.CheckpointConfig(str(folder / "checkpoints"), interval="1s"))
        while job.status().rows_in < METERS * READINGS // 2:
            time.sleep(0.05)

        savepoint = job.savepoint(str(folder / "savepoint"))
        print(f"job {job.status().state} with {len(job.subtasks())} subtasks; a savepoint of it holds")
        state = rf.read_checkpoint(savepoint).table("totals", "running")
        for row in state.sort_by("meter").slice(0, 3).to_pylist():
            print(f"  {row}")

        job = job.rescale(2)
        while job.status().state != "running":
            time.sleep(0.05)
        print(f"job {job.status().state} with {len(job.subtasks())} subtasks")
        (folder / "rest").touch()
        print(f"job {job.wait().status}")

        out = pq.read_table(folder / "out").sort_by([("meter", "ascending"), ("n", "ascending")])
    n = np.tile(np.arange(1, READINGS + 1), METERS)
    assert pc.all(pc.equal(state["total.sum"], total(READINGS // 2))).as_py()
    assert state.num_rows == METERS
    assert out["meter"].to_pylist() == np.repeat(np.arange(METERS), READINGS).tolist()
    assert out["n"].to_pylist() == n.tolist()
    assert out["total"].to_pylist() == (n * (n + 1) // 2).tolist()
    print(f"{out.num_rows} readings were each counted once, by one subtask and then by two")


if __name__ == "__main__":
    main()
