"""Timers: in the order of time, once each, at watermarks and by the wall clock, through snapshots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import rayflow as rf
from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import UserCodeError
from rayflow.operators.base import MAIN, Operator
from rayflow.operators.process import Process
from rayflow.operators.process_operator import ProcessOperator
from rayflow.operators.state.timers import TimerQueue
from tests.operators.helpers import frozen, opened, rows

I64 = pa.int64()
OUT = pa.schema([("k", I64), ("time", I64)])
T = pa.timestamp("us")


class ByKey(rf.KeyedProcess):
    """Sets what the rows say, and emits what fires."""

    output = OUT

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for row in rows.to_pylist():
            act = ctx.delete_timer if row["delete"] else ctx.timer
            act(row["at"])

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        ctx.emit({"k": key, "time": time})


class Batched(rf.KeyedProcess):
    output = OUT

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        # Row by row only in so far as deletions come after additions, as the rows of a batch here have them.
        ctx.set_event_timer(batch["at"], mask=pc.invert(batch["delete"]))
        ctx.delete_event_timer(batch["at"], mask=batch["delete"])

    def on_timers(self, times: Any, ctx: Any) -> None:
        ctx.emit({"k": ctx.keys["k"].take(pa.array(ctx.index)), "time": times})


def made(description: rf.KeyedProcess) -> Process:
    return Process(keys=("k",), description=description)


def wanted(*timers: tuple[int, int, bool]) -> pa.RecordBatch:
    keys, times, deleted = (list(column) for column in zip(*timers, strict=True))
    return pa.record_batch({"k": keys, "at": pa.array(times), "delete": deleted})


def fired(out: Any) -> list[tuple[Any, Any]]:
    return [(row["k"], row["time"]) for row in rows(out.batches.pop(MAIN, []))]


@pytest.mark.parametrize("description", [ByKey(), Batched()], ids=["by key", "batched"])
def test_timers_fire_once_in_the_order_of_their_time(description: rf.KeyedProcess) -> None:
    operator, out = opened(made(description))
    operator.process(wanted((1, 30, False), (2, 10, False), (1, 20, False), (1, 30, False), (3, 20, True)), 0)
    operator.process(wanted((2, 10, False), (3, 20, False), (2, 40, False)), 0)
    operator.process(wanted((3, 20, True), (9, 9, True)), 0)
    assert operator.on_watermark(9) == 9
    assert fired(out) == []
    assert operator.on_watermark(20) == 20
    assert fired(out) == [(2, 10), (1, 20)]
    operator.process(wanted((1, 15, False)), 0)
    assert operator.on_watermark(29) == 29
    assert fired(out) == [(1, 15)], "a timer that is due already fires at the next watermark"
    operator.on_watermark(29)
    assert operator.on_watermark(MAX_WATERMARK) == MAX_WATERMARK
    assert fired(out) == [(1, 30), (2, 40)]
    operator.on_watermark(MAX_WATERMARK)
    assert fired(out) == []


@pytest.mark.parametrize("description", [ByKey(), Batched()], ids=["by key", "batched"])
def test_random_timers_through_snapshots_equal_a_set(description: rf.KeyedProcess) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        factory = made(description)
        operator, out = opened(factory)
        pending: set[tuple[int, int]] = set()
        watermark = 0
        for step in range(40):
            n = int(random.integers(1, 30))
            timers = {
                (int(k), int(t)) for k, t in zip(random.integers(0, 9, n), random.integers(0, 900, n), strict=True)
            }
            deleted = {t for t in timers if random.random() < 0.3}
            pending = (pending | (timers - deleted)) - deleted
            operator.process(wanted(*((k, t, (k, t) in deleted) for k, t in timers)), 0)
            if step % 3 == 0:
                watermark += int(random.integers(0, 80))
                operator.on_watermark(watermark)
                due = {t for t in pending if t[1] <= watermark}
                found = fired(out)
                assert sorted(found) == sorted(due), f"seed {seed}"
                assert [t for _, t in found] == sorted(t for _, t in found)
                pending -= due
            if step % 7 == 0:
                states = frozen(operator)
                operator, out = opened(factory)
                operator.restore(states)
        operator.on_watermark(MAX_WATERMARK)
        assert sorted(fired(out)) == sorted(pending)


@pytest.mark.parametrize("description", [ByKey(), Batched()], ids=["by key", "batched"])
def test_restored_timers_fire_before_the_first_row(description: rf.KeyedProcess) -> None:
    operator, _ = opened(made(description))
    operator.process(wanted((1, 30, False)), 0)
    states = frozen(operator)
    for _ in range(2):
        again, out = opened(made(description))
        again.restore(states)
        again.on_watermark(30)
        assert fired(out) == [(1, 30)]
        assert {s.name: s.table.num_rows for s in frozen(again) if s.name == "timers" and s.piece == ""} in (
            {},
            {"timers": 0},
        )
        third, out = opened(made(description))
        third.restore(frozen(again))
        third.on_watermark(MAX_WATERMARK)
        assert fired(out) == [], "what has fired is not in the snapshot behind it"


class Chained(rf.KeyedProcess):
    """Each timer changes others that are due at the same watermark."""

    output = OUT
    count = rf.ValueState(I64, default=0)

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for time in (10, 20, 30):
            ctx.timer(time)

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        self.count.update(self.count.value + 1)
        ctx.emit({"k": self.count.value, "time": time})
        if time == 10:
            ctx.delete_timer(20)
            ctx.timer(15)
            ctx.timer(1000)
        if time == 15:
            ctx.timer(12)
            ctx.timer(30)


def test_timers_of_one_watermark_see_what_those_before_them_did() -> None:
    """As in Flink: the earliest is taken, then the next one of what is there then."""
    operator, out = opened(made(Chained()))
    operator.process(pa.record_batch({"k": [5]}), 0)
    operator.on_watermark(100)
    assert fired(out) == [(1, 10), (2, 15), (3, 12), (4, 30)]
    operator.on_watermark(1000)
    assert fired(out) == [(5, 1000)]


class Rounds(rf.KeyedProcess):
    output = OUT

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        ctx.set_event_timer(10)

    def on_timers(self, times: Any, ctx: Any) -> None:
        assert ctx.timer_kind == "event"
        assert ctx.timestamps.tolist() == times.tolist()
        ctx.emit({"k": ctx.keys["k"], "time": times})
        ctx.set_event_timer(times + 10, mask=times < 50)


def test_whole_batches_of_timers_come_in_rounds() -> None:
    operator, out = opened(made(Rounds()))
    operator.process(pa.record_batch({"k": [1, 2, 1]}), 0)
    operator.on_watermark(35)
    assert fired(out) == [(k, t) for t in (10, 20, 30) for k in (1, 2)]
    operator.on_watermark(MAX_WATERMARK)
    assert fired(out) == [(k, t) for t in (40, 50) for k in (1, 2)]


class Endless(rf.KeyedProcess):
    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        ctx.timer(0)

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        ctx.timer(time + 1)


class Stops(Endless):
    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        if not ctx.ended:
            ctx.timer(time + 60)


def test_timers_that_set_timers_for_ever_are_an_error_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayflow.operators.process_operator.ROUNDS_MAX", 200)
    operator, _ = opened(made(Endless()))
    operator.process(pa.record_batch({"k": [1]}), 0)
    operator.on_watermark(100)
    with pytest.raises(UserCodeError, match=r"step 'under test' subtask 0/1: Endless sets timers .* for ever .*ended"):
        operator.on_watermark(MAX_WATERMARK)
    operator, _ = opened(made(Stops()))
    operator.process(pa.record_batch({"k": [1]}), 0)
    operator.on_watermark(1000)
    operator.on_watermark(MAX_WATERMARK)


class Clocked(rf.KeyedProcess):
    output = OUT

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for delay in rows["delay"].to_pylist():
            ctx.processing_timer(ctx.wall_time + delay)
        ctx.timer(5)

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        ctx.emit({"k": key if ctx.timer_kind == "processing" else -key, "time": time})


def test_processing_timers_go_by_the_wall_clock_and_are_dropped_at_the_end() -> None:
    start = 1_700_000_000.123457
    operator, out = opened(made(Clocked()))
    assert isinstance(operator, ProcessOperator)
    object.__setattr__(operator.ctx, "wall_time", lambda: start)
    assert operator.next_timer() is None
    operator.process(pa.record_batch({"k": [1, 2, 1], "delay": [500_001, 20, 10**9]}), 0)
    first = operator.next_timer()
    assert first is not None
    assert first == pytest.approx(start + 20e-6, abs=1e-6)
    operator.on_time(first)
    at = round(start * 1e6)
    assert fired(out) == [(2, at + 20)]
    restored, out = opened(made(Clocked()))
    restored.restore(frozen(operator))
    second = restored.next_timer()
    assert second is not None
    assert second > first
    restored.on_time(second)
    assert fired(out) == [(1, at + 500_001)]
    restored.on_watermark(MAX_WATERMARK)
    assert sorted(fired(out)) == [(-2, 5), (-1, 5)]
    restored.on_end()
    assert restored.next_timer() is None


@pytest.mark.parametrize(
    "times",
    [
        lambda t: pa.array(t),
        lambda t: np.array(t),
        lambda t: pa.array(t, T),
        lambda t: pa.array(t, pa.timestamp("us", "UTC")),
        lambda t: pa.array([x * 1000 for x in t], pa.timestamp("ns")),
        lambda t: pa.chunked_array([t[:1], t[1:]]),
        lambda t: np.array(t, "datetime64[us]"),
    ],
)
def test_every_shape_of_times(times: Callable[[list[int]], Any]) -> None:
    class Sets(Batched):
        def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
            ctx.set_event_timer(times([10, 20, 10]))
            ctx.set_event_timer(times([30, 40]))

    operator, out = opened(made(Sets()))
    operator.process(pa.record_batch({"k": [1, 2, 1]}), 0)
    operator.on_watermark(100)
    assert fired(out) == [(1, 10), (2, 20), (1, 30), (2, 40)]


def test_a_queue_gives_what_a_sort_gives_and_never_looks_at_all_of_it() -> None:
    random = np.random.default_rng(3)
    schema = pa.schema([("k", I64)])
    queue = TimerQueue(schema)
    model: list[tuple[int, int]] = []
    number = 0
    for step in range(200):
        n = int(random.integers(0, 200))
        times = random.integers(step * 10, step * 10 + 5000, n)
        keys = np.arange(number, number + n)
        number += n
        model += zip(times.tolist(), keys.tolist(), strict=True)
        queue.add(times, pa.record_batch([pa.array(keys)], schema=schema))
        assert queue.first() == min((t for t, _ in model), default=None)
        until = step * 10
        taken = queue.take(until)
        found = [] if taken is None else list(zip(taken[0].tolist(), taken[1].column(0).to_pylist(), strict=True))
        assert sorted(found) == sorted(entry for entry in model if entry[0] <= until)
        assert [t for t, _ in found] == sorted(t for t, _ in found)
        model = [entry for entry in model if entry[0] > until]
        assert len(queue._runs) <= 12, "runs of like size are merged"


def test_operator_type() -> None:
    assert isinstance(made(ByKey()).build(), Operator)
