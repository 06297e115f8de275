"""The subtask machine: alignment, watermarks, credits and the checkpoint steps of one subtask, without doing anything.

A3  a snapshot lies after every batch before the barrier and before every batch behind it, on all inputs.
A4  the barrier goes downstream after all output of what came before it, and does not wait for the upload.
C1  a subtask acknowledges a checkpoint once, and only after its upload is durable.
C2  it commits only what the coordinator has declared complete; complete(n) commits everything up to n.

One machine lives for one attempt (rule C6): a reset throws it away.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayflow.core.alignment import Aligned, Aligner
from rayflow.core.credits import OutputAccount
from rayflow.core.events import (
    AdvanceWatermark,
    Broadcast,
    CommitUpTo,
    FinishInput,
    ProcessData,
    ReturnCredit,
    Send,
    SubtaskAction,
    TakeSnapshot,
    Tell,
)
from rayflow.core.gate import InputGate
from rayflow.core.ids import MAX_WATERMARK, ChannelId, CheckpointId, SubtaskId, Time
from rayflow.core.manifest import SubtaskSnapshot
from rayflow.core.messages import (
    Abort,
    Acknowledge,
    Barrier,
    CheckpointKind,
    Committed,
    Complete,
    Data,
    Decline,
    Element,
    EndOfInput,
    Idle,
    InputEnded,
    Trigger,
    Watermark,
)
from rayflow.core.watermarks import InputWatermarks
from rayflow.errors import ProtocolError


class SubtaskMachine:
    """Events in, actions out. The shell performs the actions of one call, in order, before the next call."""

    def __init__(
        self,
        subtask: SubtaskId,
        *,
        inputs: Sequence[ChannelId],
        outputs: Sequence[ChannelId],
        exactly_once: bool,
        credit_bytes: int,
    ) -> None:
        self.subtask = subtask
        self.is_source = not inputs
        self._aligner = Aligner(inputs, exactly_once=exactly_once)
        self._gate = InputGate(inputs, self._aligner)
        self._watermarks = InputWatermarks(inputs)
        self._accounts = {channel: OutputAccount(channel, credit_bytes) for channel in outputs}
        self._waiting = 0
        """How many output channels hold something back."""
        self._snapshotted = CheckpointId(0)
        """Newest checkpoint whose snapshot was taken; earlier or equal triggers change nothing."""
        self._uploading: set[CheckpointId] = set()
        self._aborted: set[CheckpointId] = set()
        self._completed = CheckpointId(0)
        self.input_ended = False
        self.stopped = False
        """A stop barrier has passed: a source emits nothing more."""

    # ------------------------------------------------------------------------------------------------------ questions

    @property
    def output_blocked(self) -> bool:
        """Output waits for credit: take no input and poll no source (rule F3)."""
        return self._waiting > 0

    @property
    def has_input(self) -> bool:
        return self._gate.has_ready

    @property
    def input_watermark(self) -> int:
        return self._watermarks.current

    @property
    def inputs_idle(self) -> bool:
        """All inputs that have not ended are idle; whoever holds nothing back passes that on."""
        return self._watermarks.all_idle

    @property
    def peak_in_flight(self) -> int:
        return max((account.peak for account in self._accounts.values()), default=0)

    # ---------------------------------------------------------------------------------------------------------- input

    def on_element(self, channel: ChannelId, element: Element) -> None:
        """An element has arrived; `take_input` yields it when it is its turn."""
        self._gate.put(channel, element)

    def take_input(self, now: Time) -> list[SubtaskAction]:
        """Take the next element, if there is one, and say what to do with it."""
        taken = self._gate.take()
        if taken is None:
            return []
        channel, element = taken
        match element:
            case Data(payload, nbytes):
                return [ProcessData(channel, payload), ReturnCredit(channel, nbytes)]
            case Watermark(time):
                risen = self._watermarks.advance(channel, time)
                return [] if risen is None else [AdvanceWatermark(risen)]
            case Idle():
                risen = self._watermarks.set_idle(channel)
                return [] if risen is None else [AdvanceWatermark(risen)]
            case Barrier():
                return self._aligned(self._aligner.on_barrier(channel, element, now))
            case EndOfInput():
                return self._on_end(channel, now)

    def _on_end(self, channel: ChannelId, now: Time) -> list[SubtaskAction]:
        actions = self._aligned(self._aligner.on_end(channel, now))
        risen = self._watermarks.end(channel)
        if risen is not None and not self._aligner.all_ended:
            actions.append(AdvanceWatermark(risen))
        if self._aligner.all_ended:
            actions += self.end_input()
        return actions

    def end_input(self) -> list[SubtaskAction]:
        """All channels have ended, or the source has read everything."""
        if self.input_ended:
            raise ProtocolError(f"A6: the input of {self.subtask} ended twice")
        self.input_ended = True
        return [AdvanceWatermark(MAX_WATERMARK), FinishInput(), Broadcast(EndOfInput()), Tell(InputEnded())]

    def _aligned(self, outcomes: Sequence[object]) -> list[SubtaskAction]:
        actions: list[SubtaskAction] = []
        for outcome in outcomes:
            if isinstance(outcome, Aligned):
                actions += self._snapshot(outcome.barrier, outcome.alignment_s)
            else:
                old, new = outcome.checkpoint, outcome.by  # type: ignore[attr-defined]
                self._aborted.add(old)
                actions.append(Tell(Decline(old, f"{self.subtask} saw barrier {new} before {old} was aligned (A5)")))
        if outcomes:
            self._gate.unblock()
        return actions

    def _snapshot(self, barrier: Barrier, alignment_s: float) -> list[SubtaskAction]:
        self._snapshotted = barrier.checkpoint
        self._uploading.add(barrier.checkpoint)
        actions: list[SubtaskAction] = [TakeSnapshot(barrier.checkpoint, barrier.kind, alignment_s)]
        if not self.input_ended:
            actions.append(Broadcast(barrier))
        return actions

    # --------------------------------------------------------------------------------------------------------- output

    def offer(self, channel: ChannelId, element: Element) -> list[SubtaskAction]:
        """Queue an element for the channel; it is sent as soon as credit allows (rules F1, F2)."""
        account = self._accounts[channel]
        waited = account.waiting
        released = account.offer(element)
        self._waiting += account.waiting - waited
        return [Send(channel, e) for e in released]

    def on_credit(self, channel: ChannelId, taken: int) -> list[SubtaskAction]:
        """The receiver has taken ``taken`` bytes in all on this channel."""
        account = self._accounts[channel]
        waited = account.waiting
        released = account.credit(taken)
        self._waiting += account.waiting - waited
        return [Send(channel, e) for e in released]

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def on_trigger(self, trigger: Trigger) -> list[SubtaskAction]:
        """The coordinator begins a checkpoint here: this is a source, or its input has ended."""
        if trigger.checkpoint <= self._snapshotted or trigger.checkpoint in self._aborted:
            return []
        if not (self.is_source or self.input_ended):
            raise ProtocolError(f"A3: {self.subtask} has inputs and was triggered for checkpoint {trigger.checkpoint}")
        if trigger.kind is CheckpointKind.STOP:
            self.stopped = True
        return self._snapshot(Barrier(trigger.checkpoint, trigger.kind), 0.0)

    def on_uploaded(self, checkpoint: CheckpointId, snapshot: SubtaskSnapshot) -> list[SubtaskAction]:
        """Everything in ``snapshot`` is durable: acknowledge, unless the checkpoint was aborted meanwhile."""
        if checkpoint not in self._uploading:
            raise ProtocolError(f"C1: {self.subtask} has no upload under way for checkpoint {checkpoint}")
        self._uploading.discard(checkpoint)
        if checkpoint in self._aborted:
            return []
        return [Tell(Acknowledge(checkpoint, snapshot))]

    def on_upload_failed(self, checkpoint: CheckpointId, reason: str) -> list[SubtaskAction]:
        self._uploading.discard(checkpoint)
        if checkpoint in self._aborted:
            return []
        return [Tell(Decline(checkpoint, reason))]

    def on_complete(self, complete: Complete) -> list[SubtaskAction]:
        """Commit everything up to the checkpoint (rule C2). Told twice, or late, it changes nothing."""
        if complete.checkpoint <= self._completed:
            return []
        if complete.checkpoint > self._snapshotted:
            raise ProtocolError(f"C2: checkpoint {complete.checkpoint} is complete without {self.subtask}")
        self._completed = complete.checkpoint
        return [CommitUpTo(complete.checkpoint)]

    def on_committed(self, checkpoint: CheckpointId) -> list[SubtaskAction]:
        return [Tell(Committed(checkpoint))]

    def on_abort(self, abort: Abort) -> None:
        """The coordinator gave the checkpoint up: end its alignment and acknowledge nothing of it."""
        self._aborted.add(abort.checkpoint)
        self._aligner.abort(abort.checkpoint)
        self._gate.unblock()

    def check_invariants(self) -> None:
        self._aligner.check_invariants()
        self._gate.check_invariants()
        self._watermarks.check_invariants()
        for account in self._accounts.values():
            account.check_invariants()
        assert self._waiting == sum(account.waiting for account in self._accounts.values())
        assert self._completed <= self._snapshotted
        assert all(checkpoint <= self._snapshotted for checkpoint in self._uploading)
