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
)


def context(subtask: int = 0, parallelism: int = 1) -> OperatorContext:
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
    )


def opened(
    factory: OperatorFactory, subtask: int = 0, parallelism: int = 1, out: Collected | None = None
) -> tuple[Operator, Collected]:
    out = Collected() if out is None else out
    operator = factory.build()
    operator.open(context(subtask, parallelism), out)
    return operator, out


def outputs(factory: OperatorFactory, batches: Iterable[pa.RecordBatch], tag: str = MAIN) -> list[pa.RecordBatch]:
    operator, out = opened(factory)
    for batch in batches:
        operator.process(batch, 0)
    return out.batches.get(tag, [])


def frozen(operator: Operator) -> list[RestoredState]:
    """What a snapshot of the operator would give back, as a copy that shares nothing with it."""
    state = operator.snapshot(CheckpointId(1))
    assert state is not None
    found = []
    for table in state.tables:
        assert table.schema is not None
        whole = pa.concat_tables([table.schema.empty_table(), *map(_as_table, table.batches)])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, whole.schema) as writer:
            writer.write_table(whole)
        found.append(RestoredState(table.name, pa.ipc.open_file(sink.getvalue()).read_all(), table.meta))
    return found


def rows(batches: Sequence[pa.RecordBatch]) -> list[dict[str, object]]:
    return [row for batch in batches for row in batch.to_pylist()]


def _as_table(batch: pa.RecordBatch | pa.Table) -> pa.Table:
    return batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch])
