"""Flows whose results are known in closed form, fed by a source that trickles until a gate file is there.

Until then rows come slowly and far more of them are left than a test lasts; afterwards the rest comes at once. So
faults happen while rows flow, and no test depends on the speed of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset

import rayflow as rf
from rayflow import col
from rayflow.stream import Stream

SPLITS = 4
"""Two for each subtask at parallelism 2: one is read, the other fetched ahead, so that nobody is left without."""
ROWS = 1_000_000
"""Of each split. While the gate is closed some 20,000 rows/s are read at most."""
KEYS = 7
WINDOW_S = 100
SCHEMA = pa.schema([("ts", pa.timestamp("us")), ("k", pa.int64()), ("v", pa.int64())])


def numbers(gate: Path, rows: int = ROWS) -> Callable[[int, int], Iterator[pa.RecordBatch | None]]:
    """Row j of split s is number i = s * rows + j: time i ms, key i % KEYS, value i. In reading order, as files are."""

    def read(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        while position < rows:
            opened = gate.exists()
            count = min(65_536 if opened else 100, rows - position)
            i = np.arange(position, position + count, dtype=np.int64) + split * rows
            yield pa.record_batch(
                [pa.array(i * 1000, pa.timestamp("us")), pa.array(i % KEYS), pa.array(i)], schema=SCHEMA
            )
            position += count
            if not opened:
                yield None  # the loop asks again in 5 ms

    return read


def trickle(gate: Path, rows: int = ROWS) -> Stream:
    return rf.from_generator(numbers(gate, rows), splits=SPLITS, schema=SCHEMA, event_time="ts", max_delay="0s")


def windowed(stream: Stream) -> Stream:
    return stream.key_by("k").window(rf.tumbling(f"{WINDOW_S}s")).agg(n=rf.count(), total=rf.sum("v"))


def expected_windows(rows: int = ROWS) -> list[tuple[int, int, int, int]]:
    """(key, window start in us, count, sum) over all rows, sorted; by DuckDB."""
    width = WINDOW_S * 1000
    return duckdb.sql(  # type: ignore[no-any-return]
        f"select i % {KEYS}, i // {width} * {width * 1000}, count(*), sum(i)::bigint "
        f"from range({rows * SPLITS}) t(i) group by all order by all"
    ).fetchall()


def windows_in(table: pa.Table) -> list[tuple[int, int, int, int]]:
    start = table.column("window_start").cast(pa.int64())
    return sorted(
        zip(
            table.column("k").to_pylist(),
            start.to_pylist(),
            table.column("n").to_pylist(),
            table.column("total").to_pylist(),
            strict=True,
        )
    )


def doubled(gate: Path, out: Path, rows: int = ROWS) -> rf.Flow:
    """Source, map and Parquet sink in one chain, no exchange."""
    return rf.Flow("doubled", trickle(gate, rows).select("v", twice=col("v") * 2).write_parquet(str(out)))


def assert_doubled(out: Path, rows: int = ROWS) -> None:
    """Every number exactly once, with its double."""
    total = rows * SPLITS
    n, distinct, low, high, wrong = duckdb.sql(
        "select count(*), count(distinct v), min(v), max(v), count(*) filter (twice != 2 * v) "
        f"from '{out}/**/*.parquet'"
    ).fetchall()[0]
    assert (n, distinct, low, high, wrong) == (total, total, 0, total - 1, 0)


def windows_flow(gate: Path, out: Path, rows: int = ROWS, *, ballast: bytes = b"") -> rf.Flow:
    """``ballast`` makes the plan so much heavier."""

    def carry(batch: pa.RecordBatch) -> pa.RecordBatch:
        assert ballast is not None
        return batch

    stream = trickle(gate, rows)
    if ballast:
        stream = stream.map_batches(carry, schema=SCHEMA)
    return rf.Flow("windows", windowed(stream).write_parquet(str(out)))


def assert_windows(out: Path, rows: int = ROWS) -> None:
    assert windows_in(pyarrow.dataset.dataset(str(out), format="parquet").to_table()) == expected_windows(rows)
