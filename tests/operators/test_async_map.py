"""Asynchronous user code: order, bounds, retries, and that rows in flight are part of checkpoints.

Nothing sleeps: the functions wait for events of the test, and the test for their answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.errors import ConfigError, UserCodeError
from rayflow.operators import async_map as module
from rayflow.operators.async_map import AsyncMapOperator, MapBatchesAsync
from rayflow.operators.base import MAIN, Collected
from tests.operators.helpers import context, frozen

TIMEOUT_S = 60


def batch(*values: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"x": pa.array(values, pa.int64())})


@contextmanager
def running(factory: MapBatchesAsync, *, threads: bool = True) -> Iterator[tuple[AsyncMapOperator, Collected]]:
    operator, out = factory.build(), Collected()
    assert isinstance(operator, AsyncMapOperator)
    operator.open(replace(context(), threads=threads), out)
    try:
        yield operator, out
    finally:
        operator.close()


def values(out: Collected) -> list[int]:
    return [x for each in out.batches.get(MAIN, []) for x in each.column("x").to_pylist()]


class Gate:
    """Lets calls through by the first value of their batch, and says which have begun."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.most = 0
        self._now = 0
        self._open: dict[int, Future[None]] = {}

    def open(self, *firsts: int) -> None:
        for first in firsts:
            self._open.setdefault(first, Future()).set_result(None)

    async def __call__(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        first = rows.column("x")[0].as_py()
        self.begun.append(first)
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.wrap_future(self._open.setdefault(first, Future()))
        self._now -= 1
        return rows


def answered(operator: AsyncMapOperator, *positions: int) -> None:
    """Wait until the calls at these places in flight have been answered, and have them emitted."""
    calls = [each for each in operator._flight if isinstance(each, module.Call)]
    done, _ = wait([call.answer for i, call in enumerate(calls) if i in positions and call.answer], TIMEOUT_S)
    assert len(done) == len(positions)
    operator.on_time(0.0)


def test_ordered_results_wait_for_those_before_them() -> None:
    gate = Gate()
    with running(MapBatchesAsync(gate)) as (operator, out):
        for value in (1, 2, 3):
            operator.process(batch(value), 0)
        gate.open(2, 3)
        answered(operator, 1, 2)
        assert values(out) == []
        gate.open(1)
        answered(operator, 0)
        assert values(out) == [1, 2, 3]
        assert operator.next_timer() is None


def test_unordered_results_go_on_as_they_come_and_watermarks_do_not() -> None:
    gate = Gate()
    with running(MapBatchesAsync(gate, ordered=False)) as (operator, out):
        operator.process(batch(1), 0)
        assert operator.on_watermark(10) == MIN_WATERMARK
        operator.process(batch(2), 0)
        assert operator.on_watermark(20) == MIN_WATERMARK
        gate.open(2)
        answered(operator, 1)
        assert values(out) == [2]
        assert operator.on_watermark(20) == MIN_WATERMARK
        assert not operator.on_idle(True)
        gate.open(1)
        answered(operator, 0)
        assert operator.on_watermark(20) == 20
        assert operator.on_idle(True)


def test_a_watermark_is_released_by_the_rows_before_it() -> None:
    gate = Gate()
    with running(MapBatchesAsync(gate)) as (operator, _):
        assert operator.on_watermark(5) == 5
        operator.process(batch(1), 0)
        for time in (6, 10):
            assert operator.on_watermark(time) == 5
        operator.process(batch(2), 0)
        assert operator.on_watermark(20) == 5
        gate.open(1)
        answered(operator, 0)
        assert operator.on_watermark(20) == 10
        gate.open(2)
        assert operator.on_watermark(MAX_WATERMARK) == MAX_WATERMARK


def test_a_watermark_that_overtakes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: watermarks are passed on as they come."""
    monkeypatch.setattr(AsyncMapOperator, "on_watermark", lambda self, time: time)
    with pytest.raises(AssertionError):
        test_a_watermark_is_released_by_the_rows_before_it()


@pytest.mark.parametrize("ordered", [True, False])
def test_no_more_calls_than_allowed_run_at_once(ordered: bool) -> None:
    gate = Gate()
    gate.open(*range(50))
    with running(MapBatchesAsync(gate, concurrency=3, ordered=ordered, batch_size=1)) as (operator, out):
        for value in range(40):
            while operator.full():
                operator._wait()
                operator.on_time(0.0)
            operator.process(batch(value), 0)
            assert operator._calls <= 3
        operator.process(batch(*range(40, 50)), 0)
        operator.on_watermark(MAX_WATERMARK)
        assert sorted(values(out)) == list(range(50))
        assert values(out) == sorted(values(out)) or not ordered
        assert 1 <= gate.most <= 3


@pytest.mark.parametrize("threads", [True, False])
def test_rows_in_flight_are_called_again_after_a_restore(threads: bool) -> None:
    gate, again = Gate(), Gate()
    with running(MapBatchesAsync(gate, concurrency=4)) as (operator, out):
        for value in (1, 2, 3, 4):
            operator.process(batch(value, -value), 0)
        gate.open(1)
        answered(operator, 0)
        assert values(out) == [1, -1]
        states = frozen(operator)
        gate.open(2, 3, 4)
        operator.on_end()
        assert operator.snapshot(CheckpointId(2)) is None
    again.open(2, 3, 4)
    with running(MapBatchesAsync(again, concurrency=1, batch_size=2), threads=threads) as (operator, out):
        operator.restore(states)
        assert operator.on_watermark(7) == MIN_WATERMARK, "W1: the rows restored come first"
        assert operator.next_timer() is not None
        operator.on_watermark(MAX_WATERMARK)
        assert values(out) == [2, -2, 3, -3, 4, -4]
        assert again.most == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), max_size=12),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 12),
    st.sampled_from([None, 1, 3]),
)
def test_all_rows_come_out_once_whatever_the_way(
    sent: list[list[int]], concurrency: int, ordered: bool, threads: bool, restore_at: int, size: int | None
) -> None:
    async def twice(rows: pa.RecordBatch) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"x": [2 * x for x in rows.column("x").to_pylist()]}

    factory = MapBatchesAsync(twice, concurrency=concurrency, ordered=ordered, batch_size=size)
    found, states = [], []
    with running(factory, threads=threads) as (operator, out):
        for data in sent[:restore_at]:
            operator.process(batch(*data), 0)
        states = frozen(operator) if operator._calls else []
        found += values(out)
    with running(factory, threads=threads) as (operator, out):
        operator.restore(states)
        for data in sent[restore_at:]:
            operator.process(batch(*data), 0)
        operator.on_watermark(MAX_WATERMARK)
        operator.on_end()
        found += values(out)
    expected = [2 * x for data in sent for x in data]
    assert (found if ordered or not threads else sorted(found)) == (
        expected if ordered or not threads else sorted(expected)
    )


def test_a_step_without_its_rows_in_the_checkpoint_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken on purpose: what is in flight is not frozen."""
    real = AsyncMapOperator.snapshot

    def broken(self: AsyncMapOperator, checkpoint: CheckpointId) -> Any:
        state = real(self, checkpoint)
        return state and replace(state, tables=(replace(state.tables[0], batches=state.tables[0].batches[:1]),))

    monkeypatch.setattr(AsyncMapOperator, "snapshot", broken)
    with pytest.raises(AssertionError):
        test_rows_in_flight_are_called_again_after_a_restore(True)


def test_failed_calls_are_made_again_and_then_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    calls: list[int] = []

    async def moody(rows: pa.RecordBatch, good_after: int) -> pa.RecordBatch:
        calls.append(len(calls))
        if len(calls) <= good_after:
            raise ConnectionError("busy")
        return rows

    with running(MapBatchesAsync(moody, retries=2, fn_args=(2,))) as (operator, out):
        operator.process(batch(1), 0)
        operator.on_end()
        assert values(out) == [1]
        assert len(calls) == 3
    calls.clear()
    with running(MapBatchesAsync(moody, retries=1, fn_args=(5,))) as (operator, _):
        operator.process(batch(1, 2), 0)
        with pytest.raises(
            UserCodeError, match=r"moody raised ConnectionError: busy on a batch of 2 rows, in the last"
        ):
            operator.on_end()


def test_a_call_that_takes_too_long_is_named() -> None:
    async def stuck(rows: pa.RecordBatch) -> pa.RecordBatch:
        await asyncio.Event().wait()
        return rows

    with running(MapBatchesAsync(stuck, timeout_s=0.01)) as (operator, _):
        operator.process(batch(1), 0)
        with pytest.raises(UserCodeError, match=r"stuck did not answer within 0\.01 s on a batch of 1 rows; raise"):
            operator.on_end()


def test_closing_cancels_what_is_in_flight() -> None:
    cancelled = threading.Event()
    begun = threading.Event()

    async def stuck(rows: pa.RecordBatch) -> pa.RecordBatch:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        return rows

    with running(MapBatchesAsync(stuck)) as (operator, _):
        operator.process(batch(1), 0)
        assert begun.wait(TIMEOUT_S)
    assert cancelled.is_set()
    operator.close()


class Client:
    """Built where a loop runs, as clients of services want it."""

    def __init__(self, add: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._add = add

    async def __call__(self, rows: pa.RecordBatch) -> dict[str, Any]:
        assert asyncio.get_running_loop() is self._loop
        return {"x": [x + self._add for x in rows.column("x").to_pylist()]}


def test_a_class_is_built_in_the_loop_that_calls_it() -> None:
    with running(MapBatchesAsync(Client, fn_constructor_args=(5,))) as (operator, out):
        operator.process(batch(1, 2), 0)
        operator.on_end()
        assert values(out) == [6, 7]
    missing = pytest.raises(UserCodeError, match="the constructor of Client raised TypeError")
    with missing, running(MapBatchesAsync(Client)):
        pass


def test_what_returns_no_rows_is_named() -> None:
    async def wrong(rows: pa.RecordBatch) -> int:
        return 5

    with running(MapBatchesAsync(wrong)) as (operator, _):
        operator.process(batch(1), 0)
        with pytest.raises(UserCodeError, match="wrong returned int, expected a pyarrow.RecordBatch"):
            operator.on_end()


async def same(rows: pa.RecordBatch) -> pa.RecordBatch:
    return rows


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MapBatchesAsync(lambda rows: rows), "needs an async function"),
        (lambda: MapBatchesAsync(dict), "needs an async function"),
        (lambda: MapBatchesAsync(same, concurrency=0), "concurrency"),
        (lambda: MapBatchesAsync(same, retries=-1), "retries"),
    ],
)
def test_options_are_checked_while_building(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
