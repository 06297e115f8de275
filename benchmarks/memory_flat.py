"""Memory of the window benchmark does not grow with the length of its input.

`python -m benchmarks.memory_flat [--rows 20000000] [--times 10]`. The job of `benchmarks.window_vs_duckdb` (parallelism
2, a checkpoint every second) over ``rows`` bids and over ten times as many, each on processes of its own: the highest
sum of the resident memory of its subtasks, sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import rayflow as rf
from benchmarks.bids import make_bids
from benchmarks.figures import emit
from benchmarks.kill_runs import cluster
from benchmarks.memory import MB, RssWatch, until_running
from benchmarks.window_vs_duckdb import PARALLELISM, flow

BAR = 1.1


def peak_of(files: list[Path], rows: int) -> RssWatch:
    with tempfile.TemporaryDirectory(prefix="rayflow-memory-") as name:
        folder = Path(name)
        checkpoints = rf.CheckpointConfig(str(folder / "checkpoints"), interval="1s")
        job = flow(files, folder / "out").submit(parallelism=PARALLELISM, checkpoints=checkpoints)
        until_running(job)
        with RssWatch(job) as watch:
            result = job.wait()
        if result.metrics["rows_in"] != rows:
            raise RuntimeError(f"expected {rows} rows to be read, got {result.metrics['rows_in']:.0f}")
        each = ", ".join(f"{name} {peak / MB:.0f} MB" for name, peak in sorted(watch.peaks.items()))
        print(f"{rows} rows: {each}; {watch.samples} samples", file=sys.stderr, flush=True)
        return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rayflow-bids")
    options = parser.parse_args()
    longer = options.rows * options.times
    with cluster():
        short = peak_of(make_bids(options.data, options.rows), options.rows).peak
        long = peak_of(make_bids(options.data, longer), longer).peak
    emit(f"memory of all subtasks, {options.rows / 1e6:g} M rows", round(short / MB), "MB")
    emit(f"memory of all subtasks, {longer / 1e6:g} M rows", round(long / MB), "MB")
    emit(f"memory, input {options.times} times as long", round(long / short, 3), "ratio", BAR, long / short <= BAR)


if __name__ == "__main__":
    main()
