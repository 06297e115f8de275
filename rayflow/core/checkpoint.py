"""The life of one checkpoint.

C1  expected = acknowledged + missing, disjoint; a subtask acknowledges once.
C2  complete only after the manifest is durable: COMPLETED is reached from WRITING alone.
C3  COMPLETED and ABORTED absorb: nothing that comes later changes them.

    IN_PROGRESS --all acknowledged--> WRITING --manifest durable--> COMPLETED
         |                               |
         +------------ abort ------------+----------------------> ABORTED
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import SplitState, SubtaskSnapshot
from rayflow.core.messages import CheckpointKind
from rayflow.core.seen import SeenSplits
from rayflow.errors import ProtocolError


class CheckpointState(Enum):
    IN_PROGRESS = "in progress"
    WRITING = "writing"
    COMPLETED = "completed"
    ABORTED = "aborted"


class AckOutcome(Enum):
    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    STALE = "stale"
    """The checkpoint has ended."""
    UNKNOWN = "unknown"
    """Not a subtask that this checkpoint waits for."""


class PendingCheckpoint:
    """One checkpoint from its trigger to its end. ``triggered_at`` is in seconds on the driver's clock.

    ``pending_splits`` are the splits that no subtask had at the trigger, ``seen_splits`` all that were ever found of
    sources that go on looking (see `rayflow.core.splits`).
    """

    def __init__(
        self,
        checkpoint: CheckpointId,
        *,
        kind: CheckpointKind,
        attempt: Attempt,
        expected: Iterable[SubtaskId],
        triggered_at: float,
        pending_splits: tuple[SplitState, ...] = (),
        seen_splits: tuple[SeenSplits, ...] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.kind = kind
        self.attempt = attempt
        self.expected = tuple(expected)
        self.triggered_at = triggered_at
        self.pending_splits = pending_splits
        self.seen_splits = seen_splits
        self.state = CheckpointState.IN_PROGRESS
        self.reason = ""  # why it was aborted; empty unless ABORTED
        self._snapshots: dict[SubtaskId, SubtaskSnapshot] = {}
        self._missing = set(self.expected)

    @property
    def missing(self) -> frozenset[SubtaskId]:
        return frozenset(self._missing)

    @property
    def acknowledged(self) -> frozenset[SubtaskId]:
        return frozenset(self._snapshots)

    @property
    def ended(self) -> bool:
        return self.state in (CheckpointState.COMPLETED, CheckpointState.ABORTED)

    def lacks(self, subtask: SubtaskId) -> bool:
        return subtask in self._missing

    def snapshots(self) -> tuple[SubtaskSnapshot, ...]:
        """What was acknowledged, in the order of ``expected``: the same manifest whatever the order of arrival."""
        return tuple(self._snapshots[s] for s in self.expected if s in self._snapshots)

    def acknowledge(self, subtask: SubtaskId, snapshot: SubtaskSnapshot) -> AckOutcome:
        if subtask != snapshot.subtask or subtask not in (self._missing | self._snapshots.keys()):
            return AckOutcome.UNKNOWN
        if self.ended:
            return AckOutcome.STALE
        if subtask in self._snapshots:
            return AckOutcome.DUPLICATE
        self._missing.remove(subtask)
        self._snapshots[subtask] = snapshot
        return AckOutcome.ACCEPTED

    def begin_writing(self) -> None:
        """All is acknowledged and the write of the manifest goes out now.

        Raises `ProtocolError` when a subtask is missing: a manifest without it would lose its state (rule C1).
        """
        if self.state is not CheckpointState.IN_PROGRESS or self._missing:
            names = ", ".join(map(str, sorted(self._missing)))
            raise ProtocolError(
                f"checkpoint {self.checkpoint} is {self.state.value} and lacks [{names}]: its manifest must not be "
                "written (rule C1)"
            )
        self.state = CheckpointState.WRITING

    def complete(self) -> None:
        """The manifest is durable. Raises `ProtocolError` unless it was being written (rule C2)."""
        if self.state is not CheckpointState.WRITING:
            raise ProtocolError(f"checkpoint {self.checkpoint} is {self.state.value}, it cannot complete (rule C2)")
        self.state = CheckpointState.COMPLETED

    def abort(self, reason: str) -> bool:
        """False when it had ended before: terminal states absorb (rule C3)."""
        if self.ended:
            return False
        self.state = CheckpointState.ABORTED
        self.reason = reason
        return True

    def check_invariants(self) -> None:
        acknowledged = self._snapshots.keys()
        assert set(self.expected) == acknowledged | self._missing, "C1: expected = acknowledged + missing"
        assert not acknowledged & self._missing, "C1: disjoint"
        if self.state in (CheckpointState.WRITING, CheckpointState.COMPLETED):
            assert not self._missing, "C1/C2: a manifest without a subtask"
        assert bool(self.reason) == (self.state is CheckpointState.ABORTED)
