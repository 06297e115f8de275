"""The source side of a subtask: reads its splits one after another on the loop thread and remembers positions.

R2: a snapshot holds every split that was assigned and is not read to its end, with the position behind the last batch
that was emitted. One split ahead is asked for, so that reading does not wait for the coordinator between two splits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK
from rayflow.core.manifest import SplitState
from rayflow.errors import RayflowError, UserCodeError
from rayflow.operators.base import OperatorContext, SplitReader
from rayflow.operators.event_time import WatermarkTracker
from rayflow.plan import PlannedSource


class SourceRunner:
    """Polls the splits of one source subtask, in the order in which they were assigned."""

    def __init__(self, planned: PlannedSource, ctx: OperatorContext) -> None:
        self._planned = planned
        self._ctx = ctx
        self._queue: deque[SplitState] = deque()
        self._reader: SplitReader | None = None
        self._no_more = False
        self._requested = False
        self.position = "before the first split"
        """Where the last batch was read, for messages and for telling a repeated failure."""
        self._skipped_before = 0
        """Rows that readers of splits that are done have left out."""
        self._tracker = WatermarkTracker(planned.event_time, where=str(ctx)) if planned.event_time is not None else None

    @property
    def watermark(self) -> int:
        return self._tracker.watermark if self._tracker is not None else MIN_WATERMARK

    @property
    def skipped_rows(self) -> int:
        """Rows left out by ``on_error="skip"`` in this attempt."""
        return self._skipped_before + self._skipped_by_reader()

    def _skipped_by_reader(self) -> int:
        return self._reader.skipped if self._reader is not None else 0

    @property
    def exhausted(self) -> bool:
        """Everything is read and nothing more will be assigned."""
        return self._no_more and not self._queue

    @property
    def can_poll(self) -> bool:
        return bool(self._queue)

    def wants_split(self) -> bool:
        """True once for every request that should be sent now."""
        if self._requested or self._no_more or len(self._queue) > 1:
            return False
        self._requested = True
        return True

    def assign(self, splits: Sequence[SplitState], *, no_more: bool) -> None:
        self._requested = False
        self._queue.extend(splits)
        self._no_more = self._no_more or no_more

    def poll(self) -> pa.RecordBatch | None:
        """The next batch, or None when there is none just now."""
        while True:
            batch, done = self._poll_head()
            # The end of a split without a batch is no reason to wait while there is another one.
            if batch is not None or not done or not self._queue:
                return batch

    def _poll_head(self) -> tuple[pa.RecordBatch | None, bool]:
        head = self._queue[0]
        self.position = f"split {head.split_id} at {head.position}"
        try:
            if self._reader is None:
                self._reader = self._planned.source.reader(head.split, head.position, self._ctx)
            polled = self._reader.poll()
        except RayflowError:
            raise
        except Exception as error:
            raise UserCodeError(
                f"{self._ctx} could not read split {head.split_id!r} at position {head.position!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if polled.done:
            self._queue.popleft()
            self._skipped_before += self._skipped_by_reader()
            self._reader.close()
            self._reader = None
        elif polled.batch is not None:
            self._queue[0] = replace(head, position=polled.position)
        if polled.batch is not None and polled.batch.num_rows and self._tracker is not None:
            self._tracker.observe(polled.batch)
        return polled.batch, polled.done

    def unfinished(self) -> tuple[SplitState, ...]:
        return tuple(self._queue)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None
