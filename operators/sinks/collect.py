"""Rows as the result of a job: kept as operator state, read by the driver from the final checkpoint.

Exactly-once by construction: what the final checkpoint holds is behind everything that was processed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.errors import DataError, StateTooLargeError
from rayflow.operators.base import Committer, FrozenState, FrozenTable, Piece, RestoredState, SinkOperator, new_piece
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
    migrates_state: ClassVar[bool] = False
    """Rows of one result have the same columns."""

    @property
    def stateful(self) -> bool:
        return True

    def state_schemas(self, input_schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        known = input_schema if input_schema is not None else self.schema
        return None if known is None else {ROWS: plain(known)}

    def build(self) -> CollectOperator:
        return CollectOperator(self)

    def committer(self) -> Committer | None:
        return None


@dataclass(slots=True)
class _Run:
    rows: pa.RecordBatch | pa.Table
    piece: Piece | None = None

    def frozen(self) -> Piece:
        if self.piece is None:
            self.piece = new_piece([self.rows])
        return self.piece


class CollectOperator(SinkOperator):
    """An append-only list of runs and a short tail of small batches, merged into a run when it has grown.

    Like a binary counter, so rows are copied a few times at most, and there are never more pieces than
    2 * rows / `RUN_ROWS` + `TAIL_BATCHES` + log2(`RUN_ROWS`). A run of `RUN_ROWS` / 2 rows is merged no more, nor is
    any before it: a checkpoint uploads it once (`Piece`), and what comes behind the last of them every time.
    """

    def __init__(self, sink: CollectSink) -> None:
        self._sink = sink
        self._schema = None if sink.schema is None else plain(sink.schema)
        self._settled: list[_Run] = []
        """Runs that stay as they are."""
        self._runs: list[pa.RecordBatch] = []
        """Later ones, too small for that yet."""
        self._tail: list[pa.RecordBatch] = []
        self._tail_rows = 0
        self._nbytes = 0

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            if state.piece and state.table.num_rows:
                self._check(state.table)
                self._settle()
                self._settled.append(_Run(state.table, Piece(state.piece, (state.table,))))
                continue
            for batch in state.table.to_batches():
                self._add(batch)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._add(batch)

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        if self._schema is None:
            return None
        pieces = tuple(run.frozen() for run in self._settled)
        return FrozenState((FrozenTable(ROWS, (*self._runs, *self._tail), self._schema, pieces=pieces),))

    def close(self) -> None:
        self._settled, self._runs, self._tail = [], [], []

    def _add(self, batch: pa.RecordBatch) -> None:
        if not self._check(batch):
            return
        assert self._schema is not None
        batch = conform(batch, self._schema)
        if batch.num_rows >= RUN_ROWS // 2 and not self._tail:
            self._runs.append(batch)
            self._settle()
            return
        self._tail.append(batch)
        self._tail_rows += batch.num_rows
        if self._tail_rows >= RUN_ROWS or len(self._tail) >= TAIL_BATCHES:
            self._merge_tail()

    def _check(self, rows: pa.RecordBatch | pa.Table) -> bool:
        """Whether there are rows; raises for columns that do not fit, and for too many rows."""
        got = plain(rows.schema)
        if self._schema is None:
            self._schema = got
        elif not same_columns(got, self._schema):
            raise DataError(
                f"{self.ctx} cannot collect batches of two schemas: {difference(self._schema, got)}; "
                f"expected {describe(self._schema)}, got {describe(got)}"
            )
        if not rows.num_rows:
            return False
        self._nbytes += rows.nbytes
        if self._nbytes > self._sink.max_bytes:
            raise StateTooLargeError(
                f"{self.ctx} has collected {self._nbytes} bytes, more than the {self._sink.max_bytes} allowed; "
                f"aggregate first, or write the rows with write_parquet"
            )
        return True

    def _merge_tail(self) -> None:
        """Tails of many tiny batches give small runs; those are merged again until they have a size worth keeping."""
        while self._runs and self._runs[-1].num_rows <= self._tail_rows < RUN_ROWS:
            self._tail.insert(0, self._runs.pop())
            self._tail_rows += self._tail[0].num_rows
        self._runs.append(pa.concat_batches(self._tail))
        self._tail, self._tail_rows = [], 0
        if self._runs[-1].num_rows >= RUN_ROWS // 2:
            self._settle()

    def _settle(self) -> None:
        """All rows so far stay where they are: behind them comes a run that is large."""
        if self._tail:
            self._runs.append(pa.concat_batches(self._tail))
            self._tail, self._tail_rows = [], 0
        self._settled += [_Run(run) for run in self._runs]
        self._runs = []
