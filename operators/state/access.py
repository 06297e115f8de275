"""Handles to keyed state for whole batches: what the attributes of a `KeyedProcess` with ``process_batch`` are.

Two shapes occur, and every argument says which it has:

- **a value per key**: as long as ``ctx.keys``, the distinct keys of this call; entry i belongs to key i.
- **a value per row**: as long as the batch (or the timers); row j belongs to key ``ctx.index[j]``.

``ctx`` is that of the running call: slots of keys are looked up once a call and table. A ``mask`` (bool) leaves out the
entries where it is not true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa

from rayflow.errors import UserCodeError
from rayflow.operators.base import OperatorContext
from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.declared import VALUES, Declared, shares_table
from rayflow.operators.state.fitting import StateProblem, fitted, fitted_mask
from rayflow.operators.state.table import StateTable

D = TypeVar("D", bound=Declared)


class Tables(Protocol):
    """The tables of the running subtask, once the types of its keys are known."""

    ctx: OperatorContext

    def table(self, name: str) -> StateTable: ...

    def next_positions(self, n: int) -> Int64Array:
        """Positions for list elements: ascending, never given before."""


class Scope:
    """The keys of one call: a batch, or the timers that fire together."""

    def __init__(self, keys: pa.RecordBatch, index: Int64Array) -> None:
        self.keys = keys
        self.index = index
        self.live = True
        """False when the call is over: slots have moved since."""
        self._found: dict[str, tuple[Int64Array, bool]] = {}

    def slots(self, table: StateTable, *, insert: bool) -> Int64Array:
        """A slot per key; looked up again only to insert."""
        known = self._found.get(table.name)
        if known is not None and (known[1] or not insert):
            return known[0]
        slots = table.slots(self.keys.columns, insert=insert)
        self._found[table.name] = (slots, insert)
        return slots

    def forget(self, table: StateTable) -> None:
        """Rows were removed or other keys looked up: the slots are no longer those."""
        self._found.pop(table.name, None)


class HasScope(Protocol):
    @property
    def scope(self) -> Scope: ...


class Handle(Generic[D]):
    """One declared state in one subtask."""

    def __init__(self, declared: D, name: str, tables: Tables) -> None:
        self.declared = declared
        self.name = name
        self._tables = tables
        self._shared = shares_table(declared)

    @property
    def table(self) -> StateTable:
        return self._tables.table(VALUES if self._shared else self.name)

    def problem(self, text: str) -> UserCodeError:
        return UserCodeError(f"{self._tables.ctx}: the state {self.name!r} {text}")

    def scope(self, ctx: HasScope) -> Scope:
        scope = getattr(ctx, "scope", None)
        if not isinstance(scope, Scope):
            raise self.problem(f"needs the ctx of the call as its first argument, got {type(ctx).__name__}; pass ctx")
        if not scope.live:
            raise self.problem("was used with the ctx of an earlier call; use the ctx of the running one")
        return scope

    def fit(self, values: Any, kind: pa.DataType, rows: int, per: str) -> pa.Array:
        try:
            return fitted(values, kind, rows, per)
        except StateProblem as error:
            raise self.problem(str(error)) from error

    def mask(self, mask: Any, rows: int, per: str) -> pa.Array | None:
        try:
            return fitted_mask(mask, rows, per)
        except StateProblem as error:
            raise self.problem(str(error)) from error

    def call(self, what: str, function: Callable[[], pa.Array], rows: int | None = None) -> pa.Array:
        """Calls a function of the declaration and says whose it was when it fails."""
        try:
            found = function()
        except (pa.ArrowException, TypeError, ValueError, OverflowError, ArithmeticError) as error:
            raise self.problem(f"could not be {what}: {type(error).__name__}: {error}") from error
        if rows is not None and len(found) != rows:
            raise self.problem(f"has a function that gave {len(found)} values for {rows}; give one for each")
        return found


def true_rows(mask: pa.Array) -> Int64Array:
    """Where a mask without nulls is true."""
    return np.flatnonzero(mask.to_numpy(zero_copy_only=False))


__all__ = ["Handle", "HasScope", "Scope", "Tables", "true_rows"]
