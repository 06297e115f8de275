"""Rules checked from outside the machines, at the ports: what was really sent, taken and acknowledged.

F1  bytes sent and not taken never exceed the credit.
A1  barriers on a channel increase.
A2, A3  at a snapshot, a subtask has taken from each input exactly the batches that were sent before the barrier.
C1  what is acknowledged is durable.   C2  nobody is told Complete before the manifest is durable.
C4  one checkpoint id belongs to one attempt.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import (
    Acknowledge,
    Barrier,
    Complete,
    Data,
    Element,
    EndOfInput,
    ReportEnvelope,
    Trigger,
)
from tests.simulation.faults import Violation
from tests.simulation.storage import Observer
from tests.simulation.target import Target


@dataclass(slots=True)
class _Channel:
    """One channel in one attempt."""

    sent: int = 0
    sent_bytes: int = 0
    taken: int = 0
    taken_bytes: int = 0
    barriers: dict[CheckpointId, int] = field(default_factory=dict)
    """Checkpoint -> batches sent before its barrier."""
    ended: bool = False


class Monitors:
    def __init__(
        self, observer: Observer, targets: tuple[Target, ...], *, credit_bytes: int, exactly_once: bool
    ) -> None:
        self._observer = observer
        self._targets = targets
        self._credit_bytes = credit_bytes
        self._exactly_once = exactly_once
        self._channels: dict[tuple[Attempt, ChannelId], _Channel] = {}
        self._triggered: dict[CheckpointId, Attempt] = {}
        self.enabled = True
        """Off, the committed output alone has to show what is wrong."""

    def _channel(self, attempt: Attempt, channel: ChannelId) -> _Channel:
        found = self._channels.get((attempt, channel))
        if found is None:
            found = self._channels[attempt, channel] = _Channel()
        return found

    def sent(self, attempt: Attempt, channel: ChannelId, element: Element) -> None:
        c = self._channel(attempt, channel)
        if c.ended and self.enabled:
            raise Violation(f"A6: {element} on {channel} after its end")
        if isinstance(element, Data):
            c.sent += 1
            c.sent_bytes += element.nbytes
            if self.enabled and c.sent_bytes - c.taken_bytes > self._credit_bytes:
                raise Violation(
                    f"F1: {c.sent_bytes - c.taken_bytes} bytes in flight on {channel}, credit {self._credit_bytes}"
                )
        elif isinstance(element, Barrier):
            if self.enabled and any(n >= element.checkpoint for n in c.barriers):
                raise Violation(f"A1: barrier {element.checkpoint} on {channel} after {max(c.barriers)}")
            c.barriers[element.checkpoint] = c.sent
        elif isinstance(element, EndOfInput):
            c.ended = True

    def taken(self, attempt: Attempt, channel: ChannelId, nbytes: int) -> None:
        c = self._channel(attempt, channel)
        c.taken += 1
        c.taken_bytes += nbytes

    def snapshot(self, attempt: Attempt, subtask: SubtaskId, checkpoint: CheckpointId, inputs: list[ChannelId]) -> None:
        if not (self._exactly_once and self.enabled):
            return
        for channel in inputs:
            c = self._channel(attempt, channel)
            expected = c.barriers.get(checkpoint, c.sent if c.ended else None)
            if expected is None:
                raise Violation(f"A3: {subtask} takes snapshot {checkpoint} before {channel} has its barrier")
            if c.taken != expected:
                raise Violation(
                    f"A2/A3: {subtask} takes snapshot {checkpoint} after {c.taken} batches of {channel}, "
                    f"its barrier stands behind {expected}"
                )

    def reported(self, envelope: ReportEnvelope, pending: CheckpointId | None) -> None:
        report = envelope.report
        if not isinstance(report, Acknowledge) or not self.enabled:
            return
        if report.checkpoint != pending:
            return  # given up meanwhile, and its files may have been deleted: nobody will believe it
        who = f"{envelope.subtask} acknowledges {report.checkpoint}"
        for handle in report.snapshot.states:
            for file in handle.files:
                if problem := self._observer.problem(file):
                    raise Violation(f"C1: {who}, but {file.path} {problem}")
        for committable in report.snapshot.committables:
            token = str(committable.payload)
            if not any(token in t.prepared or token in t.committed for t in self._targets):
                raise Violation(f"C1: {who}, but {token} is not prepared")

    def commanded(self, attempt: Attempt, command: object) -> None:
        if not self.enabled:
            return
        if isinstance(command, Complete) and command.checkpoint not in self._observer.ever:
            raise Violation(f"C2: Complete({command.checkpoint}) is sent, its manifest is not durable")
        if isinstance(command, Trigger) and self._triggered.setdefault(command.checkpoint, attempt) != attempt:
            first = self._triggered[command.checkpoint]
            raise Violation(f"C4: checkpoint id {command.checkpoint} is used in attempts {first} and {attempt}")
