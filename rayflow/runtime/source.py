"""The source side of a subtask: reads its splits on the loop thread and remembers positions.

R2: a snapshot holds every split that was assigned and is not read to its end, with the position behind the last batch
that was emitted, and the newest event time there.

**Splits are read one after another**, in the order in which they were assigned: the reading order of the subtask, of
which ``max_delay`` speaks. One split ahead is asked for, so that reading does not wait for the coordinator between two
splits. **Or in turns** (`Source.in_turns`), which splits that never end must be, and each has a watermark of its own.

W2: the watermark is the minimum over the splits that are read and not idle. While splits may still be on their way to a
subtask that reads in turns it stays where it is, because they may begin with older rows: until nothing more comes or,
where new splits are looked for, all that are known are dealt out. While a subtask has no split and waits for one to be
found, event time stays where it is; it is idle after ``idle_timeout``, and at once where splits are read in turns.
A split is idle when it was asked for rows in vain for ``idle_timeout``: time in which it was not asked, because output
waited or because others had to catch up, does not count by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from rayflow.core.drift import too_far
from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.core.manifest import Json, SplitState
from rayflow.core.watermarks import InputWatermarks
from rayflow.errors import DataError, RayflowError, UserCodeError
from rayflow.operators.base import OperatorContext, SplitReader
from rayflow.operators.event_time import WatermarkTracker
from rayflow.plan import PlannedSource


@dataclass(eq=False, slots=True)
class _Split:
    """One split that is read or will be."""

    state: SplitState
    tracker: WatermarkTracker | None
    reader: SplitReader | None = None
    quiet_since: float | None = None
    """When it was first asked in vain after its last row."""


class SourceRunner:
    """Polls the splits of one source subtask."""

    def __init__(self, planned: PlannedSource, ctx: OperatorContext) -> None:
        self._planned = planned
        self._ctx = ctx
        self._time = planned.event_time
        self._in_turns: bool = planned.source.in_turns
        self._queue: deque[_Split] = deque()
        """In turns: the next to be asked first. Otherwise the first is read to its end."""
        self._no_more = False
        self._settled = False
        """More splits may be found, but none of those that are known comes."""
        self._empty_since: float | None = None
        """When it was first asked whether it is idle after its last split."""
        self._requested = False
        self._taken: dict[CheckpointId, dict[str, Json]] = {}
        """Positions by split in checkpoints that are not known to be complete; those aborted go with the next one."""
        self.position = "before the first split"
        """Where the last batch was read, for messages and for telling a repeated failure."""
        self._skipped_before = 0
        """Rows that readers and trackers of splits that are done have left out."""
        self._shared = None if self._in_turns else self._tracker()
        self._watermarks: InputWatermarks[str] = InputWatermarks(())
        """By split id; of one that is read alone there is only that one."""
        self.slowest = MIN_WATERMARK
        """How far the slowest of the sources that this one must not leave behind has got, as the coordinator says."""

    def _tracker(self) -> WatermarkTracker | None:
        if self._time is None:
            return None
        return WatermarkTracker(self._time, where=str(self._ctx), wall_time=self._ctx.wall_time)

    # ------------------------------------------------------------------------------------------------------ event time

    @property
    def watermark(self) -> int:
        return self._watermarks.current

    @property
    def idle(self) -> bool:
        """Every split is idle, or there is none for now."""
        if self._queue or not self._settled:
            return self._watermarks.all_idle
        if self._in_turns:
            return True
        if self._time is None or self._time.idle_timeout_us is None:
            return False
        now = self._ctx.now()
        if self._empty_since is None:
            self._empty_since = now
        return bool((now - self._empty_since) * 1e6 >= self._time.idle_timeout_us)

    @property
    def aligned(self) -> bool:
        """It tells how far it has got and waits for others."""
        return self._time is not None and self._time.max_drift_us is not None

    def _held(self, split: _Split) -> bool:
        """The split is too far ahead of the slowest source."""
        limit = None if self._time is None else self._time.max_drift_us
        return limit is not None and split.tracker is not None and too_far(split.tracker.watermark, self.slowest, limit)

    def _advance(self, split: _Split) -> None:
        if split.tracker is not None and (self._no_more or self._settled or not self._in_turns):
            self._watermarks.advance(split.state.split_id, split.tracker.watermark)

    def _asked_in_vain(self, split: _Split) -> None:
        timeout_us = None if self._time is None else self._time.idle_timeout_us
        if timeout_us is None:
            return
        now = self._ctx.now()
        if split.quiet_since is None:
            split.quiet_since = now
        if (now - split.quiet_since) * 1e6 >= timeout_us and not self._watermarks.is_idle(split.state.split_id):
            self._watermarks.set_idle(split.state.split_id)

    # ---------------------------------------------------------------------------------------------------------- splits

    @property
    def skipped_rows(self) -> int:
        """Rows left out by ``on_error="skip"`` in this attempt, and rows too far in the future."""
        opened = sum(split.reader.skipped for split in self._queue if split.reader is not None)
        trackers = [self._shared] if self._shared is not None else [split.tracker for split in self._queue]
        return self._skipped_before + opened + sum(t.skipped_rows for t in trackers if t is not None)

    @property
    def exhausted(self) -> bool:
        """Everything is read and nothing more will be assigned."""
        return self._no_more and not self._queue

    @property
    def can_poll(self) -> bool:
        """There is a split to read that need not wait for other sources."""
        if self._in_turns:
            return any(not self._held(split) for split in self._queue)
        return bool(self._queue) and not self._held(self._queue[0])

    def wants_split(self) -> bool:
        """True once for every request that should be sent now."""
        if self._requested or self._no_more or (len(self._queue) > 1 and not self._in_turns):
            return False
        self._requested = True
        return True

    def assign(self, splits: Sequence[SplitState], *, no_more: bool, settled: bool = False) -> None:
        if splits or not settled:
            self._requested = False
            self._empty_since = None
        for state in splits:
            split = _Split(state, self._shared)
            if self._in_turns:
                split.tracker = self._tracker()
                self._begin_time(split)
            self._queue.append(split)
        self._no_more = self._no_more or no_more
        self._settled = settled
        if (self._no_more or self._settled) and self._in_turns:
            for split in self._queue:
                self._advance(split)

    def _begin_time(self, split: _Split) -> None:
        """Event time goes on where it was when the position was stored."""
        self._watermarks.add(split.state.split_id)
        if split.tracker is not None:
            split.tracker.restore(split.state.newest_us)
            self._advance(split)

    # --------------------------------------------------------------------------------------------------------- reading

    def poll(self) -> pa.RecordBatch | None:
        """The next batch, or None when there is none just now."""
        if self._in_turns:
            return self._poll_in_turns()
        while True:
            batch, done = self._poll_split(self._queue[0])
            # The end of a split without a batch is no reason to wait while there is another one.
            if batch is not None or not done or not self._queue:
                return batch

    def _poll_in_turns(self) -> pa.RecordBatch | None:
        """The first batch that one of them has; each is asked once."""
        for _ in range(len(self._queue)):
            split = self._queue[0]
            self._queue.rotate(-1)
            if not self._held(split):
                batch, _ = self._poll_split(split)
                if batch is not None:
                    return batch
        return None

    def _poll_split(self, split: _Split) -> tuple[pa.RecordBatch | None, bool]:
        state = split.state
        self.position = f"split {state.split_id} at {state.position}"
        try:
            if split.reader is None:
                split.reader = self._planned.source.reader(state.split, state.position, self._ctx)
                if not self._in_turns:
                    self._begin_time(split)
            polled = split.reader.poll()
        except RayflowError:
            raise
        except Exception as error:
            raise UserCodeError(
                f"{self._ctx} could not read split {state.split_id!r} at position {state.position!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        batch = polled.batch
        if batch is not None and batch.num_rows and split.tracker is not None:
            batch = self._timed(split, split.tracker, batch)
        if polled.batch is not None and not polled.done:
            split.state = replace(state, position=polled.position)
        if polled.batch is not None and polled.batch.num_rows:
            split.quiet_since = None
            self._advance(split)
        elif not polled.done:
            self._asked_in_vain(split)
        if polled.done:
            self._finish(split)
        return batch, polled.done

    def _timed(self, split: _Split, tracker: WatermarkTracker, batch: pa.RecordBatch) -> pa.RecordBatch:
        try:
            return tracker.observe(batch)
        except (DataError, UserCodeError) as error:
            state = split.state
            raise type(error)(
                f"{error} (split {state.split_id!r}, the batch at position {state.position!r})"
            ) from error

    def _finish(self, split: _Split) -> None:
        """Nothing more comes from the split. What it has reached stays."""
        self._queue.remove(split)
        self._watermarks.forget(split.state.split_id)
        if self._in_turns and split.tracker is not None:
            self._skipped_before += split.tracker.skipped_rows
        if split.reader is not None:
            self._skipped_before += split.reader.skipped
            split.reader.close()
            split.reader = None

    def unfinished(self) -> tuple[SplitState, ...]:
        """What a snapshot holds."""
        return tuple(
            replace(split.state, newest_us=split.tracker.newest)
            if split.tracker is not None and split.reader is not None
            else split.state
            for split in sorted(self._queue, key=lambda split: (split.state.order, split.state.split_id))
        )

    def snapshot(self, checkpoint: CheckpointId) -> tuple[SplitState, ...]:
        """What the checkpoint holds; its positions are kept until it is known to be complete."""
        splits = self.unfinished()
        self._taken[checkpoint] = {split.split_id: split.position for split in splits}
        return splits

    def checkpointed(self, checkpoint: CheckpointId) -> None:
        """The checkpoint is complete: tell the readers of the splits in it that are still read."""
        positions = self._taken.get(checkpoint, {})
        self._taken = {n: taken for n, taken in self._taken.items() if n > checkpoint}
        for split in self._queue:
            position = positions.get(split.state.split_id)
            if split.reader is not None and position is not None:
                split.reader.checkpointed(position)

    def close(self) -> None:
        for split in self._queue:
            if split.reader is not None:
                split.reader.close()
                split.reader = None
