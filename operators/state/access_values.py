"""Handles to value, reducing and aggregating states, whole batches; shapes as in `rayflow.operators.state.access`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.grouping import Int64Array
from rayflow.operators.state.access import D, Handle, HasScope, Scope, Tables, true_rows
from rayflow.operators.state.declared import AggregatingState, ReducingState, ValueState
from rayflow.operators.state.reduce import as_array, merge_of, reduce_groups


class ValueLikeHandle(Handle[D]):
    """What value-like states have in common: a column of a table, by key."""

    declared: Any

    @property
    def column(self) -> str:
        return self.name if self._shared else self.table.values.names[0]

    def raw(self, scope: Scope) -> pa.Array:
        table = self.table
        return table.get(scope.slots(table, insert=False), self.column)

    def store(self, scope: Scope, values: pa.Array, chosen: Int64Array | None = None) -> None:
        """Values for all keys or the ``chosen`` ones; null takes the value away."""
        table = self.table
        if values.null_count:
            empty = np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))
            present = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
            self._remove(scope, empty if chosen is None else chosen[empty])
            chosen = present if chosen is None else chosen[present]
            values = values.take(pa.array(present))
        if len(values) == 0:
            return
        if chosen is not None and not self._known(scope, chosen):
            # Only these keys get a row: a table does not fill with keys that were asked for and never written.
            slots = table.slots(scope.keys.take(pa.array(chosen)).columns, insert=True)
            scope.forget(table)
        else:
            slots = scope.slots(table, insert=chosen is None)
            slots = slots if chosen is None else slots[chosen]
        table.set(slots, self.column, values)

    def _known(self, scope: Scope, chosen: Int64Array) -> bool:
        return bool((scope.slots(self.table, insert=False)[chosen] >= 0).all())

    def _remove(self, scope: Scope, chosen: Int64Array | None) -> None:
        table = self.table
        slots = scope.slots(table, insert=False)
        slots = slots if chosen is None else slots[chosen]
        slots = slots[slots >= 0]
        if len(slots) == 0:
            return
        if self._shared and len(table.values) > 1:
            table.set(slots, self.column, pa.nulls(len(slots), self.declared.type))
            others = [table.get(slots, name).is_valid() for name in table.values.names if name != self.name]
            used = np.zeros(len(slots), np.bool_)
            for valid in others:
                used |= valid.to_numpy(zero_copy_only=False)
            slots = slots[~used]
        if len(slots):
            table.delete(slots)
            scope.forget(table)

    def clear(self, ctx: HasScope, mask: Any = None) -> None:
        """Take the values of all keys away, or of those where ``mask`` (per key) is true."""
        scope = self.scope(ctx)
        chosen = self.mask(mask, scope.keys.num_rows, "key")
        self._remove(scope, None if chosen is None else true_rows(chosen))


class ValueHandle(ValueLikeHandle[ValueState]):
    """See `rf.ValueState`."""

    def get(self, ctx: HasScope) -> pa.Array:
        """The value per key; the default where there is none."""
        return _defaulted(self.raw(self.scope(ctx)), self.declared.default)

    def set(self, ctx: HasScope, values: Any, mask: Any = None) -> None:
        """Values per key (an Arrow or numpy array, a list, or one scalar for all); null takes the value away."""
        scope = self.scope(ctx)
        n = scope.keys.num_rows
        array = self.fit(values, self.declared.type, n, "key")
        chosen = self.mask(mask, n, "key")
        if chosen is None:
            self.store(scope, array)
        else:
            self.store(scope, array.filter(chosen), true_rows(chosen))


class AddingHandle(ValueLikeHandle[D]):
    """See `rf.ReducingState` and `rf.AggregatingState`."""

    def __init__(self, declared: D, name: str, tables: Tables) -> None:
        super().__init__(declared, name, tables)
        aggregating = isinstance(declared, AggregatingState)
        self._reduce: Any = declared.merge if aggregating else declared.reduce  # type: ignore[attr-defined]
        self._merge = merge_of(self._reduce, self.declared.type, vectorized=self.declared.vectorized)

    def get(self, ctx: HasScope) -> pa.Array:
        """The result per key; where nothing was added the default (reducing) or null (aggregating)."""
        return self.result(self.raw(self.scope(ctx)))

    def add(self, ctx: HasScope, values: Any, mask: Any = None) -> None:
        """Add values per row (an Arrow or numpy array, a list, or one scalar for all), in the order of the rows."""
        scope = self.scope(ctx)
        n, index = len(scope.index), scope.index
        array = self.lifted(values, n)
        chosen = self.mask(mask, n, "row")
        if chosen is not None:
            rows = true_rows(chosen)
            index, array = index[rows], array.take(pa.array(rows))
        self.add_to(scope, index, array)

    def add_to(self, scope: Scope, index: Int64Array, accumulators: pa.Array) -> None:
        groups, part = np.empty(0, np.int64), accumulators

        def reduce() -> pa.Array:
            nonlocal groups, part
            groups, part = reduce_groups(index, accumulators, self._reduce, self._merge)
            if len(groups) == 0:
                return part
            old = self.raw(scope).take(pa.array(groups))
            if old.null_count == len(old):
                return part
            if old.null_count == 0:
                return self._merge(old, part)
            both = np.flatnonzero(old.is_valid().to_numpy(zero_copy_only=False))
            merged = self._merge(old.take(pa.array(both)), part.take(pa.array(both)))
            source = np.arange(len(part))
            source[both] = len(part) + np.arange(len(both))
            return pa.concat_arrays([part, merged]).take(pa.array(source))

        result = self.call("added to", reduce)
        if len(groups):
            everyone = len(groups) == scope.keys.num_rows and bool((groups == np.arange(len(groups))).all())
            self.store(scope, result, None if everyone else groups.astype(np.int64, copy=False))

    def lifted(self, values: Any, n: int) -> pa.Array:
        declared = self.declared
        if isinstance(declared, ReducingState):
            return self.fit(values, declared.type, n, "row")
        lift = declared.lift
        if declared.vectorized:
            return self.call("added to", lambda: as_array(lift(values), declared.type), n)
        each = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else list(values)
        if len(each) != n:
            raise self.problem(f"got {len(each)} values, expected {n}, one per row; pass one for each")
        return self.call("added to", lambda: pa.array([lift(v) for v in each], declared.type))

    def result(self, accumulators: pa.Array) -> pa.Array:
        declared = self.declared
        if isinstance(declared, ReducingState):
            return _defaulted(accumulators, declared.default)
        result = declared.result
        if result is None:
            return accumulators
        if declared.vectorized:
            return self.call("finished", lambda: as_array(result(accumulators), declared.output), len(accumulators))
        each = accumulators.to_pylist()
        return self.call(
            "finished", lambda: pa.array([None if v is None else result(v) for v in each], declared.output)
        )


def _defaulted(values: pa.Array, default: pa.Scalar | None) -> pa.Array:
    if default is None or values.null_count == 0:
        return values
    try:
        return pc.fill_null(values, default)
    except pa.ArrowNotImplementedError:  # nested types
        whole: Sequence[Any] = [default.as_py() if v is None else v for v in values.to_pylist()]
        return pa.array(whole, values.type)


__all__ = ["AddingHandle", "ValueHandle", "ValueLikeHandle"]
