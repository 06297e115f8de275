"""Sources without files: Arrow data at hand, and a function of the user that makes batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, PlanError, UserCodeError
from rayflow.operators.base import OperatorContext, Polled, Source, SplitReader
from rayflow.operators.sources.schemas import conform, describe, difference, plain, same_columns

ArrowData: TypeAlias = pa.Table | pa.RecordBatch | Iterable[pa.RecordBatch]


@dataclass(frozen=True, eq=False)
class ArrowSource(Source):
    """Reads Arrow data that the program holds; it travels with the plan, so keep it small (some 100 MB).

    The rows are read in order by one subtask, or in ``splits`` contiguous ranges by several. Positions are rows.
    """

    data: ArrowData
    _: KW_ONLY
    splits: int = 1
    batch_rows: int = 65_536

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ConfigError(f"from_arrow(splits) must be at least 1, got {self.splits}")
        if self.batch_rows < 1:
            raise ConfigError(f"from_arrow(batch_rows) must be at least 1, got {self.batch_rows}")
        table = _table(self.data)
        object.__setattr__(self, "data", table.cast(plain(table.schema)))

    @property
    def table(self) -> pa.Table:
        return self.data

    def project(self, columns: Sequence[str]) -> ArrowSource:
        """The same rows with only these columns."""
        return ArrowSource(self.table.select(list(columns)), splits=self.splits, batch_rows=self.batch_rows)

    def schema(self) -> pa.Schema:
        return self.table.schema

    def declared_schema(self) -> pa.Schema:
        return self.table.schema

    def discover(self) -> Sequence[tuple[str, Json]]:
        rows = self.table.num_rows
        edges = [rows * i // self.splits for i in range(self.splits + 1)]
        return [(f"{a}-{b}", [a, b]) for a, b in pairwise(edges) if b > a]

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        first, last = (int(x) for x in split)
        return _ArrowReader(self.table.slice(first, last - first), int(position or 0), self.batch_rows)

    def __getstate__(self) -> dict[str, Any]:
        # A slice pickles the buffers of its whole parent; the IPC format writes only its own rows.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        return {"ipc": sink.getvalue().to_pybytes(), "splits": self.splits, "batch_rows": self.batch_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, "data", pa.ipc.open_stream(state["ipc"]).read_all())
        object.__setattr__(self, "splits", state["splits"])
        object.__setattr__(self, "batch_rows", state["batch_rows"])


def _table(data: ArrowData) -> pa.Table:
    if isinstance(data, pa.Table):
        return data
    batches = [data] if isinstance(data, pa.RecordBatch) else list(data)
    for batch in batches:
        if not isinstance(batch, pa.RecordBatch):
            raise PlanError(f"from_arrow takes a Table, a RecordBatch or a list of RecordBatches, got {type(batch)}")
        if not same_columns(batch.schema, batches[0].schema):
            first, other = describe(batches[0].schema), describe(batch.schema)
            raise PlanError(f"from_arrow got batches of different schemas: {first} and {other}")
    if not batches:
        raise PlanError("from_arrow got an empty list, which has no schema; pass an empty Table instead")
    return pa.Table.from_batches(batches, schema=batches[0].schema)


class _ArrowReader(SplitReader):
    def __init__(self, table: pa.Table, position: int, batch_rows: int) -> None:
        self._position = position
        self._rows = table.num_rows
        self._batches = iter(table.slice(position).to_batches(max_chunksize=batch_rows))

    def poll(self) -> Polled:
        batch = next(self._batches, None)
        if batch is None:
            return Polled(None, self._position, done=True)
        self._position += batch.num_rows
        return Polled(batch, self._position, done=self._position >= self._rows)


Generate = Callable[[Any, int], Iterable[pa.RecordBatch | pa.Table | None]]


class GeneratorSource(Source):
    """Batches made by a function: ``fn(split, position)`` yields record batches from row ``position`` of the split on.

    Called again with the same arguments it must yield the same rows in the same order, or exactly-once is lost (rule
    R2); where one batch ends and the next begins may differ. ``splits`` is a number (then ``split`` is 0, 1, …) or a
    list of JSON values. A batch of no rows, or None, means: nothing just now. ``bounded=False`` says that it never
    ends.

    The function runs on the loop thread of its subtask: while it blocks, nothing else happens there, checkpoints
    included, so an unbounded source yields None instead of waiting longer than some 100 ms.
    """

    def __init__(self, fn: Generate, *, splits: int | Sequence[Json], schema: pa.Schema, bounded: bool = True) -> None:
        if not callable(fn):
            raise PlanError(f"from_generator(fn) must be a function of (split, position), got {fn!r}")
        if not isinstance(schema, pa.Schema):
            raise PlanError(f"from_generator(schema) must be a pyarrow.Schema, got {schema!r}")
        self._fn = fn
        self._splits = tuple(range(splits)) if isinstance(splits, int) else tuple(splits)
        self._schema = plain(schema)
        self._bounded = bounded
        names = [name for name, _ in self.discover()]
        if not names:
            raise ConfigError("from_generator(splits) must be at least 1, or a list of at least one split")
        if len(set(names)) != len(names):
            raise ConfigError(f"from_generator(splits) must differ from each other, got {list(names)}")

    @property
    def bounded(self) -> bool:
        return self._bounded

    def schema(self) -> pa.Schema:
        return self._schema

    def declared_schema(self) -> pa.Schema:
        return self._schema

    def discover(self) -> Sequence[tuple[str, Json]]:
        try:
            return [(json.dumps(split, sort_keys=True), split) for split in self._splits]
        except (TypeError, ValueError) as error:
            raise PlanError(f"from_generator(splits) must be JSON values: {error}") from error

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return _GeneratorReader(self._fn, split, int(position or 0), self._schema, ctx)


class _GeneratorReader(SplitReader):
    def __init__(self, fn: Generate, split: Json, position: int, schema: pa.Schema, ctx: OperatorContext) -> None:
        self._fn = fn
        self._split = split
        self._position = position
        self._schema = schema
        self._ctx = ctx
        self._made: Iterator[Any] | None = None
        self._rest: list[pa.RecordBatch] = []

    def poll(self) -> Polled:
        if not self._rest:
            try:
                if self._made is None:
                    self._made = iter(self._fn(self._split, self._position))
                made = next(self._made)
            except StopIteration:
                return Polled(None, self._position, done=True)
            except Exception as error:
                raise UserCodeError(
                    f"{self._where()} raised {type(error).__name__}: {error}; see the chained exception"
                ) from error
            self._rest = self._checked(made)
        if not self._rest:
            return Polled(None, self._position)
        batch = self._rest.pop(0)
        self._position += batch.num_rows
        return Polled(batch, self._position)

    def close(self) -> None:
        close = getattr(self._made, "close", None)
        self._made, self._rest = None, []
        if close is not None:
            close()

    def _checked(self, made: object) -> list[pa.RecordBatch]:
        if made is None:
            return []
        if isinstance(made, pa.RecordBatch):
            batches = [made]
        elif isinstance(made, pa.Table):
            batches = made.to_batches()
        else:
            raise UserCodeError(f"{self._where()} must yield pyarrow.RecordBatch, got {type(made).__name__}")
        got = plain(batches[0].schema) if batches else self._schema
        if not same_columns(got, self._schema):
            raise UserCodeError(
                f"{self._where()} yielded another schema than promised: {difference(self._schema, got)}; "
                f"expected {describe(self._schema)}, got {describe(got)}"
            )
        return [conform(batch, self._schema) for batch in batches if batch.num_rows]

    def _where(self) -> str:
        return f"{self._ctx}: the generator of split {self._split!r} at row {self._position}"
