"""What one report, in order and of the present attempt, changes."""

from __future__ import annotations

from typing import assert_never

from rayflow.core.checkpointing import Checkpointing
from rayflow.core.drift import SourceDrift
from rayflow.core.ids import Attempt
from rayflow.core.messages import (
    Acknowledge,
    Committed,
    Decline,
    Failed,
    FailureCause,
    Heartbeat,
    InputEnded,
    Ready,
    Report,
    Running,
    SlowestSource,
    SourceProgress,
    SplitRequest,
)
from rayflow.core.roster import Heard, Member, Roster, SubtaskState
from rayflow.core.splits import SplitOutcome, SplitPool


class Reports:
    def __init__(
        self,
        roster: Roster,
        pools: dict[str, SplitPool],
        checkpointing: Checkpointing,
        aligned: frozenset[str] = frozenset(),
    ) -> None:
        self._roster = roster
        self._pools = pools
        self._checkpointing = checkpointing
        self._failure: FailureCause | None = None
        self._aligned = aligned
        self._drift: tuple[Attempt, SourceDrift] | None = None  # of the attempt whose progress was heard last

    def take_failure(self) -> FailureCause | None:
        """The cause, when the last report was `Failed`."""
        failure, self._failure = self._failure, None
        return failure

    def handle(self, member: Member, report: Report, now: float) -> Heard:
        subtask = member.subtask
        match report:
            case Ready(address, pid, node):
                heard = self._move(member, SubtaskState.RESETTING, SubtaskState.READY)
                if heard is Heard.ACCEPTED:
                    member.address, member.pid, member.node = address, pid, node
                return heard
            case Running():
                return self._move(member, SubtaskState.LAUNCHING, SubtaskState.RUNNING)
            case InputEnded():
                heard = self._move(member, SubtaskState.RUNNING, SubtaskState.ENDED)
                if heard is Heard.ACCEPTED:
                    self._checkpointing.input_ended(subtask)
                    if subtask.chain in self._aligned:
                        self._announce(self._present_drift().ended(subtask))
                return heard
            case SplitRequest():
                return self._split_requested(member)
            case SourceProgress(watermark, idle):
                if subtask.chain not in self._aligned:
                    return Heard.UNKNOWN
                self._announce(self._present_drift().reported(subtask, watermark, idle=idle))
                return Heard.ACCEPTED
            case Acknowledge():
                return self._checkpointing.acknowledged(subtask, report, now)
            case Decline():
                return self._checkpointing.declined(subtask, report, now)
            case Committed(checkpoint):
                return self._checkpointing.committed(subtask, checkpoint)
            case Failed(cause):
                self._failure = cause
                return Heard.ACCEPTED
            case Heartbeat(metrics):
                member.metrics = metrics
                return Heard.ACCEPTED
        assert_never(report)

    def _move(self, member: Member, before: SubtaskState, after: SubtaskState) -> Heard:
        if member.state is before:
            member.state = after
            return Heard.ACCEPTED
        return Heard.DUPLICATE if member.state is after else Heard.UNKNOWN

    def _split_requested(self, member: Member) -> Heard:
        pool = self._pools.get(member.subtask.chain)
        if pool is None or member.state is not SubtaskState.RUNNING:
            return Heard.UNKNOWN
        outcome, assignments = pool.request(member.subtask)
        for assignment in assignments:
            self._roster.send(assignment.subtask, assignment.assign)
        return Heard.ACCEPTED if outcome is SplitOutcome.ACCEPTED else Heard.DUPLICATE

    def _present_drift(self) -> SourceDrift:
        """A new attempt begins with nothing known (C6)."""
        if self._drift is None or self._drift[0] != self._roster.attempt:
            members = (m.subtask for m in self._roster if m.subtask.chain in self._aligned)
            self._drift = self._roster.attempt, SourceDrift(members)
        return self._drift[1]

    def _announce(self, slowest: int | None) -> None:
        if slowest is not None:
            for subtask in self._present_drift().members:
                self._roster.send(subtask, SlowestSource(slowest))

    def check_invariants(self) -> None:
        if self._drift is not None:
            self._drift[1].check_invariants()
