"""Checkpoints of a running job: trigger, acknowledge, write, notify, abort.

C2  `Complete` goes out only after `ManifestWritten`; complete(n) implies everything <= n.
C4  ids strictly increase and none is used twice; a failover goes on counting.
S1  sinks that commit as a whole are committed by the coordinator before any subtask is told `Complete`: until then the
    subtasks name what they prepared again, so that no later manifest can forget what is not committed yet.
C5  the files of a checkpoint are discarded only when no write of its manifest was ever sent out.

**A manifest that becomes durable after its checkpoint was aborted.** `ManifestFailed` may mean that the outcome is
unknown: the object store may publish manifest n after the subtasks were told Abort(n). Restoring it is still right
while the attempt that took it goes on: its files were kept (C5), and sinks keep what they prepared for an aborted
checkpoint and name it again in the next one, so what manifest n names is either still there to be committed or was
committed by a later checkpoint, and then that one is the newest. It would be wrong once a later attempt has begun from
an *older* manifest, because `RecoverSinks` threw away what came after that one. So every id whose write is undecided is
named in `LoadLatest.unresolved`, and storage decides it before it answers, by creating a mark in its place if absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rayflow.core.checkpoint import AckOutcome, CheckpointState, PendingCheckpoint
from rayflow.core.events import CommitWhole, DiscardCheckpoint, Retain, WriteManifest
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import SplitState
from rayflow.core.messages import Abort, Acknowledge, CheckpointKind, Complete, Decline, FailureCause, Trigger
from rayflow.core.roster import Heard, Roster, SubtaskState
from rayflow.core.seen import SeenSplits
from rayflow.core.splits import SplitPool
from rayflow.core.timeline import CHECKPOINT_ABORTED, CHECKPOINT_COMPLETED, CHECKPOINT_TRIGGERED, Outbox
from rayflow.core.topology import Topology
from rayflow.errors import ProtocolError

RETRY_PAUSE_S: Final = 1.0
"""A final checkpoint or a stop that failed is tried again after this long, or after the interval if that is shorter."""

_ENDING = (CheckpointKind.FINAL, CheckpointKind.STOP)

_HEARD = {
    AckOutcome.ACCEPTED: Heard.ACCEPTED,
    AckOutcome.DUPLICATE: Heard.DUPLICATE,
    AckOutcome.STALE: Heard.STALE,
    AckOutcome.UNKNOWN: Heard.UNKNOWN,
}


@dataclass(slots=True)
class CheckpointCounts:
    triggered: int = 0
    completed: int = 0
    aborted: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointTimes:
    """Seconds. ``interval_s`` None: none but requested and final ones."""

    interval_s: float | None
    timeout_s: float
    min_pause_s: float
    tolerable_failures: int


class Checkpointing:
    """One checkpoint at a time. Driven by `CoordinatorMachine`, only while the job is RUNNING."""

    def __init__(
        self, topology: Topology, roster: Roster, pools: dict[str, SplitPool], times: CheckpointTimes, out: Outbox
    ) -> None:
        self._topology = topology
        self._roster = roster
        self._pools = pools
        self._times = times
        self._out = out
        self.next_id = CheckpointId(1)  # above every id ever triggered (C4)
        self.pending: PendingCheckpoint | None = None
        self.last_completed: CheckpointId | None = None
        self.counts = CheckpointCounts()
        self.failures_in_a_row = 0  # reset by a completion and by a failover
        self.requested: set[CheckpointKind] = set()  # by users; STOP stays until the job has ended
        self._last_reason = ""  # why the last one was aborted
        self.unresolved: set[CheckpointId] = set()  # manifest writes sent out, outcome unknown, not superseded
        self.ending: tuple[CheckpointId, CheckpointKind] | None = None  # durable; the job ends when all committed it
        self._uncommitted: set[CheckpointId] = set()  # durable, and the coordinator's own commit has not been answered
        self._committed: dict[SubtaskId, CheckpointId] = {}  # the highest each subtask has answered in this attempt
        self._deadline = 0.0  # of the pending one; restarts when its manifest write goes out; then of the last commits
        self._last_start = 0.0
        self._last_end = float("-inf")
        self._retry_at = float("-inf")
        self._end_is_next = False  # one requested checkpoint was let pass before the last one; no more, or it starves

    # --------------------------------------------------------------------------------------------- life of the attempt

    def begin(self, now: float) -> None:
        """All subtasks of a new attempt run: the interval is counted from here."""
        self._last_start = now
        self._last_end = self._retry_at = float("-inf")
        self.failures_in_a_row = 0
        self._end_is_next = False
        self.ending = None
        self._uncommitted.clear()
        self._committed.clear()

    def abandon(self, reason: str, now: float, *, discard: bool = True) -> None:
        """The attempt is over; the subtasks learn of it by Reset, not by Abort.

        ``discard=False`` leaves storage alone: a coordinator that was fenced may not own the id any more (C8).
        """
        self.ending = None
        self._uncommitted.clear()
        self._abort(reason, now, tell=False, discard=discard)

    def recovered(self, last: CheckpointId | None, next_checkpoint: CheckpointId) -> None:
        """Storage was read: ids go on above everything it has ever held (C4)."""
        self.next_id = max(self.next_id, next_checkpoint)
        if last is not None:
            self.next_id = max(self.next_id, CheckpointId(last + 1))
            self.last_completed = last
        self.unresolved.clear()

    # ---------------------------------------------------------------------------------------------------------- trigger

    def request(self, kind: CheckpointKind) -> Heard:
        if kind is CheckpointKind.FINAL:
            return Heard.UNKNOWN
        if kind in self.requested:
            return Heard.DUPLICATE  # one checkpoint answers both
        self.requested.add(kind)
        return Heard.ACCEPTED

    def next_due(self) -> tuple[CheckpointKind, float] | None:
        """The kind of the next checkpoint and the time from which it may begin; None while one is under way."""
        if self.pending is not None or self.ending is not None:
            return None
        for kind in (CheckpointKind.PERIODIC, CheckpointKind.SAVEPOINT):
            if kind in self.requested and not self._end_is_next:
                return kind, float("-inf")
        if self._roster.all_ended:
            return CheckpointKind.FINAL, self._retry_at
        if CheckpointKind.STOP in self.requested:
            return CheckpointKind.STOP, self._retry_at
        if self._times.interval_s is None:
            return None
        after_pause = self._last_end + self._times.min_pause_s
        return CheckpointKind.PERIODIC, max(self._last_start + self._times.interval_s, after_pause)

    def next_deadline(self) -> float | None:
        if self.pending is not None or self.ending is not None:
            return self._deadline
        due = self.next_due()
        return None if due is None else due[1]

    def advance(self, now: float) -> None:
        """Begin what is due."""
        due = self.next_due()
        if due is not None and due[1] <= now:
            self._trigger(due[0], now)

    def check_timeout(self, now: float) -> None:
        if self.pending is not None and self._deadline <= now:
            missing = ", ".join(map(str, sorted(self.pending.missing))) or "its manifest"
            self._abort(f"it took longer than {self._times.timeout_s:g} s; missing: {missing}", now)

    def _trigger(self, kind: CheckpointKind, now: float) -> None:
        if self.pending is not None:
            raise ProtocolError(f"checkpoint {self.pending.checkpoint} is pending, another must not begin")
        checkpoint = self._new_id()
        self._end_is_next = self._roster.all_ended or CheckpointKind.STOP in self.requested
        if kind is not CheckpointKind.STOP:
            self.requested.discard(kind)
        self.pending = PendingCheckpoint(
            checkpoint,
            kind=kind,
            attempt=self._roster.attempt,
            expected=self._topology.subtasks,
            triggered_at=now,
            pending_splits=self._pool_snapshot(),
            seen_splits=self._seen_splits(),
        )
        self.counts.triggered += 1
        self._last_start = now
        self._deadline = now + self._times.timeout_s
        self._note(CHECKPOINT_TRIGGERED, f"{checkpoint} ({kind.value})", now)
        for member in self._roster:
            if self._topology.is_source(member.subtask) or member.state is SubtaskState.ENDED:
                self._roster.send(member.subtask, Trigger(checkpoint, kind))

    def _new_id(self) -> CheckpointId:
        checkpoint = self.next_id
        self.next_id = CheckpointId(checkpoint + 1)
        return checkpoint

    def _pool_snapshot(self) -> tuple[SplitState, ...]:
        """Taken at the moment of the trigger and no later: see `rayflow.core.splits`."""
        return tuple(split for name in sorted(self._pools) for split in self._pools[name].snapshot())

    def _seen_splits(self) -> tuple[SeenSplits, ...]:
        """At the same moment: each of them stands in a snapshot, or was read to its end before the barrier."""
        frozen = (self._pools[name].seen() for name in sorted(self._pools))
        return tuple(seen for seen in frozen if seen is not None)

    def input_ended(self, subtask: SubtaskId) -> None:
        """No barrier can reach this subtask any more (A6): it must be told of the pending checkpoint itself.

        It may have begun the checkpoint already and be uploading: a subtask ignores a Trigger for what it has begun.
        Sources were told at the trigger.
        """
        p = self.pending
        if p is not None and p.lacks(subtask) and not self._topology.is_source(subtask):
            self._roster.send(subtask, Trigger(p.checkpoint, p.kind))

    # ---------------------------------------------------------------------------------------------------------- answers

    def acknowledged(self, subtask: SubtaskId, ack: Acknowledge, now: float) -> Heard:
        p = self.pending
        if p is None or p.checkpoint != ack.checkpoint:
            return self._not_pending(ack.checkpoint)
        heard = _HEARD[p.acknowledge(subtask, ack.snapshot)]
        if heard is Heard.ACCEPTED and not p.missing:
            self._write(p, now)
        return heard

    def _write(self, p: PendingCheckpoint, now: float) -> None:
        p.begin_writing()
        self.unresolved.add(p.checkpoint)
        self._deadline = now + self._times.timeout_s
        self._out.put(WriteManifest(p.checkpoint, p.kind, p.attempt, p.snapshots(), p.pending_splits, p.seen_splits))

    def declined(self, subtask: SubtaskId, decline: Decline, now: float) -> Heard:
        p = self.pending
        if p is None or p.checkpoint != decline.checkpoint:
            return self._not_pending(decline.checkpoint)
        if not p.lacks(subtask):
            return Heard.DUPLICATE  # it has answered already, and what it gave is durable
        self._abort(f"{subtask} declined: {decline.reason}", now)
        return Heard.ACCEPTED

    def _not_pending(self, checkpoint: CheckpointId) -> Heard:
        return Heard.STALE if checkpoint < self.next_id else Heard.UNKNOWN

    def manifest_written(self, checkpoint: CheckpointId, now: float) -> Heard:
        p = self.pending
        if p is None or p.checkpoint != checkpoint or p.state is not CheckpointState.WRITING:
            self.unresolved.discard(checkpoint)  # durable: the next recovery will find it
            return self._not_pending(checkpoint)
        p.complete()
        self.pending = None
        self.last_completed = checkpoint
        self.failures_in_a_row = 0
        self.counts.completed += 1
        self._last_end = now
        self.unresolved = {n for n in self.unresolved if n > checkpoint}  # older ones are superseded
        if p.kind in _ENDING:
            self.ending = (checkpoint, p.kind)
            self._deadline = now + self._times.timeout_s
        self._note(CHECKPOINT_COMPLETED, f"{checkpoint} ({p.kind.value}) in {now - p.triggered_at:.3f} s", now)
        if self._topology.whole:
            self._uncommitted.add(checkpoint)
            self._out.put(CommitWhole(p.attempt, checkpoint, p.snapshots()))
        else:
            self._roster.send_all(Complete(checkpoint))
        self._out.put(Retain(checkpoint))
        return Heard.ACCEPTED

    def whole_answered(self, attempt: Attempt, checkpoint: CheckpointId, *, committed: bool) -> Heard:
        """The coordinator's own commit is done, or has failed; ACCEPTED when the present attempt waited for it."""
        if attempt != self._roster.attempt:
            return Heard.STALE  # C6: the present one has committed what its manifest names
        if checkpoint not in self._uncommitted:
            return Heard.DUPLICATE if checkpoint < self.next_id else Heard.UNKNOWN
        if committed:
            self._uncommitted.discard(checkpoint)
            self._roster.send_all(Complete(checkpoint))
        return Heard.ACCEPTED

    def manifest_failed(self, checkpoint: CheckpointId, reason: str, now: float) -> Heard:
        p = self.pending
        if p is None or p.checkpoint != checkpoint or p.state is not CheckpointState.WRITING:
            return self._not_pending(checkpoint)
        self._abort(f"its manifest could not be written: {reason}", now)
        return Heard.ACCEPTED

    def committed(self, subtask: SubtaskId, checkpoint: CheckpointId) -> Heard:
        if self.last_completed is None or checkpoint > self.last_completed:
            return Heard.UNKNOWN
        if checkpoint <= self._committed.get(subtask, 0):
            return Heard.DUPLICATE
        self._committed[subtask] = checkpoint
        return Heard.ACCEPTED

    def over(self) -> CheckpointKind | None:
        """FINAL or STOP when every subtask has committed it: the job may end."""
        if self.ending is None:
            return None
        checkpoint, kind = self.ending
        return kind if all(self._committed.get(m.subtask, 0) >= checkpoint for m in self._roster) else None

    def overdue(self, now: float) -> FailureCause | None:
        """The last checkpoint is durable, and somebody does not commit it: nothing else would ever notice.

        Another attempt commits what its manifest names before anything else (rule S1).
        """
        if self.ending is None or now < self._deadline:
            return None
        checkpoint, kind = self.ending
        missing = [str(m.subtask) for m in self._roster if self._committed.get(m.subtask, 0) < checkpoint]
        if self._uncommitted:
            missing = [f"sink {name!r}" for name in sorted(self._topology.whole)]
        return FailureCause(
            f"checkpoint {checkpoint} ({kind.value}) is complete, but {', '.join(missing)} did not commit it within "
            f"{self._times.timeout_s:g} s",
            kind="CommitTimeout",
        )

    # ------------------------------------------------------------------------------------------------------------ abort

    def too_many_failures(self) -> FailureCause | None:
        if self.failures_in_a_row <= self._times.tolerable_failures:
            return None
        return FailureCause(
            f"{self.failures_in_a_row} checkpoints failed in a row, {self._times.tolerable_failures} are tolerated; "
            f"the last: {self._last_reason}",
            kind="CheckpointFailure",
        )

    def _abort(self, reason: str, now: float, *, tell: bool = True, discard: bool = True) -> None:
        p = self.pending
        if p is None:
            return
        begun_writing = p.state is CheckpointState.WRITING
        p.abort(reason)
        self.pending = None
        self._last_end = now
        self._retry_at = now + max(self._times.min_pause_s, min(RETRY_PAUSE_S, self._times.interval_s or RETRY_PAUSE_S))
        self.counts.aborted += 1
        self._note(CHECKPOINT_ABORTED, f"{p.checkpoint} ({p.kind.value}): {reason}", now)
        if tell:
            self.failures_in_a_row += 1
            self._last_reason = reason
            self._roster.send_all(Abort(p.checkpoint))
        if discard and self._may_discard(begun_writing):
            self._out.put(DiscardCheckpoint(p.checkpoint))

    def _may_discard(self, begun_writing: bool) -> bool:
        return not begun_writing

    def _note(self, what: str, detail: str, now: float) -> None:
        self._out.note(what, detail, attempt=self._roster.attempt, now=now)

    def check_invariants(self) -> None:
        p = self.pending
        if p is not None:
            p.check_invariants()
            assert not p.ended, "C3: an ended checkpoint is not pending"
            assert p.attempt == self._roster.attempt, "C6"
            assert p.checkpoint < self.next_id, "C4"
            assert self.last_completed is None or p.checkpoint > self.last_completed, "C4"
            assert self.ending is None, "nothing begins after the last checkpoint"
            assert (p.checkpoint in self.unresolved) == (p.state is CheckpointState.WRITING)
        assert all(n < self.next_id for n in self.unresolved)
        assert self._topology.whole or not self._uncommitted
        assert all(self.last_completed is not None and n <= self.last_completed for n in self._uncommitted), "C2"
        assert self.last_completed is None or all(n > self.last_completed for n in self.unresolved)
