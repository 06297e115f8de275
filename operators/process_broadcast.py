"""Broadcast state: rows of a second input that every subtask sees, remembered beside keyed state.

Every subtask holds the whole state and all have seen the same rows at an aligned barrier, so **subtask 0 alone freezes
it, and every subtask restores from that** (``spread="union"``): written once, however many subtasks there are, and at
any parallelism later all copies are equal. If copies had come to differ, because several subtasks wrote the other
stream and a process let the order of their rows matter, a restore makes them equal again. In ``at_least_once`` mode
subtask 0 may have seen rows behind the barrier: they come again, as all rows do there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from rayflow.core.ids import CheckpointId
from rayflow.errors import StateSchemaError, UserCodeError
from rayflow.operators.base import MAIN, FrozenState, FrozenTable, OperatorContext, Output, RestoredState
from rayflow.operators.process import BroadcastProcess, KeyedProcess, Process
from rayflow.operators.process_operator import ProcessOperator
from rayflow.operators.process_output import Emitted, brief
from rayflow.operators.state.declared import BroadcastState, declared_states
from rayflow.operators.state.fitting import StateProblem, fitted

BROADCAST_INPUT: Final = 1


class BroadcastHandle:
    """See `rf.BroadcastState`. Named methods take and give Arrow arrays; ``[]``, ``in`` and `items` Python values."""

    def __init__(self, declared: BroadcastState, name: str, ctx: OperatorContext) -> None:
        self.declared = declared
        self.name = name
        self.writable = False
        """True while ``process_broadcast`` runs."""
        self._ctx = ctx
        self._rows: dict[Any, Any] = {}
        """Python key -> Python value; small by contract."""
        self._columns: pa.RecordBatch | None = None
        """The same as columns; None after a change."""

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(self.declared.columns)

    def entries(self) -> pa.RecordBatch:
        """All entries: ``map_key``, ``value``."""
        if self._columns is None:
            keys = pa.array(list(self._rows), self.declared.key_type)
            values = pa.array(list(self._rows.values()), self.declared.type)
            self._columns = pa.RecordBatch.from_arrays([keys, values], schema=self.schema)
        return self._columns

    def get(self, map_keys: Any, default: Any = None) -> Any:
        """For an array of keys the array of their values, null where there is no entry; for one key (a Python value)
        its value, ``default`` where there is none."""
        if not isinstance(map_keys, pa.Array | pa.ChunkedArray):
            return self._rows.get(map_keys, default)
        columns = self.entries()
        found = pc.index_in(self._fit(map_keys, self.declared.key_type), columns.column(0))
        return columns.column(1).take(found)

    def contains(self, map_keys: Any) -> pa.Array:
        """Whether there is an entry, for an array of keys."""
        return pc.is_in(self._fit(map_keys, self.declared.key_type), self.entries().column(0))

    def put(self, map_keys: Any, values: Any) -> None:
        """Set entries: arrays of equal length; of several with one key the last counts."""
        self._check_writable()
        keys = self._fit(map_keys, self.declared.key_type)
        if keys.null_count:
            raise self._bad(f"got {keys.null_count} null keys, expected none; filter those rows out")
        try:
            array = fitted(values, self.declared.type, len(keys), "key")
        except StateProblem as error:
            raise self._bad(str(error)) from error
        self._rows.update(zip(keys.to_pylist(), array.to_pylist(), strict=True))
        self._columns = None

    def remove(self, map_keys: Any) -> None:
        """Remove the entries of an array of keys; those that are not there are left out."""
        self._check_writable()
        for key in self._fit(map_keys, self.declared.key_type).to_pylist():
            self._rows.pop(key, None)
        self._columns = None

    def clear(self) -> None:
        """Remove all entries."""
        self._check_writable()
        self._rows, self._columns = {}, None

    def __getitem__(self, key: Any) -> Any:
        return self._rows[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.put([key], [value])

    def __delitem__(self, key: Any) -> None:
        self._check_writable()
        del self._rows[key]
        self._columns = None

    def __contains__(self, key: Any) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def items(self) -> list[tuple[Any, Any]]:
        """All entries as Python objects."""
        return list(self._rows.items())

    def restore(self, table: pa.Table) -> None:
        try:
            table = table.select(self.schema.names).cast(self.schema)
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise StateSchemaError(
                f"{self._ctx}: the broadcast state {self.name!r} was {brief(table.schema)} in the checkpoint and is "
                f"declared as {brief(self.schema)}: {error}; declare it as it was, or under a new name"
            ) from error
        self._rows.update(zip(table.column(0).to_pylist(), table.column(1).to_pylist(), strict=True))
        self._columns = None

    def _fit(self, values: Any, kind: pa.DataType) -> pa.Array:
        try:
            return fitted(values, kind, len(values), "key")
        except StateProblem as error:
            raise self._bad(str(error)) from error

    def _check_writable(self) -> None:
        if not self.writable:
            raise self._bad(
                "is read-only here: rows of one key must not change what all subtasks see; write it in "
                "process_broadcast"
            )

    def _bad(self, text: str) -> UserCodeError:
        return UserCodeError(f"{self._ctx}: the broadcast state {self.name!r} {text}")


class BroadcastContext:
    """``ctx`` of ``process_broadcast``."""

    def __init__(self, operator: OperatorContext, emitted: Emitted, watermark: int) -> None:
        self._operator = operator
        self._emitted = emitted
        self.watermark = watermark
        """No row with event time below it follows, on either input (int us)."""

    @property
    def wall_time(self) -> int:
        """Processing time (int us)."""
        return round(self._operator.wall_time() * 1e6)

    @property
    def subtask(self) -> int:
        """Number of this subtask: all see the same rows; let one of them emit."""
        return self._operator.subtask

    def emit(self, batch: Any, *, tag: str = MAIN) -> None:
        """Rows for the next step, from every subtask: a RecordBatch, a Table or a dict of columns."""
        self._emitted.columns(batch, tag)


class BroadcastOperator(ProcessOperator):
    """Input 0: keyed rows; input 1: the rows that all subtasks see."""

    def __init__(self, factory: Process, working: KeyedProcess) -> None:
        super().__init__(factory, working)
        assert isinstance(working, BroadcastProcess)
        self._listener = working
        self._shared: Mapping[str, BroadcastHandle] = {}

    def open(self, ctx: OperatorContext, out: Output) -> None:
        declared = declared_states(type(self._user))
        self._shared = {n: BroadcastHandle(d, n, ctx) for n, d in declared.items() if isinstance(d, BroadcastState)}
        self._user.__dict__.update(self._shared)
        super().open(ctx, out)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if input_index != BROADCAST_INPUT:
            super().process(batch, input_index)
            return
        for handle in self._shared.values():
            handle.writable = True
        try:
            with self._guard("process_broadcast", f" on {batch.num_rows} rows"):
                self._listener.process_broadcast(batch, BroadcastContext(self.ctx, self._emitted, self._watermark))
        finally:
            for handle in self._shared.values():
                handle.writable = False
        self._pass_on()

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        frozen = super().snapshot(checkpoint)
        assert frozen is not None
        if self.ctx.subtask != 0:
            return frozen
        tables = tuple(
            FrozenTable(name, (handle.entries(),), schema=handle.schema, spread="union")
            for name, handle in self._shared.items()
        )
        return replace(frozen, tables=frozen.tables + tables)

    def _restored(self, state: RestoredState) -> bool:
        if state.name in self._shared:
            self._shared[state.name].restore(state.table)
            return True
        return super()._restored(state)


__all__ = ["BroadcastContext", "BroadcastHandle", "BroadcastOperator"]
