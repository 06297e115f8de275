"""Sources that wait where a test wants them, and keyed steps with state whose output is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

import rayflow as rf
from rayflow.stream import Stream
from tests.cluster.ray_harness import until

I64: Final = pa.int64()
SCHEMA: Final = pa.schema([("k", I64), ("v", I64), ("t", pa.timestamp("us"))])
SECOND: Final = 1_000_000

Read = Callable[[int, int], Iterator[pa.RecordBatch | None]]


@dataclass(frozen=True)
class Stops:
    """Where a source waits until a file is there; it says that it has come so far."""

    folder: Path

    def passed(self, at: int) -> bool:
        (self.folder / f"reached-{at}").touch()
        return (self.folder / f"go-{at}").exists()

    def until_reached(self, at: int) -> None:
        until((self.folder / f"reached-{at}").exists, f"stop {at} is reached")

    def until_reached_again(self, at: int) -> None:
        """After a recovery: a source says that it waits as long as it does."""
        (self.folder / f"reached-{at}").unlink()
        self.until_reached(at)

    def go(self, at: int) -> None:
        (self.folder / f"go-{at}").touch()


# ------------------------------------------------------------------------------------------------ P2: calls and seconds

SIZE_S: Final = 5
"""Of windows and of what `ByHand` calls buckets."""


def calls(stops: Stops, keys: int, calls: int, waits: tuple[int, ...]) -> Read:
    """Call k emits a row of each key at event time k seconds, with value key + k."""

    def read(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        of_all = np.arange(keys)
        for k in range(position // keys, calls):
            while k in waits and not stops.passed(k):
                yield None
            times = pa.array(np.full(keys, k * SECOND), pa.timestamp("us"))
            yield pa.record_batch([of_all, of_all + k, times], schema=SCHEMA)

    return read


class ByHand(rf.KeyedProcess):
    """All kinds of state and timers: sums of buckets from a map at a timer's time; with the last timer what a list, a
    value and a reducing state have come to."""

    output = pa.schema([("k", I64), ("end", I64), ("s", I64), ("fired", I64), ("latest", I64), ("seen", pa.list_(I64))])
    by_second = rf.MapState(I64, I64)
    seen = rf.ListState(I64)
    latest = rf.ValueState(I64)
    fired = rf.ReducingState(I64, "sum", default=0)

    def __init__(self, end_s: int) -> None:
        self.end_s = end_s
        """End of the last bucket."""

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        seconds = ctx.timestamps // SECOND
        self.by_second.put(ctx, seconds, batch["v"])
        self.seen.append(ctx, batch["v"])
        newest = np.zeros(ctx.keys.num_rows, np.int64)
        newest[ctx.index] = batch["v"].to_numpy()
        self.latest.set(ctx, newest)
        ctx.set_event_timer((seconds // SIZE_S + 1) * SIZE_S * SECOND)

    def on_timers(self, times: Any, ctx: Any) -> None:
        ends = times // SECOND
        total = np.zeros(len(times), np.int64)
        for back in range(1, SIZE_S + 1):
            total += pc.fill_null(self.by_second.get(ctx, ends - back), 0).to_numpy()
            self.by_second.remove(ctx, ends - back)
        self.fired.add(ctx, np.ones(len(times), np.int64))
        rows = pa.array(ctx.index)
        columns = {"k": ctx.keys["k"].take(rows), "end": ends, "s": total}
        last = pa.array(ends == self.end_s)
        if pc.any(last).as_py():
            for name in ("fired", "latest", "seen"):
                values = getattr(self, name).get(ctx).take(rows)
                columns[name] = pc.if_else(last, values, pa.nulls(len(values), values.type))
        else:
            columns |= {n: pa.nulls(len(times), self.output.field(n).type) for n in ("fired", "latest", "seen")}
        ctx.emit(columns)


def three_ways(rows: Stream, out: Path, calls: int) -> rf.Flow:
    """The same rows through running aggregates, a `KeyedProcess` and windows."""
    keyed = rows.key_by("k")
    running = keyed.agg(n=rf.count(), total=rf.sum("v"), top=rf.max("v"), name="running").select(
        "k", "n", "total", "top"
    )
    by_hand = keyed.process(ByHand(-(-calls // SIZE_S) * SIZE_S), name="by-hand")
    windows = keyed.window(rf.tumbling(f"{SIZE_S}s")).agg(n=rf.count(), total=rf.sum("v"))
    ways = {"running": running, "by-hand": by_hand, "windows": windows}
    return rf.Flow("gated", *(way.write_parquet(str(out / name)) for name, way in ways.items()))


def table_of(folder: Path, *order: str) -> pa.Table:
    """All committed rows, in the order of these columns."""
    table = pyarrow.dataset.dataset(str(folder), format="parquet").to_table()
    return table.sort_by([(name, "ascending") for name in order])


def columns_of(table: pa.Table, *names: str) -> list[list[int]]:
    return [table[name].cast(I64).to_numpy().tolist() for name in names]


def assert_three_ways(out: Path, keys: int, calls: int) -> None:
    """Every row of every way once, and what stands in it."""
    k, n = (grid.ravel() for grid in np.meshgrid(np.arange(keys), np.arange(1, calls + 1), indexing="ij"))
    running = table_of(out / "running", "k", "n")
    expected = [k, n, n * k + n * (n - 1) // 2, k + n - 1]
    assert columns_of(running, "k", "n", "total", "top") == [column.tolist() for column in expected]

    starts = np.arange(0, calls, SIZE_S)
    sizes = np.minimum(starts + SIZE_S, calls) - starts
    k, at = (grid.ravel() for grid in np.meshgrid(np.arange(keys), np.arange(len(starts)), indexing="ij"))
    n, start = sizes[at], starts[at]
    sums = n * (k + start) + n * (n - 1) // 2
    windows = table_of(out / "windows", "k", "window_start")
    expected = [k, start * SECOND, n, sums]
    assert columns_of(windows, "k", "window_start", "n", "total") == [column.tolist() for column in expected]

    by_hand = table_of(out / "by-hand", "k", "end")
    assert columns_of(by_hand, "k", "end", "s") == [column.tolist() for column in (k, start + SIZE_S, sums)]
    of_last = pc.equal(by_hand["end"], int(starts[-1]) + SIZE_S)
    assert by_hand.filter(pc.invert(of_last))["seen"].null_count == keys * (len(starts) - 1)
    last = by_hand.filter(of_last)
    assert columns_of(last, "fired", "latest") == [[len(starts)] * keys, list(range(calls - 1, calls - 1 + keys))]
    seen = last["seen"].combine_chunks().flatten().to_numpy().reshape(keys, calls)
    assert np.array_equal(seen, np.arange(keys)[:, None] + np.arange(calls)), "lists are in the order of the rows"


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# -------------------------------------------------------------------------------------------- P3: sums by key and owner

KEYS: Final = 42
GROUPS: Final = 13
PART: Final = 30 * KEYS
"""Rows between two stops."""


def numbers(stops: Stops, parts: int) -> Read:
    """Row i: key i % KEYS, value i, time i ms; it waits behind every part."""

    def read(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        while position < parts * PART:
            part = position // PART
            while position % PART == 0 and part and not stops.passed(part):
                yield None
            i = np.arange(position, min(position + 50, (part + 1) * PART))
            yield pa.record_batch([i % KEYS, i, pa.array(i * 1000, pa.timestamp("us"))], schema=SCHEMA)
            position += len(i)

    return read


def trickle(stops: Stops, parts: int) -> Stream:
    return rf.from_generator(numbers(stops, parts), schema=SCHEMA, event_time="t", max_delay="0s", parallelism=1)


class Sums(rf.KeyedProcess):
    """For every row the subtask that has it, which row of its key it is, and the sum so far; row by row."""

    output = pa.schema([("k", I64), ("subtask", I64), ("n", I64), ("total", I64)])
    n = rf.ValueState(I64, default=0)
    total = rf.ValueState(I64, default=0)

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for value in rows["v"].to_pylist():
            self.n.update(self.n.value + 1)
            self.total.update(self.total.value + value)
            ctx.emit({"k": key, "subtask": ctx.subtask, "n": self.n.value, "total": self.total.value})


def sums_flow(stops: Stops, parts: int, out: Path) -> rf.Flow:
    return rf.Flow("sums", trickle(stops, parts).key_by("k").process(Sums, name="sums").write_parquet(str(out)))
