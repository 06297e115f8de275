"""Handles to keyed state for one key at a time: what the attributes of a `KeyedProcess` with ``process`` are.

Sugar on `rayflow.operators.state.access`: what a call needs is loaded for all keys of the batch at once, changed as
Python values, and written back at once when all keys of the batch have been processed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from rayflow.operators.state.access import Handle, Scope
from rayflow.operators.state.access_tables import ListHandle, MapHandle
from rayflow.operators.state.access_values import AddingHandle, ValueHandle

H = TypeVar("H", bound=Handle[Any])
_UNKNOWN: Any = object()
_GONE: Any = object()


class Cell(Generic[H]):
    """One declared state of the key that is being processed."""

    def __init__(self, handle: H) -> None:
        self._handle = handle
        self._scope: Scope | None = None
        self._at = -1

    def begin(self, scope: Scope) -> None:
        """Keys of a batch follow; nothing is loaded yet."""
        self._scope = scope

    def move(self, position: int) -> None:
        """The next calls are about the key at this position of the batch's keys."""
        self._at = position

    def end(self) -> None:
        """Write back what was changed."""
        self._scope, self._at = None, -1

    @property
    def scope(self) -> Scope:
        if self._scope is None or self._at < 0:
            raise self._handle.problem("was used where there is no key; use it in process or on_timer")
        return self._scope

    def indices(self, positions: list[int]) -> Any:
        return np.asarray(positions, np.int64)


class ValueCell(Cell[ValueHandle]):
    """See `rf.ValueState`."""

    _values: list[Any] | None = None
    _changed: dict[int, None]

    def begin(self, scope: Scope) -> None:
        super().begin(scope)
        self._values, self._changed = None, {}

    def _loaded(self) -> list[Any]:
        scope = self.scope
        if self._values is None:
            self._values = self._handle.raw(scope).to_pylist()
        return self._values

    @property
    def value(self) -> Any:
        """The value of the key as a Python object; the default where there is none."""
        found = self._loaded()[self._at]
        default = self._handle.declared.default
        return default.as_py() if found is None and default is not None else found

    def update(self, value: Any) -> None:
        """Set the value; None takes it away."""
        self._loaded()[self._at] = value
        self._changed[self._at] = None

    def clear(self) -> None:
        """Take the value away."""
        self.update(None)

    def end(self) -> None:
        scope, values, changed = self._scope, self._values, list(self._changed)
        super().end()
        if scope is not None and values is not None and changed:
            array = self._handle.fit([values[i] for i in changed], self._handle.declared.type, len(changed), "key")
            self._handle.store(scope, array, self.indices(changed))


class AddingCell(Cell["AddingHandle[Any]"]):
    """See `rf.ReducingState` and `rf.AggregatingState`."""

    _added: list[tuple[int, Any]]

    def begin(self, scope: Scope) -> None:
        super().begin(scope)
        self._added = []

    @property
    def value(self) -> Any:
        """The result of all that was added to the key."""
        scope, at = self.scope, self._at
        self._flush()
        return self._handle.result(self._handle.raw(scope).slice(at, 1))[0].as_py()

    def add(self, value: Any) -> None:
        """Add a value."""
        assert self.scope
        self._added.append((self._at, value))

    def clear(self) -> None:
        """Take away what was added."""
        scope = self.scope
        self._flush()
        self._handle.store(scope, pa.nulls(1, self._handle.declared.type), self.indices([self._at]))

    def _flush(self) -> None:
        added, self._added = self._added, []
        if added:
            assert self._scope is not None
            lifted = self._handle.lifted([value for _, value in added], len(added))
            self._handle.add_to(self._scope, self.indices([at for at, _ in added]), lifted)

    def end(self) -> None:
        if self._scope is not None:
            self._flush()
        super().end()


class ListCell(Cell[ListHandle]):
    """See `rf.ListState`."""

    _lists: list[Any] | None = None

    def begin(self, scope: Scope) -> None:
        super().begin(scope)
        self._lists = None
        self._added: dict[int, list[Any]] = {}
        self._cleared: dict[int, None] = {}

    def get(self) -> list[Any]:
        """The elements as Python objects, in the order in which they were appended; changing it changes nothing."""
        scope, at = self.scope, self._at
        if at in self._cleared:
            return list(self._added.get(at, ()))
        if self._lists is None:
            self._lists = self._handle.lists(scope).to_pylist()
        return [*self._lists[at], *self._added.get(at, ())]

    def append(self, value: Any) -> None:
        """Append an element."""
        assert self.scope
        self._added.setdefault(self._at, []).append(value)

    def extend(self, values: Any) -> None:
        """Append elements."""
        for value in values:
            self.append(value)

    def clear(self) -> None:
        """Remove all elements."""
        assert self.scope
        self._cleared[self._at] = None
        self._added.pop(self._at, None)

    def update(self, values: Any) -> None:
        """Replace the elements."""
        self.clear()
        self.extend(values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.get())

    def __len__(self) -> int:
        return len(self.get())

    def end(self) -> None:
        scope = self._scope
        super().end()
        if scope is None:
            return
        if self._cleared:
            self._handle.remove_all(scope, self.indices(list(self._cleared)))
        if self._added:
            flat = [(at, value) for at, values in self._added.items() for value in values]
            array = self._handle.fit([value for _, value in flat], self._handle.declared.type, len(flat), "element")
            self._handle.extend(scope, self.indices([at for at, _ in flat]), array)


