"""What travels: elements on channels, commands to subtasks, reports to the coordinator.

Elements on a channel are ordered (rule F2). Commands and reports carry the attempt and a sequence number, because the
transport below (Ray actor calls) is a FIFO only as long as nothing is retried: receivers put them in order again with
`rayflow.core.resequence.Resequencer` and drop those of another attempt (rule C6).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Json, SplitState, StateHandle, SubtaskSnapshot

# ---------------------------------------------------------------------------------------------- elements on a channel


@dataclass(frozen=True, slots=True)
class Data:
    """A record batch. The core knows its size in bytes only; ``payload`` is never looked into."""

    payload: Any
    nbytes: int


@dataclass(frozen=True, slots=True)
class Watermark:
    """No row with an event time below ``time`` (microseconds) follows on this channel."""

    time: int


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing comes on this channel for now: it holds no watermark back until its next `Watermark` (rule W2)."""


class CheckpointKind(Enum):
    PERIODIC = "periodic"
    FINAL = "final"
    """Taken when all input has been read; the job is finished when it is committed."""
    SAVEPOINT = "savepoint"
    STOP = "stop"
    """A savepoint after which sources emit nothing more."""


@dataclass(frozen=True, slots=True)
class Barrier:
    """Separates what belongs to ``checkpoint`` from what comes after (Chandy-Lamport, asynchronous form)."""

    checkpoint: CheckpointId
    kind: CheckpointKind = CheckpointKind.PERIODIC


@dataclass(frozen=True, slots=True)
class EndOfInput:
    """Nothing follows on this channel; it counts as aligned from here on (rule A6)."""


Element = Data | Watermark | Idle | Barrier | EndOfInput

# ------------------------------------------------------------------------------- commands: coordinator -> one subtask


@dataclass(frozen=True, slots=True)
class Reset:
    """Drop all state and channels and belong to this attempt from now on. Answer: `Ready`."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Restore, connect to the downstream subtasks and run. Sent when every subtask is ready. Answer: `Running`."""

    addresses: dict[SubtaskId, str]
    states: tuple[StateHandle, ...] = ()
    restored_from: CheckpointId | None = None
    run_id: str = ""
    """Of the job's life on its checkpoint directory: the same after every restart (`CommitterContext.run_id`)."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """Begin this checkpoint. Sent to sources, and to subtasks whose input has ended."""

    checkpoint: CheckpointId
    kind: CheckpointKind


@dataclass(frozen=True, slots=True)
class Complete:
    """The manifest is durable (rule C2): commit all that is prepared up to this checkpoint. Answer: `Committed`."""

    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class Abort:
    """The coordinator gave the checkpoint up. Nobody deletes anything on it: a manifest write may be under way, and
    only the coordinator knows (rule C7)."""

    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class Assign:
    """Splits for a source subtask; ``no_more`` says that none will follow.

    ``settled``: none of those that are known now will follow, but new ones may be found. Without splits it only says
    so, and the request stays open.
    """

    splits: tuple[SplitState, ...]
    no_more: bool
    settled: bool = False


@dataclass(frozen=True, slots=True)
class SlowestSource:
    """How far the slowest of the sources with a maximum drift has got (`rayflow.core.drift`)."""

    watermark: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The job has ended; release everything."""


Command = Reset | Launch | Trigger | Complete | Abort | Assign | SlowestSource | Shutdown


@dataclass(frozen=True, slots=True)
class CommandEnvelope:
    """``sequence`` counts from 0 for each (attempt, subtask); `Reset` opens an attempt and is always number 0."""

    attempt: Attempt
    subtask: SubtaskId
    sequence: int
    command: Command


# -------------------------------------------------------------------------------- reports: one subtask -> coordinator


@dataclass(frozen=True, slots=True)
class Ready:
    address: str
    pid: int = 0
    node: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    pass


@dataclass(frozen=True, slots=True)
class SplitRequest:
    """A source subtask has nothing left to read."""


@dataclass(frozen=True, slots=True)
class SourceProgress:
    """How far a source subtask with a maximum drift has got; idle ones are waited for by nobody."""

    watermark: int
    idle: bool


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """All that this subtask contributes to the checkpoint is durable."""

    checkpoint: CheckpointId
    snapshot: SubtaskSnapshot


@dataclass(frozen=True, slots=True)
class Decline:
    """This subtask could not contribute (upload failed, alignment aborted by a newer barrier)."""

    checkpoint: CheckpointId
    reason: str


@dataclass(frozen=True, slots=True)
class InputEnded:
    """All input is read and processed and end of input has been sent downstream."""


@dataclass(frozen=True, slots=True)
class Committed:
    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class FailureCause:
    """Why a subtask failed. ``fatal`` failures (a lost commit, a corrupt state file) end the job at once.

    ``position`` tells where in the input the failure happened, so that the same exception at the same position can be
    recognised as one that will come back for ever.
    """

    message: str
    kind: str = "Exception"
    position: str = ""
    traceback: str = ""
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    cause: FailureCause


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent by the loop itself, so that a hang shows. ``metrics`` are numbers only."""

    metrics: dict[str, float] = field(default_factory=dict)


Report = (
    Ready
    | Running
    | SplitRequest
    | SourceProgress
    | Acknowledge
    | Decline
    | InputEnded
    | Committed
    | Failed
    | Heartbeat
)


@dataclass(frozen=True, slots=True)
class ReportEnvelope:
    """``sequence`` counts from 0 for each (attempt, subtask)."""

    attempt: Attempt
    subtask: SubtaskId
    sequence: int
    report: Report


__all__ = [
    "Abort",
    "Acknowledge",
    "Assign",
    "Barrier",
    "CheckpointKind",
    "Command",
    "CommandEnvelope",
    "Committed",
    "Complete",
    "Data",
    "Decline",
    "Element",
    "EndOfInput",
    "Failed",
    "FailureCause",
    "Heartbeat",
    "Idle",
    "InputEnded",
    "Json",
    "Launch",
    "Ready",
    "Report",
    "ReportEnvelope",
    "Reset",
    "Running",
    "Shutdown",
    "SlowestSource",
    "SourceProgress",
    "SplitRequest",
    "Trigger",
    "Watermark",
]
