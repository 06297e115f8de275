"""A fake cluster for the coordinator machine: one seed is one run.

Every source subtask is also a transactional sink: it stages the rows it reads, and commits on `Complete`. So the oracle
is simple and closed-form: when the job has finished, each row of each split is committed exactly once (rule R3).
Faults: reports and commands reordered and repeated, processes killed and hung, user code that raises, uploads that
fail, manifest writes that fail, or whose outcome is unknown and which become durable later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from random import Random

from rayflow.core.coordinator import CoordinatorMachine, CoordinatorSettings
from rayflow.core.events import (
    CheckpointRequested,
    CleanUp,
    CoordinatorAction,
    CoordinatorEvent,
    JobCleaned,
    JobEnded,
    JobState,
    LoadLatest,
    ManifestFailed,
    ManifestWritten,
    Note,
    Recovered,
    RecoverSinks,
    Reported,
    Retain,
    SendCommand,
    SinksRecovered,
    StartSubtask,
    StopSubtask,
    SubtaskDied,
    Tick,
    WriteManifest,
)
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Committable, Manifest, SplitState, SubtaskSnapshot
from rayflow.core.messages import (
    Abort,
    Acknowledge,
    Assign,
    CheckpointKind,
    Command,
    Committed,
    Complete,
    Decline,
    Failed,
    FailureCause,
    Heartbeat,
    InputEnded,
    Launch,
    Ready,
    Report,
    ReportEnvelope,
    Reset,
    Running,
    Shutdown,
    SplitRequest,
    Trigger,
)
from rayflow.core.restore import splits_of
from rayflow.core.topology import Topology
from tests.core.fakes import NO_FAULTS, Faults, Process, Storage, small_topology, some_splits
from tests.core.watch import Violation, Watch, require

ROWS = 4
"""Rows of every split."""


class Cluster:
    """Drives one machine to the end of its job."""

    def __init__(
        self,
        seed: int,
        *,
        machine: type[CoordinatorMachine] = CoordinatorMachine,
        faults: Faults = NO_FAULTS,
        topology: Topology | None = None,
        splits: int = 5,
        settings: CoordinatorSettings | None = None,
    ) -> None:
        self.random = Random(seed)
        self.topology = topology or small_topology()
        settings = settings or CoordinatorSettings(interval_s=0.5, timeout_s=20.0, hang_timeout_s=30.0)
        self.machine = machine(self.topology, settings)
        self.splits = some_splits(splits)
        self.now = 0.0
        self.storage = Storage()
        self.watch = Watch()
        self.processes: dict[SubtaskId, Process] = {}
        self.to_machine: list[CoordinatorEvent] = []
        self.to_processes: list[SendCommand] = []
        self.background: list[CoordinatorAction] = []
        self.past: list[Reported] = []  # to be heard again, much later
        self.outcome: JobEnded | None = None
        self.budget = Counter(
            kill=faults.kills,
            hang=faults.hangs,
            raises=faults.raises,
            decline=faults.declines,
            write=faults.write_failures,
            late=faults.late_writes,
            request=faults.requests,
        )
        self.disorder = faults.disorder

    # ------------------------------------------------------------------------------------------------------- the run

    def run(self, *, steps: int = 20_000) -> JobEnded:
        self.perform(self.machine.start(self.now))
        for _ in range(steps):
            if self.outcome is not None:
                return self.outcome
            self.step()
        raise Violation(f"the job does not end: {self.machine.state} {self.machine.timeline[-8:]}")

    def check_output(self) -> None:
        """Each row exactly once; of a job that was stopped, each row before the positions of its last manifest."""
        expected = Counter((s.split_id, i) for s in self.splits for i in range(ROWS))
        manifest = self.storage.latest()
        if self.outcome is not None and self.outcome.outcome is JobState.STOPPED:
            require(manifest is not None, "stopped without a savepoint")
            for split in splits_of(manifest):
                expected -= Counter((split.split_id, i) for i in range(split.position or 0, ROWS))
        require(self.storage.rows() == expected, "R3: the committed rows are not those of the run without a failure")

    def step(self) -> None:
        self.now += self.random.random() * 0.02
        if self.disorder and self.past and self.random.random() < 0.1:
            self.tell(self.random.choice(self.past))
        if self.outcome is not None:
            return
        if self.storage.late and self.random.random() < 0.02:
            self.storage.create(self.storage.late.pop())
        if self.random.random() < 0.02:
            self._strike()
        moves: list[Callable[[], None]] = []
        if self.to_machine:
            moves += [self._deliver_event] * 3
        if any(not self._deaf(c.subtask) for c in self.to_processes):
            moves += [self._deliver_command] * 3
        if self.background:
            moves.append(self._background)
        moves += [partial(self._work, p) for p in self.processes.values() if self._can_work(p)]
        deadline = self.machine.next_deadline()
        if moves and (deadline is None or deadline > self.now):
            self.random.choice(moves)()
        elif deadline is not None:
            self.now = max(self.now, deadline)
            self._beat()
            self.tell(Tick())
        else:
            require(bool(moves), f"nothing is left to do and the job has not ended: {self.machine.state}")
            self.random.choice(moves)()

    def tell(self, event: CoordinatorEvent) -> None:
        self.watch.event(event)
        actions = self.machine.handle(event, self.now)
        self.machine.check_invariants()
        self.perform(actions)

    def _pick(self, queue: int) -> int:
        return self.random.randrange(queue) if self.disorder else 0

    def _deliver_event(self) -> None:
        index = self._pick(len(self.to_machine))
        event = self.to_machine[index]
        if not (self.disorder and isinstance(event, Reported) and self.random.random() < 0.05):
            del self.to_machine[index]  # else it will come again
        self.tell(event)

    def _deaf(self, subtask: SubtaskId) -> bool:
        process = self.processes.get(subtask)
        return process is not None and process.alive and process.hung

    def _deliver_command(self) -> None:
        index = self._pick(len(self.to_processes))
        sent = self.to_processes[index]
        process = self.processes.get(sent.subtask)
        if self._deaf(sent.subtask):
            self.to_processes.append(self.to_processes.pop(index))
            return
        if not (self.disorder and self.random.random() < 0.05):
            del self.to_processes[index]
        if process is not None and process.alive:
            _, due = process.commands.offer(sent.attempt, sent.sequence, sent.command)
            for command in due:
                self._obey(process, command)

    # ----------------------------------------------------------------------------------------------------- the faults

    def _strike(self) -> None:
        up = [p for p in self.processes.values() if p.alive and not p.hung]
        if not up:
            return
        victim = self.random.choice(up)
        match self.random.choice(["kill", "hang", "raises", "request"]):
            case "kill" if self.budget["kill"] > 0:
                self.budget["kill"] -= 1
                self.kill(victim.subtask)
            case "hang" if self.budget["hang"] > 0:
                self.budget["hang"] -= 1
                victim.hung = True
            case "raises" if self.budget["raises"] > 0 and victim.launched:
                self.budget["raises"] -= 1
                self.report(victim, Failed(FailureCause("boom", kind="ValueError")))
            case "request" if self.budget["request"] > 0:
                self.budget["request"] -= 1
                kinds = [CheckpointKind.PERIODIC, CheckpointKind.SAVEPOINT, CheckpointKind.STOP]
                self.to_machine.append(CheckpointRequested(self.random.choice(kinds)))
            case _:
                pass

    def kill(self, subtask: SubtaskId) -> None:
        process = self.processes[subtask]
        process.alive = False
        self.to_processes = [c for c in self.to_processes if c.subtask != subtask]
        self.to_machine.append(SubtaskDied(subtask, process.incarnation, "killed"))

    def _beat(self) -> None:
        """Time jumps to the next deadline: whoever lives has shown it meanwhile."""
        for process in self.processes.values():
            if process.alive and not process.hung and process.commands.attempt == self.machine.attempt:
                self.report(process, Heartbeat())
        if not self.disorder:
            return
        for event in [e for e in self.to_machine if isinstance(e, Reported)]:
            self.to_machine.remove(event)
            self.tell(event)

    # ---------------------------------------------------------------------------------------------- the subtasks' side

    def report(self, process: Process, report: Report) -> None:
        attempt = process.commands.attempt
        event = Reported(ReportEnvelope(attempt, process.subtask, process.sent, report))
        self.to_machine.append(event)
        if not isinstance(report, Heartbeat):
            self.past.append(event)
        process.sent += 1

    def _obey(self, p: Process, command: Command) -> None:
        match command:
            case Reset():
                p.reset()
                self.report(p, Ready(f"{p.subtask}/{p.incarnation}"))
            case Launch():
                p.launched = True
                self.report(p, Running())
            case Assign(splits, no_more):
                p.asked = False
                p.splits += splits
                p.no_more = p.no_more or no_more
            case Trigger(n, kind):
                p.stopped = p.stopped or kind is CheckpointKind.STOP
                require(p.is_source or p.ended, "A6: a trigger where a barrier will come")
                if n > p.begun:
                    self._begin(p, n)
            case Complete(n):
                for name in [name for name in p.prepared if int(name.rsplit("/", 1)[1]) <= n]:
                    self.storage.commit(name)
                    p.prepared.remove(name)
                self.report(p, Committed(n))
            case Abort():
                pass  # what is prepared stays and stands in the next snapshot
            case Shutdown():
                p.launched = False

    def _begin(self, p: Process, n: int) -> None:
        p.begun = n
        if not p.ended:
            p.barrier = n
        if p.rows:
            name = f"{p.subtask}/{p.commands.attempt}/{n}"
            self.storage.staged[name] = p.rows
            p.prepared.append(name)
            p.rows = []
        committables = tuple(Committable("read", name) for name in p.prepared)
        p.uploads.append((n, SubtaskSnapshot(p.subtask, splits=tuple(p.splits), committables=committables)))

    def _upstream(self, p: Process) -> list[Process]:
        return [self.processes[c.source] for c in self.topology.inputs_of(p.subtask)]

    def _aligned(self, p: Process) -> int:
        """The barrier that all inputs have delivered (an ended one counts as having it, A6), or 0."""
        upstream = self._upstream(p)
        n = max((u.barrier for u in upstream), default=0)
        return n if n > p.begun and all(u.barrier >= n or u.ended for u in upstream) else 0

    def _can_work(self, p: Process) -> bool:
        if not p.alive or p.hung or not p.launched or p.commands.attempt != self.machine.attempt:
            return False
        if p.uploads:
            return True
        if p.is_source:
            return not p.ended and not p.stopped and (bool(p.splits) or p.no_more or not p.asked)
        upstream = self._upstream(p)
        if any(not u.alive or u.commands.attempt != p.commands.attempt for u in upstream):
            return False
        return not p.ended and (self._aligned(p) > 0 or all(u.ended for u in upstream))

    def _work(self, p: Process) -> None:
        if p.uploads and self.random.random() < 0.5:
            n, snapshot = p.uploads.pop(0)
            if self.budget["decline"] > 0 and self.random.random() < 0.1:
                self.budget["decline"] -= 1
                self.report(p, Decline(CheckpointId(n), "upload failed"))
            else:
                self.report(p, Acknowledge(CheckpointId(n), snapshot))
        elif not p.is_source:
            if not p.ended and (n := self._aligned(p)):
                self._begin(p, n)
            elif not p.ended and all(u.ended for u in self._upstream(p)):
                p.ended = True
                self.report(p, InputEnded())
        elif p.stopped:
            pass
        elif p.splits:
            self._read(p)
        elif p.no_more and not p.ended:
            p.ended = True
            self.report(p, InputEnded())
        elif not p.no_more and not p.asked:
            p.asked = True
            self.report(p, SplitRequest())

    def _read(self, p: Process) -> None:
        split = p.splits[0]
        row = split.position or 0
        p.rows.append((split.split_id, row))
        if row + 1 == ROWS:
            del p.splits[0]
        else:
            p.splits[0] = SplitState(split.source, split.split_id, split.order, split.split, row + 1)

    # ------------------------------------------------------------------------------------------------- the shell's side

    def perform(self, actions: list[CoordinatorAction]) -> None:
        for action in actions:
            self.watch.action(action)
            match action:
                case SendCommand():
                    self.to_processes.append(action)
                case StartSubtask(subtask, incarnation):
                    self.processes[subtask] = Process(subtask, incarnation, subtask.chain in self.topology.sources)
                case StopSubtask(subtask, incarnation):
                    process = self.processes[subtask]
                    require(process.incarnation == incarnation, "the wrong process is stopped")
                    process.alive = False
                    self.to_processes = [c for c in self.to_processes if c.subtask != subtask]
                case JobEnded():
                    self.outcome = action
                case Note():
                    pass
                case _:
                    self.background.append(action)

    def _background(self) -> None:
        """Storage and sinks: one at a time and in order."""
        match self.background.pop(0):
            case LoadLatest(unresolved):
                self.storage.void.update(n for n in unresolved if n not in self.storage.manifests)
                manifest = self.storage.latest()
                splits = () if manifest is not None else self.splits
                attempt = Attempt(1 if manifest is None else manifest.attempt + 1)
                following = CheckpointId(self.storage.highest + 1)
                self.to_machine.append(Recovered(manifest, following, attempt, splits))
            case RecoverSinks(attempt, manifest):
                for name in () if manifest is None else manifest.committables("read"):
                    self.storage.commit(str(name))
                self.storage.staged.clear()
                self.to_machine.append(SinksRecovered(attempt))
            case WriteManifest() as action:
                self._write(action)
            case CleanUp():
                self.to_machine.append(JobCleaned())
            case Retain(newest):
                for n in [n for n in self.storage.manifests if n < newest - 3]:
                    del self.storage.manifests[n]
            case _:
                pass

    def _write(self, action: WriteManifest) -> None:
        n = action.checkpoint
        manifest = Manifest(
            job="job",
            checkpoint=n,
            kind=action.kind.value,
            attempt=action.attempt,
            incarnation=1,
            run_id="run",
            created_at=0.0,
            max_parallelism=self.topology.max_parallelism,
            parallelism=dict(self.topology.parallelism),
            operators={},
            subtasks=action.snapshots,
            pending_splits=action.pending_splits,
        )
        if self.budget["late"] > 0 and self.random.random() < 0.3:
            self.budget["late"] -= 1
            self.storage.late.append(manifest)
            self.to_machine.append(ManifestFailed(n, "timed out"))
        elif self.budget["write"] > 0 and self.random.random() < 0.2:
            self.budget["write"] -= 1
            self.to_machine.append(ManifestFailed(n, "storage is down"))
        elif self.storage.create(manifest):
            self.storage.highest = max(self.storage.highest, n)
            self.to_machine.append(ManifestWritten(n))
        else:
            self.to_machine.append(ManifestFailed(n, "exists"))
