"""What a shell provides: the loops below know nothing else of Ray, threads, the network or the clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.manifest import StateHandle, SubtaskSnapshot
from rayflow.core.messages import CommandEnvelope, Element, ReportEnvelope
from rayflow.operators.base import FrozenState, RestoredState
from rayflow.storage.reuse import Reuse, Written

# --------------------------------------------------------------------------------------- what a subtask's inbox holds


@dataclass(frozen=True, slots=True)
class CommandArrived:
    envelope: CommandEnvelope


@dataclass(frozen=True, slots=True)
class ElementArrived:
    attempt: Attempt
    channel: ChannelId
    element: Element


@dataclass(frozen=True, slots=True)
class CreditArrived:
    """The receiver has taken ``taken`` bytes in all on this channel."""

    attempt: Attempt
    channel: ChannelId
    taken: int


@dataclass(frozen=True, slots=True)
class ChannelBroken:
    """The stream of an output channel is gone; its receiver is dead, or the network is."""

    attempt: Attempt
    channel: ChannelId
    reason: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    attempt: Attempt
    checkpoint: CheckpointId
    snapshot: SubtaskSnapshot


@dataclass(frozen=True, slots=True)
class UploadFailed:
    attempt: Attempt
    checkpoint: CheckpointId
    reason: str


@dataclass(frozen=True, slots=True)
class CommitDone:
    attempt: Attempt
    checkpoint: CheckpointId


@dataclass(frozen=True, slots=True)
class BackgroundFailed:
    """A background task of this attempt raised something it has no answer for (a commit that failed)."""

    attempt: Attempt
    error: Exception


@dataclass(frozen=True, slots=True)
class Drained:
    """Every background task of earlier attempts has ended."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Nothing:
    """A background task that has nothing to say."""


SubtaskEvent = (
    CommandArrived
    | ElementArrived
    | CreditArrived
    | ChannelBroken
    | Uploaded
    | UploadFailed
    | CommitDone
    | BackgroundFailed
    | Drained
    | Nothing
)


class SubtaskHost(Protocol):
    """The world around one subtask. All methods are called on the loop thread and return at once."""

    @property
    def address(self) -> str:
        """Where upstream subtasks reach this one."""

    @property
    def pid(self) -> int: ...

    @property
    def node(self) -> str: ...

    def now(self) -> float:
        """Seconds of a clock that never goes back."""

    def wall_time(self) -> float:
        """Unix seconds."""

    def accept(self, attempt: Attempt, channels: Sequence[ChannelId]) -> None:
        """From now on take elements of these input channels and this attempt only (rule C6)."""

    def connect(self, attempt: Attempt, addresses: Mapping[ChannelId, str]) -> None:
        """Make the output channels of this attempt usable."""

    def disconnect(self) -> None:
        """Drop all output channels at once, without waiting for anybody."""

    def send(self, channel: ChannelId, element: Element) -> None: ...

    def return_credit(self, channel: ChannelId, nbytes: int) -> None: ...

    def report(self, envelope: ReportEnvelope) -> None: ...

    def background(self, task: Callable[[], SubtaskEvent]) -> None:
        """Run the task off the loop, one at a time and in order; what it returns comes as an event."""


class SnapshotStore(Protocol):
    """Writes and reads named states; see `rayflow.storage.snapshots`. Called off the loop thread (write) or on it
    (read)."""

    bytes_read: int
    """From storage, by `read` and what it returned, in all."""

    def write(
        self,
        checkpoint: CheckpointId,
        subtask: SubtaskId,
        parallelism: int,
        states: Sequence[tuple[str, FrozenState]],
        reuse: Reuse,
    ) -> Written: ...

    def read(self, handle: StateHandle, key_groups: range | None) -> RestoredState: ...
