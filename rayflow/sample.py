"""Looking at rows while building: `Stream.take`, `to_arrow` and `show` run the stream in this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from rayflow.config import JobConfig, Restart
from rayflow.core.events import CancelRequested
from rayflow.errors import JobCancelledError
from rayflow.operators.base import Committer, Operator
from rayflow.runtime.inprocess import World

if TYPE_CHECKING:
    from rayflow.stream import Stream


@dataclass(frozen=True, slots=True)
class _SampleSink:
    """Appends what comes to a list of this process; never restarted, so nothing is seen twice."""

    rows: list[pa.RecordBatch]
    stateful = False

    def build(self) -> Operator:
        return _Append(self.rows)

    def committer(self) -> Committer | None:
        return None


class _Append(Operator):
    def __init__(self, rows: list[pa.RecordBatch]) -> None:
        self._rows = rows

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._rows.append(batch)


def take(stream: Stream, limit: int | None) -> pa.Table:
    """The first ``limit`` rows (None: all) as a table."""
    from rayflow.flow import Flow, run_local

    rows: list[pa.RecordBatch] = []
    sink = stream._sink("sample", _SampleSink(rows))
    config = JobConfig(restart=Restart.none())

    def enough(world: World) -> None:
        if limit is not None and sum(b.num_rows for b in rows) >= limit:
            world.coordinator.handle(CancelRequested())

    with suppress(JobCancelledError):
        run_local(Flow("sample", sink).plan(config=config), config, None, on_round=enough)
    return _table(rows, stream.schema, limit)


def _table(rows: Sequence[pa.RecordBatch], schema: pa.Schema | None, limit: int | None) -> pa.Table:
    if not rows:
        return schema.empty_table() if schema is not None else pa.table({})
    table = pa.Table.from_batches(rows)
    return table if limit is None else table.slice(0, limit)


def show(stream: Stream, limit: int) -> None:
    """Print the first rows as a table."""
    from rich.console import Console
    from rich.table import Table

    found = take(stream, limit)
    table = Table(show_edge=False)
    for name, kind in zip(found.schema.names, found.schema.types, strict=True):
        table.add_column(f"{name}\n[dim]{kind}")
    for row in found.to_pylist():
        table.add_row(*("" if v is None else str(v) for v in row.values()))
    Console().print(table)
