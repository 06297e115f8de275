"""Steps that call user functions: `MapBatches` on whole batches, `Map` and `FlatMap` on rows.

What user code raises, and what it returns against its promise, becomes one `UserCodeError` that names step and subtask,
with the cause chained. Empty results are not passed on.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rayflow.errors import ConfigError, RayflowError, SchemaChangedError, UserCodeError
from rayflow.operators.base import Operator, OperatorContext, Output

Row = dict[str, Any]


class _UserStep:
    """What the factories have in common: without a promised schema nothing is known while building."""

    __slots__ = ()
    schema: pa.Schema | None

    @property
    def stateful(self) -> bool:
        return False

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """The promised schema; None: decided by the first output of each subtask that is not empty."""
        return self.schema


@dataclass(frozen=True, slots=True, eq=False)
class MapBatches(_UserStep):
    """``fn(batch, *fn_args, **fn_kwargs)`` for every batch; names and meaning as in Ray Data's ``map_batches``.

    A class is built in `open`, once an attempt and subtask, with ``fn_constructor_args`` and ``fn_constructor_kwargs``,
    and then called. The result is a RecordBatch, a Table, a mapping of name to array, or an iterable of those.
    ``batch_size`` is the largest batch the function gets; smaller ones are not put together.
    """

    fn: Callable[..., Any] | type
    schema: pa.Schema | None = None
    batch_size: int | None = None
    fn_args: tuple[Any, ...] = ()
    fn_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fn_constructor_args: tuple[Any, ...] = ()
    fn_constructor_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_callable("map_batches", self.fn)
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"map_batches(batch_size) must be at least 1, got {self.batch_size}")
        if not inspect.isclass(self.fn) and (self.fn_constructor_args or self.fn_constructor_kwargs):
            raise ConfigError("map_batches(fn_constructor_args) is for classes, got a function; use fn_args")

    def build(self) -> Operator:
        return MapBatchesOperator(self)


@dataclass(frozen=True, slots=True, eq=False)
class Map(_UserStep):
    """``fn(row) -> row`` with rows as dicts. Without ``schema`` the first rows decide it."""

    fn: Callable[[Row], Mapping[str, Any]]
    schema: pa.Schema | None = None

    def __post_init__(self) -> None:
        _check_callable("map", self.fn)

    def build(self) -> Operator:
        return RowOperator(self.fn, self.schema, flat=False)


@dataclass(frozen=True, slots=True, eq=False)
class FlatMap(_UserStep):
    """``fn(row) -> iterable of rows`` with rows as dicts. Without ``schema`` the first rows decide it."""

    fn: Callable[[Row], Iterable[Mapping[str, Any]]]
    schema: pa.Schema | None = None

    def __post_init__(self) -> None:
        _check_callable("flat_map", self.fn)

    def build(self) -> Operator:
        return RowOperator(self.fn, self.schema, flat=True)


def _check_callable(step: str, fn: Any) -> None:
    if not callable(fn):
        raise ConfigError(f"{step} needs a function or a class, got {type(fn).__name__}")


class UserCodeOperator(Operator):
    """Runs user code, fits its results to the schema and emits them."""

    def __init__(self, schema: pa.Schema | None) -> None:
        self._schema = schema
        self._promised = schema is not None

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        # Emitting stands outside of the guard: an error of the next step is not this one's.
        for result in self._guarded(batch):
            if result.num_rows:
                self.out.emit(result)

    def _guarded(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        results = self._results(batch)
        while True:
            try:
                result = next(results, None)
            except RayflowError:
                raise
            except Exception as error:
                raise UserCodeError(
                    f"{self.ctx}: the function {self._name} raised {type(error).__name__}: {error} "
                    f"on a batch of {batch.num_rows} rows"
                ) from error
            if result is None:
                return
            yield result

    @property
    @abstractmethod
    def _name(self) -> str:
        """What to call the function in messages."""

    @abstractmethod
    def _results(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Calls user code; its exceptions may pass."""

    def _fitted(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """With exactly the schema promised or seen first; nullability and metadata do not count."""
        if self._schema is None:
            if batch.num_rows == 0:
                return batch
            self._schema = pa.schema([pa.field(f.name, f.type) for f in batch.schema])
        expected = self._schema
        if batch.schema.equals(expected):
            return batch
        if batch.schema.names != expected.names or batch.schema.types != expected.types:
            if batch.num_rows == 0 and not self._promised:
                return batch
            raise self._misfit(
                f"{self.ctx}: the function {self._name} returned columns {_brief(batch.schema)}, expected "
                f"{_brief(expected)} ({'its schema=' if self._promised else 'as in its first output'}); "
                "return these columns or pass the right schema="
            )
        return pa.RecordBatch.from_arrays(batch.columns, schema=expected)

    def _misfit(self, message: str) -> UserCodeError:
        """Where the first output decided the schema, a restart would forget it: that ends the job."""
        return (UserCodeError if self._promised or self._schema is None else SchemaChangedError)(message)


class MapBatchesOperator(UserCodeOperator):
    """See `MapBatches`."""

    def __init__(self, factory: MapBatches) -> None:
        super().__init__(factory.schema)
        self._factory = factory
        self._call: Callable[..., Any] = factory.fn

    @property
    def _name(self) -> str:
        return getattr(self._factory.fn, "__name__", type(self._factory.fn).__name__)

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        factory = self._factory
        if inspect.isclass(factory.fn):
            try:
                self._call = factory.fn(  # type: ignore[assignment]  # what is not callable is told below
                    *factory.fn_constructor_args, **factory.fn_constructor_kwargs
                )
            except Exception as error:
                raise UserCodeError(
                    f"{ctx}: the constructor of {self._name} raised {type(error).__name__}: {error}"
                ) from error
            if not callable(self._call):
                raise UserCodeError(f"{ctx}: the class {self._name} needs a method __call__(batch), it has none")

    def _results(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        size = self._factory.batch_size or max(batch.num_rows, 1)
        for at in range(0, batch.num_rows, size):
            result = self._call(batch.slice(at, size), *self._factory.fn_args, **self._factory.fn_kwargs)
            for piece in self._pieces(result):
                yield from self._batches(piece)

    def _pieces(self, result: Any) -> Iterable[Any]:
        if isinstance(result, pa.RecordBatch | pa.Table | Mapping):
            return (result,)
        if isinstance(result, Iterable) and not isinstance(result, str | bytes | pa.Array | pa.ChunkedArray):
            return result
        raise self._wrong_type(result)

    def _batches(self, piece: Any) -> Iterator[pa.RecordBatch]:
        if isinstance(piece, pa.RecordBatch):
            yield self._fitted(piece)
        elif isinstance(piece, pa.Table):
            if piece.num_rows == 0:
                self._fitted(pa.RecordBatch.from_pylist([], schema=piece.schema))
            for batch in piece.to_batches():
                yield self._fitted(batch)
        elif isinstance(piece, Mapping):
            yield self._fitted(self._from_mapping(piece))
        else:
            raise self._wrong_type(piece)

    def _from_mapping(self, columns: Mapping[str, Any]) -> pa.RecordBatch:
        expected = self._schema
        if expected is not None and set(columns) == set(expected.names):
            try:
                arrays = [_array(columns[f.name], f.type) for f in expected]
                return pa.RecordBatch.from_arrays(arrays, schema=expected)
            except (pa.ArrowException, TypeError, ValueError) as error:
                raise self._misfit(
                    f"{self.ctx}: the function {self._name} returned a dict that does not fit "
                    f"{_brief(expected)}: {error}"
                ) from error
        arrays = [_array(values, None) for values in columns.values()]
        return pa.RecordBatch.from_arrays(arrays, names=[str(name) for name in columns])

    def _wrong_type(self, got: Any) -> UserCodeError:
        return UserCodeError(
            f"{self.ctx}: the function {self._name} returned {type(got).__name__}, expected a pyarrow.RecordBatch, a "
            "pyarrow.Table, a dict of columns, or an iterable of those; return one of them"
        )


class RowOperator(UserCodeOperator):
    """See `Map` and `FlatMap`. Rows are Python dicts: this is for convenience, not for speed."""

    def __init__(self, fn: Callable[[Row], Any], schema: pa.Schema | None, *, flat: bool) -> None:
        super().__init__(schema)
        self._fn = fn
        self._flat = flat

    @property
    def _name(self) -> str:
        return getattr(self._fn, "__name__", type(self._fn).__name__)

    def _results(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        rows: list[Mapping[str, Any]] = []
        for row in batch.to_pylist():
            result = self._fn(row)
            if not self._flat:
                rows.append(self._checked(result))
                continue
            if isinstance(result, Mapping | str | bytes) or not isinstance(result, Iterable):
                raise self._wrong(result, "an iterable of dicts")
            rows.extend(self._checked(one) for one in result)
        if rows:
            yield self._batch_of(rows)

    def _checked(self, row: Any) -> Mapping[str, Any]:
        if not isinstance(row, Mapping):
            raise self._wrong(row, "a dict" if not self._flat else "an iterable of dicts")
        return row

    def _batch_of(self, rows: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
        # Over all rows, because pyarrow takes the names from the first one only and would drop the others silently.
        names = list(dict.fromkeys(name for row in rows for name in row))
        expected = self._schema
        unknown = [] if expected is None else [name for name in names if name not in expected.names]
        try:
            if expected is not None and not unknown:
                return pa.RecordBatch.from_pylist(rows, schema=expected)
            arrays = [pa.array([row.get(name) for row in rows]) for name in names]
        except (pa.ArrowException, TypeError, ValueError) as error:
            wanted = "columns of one type each" if expected is None else _brief(expected)
            raise self._misfit(
                f"{self.ctx}: the function {self._name} returned rows that do not fit {wanted}: {error}; "
                "return such values or pass schema="
            ) from error
        return self._fitted(pa.RecordBatch.from_arrays(arrays, names=names))

    def _wrong(self, got: Any, expected: str) -> UserCodeError:
        return UserCodeError(
            f"{self.ctx}: the function {self._name} returned {type(got).__name__}, expected {expected}; return that"
        )


def _array(values: Any, kind: pa.DataType | None) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values if kind is None or values.type.equals(kind) else values.cast(kind)
    return pa.array(values, kind)


def _brief(schema: pa.Schema) -> str:
    return "{" + ", ".join(f"{f.name}: {f.type}" for f in schema) + "}"


__all__ = ["FlatMap", "Map", "MapBatches", "MapBatchesOperator", "RowOperator", "UserCodeOperator"]
