"""What all SQL sinks have in common: rows are gathered, written in large pieces, and sealed at the barrier.

A **segment** is what one subtask writes between two barriers. The loop thread fills it; `snapshot` hands it over in
O(1), and from then on only the uploader thread uses it.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import RayflowError, SchemaChangedError
from rayflow.operators.base import FrozenState, SinkOperator
from rayflow.operators.sources.schemas import conform, describe, difference, plain, same_columns
from rayflow.operators.sql.marks import Mark

FLUSH_ROWS: Final = 131_072
FLUSH_BYTES: Final = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Flush:
    """Rows are gathered until one of these is reached."""

    rows: int = FLUSH_ROWS
    nbytes: int = FLUSH_BYTES


class Segment(ABC):
    """Rows of one interval. One thread at a time uses it."""

    @abstractmethod
    def write(self, rows: pa.Table) -> None:
        """Take these rows. An error of it is final where `lost` says so; else it may be called again with them."""

    @abstractmethod
    def seal(self, mark: Mark) -> Json | None:
        """Make all rows durable under this mark; the committable, or None when there is nothing to commit. May be
        called again after a failure."""

    def lost(self) -> bool:
        """Whether rows it had taken are gone: only going back to a checkpoint brings them again."""
        return False

    def abandon(self) -> None:
        """The rows are not wanted any more; never raises."""


@dataclass(slots=True)
class _Filling:
    segment: Segment
    rows: list[pa.RecordBatch] = field(default_factory=list)
    buffered_rows: int = 0
    buffered_bytes: int = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self.rows.append(batch)
        self.buffered_rows += batch.num_rows
        self.buffered_bytes += batch.nbytes

    def flush(self) -> None:
        if self.rows:
            self.segment.write(pa.Table.from_batches(self.rows))
            self.rows, self.buffered_rows, self.buffered_bytes = [], 0, 0


class SegmentSinkOperator(SinkOperator):
    """Batches must all have one schema (the first one's).

    What could not be prepared stays in the queue and is tried again with the next checkpoint. Once rows are lost with a
    connection, the next batch or barrier raises what has happened, so that the attempt ends.
    """

    ordered: ClassVar[bool] = False
    """Rows are visible as soon as they are written, so they must be written in their order."""

    def __init__(self, flush: Flush) -> None:
        self._flush = flush
        self._schema: pa.Schema | None = None
        self._filling: _Filling | None = None
        self._closed = False
        self._failure: RayflowError | None = None
        self._lock = threading.Lock()
        """Held by whoever seals. Of the two below the loop thread only appends to the first."""
        self._sealed: list[tuple[CheckpointId, _Filling]] = []
        self._ready: list[tuple[CheckpointId, Json]] = []

    @abstractmethod
    def _begin(self, schema: pa.Schema) -> None:
        """The schema is known: look at the target. On the loop thread, before the first segment."""

    @abstractmethod
    def _segment(self) -> Segment: ...

    def _check(self, rows: pa.RecordBatch) -> None:
        """Raises `DataError` for rows that the target will not take."""

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if not batch.num_rows:
            return
        self._raise_failure()
        batch = self._conformed(batch)
        self._check(batch)
        if self._filling is None:
            self._filling = _Filling(self._segment())
        filling = self._filling
        filling.add(batch)
        if filling.buffered_rows >= self._flush.rows or filling.buffered_bytes >= self._flush.nbytes:
            if self.ordered:
                with self._lock:
                    self._seal_up_to(None)
                    filling.flush()
            else:
                filling.flush()

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        self._raise_failure()
        filling, self._filling = self._filling, None
        # Without the lock: the uploader may hold it for as long as the server lets it wait.
        if filling is not None:
            self._sealed.append((checkpoint, filling))
        if not self._sealed and not self._ready:
            return None
        return FrozenState(prepare=partial(self._prepare, checkpoint))

    def close(self) -> None:
        if self._filling is not None:
            self._filling.segment.abandon()
            self._filling = None
        self._closed = True
        self._release()

    def _disconnect(self) -> None:
        """Release what all segments share; never raises."""

    def _release(self) -> None:
        """Never waits for an upload: whoever of the two threads comes last does it."""
        if self._lock.acquire(blocking=False):
            try:
                for _, filling in self._sealed:
                    filling.segment.abandon()
                self._sealed = []
                self._disconnect()
            finally:
                self._lock.release()

    def _prepare(self, checkpoint: CheckpointId) -> Sequence[Json]:
        """On the uploader thread."""
        try:
            with self._lock:
                self._seal_up_to(checkpoint)
                due = [payload for n, payload in self._ready if n <= checkpoint]
                self._ready = [(n, payload) for n, payload in self._ready if n > checkpoint]
                return due
        finally:
            if self._closed:
                self._release()

    def _seal_up_to(self, checkpoint: CheckpointId | None) -> None:
        """Not beyond this checkpoint: later rows do not lie before its barrier (rule A3)."""
        while self._sealed and (checkpoint is None or self._sealed[0][0] <= checkpoint):
            of, filling = self._sealed[0]
            try:
                filling.flush()
                payload = filling.segment.seal(self._mark(of))
            except RayflowError as error:
                if filling.segment.lost():
                    self._failure = error
                raise
            if payload is not None:
                self._ready.append((of, payload))
            del self._sealed[0]

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _mark(self, checkpoint: CheckpointId) -> Mark:
        return Mark(self.ctx.job, self.ctx.run_id, self.ctx.operator, self.ctx.subtask, int(checkpoint))

    def _conformed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        got = plain(batch.schema)
        if self._schema is None:
            self._begin(got)
            self._schema = got
        elif not same_columns(got, self._schema):
            raise SchemaChangedError(
                f"{self.ctx} cannot write batches of two schemas to one table: {difference(self._schema, got)}; "
                f"expected {describe(self._schema)}, got {describe(got)}; cast them alike before the sink"
            )
        return conform(batch, self._schema)
