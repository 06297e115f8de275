"""Operators under test, without a runtime: a context, and feeding batches, watermarks and snapshots by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.keygroups import key_group_range
from rayflow.operators.base import (
    MAIN,
    Collected,
    Operator,
    OperatorContext,
    OperatorFactory,
    RestoredState,
    StateBackend,
)


def context(subtask: int = 0, parallelism: int = 1, backend: StateBackend | None = None) -> OperatorContext:
    return OperatorContext(
        job="job",
        run_id="run",
        operator="op",
        step="under test",
        subtask=subtask,
        parallelism=parallelism,
        max_parallelism=128,
        attempt=1,
        key_groups=key_group_range(subtask, parallelism, 128),
        now=lambda: 0.0,
        backend=backend or StateBackend(),
    )


def opened(
    factory: OperatorFactory,
    subtask: int = 0,
    parallelism: int = 1,
    out: Collected | None = None,
    backend: StateBackend | None = None,
) -> tuple[Operator, Collected]:
    out = Collected() if out is None else out
    operator = factory.build()
    operator.open(context(subtask, parallelism, backend), out)
    return operator, out


def outputs(factory: OperatorFactory, batches: Iterable[pa.RecordBatch], tag: str = MAIN) -> list[pa.RecordBatch]:
    operator, out = opened(factory)
    for batch in batches:
        operator.process(batch, 0)
    return out.batches.get(tag, [])


def frozen(operator: Operator, *, pieces: bool = True) -> list[RestoredState]:
    """What a snapshot of the operator would give back, as a copy that shares nothing with it: every piece under its id
    (without ``pieces``: as after a savepoint, all rows as one), then what was written for this checkpoint only."""
    state = operator.snapshot(CheckpointId(1))
    assert state is not None
    found = []
    for table in state.tables:
        parts = [(piece.id, piece.batches) for piece in table.pieces]
        if table.batches or not parts:
            parts.append(("", table.batches))
        if not pieces:
            parts = [("", tuple(batch for _, batches in parts for batch in batches))]
        for piece, batches in parts:
            found.append(RestoredState(table.name, _copied(table.schema, batches), table.meta, piece))
    return found


def _copied(schema: pa.Schema, batches: Iterable[pa.RecordBatch | pa.Table]) -> pa.Table:
    assert schema is not None
    parts = [schema.empty_table(), *map(_as_table, batches)]
    whole = pa.concat_tables(parts, promote_options="default")  # a piece may have a column of deletions
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole)
    return pa.ipc.open_file(sink.getvalue()).read_all()


def rows(batches: Sequence[pa.RecordBatch]) -> list[dict[str, object]]:
    return [row for batch in batches for row in batch.to_pylist()]


def _as_table(batch: pa.RecordBatch | pa.Table) -> pa.Table:
    return batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
