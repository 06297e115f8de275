"""Keyed state larger than memory, and what a checkpoint of it costs after few keys have changed.

`python -m benchmarks.big_state [--keys 10000000]`. One keyed subtask (`rf.KeyedProcess`, int64 key, int64 values, a
`set` of a whole batch for each value) takes rows from a source that holds still at two gates: after it has given every
key once, and after it has given 1 % of them, chosen at random, again. At each a checkpoint is asked for, and its
manifest tells what it has uploaded and how long its synchronous phase took. First with 3 values, where the resident
memory of the keyed subtask is sampled every 20 ms, under ``rocksdb`` and, beside it, ``fs``; then both with 25 values,
which is 2 GB of state.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

import rayflow as rf
from benchmarks.figures import emit
from benchmarks.kill_runs import cluster
from benchmarks.memory import MB, RssWatch, until_running
from rayflow.cluster.job import Job
from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json, Manifest
from rayflow.operators.base import OperatorContext, Polled, SplitReader
from rayflow.operators.process_context import BatchContext
from rayflow.storage.catalog import CheckpointReader
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root

BATCH_ROWS = 65_536
TOUCHED = 0.01
GOLDEN = 0x9E3779B97F4A7C15
PATIENCE_S = 900.0
NAME = "big-state"


def names(values: int) -> list[str]:
    return [f"v{i}" for i in range(values)]


def rows_of(numbers: np.ndarray[tuple[int], np.dtype[np.uint64]], values: int, salt: int) -> pa.RecordBatch:
    """Key ``number * GOLDEN`` (odd, so distinct numbers give distinct keys, in no order), and values from it."""
    keys = numbers * np.uint64(GOLDEN)
    columns = {"key": pa.array(keys.view(np.int64))}
    for i, name in enumerate(names(values)):
        columns[name] = pa.array((keys ^ np.uint64((i + 1) * GOLDEN & (2**64 - 1))).view(np.int64) + salt)
    return pa.record_batch(columns)


@dataclass(frozen=True)
class GatedKeys(rf.Source):
    """Every key once; then, when the file ``touch`` is there, 1 % of them again; then, at ``end``, the end."""

    keys: int
    values: int
    gates: str

    def schema(self) -> pa.Schema:
        return rows_of(np.zeros(0, np.uint64), self.values, 0).schema

    def discover(self) -> Sequence[tuple[str, Json]]:
        return [("all", None)]

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return GatedReader(self, position or 0)


class GatedReader(SplitReader):
    def __init__(self, source: GatedKeys, position: int) -> None:
        self._source = source
        self._position = position
        self._touched = np.random.default_rng(7).choice(source.keys, int(source.keys * TOUCHED), replace=False)

    def poll(self) -> Polled:
        source, position = self._source, self._position
        if position < source.keys:
            stop = min(position + BATCH_ROWS, source.keys)
            return self._give(np.arange(position, stop, dtype=np.uint64), 0)
        position -= source.keys
        if position < len(self._touched):
            if not (Path(source.gates) / "touch").exists():
                return Polled()
            return self._give(self._touched[position : position + BATCH_ROWS].astype(np.uint64), 1)
        return Polled(done=(Path(source.gates) / "end").exists(), position=self._position)

    def _give(self, numbers: np.ndarray[tuple[int], np.dtype[np.uint64]], salt: int) -> Polled:
        self._position += len(numbers)
        return Polled(rows_of(numbers, self._source.values, salt), self._position)


def keeper(values: int) -> rf.KeyedProcess:
    """A process with a `rf.ValueState` for each value, set from the rows as they come."""

    def process_batch(self: rf.KeyedProcess, batch: pa.RecordBatch, ctx: BatchContext) -> None:
        for name in names(values):
            getattr(self, name).set(ctx, batch.column(name))

    body = {name: rf.ValueState(pa.int64()) for name in names(values)}
    kind = type(
        "Keeper", (rf.KeyedProcess,), {**body, "process_batch": process_batch, "output": pa.schema([("n", pa.int64())])}
    )
    made = kind()
    assert isinstance(made, rf.KeyedProcess)
    return made


def rows_in(job: Job, rows: int) -> None:
    """Until the source has given that many rows; what a checkpoint holds is behind them."""
    deadline = time.monotonic() + PATIENCE_S
    while job.metrics().get("rows_in", 0) < rows:
        if time.monotonic() > deadline or job.status().state in ("failed", "cancelled"):
            raise TimeoutError(f"{job} did not read {rows} rows: {job.status()}")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    uploaded: int
    nbytes: int
    sync_s: float
    async_s: float


def taken(job: Job, url: str) -> Checkpoint:
    number = job.checkpoint(PATIENCE_S)
    manifest: Manifest = CheckpointReader(ObjectStore(job_root(url, NAME)), NAME).read(CheckpointId(number))
    stats = [part.stats for part in manifest.subtasks]
    return Checkpoint(
        sum(s.uploaded_bytes for s in stats),
        sum(s.nbytes for s in stats),
        max(s.sync_s for s in stats),
        max(s.async_s for s in stats),
    )


@dataclass(frozen=True, slots=True)
class Result:
    load_s: float
    rss: int
    full: Checkpoint
    touched: Checkpoint


def run(state: Literal["fs", "rocksdb"], keys: int, values: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="rayflow-state-") as name:
        gates = Path(name) / "gates"
        gates.mkdir()
        url = str(Path(name) / "checkpoints")
        rows = rf.read_source(GatedKeys(keys, values, str(gates)), parallelism=1)
        kept = rows.key_by("key").process(keeper(values), name="keep", parallelism=1)
        flow = rf.Flow(NAME, kept.print())
        began = time.monotonic()
        job = flow.submit(
            parallelism=1,
            config=rf.JobConfig(state=state, local_dir=name),
            checkpoints=rf.CheckpointConfig(url, interval="1h"),
        )
        until_running(job)
        with RssWatch(job) as watch:
            rows_in(job, keys)
            full = taken(job, url)
            load_s = time.monotonic() - began
            (gates / "touch").touch()
            rows_in(job, keys + int(keys * TOUCHED))
            touched = taken(job, url)
            (gates / "end").touch()
            job.wait(PATIENCE_S)
        rss = max(peak for step, peak in watch.peaks.items() if not step.startswith("read_source"))
        said = ", ".join(f"{step} {peak / MB:.0f} MB" for step, peak in sorted(watch.peaks.items()))
        print(f"{state}, {keys} keys, {values} values: {load_s:.1f} s; {said}; {full}; {touched}", file=sys.stderr)
        return Result(load_s, rss, full, touched)


def tell(state: Literal["fs", "rocksdb"], keys: int, values: int, result: Result, *, bars: bool) -> None:
    gigabytes = result.full.nbytes / 1e9
    what = f"{state}, {keys / 1e6:g} M keys x {values} values"
    rss, ratio = result.rss / MB, result.touched.uploaded / result.full.uploaded
    sync_ms = max(result.full.sync_s, result.touched.sync_s) * 1000
    emit(f"state, {what}: keys loaded", round(keys / result.load_s / 1e6, 2), "M rows/s")
    memory_bar = 1024.0 if bars and state == "rocksdb" else None
    emit(f"state, {what}: resident", round(rss), "MB", memory_bar, memory_bar is None or rss < memory_bar)
    emit(f"state, {what}: full checkpoint", round(gigabytes, 3), "GB")
    emit(f"state, {what}: uploaded after 1 %", round(ratio * 100, 2), "% of full", 5.0, ratio <= 0.05)
    emit(f"state, {what}: longest sync phase", round(sync_ms, 2), "ms", 50.0, sync_ms < 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10_000_000)
    parser.add_argument("--values", type=int, nargs="*", default=[3, 25])
    parser.add_argument("--state", nargs="*", default=["rocksdb", "fs"])
    options = parser.parse_args()
    with cluster():
        for values in options.values:
            for state in options.state:
                tell(state, options.keys, values, run(state, options.keys, values), bars=values == 3)


if __name__ == "__main__":
    main()
