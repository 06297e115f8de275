"""The asynchronous part of checkpoints: runs on the one background thread of a subtask, task after task.

Everything here is confined to that thread, so it needs no lock. Rules: acknowledge only what is durable (C1); commit
only what is complete (C2, S1). What a sink prepared for a checkpoint that failed or was aborted is kept and goes into
the next one: its rows left the operator and belong to the first checkpoint that completes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Committable, SnapshotStats, SplitState, SubtaskSnapshot
from rayflow.core.manifest import Json as Json
from rayflow.errors import CommitLostError, DataError, ProtocolError, StateTooLargeError
from rayflow.operators.base import Committer, FrozenState
from rayflow.runtime.ports import (
    BackgroundFailed,
    CommitDone,
    Nothing,
    SnapshotStore,
    SubtaskEvent,
    Uploaded,
    UploadFailed,
)

Prepare = Callable[[], Sequence[Json]]
_NO_LATER_CHECKPOINT = (CommitLostError, StateTooLargeError, DataError, ProtocolError)
"""Errors of an upload that the next checkpoint would meet again: declining would retry for ever and never name them."""


class Uploads:
    """What one attempt of one subtask has written, prepared and not yet committed."""

    def __init__(
        self, subtask: SubtaskId, parallelism: int, store: SnapshotStore, committers: Mapping[str, Committer]
    ) -> None:
        self._subtask = subtask
        self._parallelism = parallelism
        self._store = store
        self._committers = committers
        self._unprepared: list[tuple[CheckpointId, str, Prepare]] = []
        self._prepared: list[tuple[CheckpointId, Committable]] = []
        """Prepared and not known to be committed, oldest first."""
        self.cancelled = False
        """Set by the loop thread on a reset: tasks that have not begun do nothing."""

    def upload(
        self,
        checkpoint: CheckpointId,
        frozen: Sequence[tuple[str, FrozenState]],
        splits: tuple[SplitState, ...],
        stats: SnapshotStats,
        now: Callable[[], float],
    ) -> SubtaskSnapshot:
        """Write the states, finish pre-commits; everything in the result is durable. Raises what storage raises."""
        began = now()
        self._unprepared += [(checkpoint, op, state.prepare) for op, state in frozen if state.prepare is not None]
        while self._unprepared:
            of, operator, prepare = self._unprepared[0]
            done = prepare()
            self._prepared += [(of, Committable(operator, payload)) for payload in done]
            del self._unprepared[0]
        handles = [
            self._store.write(checkpoint, operator, self._subtask.index, self._parallelism, table)
            for operator, state in frozen
            for table in state.tables
        ]
        stats = replace(
            stats,
            async_s=now() - began,
            nbytes=sum(h.file.nbytes if h.file else len(h.inline or "") for h in handles),
            rows=sum(h.rows for h in handles),
        )
        committables = tuple(c for _, c in self._prepared)
        return SubtaskSnapshot(self._subtask, tuple(handles), splits, committables, stats)

    def commit(self, checkpoint: CheckpointId) -> None:
        """Commit all that was prepared up to ``checkpoint`` (rule C2)."""
        due = [(of, c) for of, c in self._prepared if of <= checkpoint]
        for operator, committer in self._committers.items():
            payloads = [c.payload for _, c in due if c.operator == operator]
            if payloads:
                committer.commit(payloads)
        self._prepared = [(of, c) for of, c in self._prepared if of > checkpoint]

    # ------------------------------------------------------------------------- the same as tasks that end with an event

    def upload_task(
        self,
        attempt: Attempt,
        checkpoint: CheckpointId,
        frozen: Sequence[tuple[str, FrozenState]],
        splits: tuple[SplitState, ...],
        stats: SnapshotStats,
        now: Callable[[], float],
    ) -> Callable[[], SubtaskEvent]:
        def task() -> SubtaskEvent:
            if self.cancelled:
                return Nothing()
            try:
                return Uploaded(attempt, checkpoint, self.upload(checkpoint, frozen, splits, stats, now))
            except Exception as error:
                if isinstance(error, _NO_LATER_CHECKPOINT):
                    return BackgroundFailed(attempt, error)
                return UploadFailed(attempt, checkpoint, f"{self._subtask}: {type(error).__name__}: {error}")

        return task

    def commit_task(self, attempt: Attempt, checkpoint: CheckpointId) -> Callable[[], SubtaskEvent]:
        def task() -> SubtaskEvent:
            if self.cancelled:
                return Nothing()
            try:
                self.commit(checkpoint)
            except Exception as error:
                return BackgroundFailed(attempt, error)
            return CommitDone(attempt, checkpoint)

        return task
