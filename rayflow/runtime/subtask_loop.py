"""THE ONE LOOP. Every subtask, on Ray, in the local runtime and in the simulator, is this code.

`SubtaskRuntime` joins the pure machine (`rayflow.core.subtask`) with the operators, the emitter and the source, and
performs the machine's actions through a `SubtaskHost`. `run_subtask` at the end is the loop itself: take events, apply
them, do one unit of work. One event is one batch or one control element: Python's cost is paid per batch, not per row.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol, assert_never

from rayflow.config import duration_us
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
from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId, Time
from rayflow.core.manifest import SnapshotStats
from rayflow.core.messages import (
    Abort,
    Assign,
    Command,
    CommandEnvelope,
    Complete,
    Element,
    Failed,
    Heartbeat,
    InputEnded,
    Launch,
    Ready,
    Report,
    ReportEnvelope,
    Reset,
    Running,
    Shutdown,
    SlowestSource,
    SplitRequest,
    Trigger,
)
from rayflow.core.resequence import Resequencer
from rayflow.core.subtask import SubtaskMachine
from rayflow.errors import (
    ProtocolError,
)
from rayflow.runtime.assembly import JobSpec, Parts, inputs_of, outputs_of
from rayflow.runtime.chain import ChainRunner
from rayflow.runtime.emitter import Emitter
from rayflow.runtime.event_time import EventTimeSpeaker
from rayflow.runtime.failures import cause_of
from rayflow.runtime.ports import (
    BackgroundFailed,
    ChannelBroken,
    CommandArrived,
    CommitDone,
    CreditArrived,
    Drained,
    ElementArrived,
    Nothing,
    SnapshotStore,
    SubtaskEvent,
    SubtaskHost,
    Uploaded,
    UploadFailed,
)
from rayflow.runtime.scratch import Scratch
from rayflow.runtime.source import SourceRunner
from rayflow.runtime.uploads import Uploads

BROKEN_GRACE_S = 3.0
"""A broken channel is usually the shadow of a death that the coordinator hears of first; after this it is a failure."""
IDLE_POLL_S = 0.005


class Phase(Enum):
    NEW = "new"
    RESETTING = "resetting"
    READY = "ready"
    RUNNING = "running"
    FAILED = "failed"
    CLOSED = "closed"


class SubtaskRuntime:
    """One subtask. `handle` applies an event, `work` does one unit of work; neither blocks."""

    def __init__(self, subtask: SubtaskId, spec: JobSpec, host: SubtaskHost, store: SnapshotStore) -> None:
        self.subtask = subtask
        self.phase = Phase.NEW
        self.attempt = Attempt(-1)
        self._spec = spec
        self._host = host
        self._store = store
        self._chain_plan = spec.plan.chain(subtask.chain)
        self._inputs = inputs_of(spec.plan, subtask)
        self._input_index = {e.index: e.input_index for e in spec.plan.edges_to(subtask.chain)}
        self._watermark_s = duration_us(spec.config.watermark_interval) / 1e6
        self._commands: Resequencer[Command] = Resequencer(self.attempt)
        self.last_error: Exception | None = None
        """For runtimes in this process, which can chain the original exception."""
        self._rows_in = 0
        self._reset_attempt_state()

    def _reset_attempt_state(self) -> None:
        self._machine: SubtaskMachine | None = None
        self._chain: ChainRunner | None = None
        self._source: SourceRunner | None = None
        self._emitter: Emitter | None = None
        self._uploads: Uploads | None = None
        self._scratch: Scratch | None = None
        self._reports = 0
        self._event_time: EventTimeSpeaker | None = None
        self._watermark_due = 0.0
        self._heartbeat_due = 0.0
        self._source_due = 0.0
        self._broken: tuple[float, str] | None = None
        self._restored_from: CheckpointId | None = None
        self._restored_bytes = 0
        self._restore_s = 0.0

    # --------------------------------------------------------------------------------------------------------- events

    def handle(self, event: SubtaskEvent) -> None:
        """Apply one event; what belongs to another attempt changes nothing (rule C6)."""
        try:
            self._handle(event)
        except Exception as error:
            self._fail(error)

    def _handle(self, event: SubtaskEvent) -> None:
        if isinstance(event, CommandArrived):
            self._on_envelope(event.envelope)
            return
        if isinstance(event, Nothing) or event.attempt != self.attempt or self.phase in (Phase.FAILED, Phase.CLOSED):
            return
        machine = self._machine
        assert machine is not None
        match event:
            case ElementArrived(_, channel, element):
                machine.on_element(channel, element)
            case CreditArrived(_, channel, taken):
                self._perform(machine.on_credit(channel, taken))
            case Uploaded(_, checkpoint, snapshot):
                self._perform(machine.on_uploaded(checkpoint, snapshot))
            case UploadFailed(_, checkpoint, reason):
                self._perform(machine.on_upload_failed(checkpoint, reason))
            case CommitDone(_, checkpoint):
                self._perform(machine.on_committed(checkpoint))
            case BackgroundFailed(_, error):
                self._fail(error, position=self._since_restore)
            case ChannelBroken(_, channel, reason):
                if self._broken is None:
                    self._broken = (self._host.now(), f"channel {channel} broke: {reason}")
            case Drained():
                if self.phase is Phase.RESETTING:
                    self.phase = Phase.READY
                    self._report(Ready(self._host.address, self._host.pid, self._host.node))
            case _:
                assert_never(event)

    def _on_envelope(self, envelope: CommandEnvelope) -> None:
        if self.phase is Phase.CLOSED or envelope.attempt < self.attempt:
            return
        if envelope.attempt > self.attempt:
            # Whatever the first message of a new attempt is, the old one is over (rule C6).
            self._begin(envelope.attempt)
        _, due = self._commands.offer(envelope.attempt, envelope.sequence, envelope.command)
        for command in due:
            self._on_command(command)

    def _on_command(self, command: Command) -> None:
        if isinstance(command, Shutdown):
            self.close()
            return
        if self.phase is Phase.FAILED:
            return
        machine = self._machine
        assert machine is not None
        match command:
            case Reset():
                pass
            case Launch():
                self._launch(command)
            case Trigger():
                self._perform(machine.on_trigger(command))
            case Complete():
                self._perform(machine.on_complete(command))
            case Abort():
                machine.on_abort(command)
            case Assign(splits, no_more, settled):
                assert self._source is not None
                self._source.assign(splits, no_more=no_more, settled=settled)
            case SlowestSource(watermark):
                assert self._source is not None
                self._source.slowest = watermark
            case _:
                assert_never(command)

    # ---------------------------------------------------------------------------------------------- life of an attempt

    def _begin(self, attempt: Attempt) -> None:
        """Drop everything and belong to ``attempt``: survivors of a failure are reset in place."""
        self._teardown()
        scratch = self._scratch
        self._reset_attempt_state()
        self.attempt = attempt
        self._commands = Resequencer(attempt)
        self.phase = Phase.RESETTING
        self._machine = SubtaskMachine(
            self.subtask,
            inputs=self._inputs,
            outputs=outputs_of(self._spec.plan, self.subtask),
            exactly_once=self._spec.exactly_once,
            credit_bytes=self._spec.config.inflight_bytes,
        )
        self._host.accept(attempt, self._inputs)
        if scratch is not None and scratch.used:
            self._host.background(_closing(scratch))  # behind the uploads that may still read from it
        self._host.background(lambda: Drained(attempt))

    def _teardown(self) -> None:
        if self._uploads is not None:
            self._uploads.cancelled = True
        self._host.disconnect()
        try:
            if self._chain is not None:
                self._chain.close()
            if self._source is not None:
                self._source.close()
        except Exception as error:
            # A close that fails belongs to an attempt that is over; it must not keep the next one from starting.
            traceback.print_exception(error)
        self._chain, self._source = None, None

    def _launch(self, launch: Launch) -> None:
        if self.phase is not Phase.READY:
            raise ProtocolError(f"{self.subtask} was launched while {self.phase.value}")
        self._restored_from = launch.restored_from
        began, read = self._host.now(), self._store.bytes_read
        parts = Parts(
            self._spec,
            self.subtask,
            self.attempt,
            run_id=launch.run_id,
            now=self._host.now,
            wall_time=self._host.wall_time,
        )
        self._scratch = parts.scratch
        self._uploads = parts.uploads(self._store, launch.states)
        self._emitter = parts.emitter(self._offer)
        self._chain = parts.chain(self._emitter)
        self._chain.open(parts.states(launch.states, self._store))
        self._restored_bytes = self._store.bytes_read - read
        self._restore_s = self._host.now() - began
        self._source = parts.source()
        assert self._machine is not None
        self._event_time = EventTimeSpeaker(self._machine, self._chain, self._emitter, self._source, self._report)
        self._host.connect(self.attempt, {c: launch.addresses[c.target] for c in parts.outputs})
        self.phase = Phase.RUNNING
        self._report(Running())

    @property
    def _since_restore(self) -> str:
        """Where in the input an error lies whose rows are not known."""
        return f"after checkpoint {self._restored_from}"

    def _fail(self, error: Exception, *, position: str | None = None) -> None:
        """Tell the coordinator and hold still until it resets this subtask."""
        if position is None:
            position = self._source.position if self._source is not None else self._since_restore
        where = f"step {self._chain_plan.title!r} subtask {self.subtask.index}/{self._chain_plan.parallelism}"
        self.phase = Phase.FAILED
        self.last_error = error
        self._report(Failed(cause_of(error, where=where, position=position)))

    # ----------------------------------------------------------------------------------------------------------- work

    @property
    def polling(self) -> bool:
        """Whether a source waits for the world outside."""
        source, machine = self._source, self._machine
        return source is not None and source.can_poll and machine is not None and not machine.stopped

    def close(self) -> None:
        """Release everything; safe at any time."""
        self._teardown()
        if self._scratch is not None:
            self._scratch.close()
        self.phase = Phase.CLOSED

    @property
    def closed(self) -> bool:
        return self.phase is Phase.CLOSED

    @property
    def busy(self) -> bool:
        """Whether `work` has something to do right now."""
        machine = self._machine
        if self.phase is not Phase.RUNNING or machine is None or machine.output_blocked:
            return False
        if self._chain is None or self._chain.full:
            return False
        if machine.has_input:
            return True
        source = self._source
        if source is None or machine.input_ended or machine.stopped:
            return False
        return source.exhausted or (source.can_poll and self._host.now() >= self._source_due)

    def work(self) -> None:
        """One unit of work: take one element or poll the source once; then whatever the clock asks for."""
        if self.phase is Phase.CLOSED:
            return
        if self.phase is not Phase.RUNNING:
            self._beat(self._host.now())
            return
        try:
            if self.busy:
                self._advance()
            self._on_clock(self._host.now())
        except Exception as error:
            self._fail(error)

    def _advance(self) -> None:
        machine, source = self._machine, self._source
        assert machine is not None
        if source is None or machine.has_input:
            self._perform(machine.take_input(Time(self._host.now())))
        elif source.exhausted:
            self._perform(machine.end_input())
        else:
            self._poll(source)

    def _poll(self, source: SourceRunner) -> None:
        assert self._chain is not None
        assert self._event_time is not None
        batch = source.poll()
        if batch is None:
            self._source_due = self._host.now() + IDLE_POLL_S
        elif batch.num_rows:
            self._rows_in += batch.num_rows
            self._event_time.be_active()
            self._chain.process(batch, 0)

    def _on_clock(self, now: float) -> None:
        assert self._emitter is not None
        assert self._chain is not None
        assert self._machine is not None
        assert self._event_time is not None
        self._emitter.flush_due(now)
        source = self._source
        if source is not None and source.wants_split():
            self._report(SplitRequest())
        if now >= self._watermark_due and not self._machine.input_ended:
            self._watermark_due = now + self._watermark_s
            self._event_time.on_clock()
        timer = self._chain.next_timer()
        if timer is not None and not self._machine.output_blocked and not self._machine.input_ended:
            wall_time = self._host.wall_time()
            if timer <= wall_time:
                self._event_time.be_active()
                self._chain.on_time(wall_time)
        if self._broken is not None and now - self._broken[0] >= BROKEN_GRACE_S:
            raise ConnectionError(self._broken[1])
        self._beat(now)

    def _beat(self, now: float) -> None:
        if self._spec.heartbeat_s is not None and now >= self._heartbeat_due and self.attempt >= 0:
            self._heartbeat_due = now + self._spec.heartbeat_s
            self._report(Heartbeat(self.metrics()))

    def next_deadline(self) -> float | None:
        """When `work` should be called again even if nothing arrives; None: when something arrives."""
        deadlines: list[float] = []
        if self._spec.heartbeat_s is not None and self.attempt >= 0:
            deadlines.append(self._heartbeat_due)
        if self.phase is Phase.RUNNING:
            assert self._emitter is not None
            assert self._machine is not None
            linger = self._emitter.next_deadline()
            if linger is not None:
                deadlines.append(linger)
            if not self._machine.input_ended:
                deadlines.append(self._watermark_due)
            assert self._chain is not None
            if self.polling and not self._machine.output_blocked and not self._chain.full:
                deadlines.append(self._source_due)
            if self._broken is not None:
                deadlines.append(self._broken[0] + BROKEN_GRACE_S)
            timer = self._chain.next_timer()
            if timer is not None and not self._machine.output_blocked and not self._machine.input_ended:
                deadlines.append(self._host.now() + max(0.0, timer - self._host.wall_time()))
        return min(deadlines, default=None)

    def metrics(self) -> dict[str, float]:
        """Numbers for the progress line and for benchmarks."""
        found: dict[str, float] = {
            "rows_in": self._rows_in,
            "rows_out": self._emitter.rows_out if self._emitter else 0,
        }
        if self._restored_from is not None:
            found["restored_bytes"] = self._restored_bytes
            found["peak_restore_s"] = self._restore_s
        if self._machine is not None:
            found["peak_in_flight_bytes"] = self._machine.peak_in_flight
        if self._chain is not None:
            found["watermark"] = self._chain.watermark
            found |= self._chain.counters()
        if self._source is not None and self._source.skipped_rows:
            found["skipped_rows"] = found.get("skipped_rows", 0.0) + self._source.skipped_rows
        return found

    # -------------------------------------------------------------------------------------------------------- actions

    def _offer(self, channel: ChannelId, element: Element) -> None:
        assert self._machine is not None
        self._perform(self._machine.offer(channel, element))

    def _perform(self, actions: Sequence[SubtaskAction]) -> None:
        for action in actions:
            match action:
                case Send(channel, element):
                    self._host.send(channel, element)
                case ProcessData(channel, payload):
                    assert self._chain is not None
                    assert self._event_time is not None
                    self._rows_in += payload.num_rows  # type: ignore[attr-defined]
                    self._event_time.be_active()
                    self._chain.process(payload, self._input_index[channel.edge])
                case ReturnCredit(channel, nbytes):
                    self._host.return_credit(channel, nbytes)
                case AdvanceWatermark(time):
                    assert self._event_time is not None
                    self._event_time.advance(time)
                case TakeSnapshot():
                    self._take_snapshot(action)
                case Broadcast(element):
                    assert self._emitter is not None
                    self._emitter.broadcast(element)
                case FinishInput():
                    assert self._chain is not None
                    self._chain.end()
                case CommitUpTo(checkpoint):
                    self._commit(checkpoint)
                case Tell(report):
                    if isinstance(report, InputEnded):
                        # The last word on what this subtask has counted.
                        self._report(Heartbeat(self.metrics()))
                    self._report(report)
                case _:
                    assert_never(action)

    def _report(self, report: Report) -> None:
        envelope = ReportEnvelope(self.attempt, self.subtask, self._reports, report)
        self._reports += 1
        self._host.report(envelope)

    def _take_snapshot(self, action: TakeSnapshot) -> None:
        assert self._chain is not None
        assert self._uploads is not None
        began = self._host.now()
        frozen = self._chain.snapshot(action.checkpoint)
        splits = self._source.snapshot(action.checkpoint) if self._source is not None else ()
        stats = SnapshotStats(alignment_s=action.alignment_s, sync_s=self._host.now() - began)
        self._host.background(
            self._uploads.upload_task(self.attempt, action.checkpoint, frozen, splits, stats, self._host.now)
        )

    def _commit(self, checkpoint: CheckpointId) -> None:
        assert self._uploads is not None
        if self._source is not None:
            self._source.checkpointed(checkpoint)
        self._host.background(self._uploads.commit_task(self.attempt, checkpoint))


def _closing(scratch: Scratch) -> Callable[[], SubtaskEvent]:
    def task() -> SubtaskEvent:
        scratch.close()
        return Nothing()

    return task


class Inbox(Protocol):
    def drain(self, timeout_s: float | None) -> Sequence[SubtaskEvent]:
        """All events that have arrived; waits for one for at most ``timeout_s`` (None: for ever) if there is none."""


def run_subtask(subtask: SubtaskRuntime, inbox: Inbox, now: Callable[[], float]) -> None:
    """The loop: events first, then one unit of work, until the subtask is shut down."""
    while not subtask.closed:
        deadline = subtask.next_deadline()
        timeout = 0.0 if subtask.busy else None if deadline is None else max(0.0, deadline - now())
        for event in inbox.drain(timeout):
            subtask.handle(event)
        subtask.work()
