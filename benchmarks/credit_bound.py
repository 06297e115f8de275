"""A slow sink behind a fast source: what is under way stays within the credit, and memory with it.

`python -m benchmarks.credit_bound [--batches 150]`. Two sources that could give millions of rows a second, an exchange,
and a step that takes 30 ms for a batch. Memory is that of each process above what it had while the same job carried a
trickle of rows. What may be added to it is the credit of its channels, twice (a batch under way is held by the exchange
and by the loop that made it or works on it), and a margin for gRPC and the allocator.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

import rayflow as rf
from benchmarks.figures import emit
from benchmarks.kill_runs import cluster
from benchmarks.memory import MB, RssWatch, until_running

CREDITS = (16 * MB, 4 * MB)
PARALLELISM = 2
MARGIN = 48 * MB
PATIENCE_S = 60.0
DELAY_S = 0.03
BATCH_ROWS = 16_384
SCHEMA = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("c", pa.int64()), ("d", pa.int64())])


def fast(gate: str) -> Callable[[int, int], Iterator[pa.RecordBatch | None]]:
    """A trickle until the gate is open, then rows without end, in new memory every time."""

    def read(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        while True:
            opened = os.path.exists(gate)
            count = BATCH_ROWS if opened else 10
            i = np.arange(position, position + count, dtype=np.int64)
            yield pa.record_batch([pa.array(i + k) for k in range(4)], schema=SCHEMA)
            position += count
            if not opened:
                yield None

    return read


class Slow:
    """Takes its time, and tells how many large batches it has seen."""

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, f"seen-{os.getpid()}")

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        time.sleep(DELAY_S)
        if batch.num_rows >= BATCH_ROWS:
            with open(self._path, "ab") as file:
                file.write(b".")
        return batch.take([0])  # a slice would keep the whole batch in memory until the sink has written it


def flow(folder: Path) -> rf.Flow:
    rows = rf.from_generator(fast(str(folder / "gate")), splits=PARALLELISM, schema=SCHEMA)
    slow = rows.rebalance().map_batches(Slow, fn_constructor_args=(str(folder),), schema=SCHEMA)
    return rf.Flow("credit-bound", slow.write_parquet(str(folder / "out")))


def measure(credit: int, batches: int) -> None:
    label = f"credit of {credit // MB} MB"
    with tempfile.TemporaryDirectory(prefix="rayflow-credit-") as name:
        folder = Path(name)
        config = rf.JobConfig(inflight_bytes=credit)
        job = flow(folder).submit(parallelism=PARALLELISM, config=config)
        until_running(job)
        with RssWatch(job) as idle:
            # All of them have worked, and imported what they need for it.
            _until(lambda: job.metrics().get("rows_in", 0.0) >= 1_000, "rows trickle")
            job.checkpoint()
        before = dict(idle.peaks)
        (folder / "gate").touch()
        with RssWatch(job) as watch:
            _until(
                lambda: sum(path.stat().st_size for path in folder.glob("seen-*")) >= batches,
                "the slow step has worked",
            )
            # The last heartbeats are a second old: wait for those that tell of this traffic.
            _until(lambda: job.metrics().get("rows_in", 0.0) >= batches * BATCH_ROWS, "the heartbeats tell of it")
            peak = job.metrics()["peak_in_flight_bytes"]
        job.cancel()
    bound = 2 * PARALLELISM * credit + MARGIN
    grown = {name: watch.peaks[name] - before[name] for name in before}
    source = max(growth for name, growth in grown.items() if name.startswith("from_generator"))
    sink = max(growth for name, growth in grown.items() if not name.startswith("from_generator"))
    emit(f"{label}: most bytes in flight on a channel", round(peak / MB, 2), "MB", credit / MB, 0 < peak <= credit)
    emit(f"{label}: memory a source gains", round(source / MB, 1), "MB", bound / MB, source <= bound)
    emit(f"{label}: memory a slow sink gains", round(sink / MB, 1), "MB", bound / MB, sink <= bound)


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s: {what}")
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=150, help="so many have passed the slow step when it ends")
    options = parser.parse_args()
    with cluster():
        for credit in CREDITS:
            measure(credit, options.batches)


if __name__ == "__main__":
    main()
