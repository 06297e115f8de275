"""Sliding windows that overlap 2, 10 and 100 times: rows a second of one core, which should not differ.

`python -m benchmarks.sliding_windows [--rows 60000000]`. A window begins every 10 s and is 20, 100 or 1,000 s long;
1,000 keys, 10,000 rows for each second of event time in batches of 65,536, a watermark behind every batch,
count/sum/max. In one process without Ray: the combiner, the window operator, and a snapshot every 50 batches. The three
sizes take turns, medians of processor time are compared. Every key is in every window, and the first windows, which are
not full, are in the figure: what differs is the price of merging panes. The number of results is checked.

Then the same with 100,000 keys and 100 rows a second, so that a pane has 1,000 rows of about as many keys. A row is in
as many results as windows overlap there, so what is compared is the time a result takes, which must not grow.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.figures import emit
from rayflow.core.ids import MAX_WATERMARK, CheckpointId
from rayflow.operators import aggregates as rf
from rayflow.operators.base import MAIN, OperatorContext
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windows import LocalCombine, WindowAggregate

EVERY_US = 10_000_000
OVERLAPS = (2, 10, 100)
ROWS_PER_S = 10_000
BATCH_ROWS = 65_536
SNAPSHOT_BATCHES = 50
DRAWN = 64
SPARSE_KEYS = 100_000
SPARSE_ROWS_PER_S = 100
SPARSE_BATCH_ROWS = 4_096


class Feed:
    """Output of one operator that is the input of the next, or counts rows."""

    def __init__(self) -> None:
        self.rows = 0
        self.batches: list[pa.RecordBatch] = []

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
        self.rows += batch.num_rows
        self.batches.append(batch)


def batches(rows: int, keys: int, rows_per_s: int = ROWS_PER_S, size: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The same few batches over and over, with times that go on."""
    rng = np.random.default_rng(7)
    some = [(rng.integers(0, keys, size), rng.integers(0, 1_000, size)) for _ in range(DRAWN)]
    for number, start in enumerate(range(0, rows, size)):
        count = min(size, rows - start)
        times = pa.array(np.arange(start, start + count) * (1_000_000 // rows_per_s)).view(pa.timestamp("us"))
        drawn, values = some[number % DRAWN]
        yield pa.RecordBatch.from_arrays(
            [pa.array(drawn[:count]), times, pa.array(values[:count])], names=["k", "t", "v"]
        )


def seconds(
    rows: int, keys: int, overlap: int, rows_per_s: int = ROWS_PER_S, size: int = BATCH_ROWS
) -> tuple[float, int]:
    """How much processor time it takes, and how many results there are."""
    what: dict[str, Any] = {
        "keys": ("k",),
        "spec": Sliding(overlap * EVERY_US, EVERY_US),
        "aggregates": {"n": rf.count(), "total": rf.sum("v"), "highest": rf.max("v")},
        "event_time": "t",
    }
    combine, window = LocalCombine(**what).build(), WindowAggregate(**what, input_is_partial=True).build()
    middle, out = Feed(), Feed()
    ctx = OperatorContext("bench", "run", "op", "bench", 0, 1, 128, 1, range(128), lambda: 0.0)
    combine.open(ctx, middle)
    window.open(ctx, out)
    began = time.process_time()
    for number, batch in enumerate(batches(rows, keys, rows_per_s, size)):
        combine.process(batch, 0)
        for partials in middle.batches:
            window.process(partials, 0)
        middle.batches.clear()
        window.on_watermark(batch.column("t")[-1].value)
        out.batches.clear()
        if number % SNAPSHOT_BATCHES == 0:
            window.snapshot(CheckpointId(number + 1))
    window.on_watermark(MAX_WATERMARK)
    return time.process_time() - began, out.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000_000)
    parser.add_argument("--sparse-rows", type=int, default=1_000_000)
    parser.add_argument("--keys", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    panes = -(-options.rows * (1_000_000 // ROWS_PER_S) // EVERY_US)
    took: dict[int, list[float]] = {overlap: [] for overlap in OVERLAPS}
    complete = True
    for _ in range(options.repeats):
        for overlap in OVERLAPS:
            elapsed, results = seconds(options.rows, options.keys, overlap)
            took[overlap].append(elapsed)
            complete = complete and results == (panes + overlap - 1) * options.keys
    emit("sliding windows: every key in every window", float(complete), "bool", 1.0, complete)
    rates = {overlap: options.rows / statistics.median(took[overlap]) / 1e6 for overlap in OVERLAPS}
    for overlap, rate in rates.items():
        emit(f"sliding windows, size/slide {overlap}", round(rate, 2), "M rows/s a core", None, True)
    spread = 1 - min(rates.values()) / max(rates.values())
    emit("sliding windows, slowest below fastest", round(100 * spread, 1), "%", 25, spread <= 0.25)
    sparse(options.sparse_rows, options.repeats)


def sparse(rows: int, repeats: int) -> None:
    rates: dict[int, float] = {}
    for overlap in OVERLAPS:
        found = [seconds(rows, SPARSE_KEYS, overlap, SPARSE_ROWS_PER_S, SPARSE_BATCH_ROWS) for _ in range(repeats)]
        rates[overlap] = found[0][1] / statistics.median(took for took, _ in found) / 1e6
        each = round(found[0][1] / rows, 1)
        emit(f"sliding windows, few rows a key, size/slide {overlap}: results a row", each, "rows", None, True)
        emit(
            f"sliding windows, few rows a key, size/slide {overlap}",
            round(rates[overlap], 2),
            "M results/s",
            None,
            True,
        )
    slower = 1 - rates[OVERLAPS[-1]] / rates[OVERLAPS[0]]
    emit("sliding windows, few rows a key, slowdown a result", round(100 * slower, 1), "%", 25, slower <= 0.25)


if __name__ == "__main__":
    main()
