"""The state of an interval join larger than memory: what it costs, and how much stays resident.

`python -m benchmarks.join_state [--rows 8000000]`. Two sides take turns with batches of 65,536 rows of 130 bytes, a
random int64 key, a row a microsecond, and a watermark behind each; half of all rows are kept at any time. In a process
of its own, without Ray: the operator, and a snapshot every 20 batches. With the rows in memory (``fs``), then with
64 MB of memory and files (``rocksdb``). Resident is what the process has beyond what it began with, without pages of
files, which the kernel takes back when it wants to (RssAnon). Files are not synced, as in a job.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from benchmarks.figures import emit
from rayflow.core.ids import CheckpointId
from rayflow.operators.base import MAIN, OperatorContext, StateBackend
from rayflow.operators.joins.interval import IntervalJoin

SCHEMA = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.string())])
BATCH_ROWS = 65_536
MEMORY_BYTES = 64 * 1024 * 1024
SNAPSHOT_BATCHES = 20
MB = 1024 * 1024


class Counted:
    rows = 0

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
        self.rows += batch.num_rows


def batches(rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(side, rows); every key comes about twice on each side."""
    rng = np.random.default_rng(7)
    text = pa.array([f"{i:0114d}" for i in range(1_000)])
    for number, start in enumerate(range(0, rows, BATCH_ROWS)):
        at = np.arange(start, min(start + BATCH_ROWS, rows))
        columns = [
            pa.array(rng.integers(0, max(1, rows // 4), len(at))),
            pa.array(at, SCHEMA.field("t").type),
            text.take(pa.array(at % 1_000)),
        ]
        yield number % 2, pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def resident() -> int:
    """Anonymous memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def run(state: Literal["fs", "rocksdb"], rows: int) -> tuple[float, int, int]:
    """(seconds of processor time, resident bytes at most, pairs)."""
    factory = IntervalJoin(
        left_keys=("k",), right_keys=("k",), left_time="t", right_time="t",
        left_schema=SCHEMA, right_schema=SCHEMA, lower_us=-rows // 2, upper_us=rows // 2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rayflow-join-") as folder:
        backend = StateBackend(state, MEMORY_BYTES, lambda name: Path(tempfile.mkdtemp(prefix=name, dir=folder)))
        join, out = factory.build(), Counted()
        join.open(
            OperatorContext("bench", "run", "op", "bench", 0, 1, 128, 1, range(128), lambda: 0.0, backend=backend), out
        )
        before, most, took = resident(), 0, 0.0
        for number, (side, batch) in enumerate(batches(rows)):
            began = time.process_time()
            join.process(batch, side)
            join.on_watermark(batch.column("t")[-1].value)
            if number % SNAPSHOT_BATCHES == 0:
                join.snapshot(CheckpointId(number + 1))
            took += time.process_time() - began
            most = max(most, resident() - before)
        join.close()
    return took, most, out.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8_000_000, help="of both sides")
    rows = parser.parse_args().rows
    pairs: dict[str, int] = {}
    states: tuple[Literal["fs", "rocksdb"], ...] = ("fs", "rocksdb")
    for state in states:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            took, most, pairs[state] = pool.apply(run, (state, rows))
        what = f"join state, {state}, {rows / 1e6:g} M rows"
        emit(what, round(rows / took / 1e6, 2), "M rows/s a core", None, True)
        emit(f"{what}: resident", round(most / MB), "MB", None, True)
    same = len(set(pairs.values())) == 1
    emit("join state: the same pairs from disk", float(same), "bool", 1.0, same)


if __name__ == "__main__":
    main()
