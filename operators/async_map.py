"""`MapBatchesAsync`: user code that waits (for a model server, a database), many batches at a time.

W1  a watermark does not overtake rows that are in flight: `AsyncMapOperator.on_watermark`.
A3  the batches in flight are the state of the step: after a restore they are called again, so a call may happen twice,
    but its rows go on once.
F3  no more than ``concurrency`` batches are in flight, and no input is taken meanwhile (`AsyncMapOperator.full`): what
    waits to be called is the rest of one element of the input.

The functions run in an asyncio loop on a thread of its own, one a subtask. Results are looked for when batches come and
every ``POLL_S`` while any are in flight, so all else is as if they had come from the loop thread of the subtask. Where
`OperatorContext.threads` is false (the local runtime, the simulator) each look waits for all of them and takes them in
the order in which they were called: then a run does not depend on how fast they are.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.errors import ConfigError, DataError, UserCodeError
from rayflow.operators.base import FrozenState, FrozenTable, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.user_code import MapBatches, MapBatchesOperator

STATE: Final = "in_flight"
POLL_S: Final = 0.002
RESTORED_ROWS: Final = 65_536
"""Largest batch that is made of rows that were in flight."""
PAUSE_S: Final = 0.1
"""Before the first retry; twice as long before each other one, up to `PAUSE_MAX_S`."""
PAUSE_MAX_S: Final = 5.0
CLOSE_S: Final = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class MapBatchesAsync(MapBatches):
    """As `MapBatches`, with an ``async def`` function, or a class with ``async def __call__``, which is built on the
    thread that calls it. ``timeout_s`` bounds each call (None: no bound), ``retries`` says how often a call that failed
    or took too long is made again. Without ``ordered`` results go on as they come."""

    concurrency: int = 8
    ordered: bool = True
    timeout_s: float | None = 30.0
    retries: int = 0

    loses_order: ClassVar[bool] = True
    """Rows called again after a restore may come behind later ones of other subtasks (see `Plan`)."""

    def __post_init__(self) -> None:
        MapBatches.__post_init__(self)
        called = self.fn if inspect.isroutine(self.fn) else getattr(self.fn, "__call__", self.fn)  # noqa: B004
        if not (inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(self.fn)):
            raise ConfigError(
                "map_batches_async needs an async function or a class with async __call__, got "
                f"{getattr(self.fn, '__name__', self.fn)!r}; write async def, or use map_batches"
            )
        for option, value, least in (("concurrency", self.concurrency, 1), ("retries", self.retries, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"map_batches_async({option}) must be a whole number from {least} on, got {value!r}")

    @property
    def stateful(self) -> bool:
        return True

    def build(self) -> Operator:
        return AsyncMapOperator(self)


class AsyncLoop:
    """An asyncio loop on its own thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel what is running. Code that does not wait for anything cannot be cancelled and is left behind."""
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join(CLOSE_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _cancel(self) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: self._loop.stop())
        else:
            self._loop.stop()


@dataclass(eq=False, slots=True)
class Call:
    """A batch in flight."""

    batch: pa.RecordBatch
    answer: Future[Any] | None = None
    """None: not called yet, because too many others are."""


@dataclass(slots=True)
class Mark:
    """A watermark that waits for the calls before it."""

    time: int


class AsyncMapOperator(MapBatchesOperator):
    """See `MapBatchesAsync`."""

    def __init__(self, factory: MapBatchesAsync) -> None:
        super().__init__(factory)
        self._options = factory
        self._loop: AsyncLoop | None = None
        self._flight: deque[Call | Mark] = deque()
        """In the order in which they came. Marks are never next to each other."""
        self._calls = 0
        """How many calls are among them."""
        self._released = MIN_WATERMARK
        """No row that has not been emitted yet came before this watermark."""
        self._due: float | None = None
        self._answer: Any = None

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        factory = self._options
        self._ordered = factory.ordered or not ctx.threads
        self._loop = AsyncLoop(f"rayflow-async-{ctx.operator}-{ctx.subtask}")
        if inspect.isclass(factory.fn):
            try:
                self._call = self._loop.submit(self._construct()).result()
            except Exception as error:
                raise UserCodeError(
                    f"{ctx}: the constructor of {self._name} raised {type(error).__name__}: {error}"
                ) from error

    async def _construct(self) -> Any:
        """On the thread that calls it, because clients belong to the loop they are made in."""
        factory = self._options
        return factory.fn(*factory.fn_constructor_args, **factory.fn_constructor_kwargs)

    # ---------------------------------------------------------------------------------------------------------- calls

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        size = self._options.batch_size or max(batch.num_rows, 1)
        for at in range(0, batch.num_rows, size):
            if self.ctx.threads:
                self._emit_answered()
            self._add(batch.slice(at, size))

    def full(self) -> bool:
        return self._calls >= self._options.concurrency

    def _add(self, batch: pa.RecordBatch) -> None:
        self._flight.append(Call(batch))
        self._calls += 1
        self._start()
        if self._due is None:
            self._due = self.ctx.wall_time() + POLL_S

    def _start(self) -> None:
        """Call what has not been called, as far as ``concurrency`` allows."""
        assert self._loop is not None
        calls = [each for each in self._flight if isinstance(each, Call)]
        for call in calls[: self._options.concurrency]:
            if call.answer is None:
                call.answer = self._loop.submit(self._called(call.batch))

    async def _called(self, batch: pa.RecordBatch) -> Any:
        factory = self._options
        pause_s = PAUSE_S
        for left in reversed(range(factory.retries + 1)):
            limit = asyncio.timeout(factory.timeout_s)
            try:
                async with limit:
                    return await self._call(batch, *factory.fn_args, **factory.fn_kwargs)
            except Exception as error:
                if not left:
                    tried = f", in the last of {factory.retries + 1} calls" if factory.retries else ""
                    if limit.expired():
                        what = f"did not answer within {factory.timeout_s:g} s"
                        raise UserCodeError(
                            f"{self.ctx}: the function {self._name} {what} on a batch of {batch.num_rows} rows{tried}; "
                            "raise timeout=, or pass smaller batches by batch_size="
                        ) from error
                    raise UserCodeError(
                        f"{self.ctx}: the function {self._name} raised {type(error).__name__}: {error} on a batch of "
                        f"{batch.num_rows} rows{tried}"
                    ) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
        raise AssertionError("the last call returns or raises")

    def _wait(self) -> None:
        """Until a result can be emitted."""
        answers = [each.answer for each in self._flight if isinstance(each, Call) and each.answer is not None]
        wait(answers[:1] if self._ordered else answers, return_when=FIRST_COMPLETED)

    def _drain(self) -> None:
        """Wait for all that is in flight, and emit it."""
        self._emit_answered()
        while self._calls:
            self._wait()
            self._emit_answered()

    def _emit_answered(self) -> None:
        """Emit the results that are there: up to the first that is not, or all of them."""
        for call in self._answered():
            self._calls -= 1
            self._start()
            self._answer = call.answer
            MapBatchesOperator.process(self, call.batch, 0)
        self._answer = None
        if not self._calls:
            self._due = None

    def _answered(self) -> Iterator[Call]:
        flight = self._flight
        if not self._ordered:
            for each in list(flight):
                if isinstance(each, Call) and _is_answered(each):
                    flight.remove(each)
                    yield each
        while flight:
            first = flight[0]
            if isinstance(first, Mark):
                self._released = first.time
                flight.popleft()
            elif _is_answered(first):
                flight.popleft()
                yield first
            else:
                return

    def _results(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        for piece in self._pieces(self._answer.result()):
            yield from self._batches(piece)

    # ------------------------------------------------------------------------------------------------- time and state

    def next_timer(self) -> float | None:
        return self._due

    def on_time(self, now: float) -> None:
        if self.ctx.threads:
            self._emit_answered()
        else:
            self._drain()
        if self._calls:
            self._due = now + POLL_S

    def on_watermark(self, time: int) -> int:
        """Passed on when the rows before it have been emitted; the end of the input waits for them."""
        if time == MAX_WATERMARK:
            self._drain()
            self._released = time
        elif not self._calls:
            self._flight.clear()
            self._released = max(self._released, time)
        else:
            self._mark(time)
        return self._released

    def _mark(self, time: int) -> None:
        marks = [each.time for each in self._flight if isinstance(each, Mark)]
        if time <= max(marks, default=self._released):
            return
        if isinstance(self._flight[-1], Mark):
            self._flight[-1].time = time
        else:
            self._flight.append(Mark(time))

    def on_idle(self, inputs_idle: bool) -> bool:
        return inputs_idle and not self._calls

    def on_end(self) -> None:
        self._drain()

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        batches = tuple(each.batch for each in self._flight if isinstance(each, Call))
        if not batches:
            return None
        return FrozenState((FrozenTable(STATE, batches, schema=batches[0].schema, spread="list"),))

    def restore(self, states: Sequence[RestoredState]) -> None:
        size = self._options.batch_size or RESTORED_ROWS
        for state in states:
            if state.name != STATE:
                raise DataError(f"{self.ctx} knows the state {STATE!r}, got {state.name!r}; restore a matching flow")
            for batch in state.table.replace_schema_metadata(None).combine_chunks().to_batches(max_chunksize=size):
                if batch.num_rows:
                    self._add(batch)

    def close(self) -> None:
        self._flight.clear()
        self._calls = 0
        if self._loop is not None:
            self._loop.close()


def _is_answered(call: Call) -> bool:
    return call.answer is not None and call.answer.done()


__all__ = ["POLL_S", "STATE", "AsyncLoop", "AsyncMapOperator", "MapBatchesAsync"]
