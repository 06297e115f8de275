"""Runs a `KeyedProcess` in one subtask.

A3  what a call changes in state and timers and what it emits lie on one side of a barrier: output is passed on when
    user code has returned, before the next event.
W1  timers at or before a watermark fire before it is passed on, unchanged.
R3  timers are state: a fired one is deleted before the checkpoint that holds its effects, so each fires exactly once.

Differences to Flink: the order of timers and their deduplication are Flink's; pending processing timers are dropped at
the end of the input, as there; timers that set timers for ever at the end are an error instead of an endless loop.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, RayflowError, StateSchemaError, UserCodeError
from rayflow.operators.base import (
    MAIN,
    FrozenState,
    FrozenTable,
    Operator,
    OperatorContext,
    Output,
    RestoredState,
)
from rayflow.operators.event_time import EventTimeReader
from rayflow.operators.grouping import Int64Array, plain_key
from rayflow.operators.process import KEYS, KeyedProcess, Process, declared_output, overrides
from rayflow.operators.process_context import BatchContext, KeyContext
from rayflow.operators.process_output import Emitted, brief
from rayflow.operators.state.access import Handle, Scope
from rayflow.operators.state.access_tables import handle_of
from rayflow.operators.state.cells import Cell, cell_of
from rayflow.operators.state.declared import BroadcastState, declared_states, key_schema, table_schemas
from rayflow.operators.state.distinct import distinct
from rayflow.operators.state.keyed import KeyedState
from rayflow.operators.state.table import StateTable
from rayflow.operators.state.timers import Due, TimerKind, Timers

ROUNDS_MAX: Final = 100_000
"""Timers set by timers set by timers of one watermark."""


class ProcessOperator(Operator):
    """See `KeyedProcess`. ``working`` is this subtask's copy of the description."""

    def __init__(self, factory: Process, working: KeyedProcess) -> None:
        self._factory = factory
        self._user = working
        self._name = type(working).__name__
        self._watermark = MIN_WATERMARK
        self._state: KeyedState | None = None
        self._keys: pa.Schema | None = None
        """Types of the keys, once the tables are there."""
        self._key_types: pa.Schema | None = None
        """What the plan or a checkpoint says they are."""
        self._tables: dict[str, StateTable] = {}
        self._timers: Timers | None = None
        self._undeclared: dict[str, pa.Table] = {}
        self._next_position = 0
        self._ended = False
        self._opened = False

    # ------------------------------------------------------------------------------------------------- life and state

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        self._state = KeyedState(ctx, self._factory.keys)
        self._reader = (
            None
            if self._factory.event_time is None
            else EventTimeReader(self._factory.event_time, on_error="fail", where=str(ctx))
        )
        self._handles: dict[str, Handle[Any]] = {}
        self._cells: list[Cell[Any]] = []
        for name, declared in declared_states(type(self._user)).items():
            if isinstance(declared, BroadcastState):
                continue
            handle = self._handles[name] = handle_of(declared, name, self)
            if self._factory.batched:
                self._user.__dict__[name] = handle
            else:
                self._cells.append(cell_of(handle))
                self._user.__dict__[name] = self._cells[-1]
        output = declared_output(self._user, self._factory.schema)
        self._emitted = Emitted(ctx, self._name, {MAIN: output, **self._user.side_outputs})
        self._key_types = None
        if self._factory.schema is not None:
            self._key_types = key_schema(self._factory.schema, self._factory.keys)
        self._opened = True
        with self._guard("open"):
            self._user.open(ctx)

    def restore(self, states: Sequence[RestoredState]) -> None:
        assert self._state is not None
        self._state.restore([state for state in states if not self._restored(state)])

    def _restored(self, state: RestoredState) -> bool:
        """Takes operator state; False for keyed state."""
        if state.name != KEYS:
            # Without keys, and not declared any more: broadcast state of an older flow, kept as keyed tables are.
            foreign = state.folder is None and any(key not in state.table.schema.names for key in self._factory.keys)
            if foreign:
                self._undeclared[state.name] = state.table
            return foreign
        if self._key_types is None:
            self._key_types = state.table.schema.remove_metadata()
        assert isinstance(state.meta, dict)
        position = state.meta["next_position"]
        assert isinstance(position, int)
        self._next_position = max(self._next_position, position)
        return True

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        assert self._state is not None
        frozen = self._state.freeze()
        tables = list(frozen.tables)
        if self._key_types is not None:
            meta: dict[str, Any] = {"next_position": self._next_position}
            tables.append(FrozenTable(KEYS, schema=self._key_types, meta=meta, spread="union"))
        if self.ctx.subtask == 0:
            tables += [FrozenTable(n, (t,), schema=t.schema, spread="union") for n, t in self._undeclared.items()]
        return replace(frozen, tables=tuple(tables))

    def close(self) -> None:
        if self._state is not None:
            self._state.close()
        if self._opened:
            self._opened = False
            with self._guard("close"):
                self._user.close()

    # ------------------------------------------------------------------------- what handles need (see `access.Tables`)

    def table(self, name: str) -> StateTable:
        return self._tables[name]

    def next_positions(self, n: int) -> Int64Array:
        begin = self._next_position
        self._next_position += n
        return np.arange(begin, begin + n, dtype=np.int64)

    def _bind(self, keys: pa.Schema) -> None:
        """The types of the keys are known: the tables can be there."""
        assert self._state is not None
        self._keys = self._key_types = keys
        declared = declared_states(type(self._user))
        for name, (key, values, subkeys) in table_schemas(type(self._user), keys).items():
            ttl = declared[name].ttl_us if name in declared else None
            self._tables[name] = self._state.table(name, key, values, subkeys=subkeys, ttl_us=ttl)
        self._timers = Timers(self._state, keys)

    # -------------------------------------------------------------------------------------------------------- rows in

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        scope = self._scope(self._key_columns(batch))
        if self._factory.batched:
            self._call_batch("process_batch", lambda ctx: self._user.process_batch(batch, ctx), scope, batch)
        else:
            self._call_by_key(batch, scope)

    def _key_columns(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        missing = [name for name in self._factory.keys if name not in batch.schema.names]
        if missing:
            raise DataError(
                f"{self.ctx}: the rows have no key column {missing[0]!r}, they have {brief(batch.schema)}; "
                "key by a column that is there"
            )
        columns = [plain_key(batch.column(name)) for name in self._factory.keys]
        if self._keys is None:
            known = self._key_types
            self._bind(known if known is not None else key_schema(batch.schema, self._factory.keys))
        assert self._keys is not None
        for i, field in enumerate(self._keys):
            if not columns[i].type.equals(field.type):
                columns[i] = self._cast_key(columns[i], field)
        return pa.RecordBatch.from_arrays(columns, schema=self._keys)

    def _cast_key(self, column: pa.Array, field: pa.Field) -> pa.Array:
        same = pa.types.is_integer(column.type) and pa.types.is_integer(field.type)
        text = {pa.string(), pa.large_string()}
        if same or (column.type in text and field.type in text):
            try:
                return column.cast(field.type)
            except pa.ArrowException:
                pass
        raise StateSchemaError(
            f"{self.ctx}: the key column {field.name!r} is {column.type}, and {field.type} in the state there is; cast "
            "it to that type before key_by"
        )

    def _scope(self, keys: pa.RecordBatch) -> Scope:
        first, index = distinct(keys.columns)
        return Scope(keys if len(first) == keys.num_rows else keys.take(pa.array(first)), index)

    def _times_of(self, batch: pa.RecordBatch) -> Callable[[], Int64Array]:
        def read() -> Int64Array:
            if self._reader is None:
                raise UserCodeError(
                    f"{self.ctx}: ctx.timestamps needs event time, the stream has none; pass event_time= to the source "
                    "or call .with_event_time(column) before key_by"
                )
            times: Int64Array = self._reader.read(batch)[1].to_numpy()
            return times

        return read

    @contextmanager
    def _guard(self, method: str, detail: str = "") -> Iterator[None]:
        try:
            yield
        except RayflowError:
            raise
        except Exception as error:
            raise UserCodeError(
                f"{self.ctx}: {self._name}.{method} raised {type(error).__name__}: {error}{detail}"
            ) from error

    def _pass_on(self) -> None:
        """Outside of the guard: an error of the next step is not this one's."""
        for tag, batch in self._emitted.drain():
            self.out.emit(batch, tag)

    # ---------------------------------------------------------------------------------------------------- whole batches

    def _call_batch(
        self, method: str, call: Callable[[BatchContext], None], scope: Scope, batch: pa.RecordBatch | Due
    ) -> None:
        assert self._timers is not None
        kind = batch.kind if isinstance(batch, Due) else None
        times = (lambda: batch.times) if isinstance(batch, Due) else self._times_of(batch)
        ctx = BatchContext(self.ctx, self._emitted, self._watermark, kind, times, scope, self._timers)
        n = len(scope.index)
        with self._guard(method, f" on {n} {'rows' if kind is None else 'timers'}"):
            call(ctx)
        scope.live = False
        self._pass_on()

    # ------------------------------------------------------------------------------------------------------- key by key

    def _key_context(self, kind: TimerKind | None, times: Callable[[], Int64Array], scope: Scope) -> KeyContext:
        for cell in self._cells:
            cell.begin(scope)
        return KeyContext(self.ctx, self._emitted, self._watermark, kind, times)

    def _finish_keys(self, ctx: KeyContext, scope: Scope) -> None:
        """Write back what the cells hold and the timers that were set."""
        assert self._timers is not None
        for cell in self._cells:
            cell.end()
        for wanted, act in ((False, self._timers.delete), (True, self._timers.add)):
            for kind in ("event", "processing"):
                chosen = [(at, time) for (k, at, time), w in ctx.wanted.items() if k == kind and w is wanted]
                if chosen:
                    ats, times = (np.asarray(column, np.int64) for column in zip(*chosen, strict=True))
                    act(scope.keys.take(pa.array(ats)), times, kind)
        scope.live = False
        self._pass_on()

    def _python_keys(self, scope: Scope) -> list[Any]:
        columns = [column.to_pylist() for column in scope.keys.columns]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))

    def _call_by_key(self, batch: pa.RecordBatch, scope: Scope) -> None:
        ctx = self._key_context(None, self._times_of(batch), scope)
        keys = self._python_keys(scope)
        order = np.argsort(scope.index, kind="stable")
        ends = np.cumsum(np.bincount(scope.index, minlength=len(keys)))
        sorted_already = len(keys) == 1 or bool((np.diff(scope.index) >= 0).all())
        arranged = batch if sorted_already else batch.take(pa.array(order))
        begin = 0
        for at, key in enumerate(keys):
            end = int(ends[at])
            self._move(ctx, at)
            ctx.rows = order[begin:end]
            with self._guard("process", f" for key {key!r} on {end - begin} rows"):
                self._user.process(key, arranged.slice(begin, end - begin), ctx)
            begin = end
        self._finish_keys(ctx, scope)

    def _move(self, ctx: KeyContext, at: int) -> None:
        ctx.at = at
        for cell in self._cells:
            cell.move(at)

    def _fire_by_key(self, due: Due, scope: Scope, until: int) -> None:
        """In the order of time, with those that are set on the way; a timer can be deleted until it fires."""
        ctx = self._key_context(due.kind, lambda: due.times, scope)
        keys = self._python_keys(scope)
        heap = [
            (time, i, at) for i, (time, at) in enumerate(zip(due.times.tolist(), scope.index.tolist(), strict=True))
        ]
        pending = {(at, time): 0 for time, _, at in heap}
        """(position of the key, time) -> how many timers led to this one."""
        generation = 0

        def changed(kind: TimerKind, time: int, wanted: bool) -> None:
            if kind != due.kind or time > until:
                return
            if not wanted:
                pending.pop((ctx.at, time), None)
            elif (ctx.at, time) not in pending:
                self._check_rounds(generation + 1)
                pending[ctx.at, time] = generation + 1
                heapq.heappush(heap, (time, len(keys) + len(heap), ctx.at))

        ctx.on_timer_change = changed
        while heap:
            time, _, at = heapq.heappop(heap)
            if (at, time) not in pending:
                continue
            generation = pending.pop((at, time))
            self._move(ctx, at)
            ctx.wanted.pop((due.kind, at, time), None)
            with self._guard("on_timer", f" for key {keys[at]!r} at {time}"):
                self._user.on_timer(keys[at], time, ctx)
        # What is due has fired: only timers behind ``until`` are left to be set.
        ctx.wanted = {w: v for w, v in ctx.wanted.items() if w[0] != due.kind or w[2] > until}
        self._finish_keys(ctx, scope)

    # ----------------------------------------------------------------------------------------------------------- timers

    def on_watermark(self, time: int) -> int:
        if time > self._watermark:
            self._watermark = time
            self._fire("event", time)
        return time

    def next_timer(self) -> float | None:
        self._bind_restored()
        first = None if self._timers is None or self._ended else self._timers.first("processing")
        return None if first is None else first / 1e6

    def on_time(self, now: float) -> None:
        self._fire("processing", round(now * 1e6))

    def on_end(self) -> None:
        self._ended = True

    def _bind_restored(self) -> None:
        """Restored timers must be there before the first row."""
        if self._keys is None and self._key_types is not None:
            self._bind(self._key_types)

    def _fire(self, kind: TimerKind, until: int) -> None:
        self._bind_restored()
        if self._timers is None:
            return
        rounds = 0
        while (due := self._timers.take_due(kind, until)) is not None:
            rounds += 1
            self._check_rounds(rounds)
            method = "on_timers" if self._factory.batched else "on_timer"
            if not overrides(self._user, method):
                raise UserCodeError(f"{self.ctx}: {self._name} sets timers and has no {method}; write that method")
            scope = self._scope(due.keys)
            if self._factory.batched:
                self._call_batch(method, partial(self._user.on_timers, due.times), scope, due)
            else:
                self._fire_by_key(due, scope, until)

    def _check_rounds(self, rounds: int) -> None:
        if rounds > ROUNDS_MAX:
            raise UserCodeError(
                f"{self.ctx}: {self._name} sets timers in its timers for ever ({ROUNDS_MAX} in a row at watermark "
                f"{self._watermark}); set none when ctx.ended, and none that is due already"
            )


__all__ = ["ProcessOperator"]
