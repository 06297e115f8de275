"""The asynchronous part of checkpoints: runs on the one background thread of a subtask, task after task.

Everything here is confined to that thread, so it needs no lock. Rules: acknowledge only what is durable (C1); commit
only what is complete (C2, S1). What a sink prepared for a checkpoint that failed or was aborted is kept and goes into
the next one: its rows left the operator and belong to the first checkpoint that completes.

Pieces of state are written once: what the last complete checkpoint that is known here has named, or the one that was
restored, is named again (`rayflow.storage.reuse` says when that is safe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Committable, SnapshotStats, SplitState, StateHandle, SubtaskSnapshot
from rayflow.core.manifest import Json as Json
from rayflow.errors import CommitLostError, ConfigError, DataError, ProtocolError, StateTooLargeError
from rayflow.operators.base import Committer, FrozenState, Piece
from rayflow.runtime.ports import (
    BackgroundFailed,
    CommitDone,
    Nothing,
    SnapshotStore,
    SubtaskEvent,
    Uploaded,
    UploadFailed,
)
from rayflow.storage.reuse import Reuse
from rayflow.storage.snapshots import rows_that_count

Prepare = Callable[[], Sequence[Json]]
_NO_LATER_CHECKPOINT = (CommitLostError, StateTooLargeError, DataError, ProtocolError, ConfigError)
"""Errors of an upload that the next checkpoint would meet again: declining would retry for ever and never name them."""


@dataclass(frozen=True, slots=True)
class _Attempted:
    """What was written for a checkpoint that is not known to be complete; it may be, or may have been aborted."""

    named: Reuse
    transient: tuple[Piece, ...]


class Uploads:
    """What one attempt of one subtask has written, prepared and not yet committed.

    ``restored``: the handles it began with, clipped to what is its own.
    """

    def __init__(
        self,
        subtask: SubtaskId,
        parallelism: int,
        store: SnapshotStore,
        committers: Mapping[str, Committer],
        restored: Sequence[StateHandle] = (),
    ) -> None:
        self._subtask = subtask
        self._parallelism = parallelism
        self._store = store
        self._committers = committers
        self._unprepared: list[tuple[CheckpointId, str, Prepare]] = []
        self._prepared: list[tuple[CheckpointId, Committable]] = []
        """Prepared and not known to be committed, oldest first."""
        self._complete = Reuse.of(restored)
        """What the newest checkpoint names that is known to be complete."""
        self._attempted: dict[CheckpointId, _Attempted] = {}
        """Those after it, oldest first."""
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
        try:
            return self._upload(checkpoint, frozen, splits, stats, now)
        finally:
            _release(frozen)

    def _upload(
        self,
        checkpoint: CheckpointId,
        frozen: Sequence[tuple[str, FrozenState]],
        splits: tuple[SplitState, ...],
        stats: SnapshotStats,
        now: Callable[[], float],
    ) -> SubtaskSnapshot:
        began = now()
        self._unprepared += [(checkpoint, op, state.prepare) for op, state in frozen if state.prepare is not None]
        while self._unprepared:
            of, operator, prepare = self._unprepared[0]
            done = prepare()
            self._prepared += [(of, Committable(operator, payload)) for payload in done]
            del self._unprepared[0]
        reuse = self._complete.agreed([a.named for a in self._attempted.values()])
        written = self._store.write(checkpoint, self._subtask, self._parallelism, frozen, reuse)
        transient = tuple(p for _, s in frozen for t in s.tables for p in t.pieces if p.transient and p.batches)
        self._attempted[checkpoint] = _Attempted(Reuse.of(written.handles), transient)
        stats = replace(
            stats,
            async_s=now() - began,
            nbytes=sum(h.nbytes for h in written.handles),
            rows=sum(map(rows_that_count, written.handles)),
            uploaded_bytes=written.uploaded_bytes,
        )
        committables = tuple(c for _, c in self._prepared)
        return SubtaskSnapshot(self._subtask, written.handles, splits, committables, stats)

    def commit(self, checkpoint: CheckpointId) -> None:
        """``checkpoint`` is complete: commit all that was prepared up to it (rule C2).

        What has no committer here was committed by the coordinator before it told this (`Committer.whole`).
        """
        self._let_go(checkpoint)
        due = [(of, c) for of, c in self._prepared if of <= checkpoint]
        for operator, committer in self._committers.items():
            payloads = [c.payload for _, c in due if c.operator == operator]
            if payloads:
                committer.commit(payloads)
        self._prepared = [(of, c) for of, c in self._prepared if of > checkpoint]

    def _let_go(self, checkpoint: CheckpointId) -> None:
        """Pieces of a complete checkpoint need no rows any more, where every later one has named the same files."""
        completed = self._attempted.get(checkpoint)
        self._attempted = {n: attempted for n, attempted in self._attempted.items() if n > checkpoint}
        if completed is None:
            return
        self._complete = completed.named
        safe = self._complete.agreed([a.named for a in self._attempted.values()]).pieces
        for piece in completed.transient:
            if piece.id in safe:
                piece.batches = ()

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
                _release(frozen)
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


def _release(frozen: Sequence[tuple[str, FrozenState]]) -> None:
    for _, state in frozen:
        for folder in state.folders:
            folder.release()
