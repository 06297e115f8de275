"""A program whose result is in closed form, written both ways: rows counted by key and bucket of event time, told by an
event timer at the bucket's end, and numbered by key in the order in which the timers fire."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import rayflow as rf

I64, US = pa.int64(), pa.timestamp("us")
WIDTH = 1000
SCHEMA = pa.schema([("k", I64), ("v", I64), ("t", US)])
OUT = pa.schema([("k", I64), ("bucket", I64), ("n", I64), ("sum", I64), ("number", I64)])
Told = tuple[int, int, int, int, int]


class Buckets(rf.KeyedProcess):
    output = OUT
    n = rf.MapState(I64, I64)
    sums = rf.MapState(I64, I64)
    told = rf.ValueState(I64, default=0)


class BatchedBuckets(Buckets):
    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        buckets = ctx.timestamps // WIDTH
        # One entry for every key and bucket: its rows are added up before.
        grouped = pa.table({"at": ctx.index, "bucket": buckets, "v": batch["v"]}).group_by(["at", "bucket"])
        sums = grouped.aggregate([("v", "sum"), ([], "count_all")]).combine_chunks()
        first = np.zeros((len(sums),), np.int64)
        position = {
            entry: i for i, entry in enumerate(zip(sums["at"].to_pylist(), sums["bucket"].to_pylist(), strict=True))
        }
        rows = np.array([position[entry] for entry in zip(ctx.index.tolist(), buckets.tolist(), strict=True)])
        first[rows] = np.arange(batch.num_rows)
        for state, new in ((self.n, sums["count_all"]), (self.sums, sums["v_sum"])):
            old = pc.fill_null(state.get(ctx, buckets), 0)
            state.put(ctx, buckets, pc.add(old, new.combine_chunks().take(pa.array(rows))))
        ctx.set_event_timer((buckets + 1) * WIDTH)

    def on_timers(self, times: Any, ctx: Any) -> None:
        buckets = times // WIDTH - 1
        order = np.argsort(ctx.index, kind="stable")
        begins = np.searchsorted(ctx.index[order], np.arange(ctx.keys.num_rows))
        rank = np.empty(len(times), np.int64)
        rank[order] = np.arange(len(times)) - begins[ctx.index[order]]
        before = self.told.get(ctx)
        ctx.emit(
            {
                "k": ctx.keys["k"].take(pa.array(ctx.index)),
                "bucket": buckets,
                "n": self.n.get(ctx, buckets),
                "sum": self.sums.get(ctx, buckets),
                "number": pc.add(before.take(pa.array(ctx.index)), pa.array(rank)),
            }
        )
        self.n.remove(ctx, buckets)
        self.sums.remove(ctx, buckets)
        self.told.set(ctx, pc.add(before, pa.array(np.bincount(ctx.index, minlength=len(before)))))


class BucketsByKey(Buckets):
    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for time, value in zip(ctx.timestamps.tolist(), rows["v"].to_pylist(), strict=True):
            bucket = time // WIDTH
            self.n[bucket] = self.n.get(bucket, 0) + 1
            self.sums[bucket] = self.sums.get(bucket, 0) + value
            ctx.timer((bucket + 1) * WIDTH)

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        bucket = time // WIDTH - 1
        number = self.told.value
        ctx.emit({"k": key, "bucket": bucket, "n": self.n[bucket], "sum": self.sums[bucket], "number": number})
        del self.n[bucket], self.sums[bucket]
        self.told.update(number + 1)


def expected(rows: pa.Table) -> list[Told]:
    found: dict[tuple[int, int], list[int]] = {}
    for key, value, time in zip(
        *(rows[c].to_pylist() for c in ("k", "v")), rows["t"].cast(I64).to_pylist(), strict=True
    ):
        found.setdefault((key, time // WIDTH), []).append(value)
    numbers: Counter[int] = Counter()
    result = []
    for (key, bucket), values in sorted(found.items()):
        result.append((key, bucket, len(values), sum(values), numbers[key]))
        numbers[key] += 1
    return result


def found_in(table: pa.Table) -> list[Told]:
    return sorted(zip(*(table[name].to_pylist() for name in OUT.names), strict=True))


def rows_of(n: int, keys: int) -> pa.Table:
    """About eight buckets a key; out of order by less than a bucket."""
    random = np.random.default_rng(n)
    times = np.arange(n) * 8 * WIDTH // n + random.integers(0, WIDTH // 2, n)
    return pa.table({"k": random.integers(0, keys, n), "v": np.arange(n), "t": pa.array(times).view(US)}, SCHEMA)
