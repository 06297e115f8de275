"""Rows/s into Parquet files: `write_parquet` in a flow beside `pyarrow.parquet` alone, the same rows in the same run.

`python -m benchmarks.parquet_sink [--rows 10000000]`. Both write the same batches (five columns: two integers, a price,
a text of 10,000 values, a time) with snappy to the same local disk, in one thread and one process. The flow runs in
the local runtime at parallelism 1 with exactly-once checkpoints: of its time nothing is left out (start, source,
barriers, checkpoints, commits). Alone: the same number of files of the same rows, row groups of the same size, each
file and at the end the folder synced to disk, as the sink does. Runs alternate; the median of the ratios counts.
For comparison the same with partitions by a column of 16 values, CSV and JSON lines, each beside what it stands on.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

import rayflow as rf
from benchmarks.figures import emit
from rayflow.operators.json_lines import json_texts
from rayflow.operators.sinks.files import FLUSH_ROWS
from rayflow.stream import Stream, StreamEnd

BATCH_ROWS = 65_536
DISTINCT = 32
BAR = 0.7
INTERVAL = "50ms"
"""In the local runtime time goes on by 1 ms a round, whatever it takes: a checkpoint every 50 batches or so."""


def make_batches() -> list[pa.RecordBatch]:
    rng = np.random.default_rng(7)
    names = pa.array([f"item {i}" for i in range(10_000)])
    made = []
    for i in range(DISTINCT):
        at = np.arange(i * BATCH_ROWS, (i + 1) * BATCH_ROWS)
        made.append(
            pa.record_batch(
                {
                    "id": pa.array(at),
                    "kind": pa.array(rng.integers(0, 16, BATCH_ROWS)),
                    "price": pa.array(rng.integers(100, 1_000_000, BATCH_ROWS) / 100),
                    "name": names.take(pa.array(rng.integers(0, 10_000, BATCH_ROWS))),
                    "time": pa.array(at * 1_000, pa.timestamp("us")),
                }
            )
        )
    return made


def run_flow(batches: list[pa.RecordBatch], count: int, folder: Path, end: Callable[[Stream], StreamEnd]) -> float:
    def generate(split: Any, position: int) -> Iterator[pa.RecordBatch]:
        return (batches[i % DISTINCT] for i in range(position // BATCH_ROWS, count))

    flow = rf.Flow("sink", end(rf.from_generator(generate, schema=batches[0].schema)))
    checkpoints = rf.CheckpointConfig(str(folder / "checkpoints"), interval=INTERVAL)
    began = time.perf_counter()
    flow.run(local=True, parallelism=1, checkpoints=checkpoints, progress=False)
    return time.perf_counter() - began


def file_rows(count: int, files: int) -> list[int]:
    """How many batches each of so many files holds."""
    return [len(part) for part in np.array_split(np.arange(count), max(1, files))]


def alone(
    batches: list[pa.RecordBatch],
    count: int,
    files: int,
    folder: Path,
    write: Callable[[Path, list[pa.RecordBatch]], None],
) -> float:
    folder.mkdir()
    at = 0
    began = time.perf_counter()
    for number, length in enumerate(file_rows(count, files)):
        path = folder / f"{number}"
        write(path, [batches[i % DISTINCT] for i in range(at, at + length)])
        at += length
        sync(path)
    sync(folder)
    return time.perf_counter() - began


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def parquet(path: Path, batches: list[pa.RecordBatch]) -> None:
    group = max(1, FLUSH_ROWS // BATCH_ROWS)
    with pq.ParquetWriter(path, batches[0].schema, compression="snappy") as writer:
        for i in range(0, len(batches), group):
            table = pa.Table.from_batches(batches[i : i + group])
            writer.write_table(table, row_group_size=table.num_rows)


def csv(path: Path, batches: list[pa.RecordBatch]) -> None:
    with pc.CSVWriter(path, batches[0].schema, write_options=pc.WriteOptions(batch_size=16_384)) as writer:
        for batch in batches:
            writer.write_batch(batch)


def json_lines(path: Path, batches: list[pa.RecordBatch]) -> None:
    with open(path, "wb") as file:
        file.writelines(json_texts(batch, end="\n").buffers()[2] for batch in batches)


def compare(name: str, count: int, repeats: int, end: Any, write: Any, bar: float | None, *, folders: str = "") -> None:
    batches = make_batches()
    rows = count * BATCH_ROWS
    ours, theirs, ratios, files = [], [], [], 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            took = run_flow(batches, count, folder, partial(end, out=str(folder / "out")))
            found = list((folder / "out").glob(f"{folders}part-*"))
            files = len(found)
            bare = alone(batches, count, files if not folders else files // 16, folder / "alone", write)
        ours.append(rows / took / 1e6)
        theirs.append(rows / bare / 1e6)
        ratios.append(bare / took)
    emit(f"{name}: files written", files, "files", None, True)
    emit(f"{name}: rows/s in a flow", round(statistics.median(ours), 2), "M rows/s", None, True)
    emit(f"{name}: rows/s alone", round(statistics.median(theirs), 2), "M rows/s", None, True)
    ratio = statistics.median(ratios)
    emit(f"{name}: against alone", round(ratio, 3), "ratio", bar, bar is None or ratio >= bar)


def partitioned(stream: Stream, out: str) -> StreamEnd:
    return stream.write_parquet(out, partition_by="kind")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    count = max(2, options.rows // BATCH_ROWS)
    few = max(2, count // 4)
    compare("Parquet sink", count, options.repeats, lambda s, out: s.write_parquet(out), parquet, BAR)
    compare("Parquet sink, 16 partitions", few, options.repeats, partitioned, parquet, None, folders="*/")
    compare("CSV sink", few, options.repeats, lambda s, out: s.write_csv(out), csv, None)
    compare("JSON lines sink", few, options.repeats, lambda s, out: s.write_json(out), json_lines, None)


if __name__ == "__main__":
    main()
