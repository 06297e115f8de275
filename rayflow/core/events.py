"""Events and actions of the two machines: what a shell tells them, and what they tell the shell to do.

A machine never does anything: it is told an event (with the time, where time matters) and answers with actions. Shells
(Ray, local, simulator) perform the actions in the order given.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.manifest import Json, Manifest, SplitState, SubtaskSnapshot
from rayflow.core.messages import (
    CheckpointKind,
    Command,
    Element,
    FailureCause,
    Report,
    ReportEnvelope,
)
from rayflow.core.seen import SeenSplits

# ------------------------------------------------------------------------------------------- subtask machine: actions


@dataclass(frozen=True, slots=True)
class Send:
    """Put the element on the wire now; credit for it has been taken (rule F1)."""

    channel: ChannelId
    element: Element


@dataclass(frozen=True, slots=True)
class ReturnCredit:
    channel: ChannelId
    nbytes: int


@dataclass(frozen=True, slots=True)
class ProcessData:
    """Give the payload to the operators; they may emit."""

    channel: ChannelId
    payload: object


@dataclass(frozen=True, slots=True)
class AdvanceWatermark:
    """Event time has advanced on all live inputs (rule W2): fire, then forward the operators' own watermark."""

    time: int


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Sync phase (rule A3): freeze the state, give it to the uploader, which answers with `Uploaded`/`UploadFailed`."""

    checkpoint: CheckpointId
    kind: CheckpointKind
    alignment_s: float


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Flush all output, then send this control element on every output channel (rules A4, F2)."""

    element: Element


@dataclass(frozen=True, slots=True)
class FinishInput:
    """All inputs have ended: operators emit what they still hold."""


@dataclass(frozen=True, slots=True)
class CommitUpTo:
    """Commit everything prepared up to this checkpoint (rule C2), then tell the machine `CommitDone`."""

    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class Tell:
    """Report to the coordinator."""

    report: Report


SubtaskAction = (
    Send | ReturnCredit | ProcessData | AdvanceWatermark | TakeSnapshot | Broadcast | FinishInput | CommitUpTo | Tell
)

# ------------------------------------------------------------------------------------------ coordinator machine: events


@dataclass(frozen=True, slots=True)
class Recovered:
    """Storage was read at the start or after a failure; the answer to `LoadLatest`.

    ``manifest`` is the newest whole one that counts, None when there is none. ``next_checkpoint`` is above every id
    ever seen in the directory (rule C4).
    """

    manifest: Manifest | None
    next_checkpoint: CheckpointId
    next_attempt: Attempt
    discovered: tuple[SplitState, ...]
    """Splits to read when there is no manifest; otherwise splits that are new since."""
    run_id: str = ""
    """Goes to the subtasks; see `Launch.run_id`."""


@dataclass(frozen=True, slots=True)
class RecoveryFailed:
    cause: FailureCause


@dataclass(frozen=True, slots=True)
class SinksRecovered:
    """What the manifest names is committed, what came later is gone. The answer to `RecoverSinks`."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SinksFailed:
    attempt: Attempt
    cause: FailureCause


@dataclass(frozen=True, slots=True)
class Reported:
    envelope: ReportEnvelope


@dataclass(frozen=True, slots=True)
class SubtaskDied:
    """The process of a subtask is gone. ``incarnation`` is that of `StartSubtask`: late news changes nothing."""

    subtask: SubtaskId
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class ManifestWritten:
    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class ManifestFailed:
    """The write failed or its outcome is unknown."""

    checkpoint: CheckpointId
    reason: str
    fenced: bool = False
    """A later coordinator owns the directory (rule C8): stop, touch nothing."""
    fatal: FailureCause | None = None
    """It will fail for ever (state too large for memory): end the job with this."""


@dataclass(frozen=True, slots=True)
class Discovered:
    """All splits that the source has now, as (id, description) in reading order: known ones are among them. The answer
    to `Discover`."""

    attempt: Attempt
    source: str
    found: tuple[tuple[str, Json], ...]


@dataclass(frozen=True, slots=True)
class LookFailed:
    """The other answer to `Discover`."""

    attempt: Attempt
    source: str
    reason: str
    fatal: FailureCause | None = None
    """What is there is wrong, so that looking again will not help: end the job with this."""


@dataclass(frozen=True, slots=True)
class WholeCommitted:
    """The answer to `CommitWhole`."""

    attempt: Attempt
    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class WholeFailed:
    """The manifest stays durable: the next attempt commits what it names before anything else (rule S1)."""

    attempt: Attempt
    checkpoint: CheckpointId
    cause: FailureCause


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; see `CoordinatorMachine.next_deadline`."""