class MapCell(Cell[MapHandle]):
    """See `rf.MapState`. Entries are looked up one by one and kept until the batch ends; `items` loads all of a key."""

    def begin(self, scope: Scope) -> None:
        super().begin(scope)
        self._known: dict[int, dict[Any, Any]] = {}
        """Position of the key -> what is known of its entries."""
        self._changed: dict[tuple[int, Any], None] = {}
        self._loaded: set[int] = set()

    def _look(self, key: Any) -> Any:
        scope, at = self.scope, self._at
        known = self._known.setdefault(at, {})
        found = known.get(key, _UNKNOWN)
        if found is _UNKNOWN:
            if at in self._loaded:
                return _GONE
            handle = self._handle
            slots = handle.slots(scope, self.indices([at]), handle.fit_keys([key], 1), insert=False)
            value = handle.table.get(slots, handle.table.values.names[0])[0].as_py()
            found = known[key] = _GONE if slots[0] < 0 else value
        return found

    def __getitem__(self, key: Any) -> Any:
        found = self._look(key)
        if found is _GONE:
            raise KeyError(key)
        return found

    def get(self, key: Any, default: Any = None) -> Any:
        """The value of the entry, ``default`` where there is none."""
        found = self._look(key)
        return default if found is _GONE else found

    def __contains__(self, key: Any) -> bool:
        return self._look(key) is not _GONE

    def __setitem__(self, key: Any, value: Any) -> None:
        assert self.scope
        self._known.setdefault(self._at, {})[key] = value
        self._changed[self._at, key] = None

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self[key] = _GONE

    def pop(self, key: Any, default: Any = None) -> Any:
        """Remove the entry and return its value, ``default`` where there is none."""
        found = self.get(key, default)
        self[key] = _GONE
        return found

    def items(self) -> list[tuple[Any, Any]]:
        """All entries of the key, in no order."""
        scope, at = self.scope, self._at
        known = self._known.setdefault(at, {})
        if at not in self._loaded:
            rows = self._handle.entries_of(scope, self.indices([at]))
            for key, value in zip(rows.column(1).to_pylist(), rows.column(2).to_pylist(), strict=True):
                known.setdefault(key, value)
            self._loaded.add(at)
        return [(key, value) for key, value in known.items() if value is not _GONE]

    def keys(self) -> list[Any]:
        """The keys of all entries."""
        return [key for key, _ in self.items()]

    def values(self) -> list[Any]:
        """The values of all entries."""
        return [value for _, value in self.items()]

    def __len__(self) -> int:
        return len(self.items())

    def clear(self) -> None:
        """Remove all entries."""
        for key in self.keys():
            self[key] = _GONE

    def end(self) -> None:
        scope, handle = self._scope, self._handle
        super().end()
        if scope is None or not self._changed:
            return
        final = {(at, key): self._known[at][key] for at, key in self._changed}
        gone = [entry for entry, value in final.items() if value is _GONE]
        kept = [entry for entry, value in final.items() if value is not _GONE]
        if gone:
            keys = handle.fit_keys([key for _, key in gone], len(gone))
            handle.remove_from(scope, self.indices([at for at, _ in gone]), keys)
        if kept:
            values = handle.fit([final[entry] for entry in kept], handle.declared.type, len(kept), "entry")
            keys = handle.fit_keys([key for _, key in kept], len(kept))
            handle.put_to(scope, self.indices([at for at, _ in kept]), keys, values)


def cell_of(handle: Handle[Any]) -> Cell[Any]:
    match handle:
        case ValueHandle():
            return ValueCell(handle)
        case AddingHandle():
            return AddingCell(handle)
        case ListHandle():
            return ListCell(handle)
        case MapHandle():
            return MapCell(handle)
    raise AssertionError(f"no cell for {type(handle).__name__}")


__all__ = ["AddingCell", "Cell", "ListCell", "MapCell", "ValueCell", "cell_of"]
