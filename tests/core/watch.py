"""Checks the trace of a coordinator against the rules, from outside."""

from __future__ import annotations

from rayflow.core.events import (
    CleanUp,
    CoordinatorAction,
    CoordinatorEvent,
    DiscardCheckpoint,
    JobEnded,
    JobState,
    ManifestWritten,
    Note,
    SendCommand,
    SinksRecovered,
    WriteManifest,
)
from rayflow.core.ids import Attempt, SubtaskId
from rayflow.core.messages import (
    Abort,
    CheckpointKind,
    Command,
    Complete,
    Launch,
    Reset,
    Trigger,
)


class Violation(AssertionError):
    """A numbered rule was broken."""


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise Violation(rule)


class Watch:
    """Checks the trace of actions and events against the rules, independently of the machine's own invariants."""

    def __init__(self) -> None:
        self.sequence: dict[tuple[int, SubtaskId], int] = {}
        self.triggered: list[int] = []
        self.open: int | None = None
        self.writes: set[int] = set()
        self.durable: set[int] = set()
        self.sinks_recovered: set[int] = set()
        self.final_durable = False
        self.ended = False
        self.final: set[int] = set()

    def event(self, event: CoordinatorEvent) -> None:
        match event:
            case ManifestWritten(n):
                self.durable.add(n)
                self.final_durable = self.final_durable or n in self.final
            case SinksRecovered(attempt):
                self.sinks_recovered.add(attempt)
            case _:
                pass

    def action(self, action: CoordinatorAction) -> None:
        if isinstance(action, Note):
            return
        require(not self.ended, "C3: an action after the end of the job")
        match action:
            case SendCommand(attempt, subtask, sequence, command):
                expected = self.sequence.get((attempt, subtask), 0)
                require(sequence == expected, "C6: commands are numbered without a gap")
                require((sequence == 0) == isinstance(command, Reset), "C6: Reset opens an attempt")
                self.sequence[attempt, subtask] = sequence + 1
                self._command(attempt, command)
            case WriteManifest(n):
                require(n == self.open, "C1: written without being pending")
                require(n not in self.writes, "C5: written twice")
                self.writes.add(n)
                if action.kind is CheckpointKind.FINAL:
                    self.final.add(n)
            case DiscardCheckpoint(n):
                require(n not in self.writes, "C5: discarded after its manifest write went out")
                self.open = None if n == self.open else self.open
            case CleanUp(outcome):
                require(outcome is not JobState.FINISHED or self.final_durable, "finished without a final checkpoint")
            case JobEnded():
                self.ended = True
            case _:
                pass

    def _command(self, attempt: Attempt, command: Command) -> None:
        match command:
            case Trigger(n):
                if n != self.open:
                    require(not self.triggered or n > self.triggered[-1], "C4: ids strictly increase")
                    require(self.open is None, "a checkpoint begins while another is pending")
                    self.triggered.append(n)
                    self.open = n
            case Complete(n):
                require(n in self.durable, "C2: complete before the manifest is durable")
                self.open = None if n == self.open else self.open
            case Abort(n):
                self.open = None if n == self.open else self.open
            case Reset():
                self.open = None
            case Launch():
                require(attempt in self.sinks_recovered, "R1: launched before the sinks are recovered")
            case _:
                pass
