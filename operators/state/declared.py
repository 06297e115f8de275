"""States that a user's `KeyedProcess` declares as class attributes: what they hold, not where.

A declaration is immutable and shared by all subtasks. In a running subtask the attribute of the same name of the
working copy is a handle to the rows of that subtask: `rayflow.operators.state.access` (whole batches) or
`rayflow.operators.state.cells` (one key).

In checkpoints, value-like states (value, reducing, aggregating) without a time to live share the table ``values`` with
a column each; every other state has a table of its own, named as the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Literal, TypeAlias, overload

import pyarrow as pa

from rayflow.config import Duration, duration_us
from rayflow.errors import ConfigError, PlanError
from rayflow.operators.grouping import plain_type

VALUES: Final = "values"
"""Table of the value-like states without a time to live."""
TIMERS: Final = "timers"
RESERVED: Final = (VALUES, TIMERS)
TypeLike: TypeAlias = pa.DataType | str
Reduction = Literal["sum", "min", "max"]


class Declared:
    """Base of all declarations. ``ttl``: the value of a key is gone when it was not written for so long (wall time)."""

    kind: ClassVar[str]

    def __init__(self, *, ttl: Duration | None) -> None:
        self.ttl_us: int | None = None
        if ttl is not None:
            what = f"{self.kind}(ttl)"
            self.ttl_us = duration_us(ttl, what=what) if not _negative(ttl) else 0
            if self.ttl_us == 0:
                raise ConfigError(f"{what} must be longer than zero, got {ttl!r}; leave it out for state that stays")
        self._name = "?"

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"{owner.__name__}.{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Declared: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Any: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        """The declaration, on the class. A running instance has a handle in its place."""
        if instance is None:
            return self
        raise PlanError(
            f"the state {self._name} has values only in a running job: use it in process_batch, process or the timer "
            "methods, with the instance they are called on"
        )

    @property
    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        """Columns of the table of its own: subkeys, then values."""
        raise NotImplementedError

    @property
    def subkeys(self) -> int:
        """How many of ``columns`` belong to the key."""
        return 0


class ValueLike(Declared):
    """One value a key; null is no value."""

    type: pa.DataType

    @property
    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        return (("value", self.type),)


class ValueState(ValueLike):
    """One value of Arrow type ``type`` a key; ``default`` (None: null) is what a key without one has."""

    kind = "ValueState"

    def __init__(self, type: TypeLike, *, default: Any = None, ttl: Duration | None = None) -> None:
        super().__init__(ttl=ttl)
        self.type = arrow_type(type, self.kind)
        self.default = _default(default, self.type, self.kind)


class ListState(Declared):
    """A list of values of Arrow type ``type`` a key, in the order in which they were appended.

    With ``ttl`` each element lives for itself. In a checkpoint a row is an element; ``position`` ascends, with gaps.
    """

    kind = "ListState"

    def __init__(self, type: TypeLike, *, ttl: Duration | None = None) -> None:
        super().__init__(ttl=ttl)
        self.type = arrow_type(type, self.kind)

    @property
    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        return (("position", pa.int64()), ("value", self.type))

    @property
    def subkeys(self) -> int:
        return 1


class MapState(Declared):
    """A map from ``key_type`` to ``value_type`` a key. With ``ttl`` each entry lives for itself; a row is an entry."""

    kind = "MapState"

    def __init__(self, key_type: TypeLike, value_type: TypeLike, *, ttl: Duration | None = None) -> None:
        super().__init__(ttl=ttl)
        self.key_type = map_key_type(key_type, self.kind)
        self.type = arrow_type(value_type, self.kind)

    @property
    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        return (("map_key", self.key_type), ("value", self.type))

    @property
    def subkeys(self) -> int:
        return 1


class ReducingState(ValueLike):
    """One value a key, to which values are added: ``"sum"``, ``"min"``, ``"max"`` or ``reduce(a, b)``.

    A function gets and gives Python values; with ``vectorized`` Arrow arrays of equal length, and then it must be
    associative, because pairs of neighbours are reduced first. Null values are not added; ``default`` is what a key
    has to which nothing was added, and takes no part in the reduction.
    """

    kind = "ReducingState"

    def __init__(
        self,
        type: TypeLike,
        reduce: Reduction | Callable[[Any, Any], Any],
        *,
        vectorized: bool = False,
        default: Any = None,
        ttl: Duration | None = None,
    ) -> None:
        super().__init__(ttl=ttl)
        self.type = arrow_type(type, self.kind)
        self.default = _default(default, self.type, self.kind)
        self.reduce = reduce
        self.vectorized = vectorized
        if isinstance(reduce, str):
            if reduce not in ("sum", "min", "max"):
                raise PlanError(f'{self.kind}(reduce) must be "sum", "min", "max" or a function, got {reduce!r}')
            if reduce == "sum" and not _summable(self.type):
                raise PlanError(
                    f"{self.kind}({self.type}, 'sum') cannot be: sums are of integers, floats, decimals and durations; "
                    "choose such a type or pass a function"
                )
            if reduce != "sum" and not _ordered(self.type):
                raise PlanError(
                    f"{self.kind}({self.type}, {reduce!r}) cannot be: that type has no order; pass a function"
                )
        elif not callable(reduce):
            raise PlanError(f'{self.kind}(reduce) must be "sum", "min", "max" or a function, got {reduce!r}')


class AggregatingState(ValueLike):
    """An accumulator of Arrow type ``type`` a key: ``lift(value)`` makes one of a value, ``merge(a, b)`` one of two,
    ``result(accumulator)`` (None: itself) is what `get` gives, of type ``output`` (None: ``type``).

    The functions get and give Python values, or with ``vectorized`` Arrow arrays of equal length; then ``merge`` must
    be associative. Null accumulators count as nothing.
    """

    kind = "AggregatingState"

    def __init__(
        self,
        type: TypeLike,
        *,
        lift: Callable[[Any], Any],
        merge: Callable[[Any, Any], Any],
        result: Callable[[Any], Any] | None = None,
        output: TypeLike | None = None,
        vectorized: bool = False,
        ttl: Duration | None = None,
    ) -> None:
        super().__init__(ttl=ttl)
        self.type = arrow_type(type, self.kind)
        for name, function in (("lift", lift), ("merge", merge), ("result", result)):
            if function is not None and not callable(function):
                raise PlanError(f"{self.kind}({name}) must be a function, got {function!r}")
        self.lift, self.merge, self.result = lift, merge, result
        self.output = self.type if output is None else arrow_type(output, self.kind)
        if result is None and not self.output.equals(self.type):
            raise PlanError(f"{self.kind}(output) is {self.output} and the accumulator {self.type}: pass result= too")
        self.vectorized = vectorized


class BroadcastState(Declared):
    """A map from ``key_type`` to ``value_type`` that every subtask holds in full: for `BroadcastProcess`.

    Written in ``process_broadcast`` only. It is to be small: it is kept in memory on every back end.
    """

    kind = "BroadcastState"

    def __init__(self, key_type: TypeLike, value_type: TypeLike) -> None:
        super().__init__(ttl=None)
        self.key_type = map_key_type(key_type, self.kind)
        self.type = arrow_type(value_type, self.kind)

    @property
    def columns(self) -> tuple[tuple[str, pa.DataType], ...]:
        return (("map_key", self.key_type), ("value", self.type))


def declared_states(owner: type) -> dict[str, Declared]:
    """The states of a class by name, those of its bases first, in the order in which they were written."""
    found: dict[str, Declared] = {}
    for base in reversed(owner.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, Declared):
                found[name] = value
            else:
                found.pop(name, None)
    return found


def check_names(owner: type, keys: Sequence[str]) -> None:
    """Raise `PlanError` for a state whose name would clash in a checkpoint."""
    for name in declared_states(owner):
        why = None
        if name in RESERVED:
            why = "is a name that rayflow uses in checkpoints"
        elif name.startswith("__"):
            why = 'begins with "__", as names of rayflow do'
        elif name in keys:
            why = f"is also a key column ({', '.join(keys)})"
        if why is not None:
            raise PlanError(f"the state {name!r} of {owner.__name__} {why}; give it another name")


def table_schemas(owner: type, keys: pa.Schema) -> dict[str, tuple[pa.Schema, pa.Schema, int]]:
    """The keyed tables of a class: name -> (key columns with subkeys, value columns, number of subkeys)."""
    tables: dict[str, tuple[pa.Schema, pa.Schema, int]] = {}
    shared: list[tuple[str, pa.DataType]] = []
    for name, state in declared_states(owner).items():
        if isinstance(state, BroadcastState):
            continue
        if shares_table(state):
            assert isinstance(state, ValueLike)
            shared.append((name, state.type))
            continue
        columns = [(free_name(column, keys.names), kind) for column, kind in state.columns]
        split = state.subkeys
        tables[name] = (_joined(keys, columns[:split]), pa.schema(columns[split:]), split)
    if shared:
        tables[VALUES] = (keys, pa.schema(shared), 0)
    return tables


def shares_table(state: Declared) -> bool:
    """Whether the state is a column of the table ``values``."""
    return isinstance(state, ValueLike) and state.ttl_us is None


def free_name(name: str, taken: Sequence[str]) -> str:
    """``name``, with as many ``_`` behind it as it takes to be none of ``taken``."""
    while name in taken:
        name += "_"
    return name


def key_schema(schema: pa.Schema, keys: Sequence[str]) -> pa.Schema:
    """The key columns as state has them: decoded (no dictionaries), nullable, without metadata."""
    return pa.schema([(name, plain_type(schema.field(name).type)) for name in keys])


def arrow_type(kind: Any, what: str) -> pa.DataType:
    """An Arrow type, or the name of one such as ``"int64"``; else `PlanError`."""
    if isinstance(kind, str):
        try:
            return pa.type_for_alias(kind)
        except ValueError:
            pass
    if not isinstance(kind, pa.DataType):
        raise PlanError(f"{what} needs an Arrow type such as pa.int64(), got {kind!r}")
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        raise PlanError(f"{what} got the encoding {kind}, expected the type of its values: {kind.value_type}")
    if view := _view_in(kind):
        owner = "string" if pa.types.is_string_view(view) else "binary"
        raise PlanError(f"{what} got {kind}, expected {owner} in place of {view}: Arrow cannot take rows of views")
    return kind


def _view_in(kind: pa.DataType) -> pa.DataType | None:
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return kind
    inside = (_view_in(kind.field(i).type) for i in range(kind.num_fields))
    return next((view for view in inside if view is not None), None)


def map_key_type(kind: Any, what: str) -> pa.DataType:
    from rayflow.partition import check_key_type

    found = arrow_type(kind, what)
    try:
        check_key_type("map_key", found)
    except Exception as error:
        raise PlanError(f"{what} cannot have keys of type {found}; use a type that can be a key column") from error
    return found


def _joined(keys: pa.Schema, columns: Sequence[tuple[str, pa.DataType]]) -> pa.Schema:
    return pa.schema([*keys, *(pa.field(name, kind) for name, kind in columns)])


def _default(value: Any, kind: pa.DataType, what: str) -> pa.Scalar | None:
    if value is None:
        return None
    try:
        raw = value.as_py() if isinstance(value, pa.Scalar) else value
        return pa.array([raw], kind)[0]
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"{what}(default) must be a value of type {kind}, got {value!r}: {error}") from error


def _negative(ttl: Duration) -> bool:
    return not isinstance(ttl, str | bool) and ttl < type(ttl)(0)  # type: ignore[operator]


def _summable(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_duration(kind)
    ) and not types.is_float16(kind)


def _ordered(kind: pa.DataType) -> bool:
    types = pa.types
    temporal = types.is_temporal(kind) and not types.is_interval(kind)
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)
    return bool(_summable(kind) or types.is_boolean(kind) or temporal or text)


__all__ = [
    "AggregatingState",
    "BroadcastState",
    "Declared",
    "ListState",
    "MapState",
    "ReducingState",
    "ValueState",
    "check_names",
    "declared_states",
    "table_schemas",
]
