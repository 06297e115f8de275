"""Rows as the result of a job: kept as operator state, read by the driver from the final checkpoint.

Exactly-once by construction: what the final checkpoint holds is behind everything that was processed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.errors import DataError, StateTooLargeError
from rayflow.operators.base import Committer, FrozenState, FrozenTable, RestoredState, SinkOperator
from rayflow.operators.sources.schemas import conform, describe, difference, plain, same_columns

ROWS = "rows"
"""Name of the state that holds the collected rows."""
RUN_ROWS = 65_536
TAIL_BATCHES = 256


@dataclass(frozen=True)
class CollectSink:
    """Keeps all rows of a stream, up to ``max_bytes`` in each subtask; ``schema`` gives an empty result its columns."""

    name: str = "collect"
    _: KW_ONLY
    schema: pa.Schema | None = None
    max_bytes: int = 2 * 1024**3

    @property
    def stateful(self) -> bool:
        return True

    def build(self) -> CollectOperator:
        return CollectOperator(self)

    def committer(self) -> Committer | None:
        return None


class CollectOperator(SinkOperator):
    """An append-only list of runs and a short tail of small batches, merged into a run when it has grown.

    Like a binary counter, so rows are copied a few times at most, and there are never more pieces than
    2 * rows / `RUN_ROWS` + `TAIL_BATCHES` + log2(`RUN_ROWS`).
    """

    def __init__(self, sink: CollectSink) -> None:
        self._sink = sink
        self._schema = None if sink.schema is None else plain(sink.schema)
        self._runs: list[pa.RecordBatch] = []
        self._tail: list[pa.RecordBatch] = []
        self._tail_rows = 0
        self._nbytes = 0

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            for batch in state.table.to_batches():
                self._add(batch)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._add(batch)

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        if self._schema is None:
            return None
        return FrozenState((FrozenTable(ROWS, (*self._runs, *self._tail), self._schema),))

    def close(self) -> None:
        self._runs, self._tail = [], []

    def _add(self, batch: pa.RecordBatch) -> None:
        got = plain(batch.schema)
        if self._schema is None:
            self._schema = got
        elif not same_columns(got, self._schema):
            raise DataError(
                f"{self.ctx} cannot collect batches of two schemas: {difference(self._schema, got)}; "
                f"expected {describe(self._schema)}, got {describe(got)}"
            )
        if not batch.num_rows:
            return
        self._nbytes += batch.nbytes
        if self._nbytes > self._sink.max_bytes:
            raise StateTooLargeError(
                f"{self.ctx} has collected {self._nbytes} bytes, more than the {self._sink.max_bytes} allowed; "
                f"aggregate first, or write the rows with write_parquet"
            )
        batch = conform(batch, self._schema)
        if batch.num_rows >= RUN_ROWS // 2 and not self._tail:
            self._runs.append(batch)
            return
        self._tail.append(batch)
        self._tail_rows += batch.num_rows
        if self._tail_rows >= RUN_ROWS or len(self._tail) >= TAIL_BATCHES:
            self._merge_tail()

    def _merge_tail(self) -> None:
        """Tails of many tiny batches give small runs; those are merged again until they have a size worth keeping."""
        while self._runs and self._runs[-1].num_rows <= self._tail_rows < RUN_ROWS:
            self._tail.insert(0, self._runs.pop())
            self._tail_rows += self._tail[0].num_rows
        self._runs.append(pa.concat_batches(self._tail))
        self._tail, self._tail_rows = [], 0
