"""Keyed steps with state for drawn flows. What comes out does not depend on the order in which rows meet."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

import rayflow as rf
from rayflow.expressions import col
from rayflow.operators.aggregates import count
from rayflow.operators.aggregates import max as max_of
from rayflow.operators.aggregates import sum as sum_of
from rayflow.stream import Stream
from tests.simulation.target import Row

InputRow = tuple[int, int, int]
I64 = pa.int64()
FAR = 10**15
"""A time behind all rows."""
WINDOWS = pa.schema([("k", I64), ("end", I64), ("n", I64), ("s", I64)])


def running(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    """Running aggregates of a value that is the same in all rows of a key."""
    valued = stream.with_columns(v=col("k") + 1)
    result = valued.key_by("k").agg(n=count(), s=sum_of("v"), top=max_of("v")).select("k", "n", "s", "top")
    totals = Counter(k for k, _, _ in rows)
    return result, [(k, n, n * (k + 1), k + 1) for k, total in totals.items() for n in range(1, total + 1)]


def reduced(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    """As `running`, with a function of the user's."""

    def add(state: pa.RecordBatch, more: pa.RecordBatch) -> dict[str, Any]:
        return {"v": pc.add(state["v"], more["v"]), "t": more["t"]}

    result = stream.with_columns(v=col("k") + 1).key_by("k").reduce(add).select("k", "v")
    totals = Counter(k for k, _, _ in rows)
    return result, [(k, n * (k + 1)) for k, total in totals.items() for n in range(1, total + 1)]


def distinct(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    """The first row of each key, of which only the key is looked at; there are many keys."""
    result = stream.with_columns(b=col("v") // 3).key_by("b", "k").deduplicate().select("b", "k")
    return result, list({(v // 3, k) for k, _, v in rows})


class ByHand(rf.KeyedProcess):
    """Tumbling windows by map states and a timer at the end of each, key by key."""

    output = WINDOWS
    rows = rf.MapState(I64, I64)
    sums = rf.MapState(I64, I64)

    def __init__(self, size: int) -> None:
        self.size = size

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for time, value in zip(ctx.timestamps.tolist(), rows["v"].to_pylist(), strict=True):
            end = time // self.size * self.size + self.size
            self.rows[end] = self.rows.get(end, 0) + 1
            self.sums[end] = self.sums.get(end, 0) + value
            ctx.timer(end)

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        ctx.emit({"k": key, "end": time, "n": self.rows.pop(time), "s": self.sums.pop(time)})


class InBatches(rf.KeyedProcess):
    """Totals of each key, given out by a timer behind all rows; whole batches."""

    output = WINDOWS
    total = rf.ReducingState(I64, "sum", default=0)
    seen = rf.ListState(I64)

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        self.total.add(ctx, batch["v"])
        self.seen.append(ctx, batch["v"])
        ctx.set_event_timer(FAR)

    def on_timers(self, times: Any, ctx: Any) -> None:
        counts = pc.list_value_length(self.seen.get(ctx)).cast(I64)
        ctx.emit({"k": ctx.keys["k"], "end": times, "n": counts, "s": self.total.get(ctx)})
        self.total.clear(ctx)
        self.seen.clear(ctx)


def in_batches(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for k, _, v in rows:
        groups[k].append(v)
    result = stream.key_by("k").process(InBatches)
    return result, [(k, FAR, len(vs), sum(vs)) for k, vs in groups.items()]


def by_hand(stream: Stream, rows: list[InputRow], size: int) -> tuple[Stream, list[Row]]:
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for k, t, v in rows:
        groups[k, t // size * size + size].append(v)
    result = stream.key_by("k").process(ByHand(size))
    return result, [(k, end, len(vs), sum(vs)) for (k, end), vs in groups.items()]


def short_by_hand(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    return by_hand(stream, rows, 2_000_000)


def long_by_hand(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    return by_hand(stream, rows, 7_000_000)


KINDS: tuple[Callable[[Stream, list[InputRow]], tuple[Stream, list[Row]]], ...] = (
    running,
    running,
    reduced,
    distinct,
    in_batches,
    short_by_hand,
    long_by_hand,
)
