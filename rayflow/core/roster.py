"""The subtasks as the coordinator knows them: processes, states, numbered commands, signs of life.

C6  commands are stamped with the attempt and numbered from 0 for each (attempt, subtask); `Reset` is number 0.
    Reports of another attempt, and news of an earlier process, change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from rayflow.core.events import SendCommand, StartSubtask, StopSubtask
from rayflow.core.ids import Attempt, SubtaskId
from rayflow.core.messages import Command, Report, Reset, Shutdown
from rayflow.core.resequence import Resequencer
from rayflow.core.timeline import Outbox

START_TIMEOUT_S: Final = 300.0
"""A process that has given no sign at all since it was started is given this long: clusters start slowly."""


class Heard(Enum):
    """What became of something the coordinator was told: every late, repeated or foreign message has a name."""

    ACCEPTED = "accepted"
    HELD = "held"
    """Out of order: kept until the one before it comes."""
    DUPLICATE = "duplicate"
    STALE = "stale"
    """Of another attempt, of an earlier process, or of something that has ended."""
    UNKNOWN = "unknown"
    """Of a subtask or checkpoint that never was."""


class SubtaskState(Enum):
    ABSENT = "absent"
    """No process was started yet."""
    DEAD = "dead"
    RESETTING = "resetting"
    READY = "ready"
    LAUNCHING = "launching"
    RUNNING = "running"
    ENDED = "ended"
    """All its input is read and processed; it still takes part in checkpoints."""
    STOPPED = "stopped"

    @property
    def up(self) -> bool:
        return self not in (SubtaskState.ABSENT, SubtaskState.DEAD, SubtaskState.STOPPED)

    @property
    def runs(self) -> bool:
        return self in (SubtaskState.RUNNING, SubtaskState.ENDED)


@dataclass(slots=True)
class Member:
    """One subtask. ``incarnation`` counts its processes from 1."""

    subtask: SubtaskId
    incarnation: int = 0
    state: SubtaskState = SubtaskState.ABSENT
    address: str = ""  # empty until Ready of the present attempt
    pid: int = 0
    node: str = ""
    last_seen: float = 0.0
    heard: bool = False  # the present process has reported at least once
    sent: int = 0  # commands of the present attempt
    inbox: Resequencer[Report] = field(default_factory=lambda: Resequencer[Report](Attempt(0)))
    metrics: dict[str, float] = field(default_factory=dict)


class Roster:
    def __init__(self, subtasks: tuple[SubtaskId, ...], out: Outbox, *, hang_timeout_s: float) -> None:
        self.attempt = Attempt(0)  # never decreases; 0: no attempt has begun
        self.members = {s: Member(s) for s in subtasks}
        self._out = out
        self._hang_timeout_s = hang_timeout_s

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members.values())

    def all_in(self, *states: SubtaskState) -> bool:
        return all(m.state in states for m in self)

    @property
    def all_run(self) -> bool:
        return all(m.state.runs for m in self)

    @property
    def all_ended(self) -> bool:
        return self.all_in(SubtaskState.ENDED)

    # ------------------------------------------------------------------------------------------------------ commands

    def send(self, subtask: SubtaskId, command: Command) -> None:
        """Send to the present process; to one that is gone, nothing."""
        member = self.members[subtask]
        if member.state.up:
            self._out.put(SendCommand(self.attempt, subtask, member.sent, command))
            member.sent += 1

    def send_all(self, command: Command) -> None:
        for subtask in self.members:
            self.send(subtask, command)

    # ----------------------------------------------------------------------------------------------------- processes

    def begin_attempt(self, attempt: Attempt, now: float) -> None:
        """All messages of earlier attempts are void from here on; the living are reset in place."""
        self.attempt = attempt
        for member in self:
            member.sent = 0
            member.address = ""
            member.inbox = Resequencer(attempt)
            if member.state.up:
                member.state = SubtaskState.RESETTING
                member.last_seen = now
                self.send(member.subtask, Reset())

    def start_missing(self, now: float) -> None:
        """Start a process for each subtask that has none; its first command is the Reset of the attempt."""
        for member in self:
            if member.state in (SubtaskState.ABSENT, SubtaskState.DEAD):
                member.incarnation += 1
                member.state = SubtaskState.RESETTING
                member.heard = False
                member.last_seen = now
                member.metrics = {}
                self._out.put(StartSubtask(member.subtask, member.incarnation))
                self.send(member.subtask, Reset())

    def died(self, subtask: SubtaskId, incarnation: int) -> Heard:
        """ACCEPTED when it is news: the present process, and not known to be gone."""
        member = self.members.get(subtask)
        if member is None or incarnation > member.incarnation:
            return Heard.UNKNOWN
        if incarnation < member.incarnation:
            return Heard.STALE
        if not member.state.up:
            return Heard.DUPLICATE
        member.state = SubtaskState.DEAD
        return Heard.ACCEPTED

    def stop(self, subtask: SubtaskId) -> None:
        """Kill the process; the news of its death is no news then."""
        member = self.members[subtask]
        self._out.put(StopSubtask(subtask, member.incarnation))
        member.state = SubtaskState.DEAD

    def stop_all(self, *, politely: bool) -> None:
        """The job is over. ``politely``: tell them to release what they hold first."""
        for member in self:
            if member.state.up:
                if politely:
                    self.send(member.subtask, Shutdown())
                self._out.put(StopSubtask(member.subtask, member.incarnation))
                member.state = SubtaskState.STOPPED

    # ------------------------------------------------------------------------------------------------- signs of life

    def seen(self, member: Member, now: float) -> None:
        """It has reported, and what it reported has been handled.

        While it resets or launches, heartbeats prove only that its loop turns. They do not count then: a background
        thread that is stuck in storage, or a command that was lost on its way, would be waited for as long as it beats.
        """
        if not member.heard or member.state not in (SubtaskState.RESETTING, SubtaskState.LAUNCHING):
            member.last_seen = now
        member.heard = True

    def _silent_until(self, member: Member) -> float:
        patience = self._hang_timeout_s if member.heard else max(self._hang_timeout_s, START_TIMEOUT_S)
        return member.last_seen + patience

    def hung(self, now: float) -> tuple[SubtaskId, ...]:
        """Living processes that have given no sign for too long."""
        return tuple(m.subtask for m in self if self._watched(m) and self._silent_until(m) <= now)

    def next_hang(self) -> float | None:
        """When, without a sign of life, the first subtask counts as hung."""
        return min((self._silent_until(m) for m in self if self._watched(m)), default=None)

    def _watched(self, member: Member) -> bool:
        # A process that is ready and waits for Launch has nothing to report: sinks may take long to recover.
        return member.state.up and member.state is not SubtaskState.READY

    def check_invariants(self) -> None:
        for member in self:
            member.inbox.check_invariants()
            assert member.inbox.attempt == self.attempt or self.attempt == 0
            assert not member.state.up or member.incarnation > 0, member
            assert not member.state.up or member.sent > 0, "an attempt opens with Reset"