@dataclass(frozen=True, slots=True)
class CheckpointRequested:
    """A user asked for a checkpoint now (kind PERIODIC or SAVEPOINT), or for a stop (STOP)."""

    kind: CheckpointKind


@dataclass(frozen=True, slots=True)
class CancelRequested:
    pass


@dataclass(frozen=True, slots=True)
class JobCleaned:
    """Sinks are finished and storage is swept. The answer to `CleanUp`."""

    cause: FailureCause | None = None


CoordinatorEvent = (
    Recovered
    | RecoveryFailed
    | SinksRecovered
    | SinksFailed
    | Reported
    | SubtaskDied
    | ManifestWritten
    | ManifestFailed
    | WholeCommitted
    | WholeFailed
    | Discovered
    | LookFailed
    | Tick
    | CheckpointRequested
    | CancelRequested
    | JobCleaned
)

# ----------------------------------------------------------------------------------------- coordinator machine: actions


@dataclass(frozen=True, slots=True)
class LoadLatest:
    """Read the newest manifest that counts and discover splits; answer `Recovered` or `RecoveryFailed`.

    ``unresolved``: checkpoints whose manifest write was sent out and whose outcome is not known. Before it answers, the
    shell decides each for good: it creates a void mark in the manifest's place if that is absent (then the write can
    never succeed, because manifests are create-if-absent), or finds the manifest there (then it counts).
    """

    unresolved: tuple[CheckpointId, ...] = ()


@dataclass(frozen=True, slots=True)
class StartSubtask:
    """Start a process for this subtask. Its death is told as `SubtaskDied` with this incarnation."""

    subtask: SubtaskId
    incarnation: int


@dataclass(frozen=True, slots=True)
class StopSubtask:
    """Kill the process (it is hung, or the job is over)."""

    subtask: SubtaskId
    incarnation: int


@dataclass(frozen=True, slots=True)
class SendCommand:
    """Send the command to the subtask's present process, stamped with attempt and sequence."""

    attempt: Attempt
    subtask: SubtaskId
    sequence: int
    command: Command


@dataclass(frozen=True, slots=True)
class RecoverSinks:
    """Commit all that ``manifest`` names, abort all that is later; answer `SinksRecovered` or `SinksFailed`.

    Performed while no subtask of any attempt runs: between `Ready` of all and `Launch`.
    """

    attempt: Attempt
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class Discover:
    """Look which splits the source has now, beside all else that is done in the background; answer `Discovered` or
    `LookFailed`."""

    attempt: Attempt
    source: str


@dataclass(frozen=True, slots=True)
class WriteManifest:
    """Write it durably, create-if-absent; answer `ManifestWritten` or `ManifestFailed` (rules C2, C5)."""

    checkpoint: CheckpointId
    kind: CheckpointKind
    attempt: Attempt
    snapshots: tuple[SubtaskSnapshot, ...]
    pending_splits: tuple[SplitState, ...]
    seen_splits: tuple[SeenSplits, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitWhole:
    """The manifest is durable (rule C2): commit what these snapshots hold for sinks that commit as a whole
    (`Topology.whole`); answer `WholeCommitted` or `WholeFailed`. Subtasks are told `Complete` only after it."""

    attempt: Attempt
    checkpoint: CheckpointId
    snapshots: tuple[SubtaskSnapshot, ...]


@dataclass(frozen=True, slots=True)
class DiscardCheckpoint:
    """Delete the files of an aborted checkpoint for which no manifest write was ever begun."""

    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class Retain:
    """``newest`` is complete: delete manifests beyond the number to keep, then the files none refers to (rule C7)."""

    newest: CheckpointId


class JobState(Enum):
    CREATED = "created"
    RECOVERING = "recovering"
    DEPLOYING = "deploying"
    RUNNING = "running"
    RESTARTING = "restarting"
    """Waiting for the restart delay."""
    CLEANING = "cleaning"
    FINISHED = "finished"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def terminal(self) -> bool:
        return self in (JobState.FINISHED, JobState.STOPPED, JobState.CANCELLED, JobState.FAILED)


@dataclass(frozen=True, slots=True)
class CleanUp:
    """The job is over (``outcome`` says how): finish sinks, sweep storage; answer `JobCleaned`."""

    outcome: JobState
    manifest_complete: bool
    """False: nothing may be deleted that a later run could need."""


@dataclass(frozen=True, slots=True)
class JobEnded:
    outcome: JobState
    cause: FailureCause | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something for the timeline that people read: (what, detail)."""

    what: str
    detail: str = ""


CoordinatorAction = (
    LoadLatest
    | StartSubtask
    | StopSubtask
    | SendCommand
    | RecoverSinks
    | Discover
    | WriteManifest
    | CommitWhole
    | DiscardCheckpoint
    | Retain
    | CleanUp
    | JobEnded
    | Note
)
