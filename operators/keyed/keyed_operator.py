"""What all steps of this package share: their keyed state in and out of checkpoints, and the check of the schema."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.errors import DataError, PlanError, SchemaChangedError
from rayflow.operators.base import FrozenState, Operator, OperatorContext, Output, RestoredState
from rayflow.operators.faults import UNLOCATED, located
from rayflow.operators.grouping import flat, plain_key, plain_type
from rayflow.operators.state.keyed import KeyedState
from rayflow.partition import check_key_type


class KeyedOperator(Operator):
    """One table by the key of the stream. Subclasses open it in `bind` and use it in `take`."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.state: KeyedState | None = None
        self._schema: pa.Schema | None = None
        """Schema of the first batch, which all later ones must have."""

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        self.state = KeyedState(ctx, self.keys)

    def restore(self, states: Sequence[RestoredState]) -> None:
        assert self.state is not None
        self.state.restore(states)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if batch.num_rows == 0:
            return
        try:
            if self._schema is None or not self._schema.equals(batch.schema):
                self._meet(batch.schema)
            results = self.take(batch)
        except UNLOCATED as error:
            raise located(error, self.ctx) from error
        except DataError as error:
            if str(self.ctx) in str(error):
                raise
            raise located(error, self.ctx) from error
        # Emitting stands outside of the guard: an error of the next step is not this one's.
        for result, tag in results:
            if result.num_rows:
                self.out.emit(result, tag)

    @abstractmethod
    def bind(self, schema: pa.Schema) -> None:
        """Types are known: open the table. Called once, before the first batch. Raises `PlanError`."""

    @abstractmethod
    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        """One batch that is not empty; returns what to emit, with its tag."""

    def key_columns(self, batch: pa.RecordBatch) -> list[pa.Array]:
        """In the types of `key_schema`, with one zero and one NaN."""
        return [flat(plain_key(batch.column(key))) for key in self.keys]

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        assert self.state is not None
        return self.state.freeze()

    def close(self) -> None:
        if self.state is not None:
            self.state.close()

    def _meet(self, schema: pa.Schema) -> None:
        if self._schema is None:
            self.bind(schema)
        elif self._schema.names != schema.names or self._schema.types != schema.types:
            raise SchemaChangedError(
                f"{self.ctx}: the input now has the columns {_brief(schema)}, expected those before it, "
                f"{_brief(self._schema)}; cast and select them alike in front of this step"
            )
        self._schema = schema


def key_schema(schema: pa.Schema, keys: Sequence[str]) -> pa.Schema:
    """The key columns as the state holds them. Raises `PlanError` for a missing one, `KeyHashError` for its type."""
    for key in keys:
        if schema.names.count(key) != 1:
            raise PlanError(f"the key column {key!r} is not among the columns {schema.names}; key by one of them")
        check_key_type(key, schema.field(key).type)
    return pa.schema([(key, plain_type(schema.field(key).type)) for key in keys])


def _brief(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


__all__ = ["KeyedOperator", "key_schema"]
