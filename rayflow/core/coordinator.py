"""The coordinator of one job as a pure machine: events and the time in, actions out.

It holds no clock, no thread and no connection: `CoordinatorMachine.handle` is told one event with the time, and answers
with the actions a shell (Ray, local, simulator) performs in the order given. The shell calls `handle(Tick(), now)` when
`next_deadline` has passed. The parts: `roster` (processes and commands), `checkpointing`, `failover`, `splits`,
`restart`; this file holds the life of the job and says which part hears what.

C2  notification only after the manifest is durable.       C3  a job that has ended hears nothing.
C6  a message of another attempt changes nothing.          C8  a coordinator that is fenced touches nothing.
A6  a subtask whose input has ended is triggered by itself, because no barrier reaches it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, assert_never

from rayflow.core import timeline as what
from rayflow.core.checkpoint import PendingCheckpoint
from rayflow.core.checkpointing import CheckpointCounts, Checkpointing, CheckpointTimes
from rayflow.core.discovery import Discovery
from rayflow.core.events import (
    CancelRequested,
    CheckpointRequested,
    CleanUp,
    CoordinatorAction,
    CoordinatorEvent,
    Discovered,
    JobCleaned,
    JobEnded,
    JobState,
    LookFailed,
    ManifestFailed,
    ManifestWritten,
    Recovered,
    RecoveryFailed,
    Reported,
    SinksFailed,
    SinksRecovered,
    SubtaskDied,
    Tick,
    WholeCommitted,
    WholeFailed,
)
from rayflow.core.failover import Failover, LoadState, fenced_by_another, lost_commit
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.messages import CheckpointKind, FailureCause, ReportEnvelope
from rayflow.core.reports import Reports
from rayflow.core.resequence import Arrival
from rayflow.core.restart import Decision, GiveUp, RestartAfter, RestartPolicy, RestartSpec
from rayflow.core.roster import Heard, Member, Roster
from rayflow.core.splits import SplitPool
from rayflow.core.timeline import Outbox, TimelineEntry
from rayflow.core.topology import Topology
from rayflow.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """Plain numbers, in seconds. ``interval_s`` None: only requested checkpoints and the final one."""

    interval_s: float | None = 10.0
    timeout_s: float = 600.0
    min_pause_s: float = 0.0
    tolerable_failures: int = 3
    hang_timeout_s: float = 60.0
    restart: RestartSpec = field(default_factory=RestartSpec)


_ARRIVED = {
    Arrival.ACCEPTED: Heard.ACCEPTED,
    Arrival.HELD: Heard.HELD,
    Arrival.DUPLICATE: Heard.DUPLICATE,
    Arrival.STALE: Heard.STALE,
    Arrival.OVERFLOW: Heard.HELD,
}


class CoordinatorMachine:
    """One job, from `start` to `JobEnded`. ``heard`` counts what became of every event, by name."""

    checkpointing_type: ClassVar[type[Checkpointing]] = Checkpointing
    failover_type: ClassVar[type[Failover]] = Failover

    def __init__(self, topology: Topology, settings: CoordinatorSettings) -> None:
        self.topology = topology
        self.settings = settings
        self.state = JobState.CREATED
        self.heard: Counter[tuple[str, Heard]] = Counter()
        self.cause: FailureCause | None = None  # of the last failure; the job's own when it FAILED
        self._input_ended: Attempt | None = None  # the attempt whose input is known to have ended
        self._outcome: JobState | None = None  # set while CLEANING and after
        self._out = Outbox()
        self._roster = Roster(topology.subtasks, self._out, hang_timeout_s=settings.hang_timeout_s)
        self._pools = {
            source: SplitPool(
                source,
                topology.parallelism[source],
                in_turns=source in topology.in_turns,
                watched=source in topology.discovering,
            )
            for source in sorted(topology.sources)
        }
        self._policy = RestartPolicy(settings.restart)
        times = CheckpointTimes(
            settings.interval_s, settings.timeout_s, settings.min_pause_s, settings.tolerable_failures
        )
        self._checkpointing = self.checkpointing_type(topology, self._roster, self._pools, times, self._out)
        self._failover = self.failover_type(topology, self._roster, self._pools, self._checkpointing, self._out)
        self._discovery = Discovery(topology.discovering, self._roster, self._pools, self._out)
        self._reports = Reports(self._roster, self._pools, self._checkpointing, topology.aligned)

    # --------------------------------------------------------------------------------------------------- what is seen

    @property
    def attempt(self) -> Attempt:
        return self._roster.attempt

    @property
    def subtasks(self) -> Mapping[SubtaskId, Member]:
        """Read only: state, address, process, metrics of each subtask."""
        return self._roster.members

    @property
    def pending(self) -> PendingCheckpoint | None:
        return self._checkpointing.pending

    @property
    def last_completed(self) -> CheckpointId | None:
        return self._checkpointing.last_completed

    @property
    def counts(self) -> CheckpointCounts:
        return self._checkpointing.counts

    @property
    def restarts(self) -> int:
        return self._policy.restarts

    @property
    def timeline(self) -> tuple[TimelineEntry, ...]:
        return self._out.timeline

    # --------------------------------------------------------------------------------------------------------- driving

    def start(self, now: float) -> list[CoordinatorAction]:
        """Begin; call once."""
        if self.state is not JobState.CREATED:
            raise ProtocolError(f"the coordinator was started twice: its job is {self.state.value} already")
        self.state = JobState.RECOVERING
        self._failover.read_storage(now)
        return self._out.take()

    def handle(self, event: CoordinatorEvent, now: float) -> list[CoordinatorAction]:
        """Hear one event; what to do about it, in order."""
        name = type(event.envelope.report if isinstance(event, Reported) else event).__name__
        if self.state.terminal:
            self.heard[name, Heard.STALE] += 1  # C3
            return []
        self.heard[name, self._dispatch(event, now)] += 1
        self._advance(now)
        return self._out.take()

    def next_deadline(self) -> float | None:
        """When to call ``handle(Tick(), now)`` at the latest; in the past when something is due; None: never."""
        if self.state.terminal or self.state in (JobState.CREATED, JobState.CLEANING):
            return None
        times = [self._roster.next_hang()]
        if self.state is JobState.RESTARTING:
            times.append(self._failover.restart_at)
        if self.state is JobState.RUNNING:
            times += [self._checkpointing.next_deadline(), self._discovery.next_deadline()]
        return min((t for t in times if t is not None), default=None)

    def _dispatch(self, event: CoordinatorEvent, now: float) -> Heard:
        match event:
            case Reported(envelope):
                return self._reported(envelope, now)
            case Tick():
                return self._tick(now)
            case SubtaskDied(subtask, incarnation, reason):
                heard = self._roster.died(subtask, incarnation)
                if heard is Heard.ACCEPTED:
                    self._note(what.SUBTASK_DIED, f"{subtask}: {reason}", now)
                    if self.state is not JobState.CLEANING:
                        self._died((subtask,), f"died: {reason}", now)
                return heard
            case ManifestWritten(checkpoint):
                if checkpoint in self._failover.void:
                    self._end(JobState.FAILED, lost_commit(checkpoint), now)
                    return Heard.STALE
                heard = self._checkpointing.manifest_written(checkpoint, now)
                if heard is Heard.ACCEPTED:
                    self._policy.checkpoint_completed()
                return heard
            case ManifestFailed(checkpoint, reason, fenced, fatal):
                if fatal is not None:
                    self._end(JobState.FAILED, fatal, now)
                    return Heard.ACCEPTED
                if fenced:
                    self._end(JobState.FAILED, fenced_by_another(checkpoint, reason), now)
                    return Heard.ACCEPTED
                return self._checkpointing.manifest_failed(checkpoint, reason, now)
            case Discovered(attempt, source, found):
                running = self.state is JobState.RUNNING
                return self._discovery.discovered(attempt, source, found, now, running=running)
            case LookFailed(attempt, source, reason, fatal):
                running = self.state is JobState.RUNNING
                heard = self._discovery.failed(attempt, source, reason, now, running=running)
                if fatal is not None and heard is Heard.ACCEPTED:
                    self._fail(fatal, now)
                return heard
            case WholeCommitted(attempt, checkpoint):
                return self._checkpointing.whole_answered(attempt, checkpoint, committed=True)
            case WholeFailed(attempt, checkpoint, cause):
                heard = self._checkpointing.whole_answered(attempt, checkpoint, committed=False)
                if heard is Heard.ACCEPTED or (cause.fatal and heard is Heard.STALE):
                    self._fail(cause, now)
                return heard
            case Recovered():
                return self._failover.recovered(event)
            case RecoveryFailed(cause):
                heard = self._failover.recovery_failed()
                if heard is Heard.ACCEPTED:
                    self._fail(cause, now)
                return heard
            case SinksRecovered(attempt):
                return self._failover.sinks_answered(attempt, now, recovered=True)
            case SinksFailed(attempt, cause):
                heard = self._failover.sinks_answered(attempt, now, recovered=False)
                if heard is Heard.ACCEPTED or (cause.fatal and heard is Heard.STALE):
                    self._fail(cause, now)
                return heard
            case CheckpointRequested(kind):
                if self.state is JobState.CLEANING:
                    return Heard.STALE
                return self._checkpointing.request(kind)
            case CancelRequested():
                return self._cancel(now)
            case JobCleaned(cause):
                return self._cleaned(cause, now)
        assert_never(event)

    def _reported(self, envelope: ReportEnvelope, now: float) -> Heard:
        member = self._roster.members.get(envelope.subtask)
        if member is None:
            return Heard.UNKNOWN
        if self._outcome is not None:
            return Heard.STALE
        arrival, reports = member.inbox.offer(envelope.attempt, envelope.sequence, envelope.report)
        if arrival is Arrival.OVERFLOW:
            self._fail(FailureCause(f"a report of {envelope.subtask} was lost on its way", kind="ReportLost"), now)
        heard = _ARRIVED[arrival]
        for report in reports:
            heard = self._reports.handle(member, report, now)
            cause = self._reports.take_failure()
            if cause is not None:
                self._fail(cause, now)
            if envelope.attempt != self.attempt or self._outcome is not None:
                break  # the rest belongs to an attempt that has just ended (C6)
        if arrival in (Arrival.ACCEPTED, Arrival.HELD):
            self._roster.seen(member, now)
        return heard

    def _tick(self, now: float) -> Heard:
        if self.state is JobState.RUNNING:
            self._checkpointing.check_timeout(now)
        if self.state is not JobState.CLEANING:
            hung = self._roster.hung(now)
            for subtask in hung:
                self._roster.stop(subtask)
                self._note(what.SUBTASK_HUNG, str(subtask), now)
            if hung:
                self._died(hung, f"gave no sign for {self.settings.hang_timeout_s:g} s and was killed", now)
        return Heard.ACCEPTED

    # ------------------------------------------------------------------------------------------------- life of the job

    def _advance(self, now: float) -> None:
        """Go as far as what is known allows. Each step makes the next one possible, so they stand in this order."""
        if self.state is JobState.RESTARTING and self._failover.restart_at <= now:
            self.state = JobState.RECOVERING
            self._failover.read_storage(now)
        if self.state is JobState.RECOVERING and self._failover.load is LoadState.READ:
            refusal = self._failover.refusal()
            if refusal is not None:
                self._fail(refusal, now)
            else:
                self._failover.deploy(now)
                self.state = JobState.DEPLOYING
        if self.state is JobState.DEPLOYING:
            self._failover.advance(now)
            if self._roster.all_run:
                self.state = JobState.RUNNING
                self._policy.running(now)
                self._checkpointing.begin(now)
                self._discovery.begin(now, restored=self._failover.manifest is not None)
                self._note(what.RUNNING, f"attempt {self.attempt}", now)
        if self.state is JobState.RUNNING:
            self._run(now)

    def _run(self, now: float) -> None:
        too_many = self._checkpointing.too_many_failures()
        if too_many is not None:
            self._fail(too_many, now)
            return
        if self._roster.all_ended and self._input_ended != self.attempt:
            self._input_ended = self.attempt
            self._note(what.INPUT_ENDED, f"attempt {self.attempt}", now)
        over = self._checkpointing.over()
        if over is not None:
            outcome = JobState.STOPPED if over is CheckpointKind.STOP else JobState.FINISHED
            self._clean(outcome, complete=True, now=now)
            return
        overdue = self._checkpointing.overdue(now)
        if overdue is not None:
            self._fail(overdue, now)
            return
        self._checkpointing.advance(now)
        self._discovery.advance(now)

    def _died(self, subtasks: tuple[SubtaskId, ...], how: str, now: float) -> None:
        """Processes are gone, all at one moment: one failover."""
        cause = FailureCause(f"{', '.join(map(str, subtasks))} {how}", kind="SubtaskDied")
        decisions = [self._policy.on_death(subtask, cause, now) for subtask in subtasks]
        self._failed(cause, max(decisions, key=_severity), now)

    def _fail(self, cause: FailureCause, now: float) -> None:
        if self.state is not JobState.CLEANING and not self.state.terminal:
            self._failed(cause, GiveUp(cause) if cause.fatal else self._policy.on_failure(cause, now), now)

    def _failed(self, cause: FailureCause, decision: Decision, now: float) -> None:
        self._note(what.DETECTED, cause.message, now)
        self.cause = cause
        match decision:
            case GiveUp(last):
                self._end(JobState.FAILED, last, now)
            case RestartAfter(delay_s):
                self.state = JobState.RESTARTING
                self._failover.begin(cause.message, delay_s, now)

    def _clean(self, outcome: JobState, *, complete: bool, now: float) -> None:
        self.state = JobState.CLEANING
        self._outcome = outcome
        self._note(what.CLEANING, outcome.value, now)
        self._out.put(CleanUp(outcome, manifest_complete=complete))

    def _cleaned(self, cause: FailureCause | None, now: float) -> Heard:
        if self.state is not JobState.CLEANING or self._outcome is None:
            return Heard.UNKNOWN
        failed = cause is not None and self._outcome is not JobState.CANCELLED
        self._end(JobState.FAILED if failed else self._outcome, cause, now)
        return Heard.ACCEPTED

    def _cancel(self, now: float) -> Heard:
        if self.state is JobState.CLEANING:
            return Heard.STALE  # too late: all is committed, or it is being cancelled already
        self._checkpointing.abandon("the job was cancelled", now)
        self._roster.stop_all(politely=True)
        self._clean(JobState.CANCELLED, complete=False, now=now)
        return Heard.ACCEPTED

    def _end(self, outcome: JobState, cause: FailureCause | None, now: float) -> None:
        """The last actions of the job. One that FAILED leaves storage and sinks alone: a later run needs them."""
        self._checkpointing.abandon("the job has ended", now, discard=False)
        self._roster.stop_all(politely=outcome is not JobState.FAILED)
        self.state = self._outcome = outcome
        self.cause = cause
        self._note(what.JOB_ENDED, outcome.value if cause is None else f"{outcome.value}: {cause.message}", now)
        self._out.put(JobEnded(outcome, cause))

    def _note(self, name: str, detail: str, now: float) -> None:
        self._out.note(name, detail, attempt=self.attempt, now=now)

    def check_invariants(self) -> None:
        """Assert what must hold between any two events (habit 4)."""
        self._roster.check_invariants()
        self._checkpointing.check_invariants()
        self._failover.check_invariants(running=self.state is JobState.RUNNING)
        self._reports.check_invariants()
        self._discovery.check_invariants()
        for pool in self._pools.values():
            pool.check_invariants()
        if self.state is not JobState.RUNNING:
            assert self.pending is None, f"a checkpoint is pending while the job is {self.state.value}"
        if self.state.terminal:
            assert self.next_deadline() is None, "C3"
            assert not any(m.state.up for m in self._roster), "a process outlives the job"
        if self.state in (JobState.DEPLOYING, JobState.RUNNING):
            assert all(m.state.up for m in self._roster), "nobody waits for a process that is gone"


def _severity(decision: Decision) -> float:
    return float("inf") if isinstance(decision, GiveUp) else decision.delay_s
