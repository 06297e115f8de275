"""A running sum over 1 million keys, an updated row out for every row in: rayflow on Ray beside DuckDB.

`python -m benchmarks.running_sum [--rows 40000000]`. Both read the same Parquet file (key, value, row number) and end
with the number of updated rows and a checksum over all of them, which must be equal: every updated row is looked at.
rayflow: one subtask reads, so that the order of the rows is that of the file, two keep the sums (hash exchange over
Flight); behind each of them, in its process, a step of user code takes all updated rows. Exactly-once checkpoints every
second to local disk. Measured from the launch of the subtasks to the end of the job, the last commit included; "a core"
is a half of it, as on 2 cores. DuckDB: ``sum() over (partition by key order by row)``, 2 threads.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import rayflow as rf
from benchmarks.figures import emit
from benchmarks.window_vs_duckdb import span_s

PARALLELISM = 2
KEYS = 1_000_000
CHUNK_ROWS = 1_000_000
BAR = 2.0
CHECKSUM = pa.schema([("rows", pa.int64()), ("checksum", pa.int64())])


def make_rows(folder: Path, rows: int, *, strings: bool) -> Path:
    """A file with ``rows`` rows over 1 million keys, evenly at random; kept if it is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"running-{'string' if strings else 'int64'}-{rows}.parquet"
    if path.exists():
        return path
    rng = np.random.default_rng(7)
    partial = path.with_suffix(".partial")
    schema = pa.schema([("key", pa.string() if strings else pa.int64()), ("value", pa.int64()), ("row", pa.int64())])
    with pq.ParquetWriter(partial, schema, use_dictionary=False) as writer:
        for start in range(0, rows, CHUNK_ROWS):
            count = min(CHUNK_ROWS, rows - start)
            keys = pa.array(rng.integers(0, KEYS, count))
            if strings:
                keys = pc.binary_join_element_wise("user-", keys.cast(pa.string()), "")
            values, numbers = rng.integers(0, 1_000, count), np.arange(start, start + count)
            writer.write_table(pa.table([keys, values, numbers], schema=schema))
    partial.rename(path)
    return path


def checksum(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Takes every updated row."""
    total = pc.sum(batch.column("total"))
    return pa.RecordBatch.from_arrays([pa.array([len(batch)]), pa.array([total.as_py()])], schema=CHECKSUM)


def run_rayflow(file: Path, folder: Path, state: Literal["fs", "rocksdb"]) -> tuple[float, tuple[int, int], int]:
    """(seconds, (rows, checksum), checkpoints)."""
    rows = rf.read_parquet(str(file), columns=["key", "value"], parallelism=1)
    sums = rows.key_by("key").agg(total=rf.sum("value")).map_batches(checksum, schema=CHECKSUM)
    result = rf.Flow("running-sum", sums.collect()).run(
        parallelism=PARALLELISM,
        checkpoints=rf.CheckpointConfig(str(folder / "checkpoints"), interval="1s"),
        config=rf.JobConfig(state=state),
        progress=False,
    )
    table = result.table()
    found = pc.sum(table.column("rows")).as_py(), pc.sum(table.column("checksum")).as_py()
    return span_s(result), found, result.checkpoint or 0


def run_duckdb(file: Path) -> tuple[float, tuple[int, int]]:
    con = duckdb.connect()
    con.execute(f"set threads={PARALLELISM}")
    began = time.perf_counter()
    found = con.execute(
        f"""select count(*), sum(total)::bigint from
            (select sum(value) over (partition by key order by row) as total from read_parquet('{file}'))"""
    ).fetchone()
    assert found is not None
    return time.perf_counter() - began, (int(found[0]), int(found[1]))


def measure(label: str, file: Path, rows: int, state: Literal["fs", "rocksdb"], repeats: int) -> float:
    """The median of M rows/s; emits it."""
    spans, completed, theirs, identical = [], 0, 0.0, True
    for number in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            seconds, found, checkpoints = run_rayflow(file, Path(folder), state)
        spans.append(seconds)
        completed += checkpoints
        if number == 0:
            theirs, wanted = run_duckdb(file)
        identical = identical and found == wanted
    rate = rows / statistics.median(spans) / 1e6
    main = label == "int64 keys, fs"
    emit(f"running sum, {label}: identical to DuckDB", float(identical), "bool", 1.0, identical)
    emit(f"running sum, {label}", round(rate, 2), "M rows/s", None, True)
    a_core = rate / PARALLELISM
    emit(
        f"running sum, {label}, a core", round(a_core, 2), "M rows/s", BAR if main else None, not main or a_core >= BAR
    )
    emit(f"running sum, {label}: against DuckDB, 2 threads", round(theirs * rate * 1e6 / rows, 2), "ratio", None, True)
    emit(f"running sum, {label}: checkpoints taken", completed, "checkpoints", None, True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40_000_000)
    parser.add_argument("--other-rows", type=int, default=10_000_000, help="for string keys and rocksdb")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("int64", "string", "rocksdb"))
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rayflow-running")
    options = parser.parse_args()
    if options.only in (None, "int64"):
        file = make_rows(options.data, options.rows, strings=False)
        measure("int64 keys, fs", file, options.rows, "fs", options.repeats)
    if options.only in (None, "string"):
        file = make_rows(options.data, options.other_rows, strings=True)
        measure("string keys, fs", file, options.other_rows, "fs", 1)
    if options.only in (None, "rocksdb"):
        file = make_rows(options.data, options.other_rows, strings=False)
        measure("int64 keys, rocksdb", file, options.other_rows, "rocksdb", 1)


if __name__ == "__main__":
    main()
