"""Flows with state by key whose results are known in closed form, at any parallelism and however often restarted."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

import rayflow as rf
from rayflow.stream import Stream

KEYS = 42
ROWS = 4_200
GROUPS = 13
CONFIG = rf.JobConfig(max_parallelism=GROUPS, batch_rows=64, inflight_bytes=4096)


def numbers(rows: int = ROWS) -> pa.Table:
    """Row i: key i % KEYS, value i, time i ms."""
    return pa.table(
        {
            "k": pa.array([i % KEYS for i in range(rows)], pa.int64()),
            "v": pa.array(range(rows), pa.int64()),
            "t": pa.array([i * 1000 for i in range(rows)], pa.timestamp("us")),
        }
    )


def source(rows: int = ROWS, *, name: str | None = None) -> Stream:
    return rf.from_arrow(numbers(rows), splits=4, batch_rows=20, event_time="t", max_delay="0s", name=name)


def total(key: int, rows: int = ROWS) -> int:
    return sum(range(key, rows, KEYS))


class Totals(rf.KeyedProcess):
    """Every batch: for each of its rows the subtask, how many rows the key has had, and their sum."""

    output = pa.schema([("k", pa.int64()), ("subtask", pa.int64()), ("n", pa.int64()), ("total", pa.int64())])
    n = rf.ReducingState(pa.int64(), "sum", default=0)
    total = rf.ReducingState(pa.int64(), "sum", default=0)

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        ones = pa.array([1] * batch.num_rows, pa.int64())
        self.n.add(ctx, ones)
        self.total.add(ctx, batch["v"])
        self.emit(ctx)

    def emit(self, ctx: Any) -> None:
        keys = ctx.keys["k"]
        ctx.emit(
            {
                "k": keys,
                "subtask": pa.array([ctx.subtask] * len(keys), pa.int64()),
                "n": self.n.get(ctx),
                "total": self.total.get(ctx),
            }
        )


def totals(process: Any = Totals, *, name: str | None = "totals", rows: int = ROWS) -> rf.Flow:
    return rf.Flow("totals", source(rows).key_by("k").process(process, name=name).collect(name="rows"))


def last_of(table: pa.Table) -> dict[int, tuple[int, int]]:
    """Key -> (subtask, total) of the row with its highest count."""
    found: dict[int, tuple[int, int, int]] = {}
    for row in table.to_pylist():
        found[row["k"]] = max(found.get(row["k"], (0, 0, 0)), (row["n"], row["subtask"], row["total"]))
    return {key: (subtask, total) for key, (_, subtask, total) in found.items()}
