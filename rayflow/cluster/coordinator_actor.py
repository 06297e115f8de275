"""The coordinator as a Ray actor: `CoordinatorRuntime` on a thread of its own, and the world around it.

Detached and restarted by Ray for ever: it outlives the driver and its own death. All it needs to begin again stands in
the arguments that Ray keeps; where to go on is in storage, and claiming the directory fences its former life (rule C8).
Its methods only enqueue or read, so that the one thread Ray gives it is always free.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import pyarrow as pa
import ray

from rayflow.cluster.background import Background
from rayflow.cluster.inbox import Inbox
from rayflow.cluster.package import JobPackage, unpack
from rayflow.cluster.processes import CLOSE_GRACE_S, ProcessEnded, Processes, uncaught
from rayflow.cluster.resources import cpus_needed, cpus_per_subtask
from rayflow.cluster.view import CoordinatorInfo, Ended, status_of, subtasks_of, waiting_to_start
from rayflow.core.events import (
    CancelRequested,
    CheckpointRequested,
    CoordinatorEvent,
    JobState,
    Reported,
    SubtaskDied,
    Tick,
)
from rayflow.core.ids import CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest
from rayflow.core.messages import CheckpointKind, CommandEnvelope, FailureCause, ReportEnvelope
from rayflow.core.timeline import TimelineEntry
from rayflow.errors import ClusterError
from rayflow.runtime.coordinator_loop import CoordinatorRuntime, settings_of
from rayflow.runtime.failures import cause_of
from rayflow.runtime.results import JobStatus, SubtaskInfo, metrics_of
from rayflow.runtime.stores import staging_of
from rayflow.storage.savepoints import savepoint_after
from rayflow.storage.snapshots import MEMORY_STATE_BYTES_MAX

LINGER_S: Final = 600.0
"""How long the outcome of a job that has ended is kept for a driver; then the coordinator goes by itself."""
SPARE_AFTER_S: Final = 1.0
"""A job that has run so long gets a spare process; a shorter one does not pay for it. Heartbeats wake the loop."""


@dataclass(frozen=True, slots=True)
class _Bug:
    """A thread of the coordinator raised what it should have answered for."""

    error: BaseException


News = CoordinatorEvent | ProcessEnded | _Bug


class RayCoordinatorHost:
    """The `CoordinatorHost` on Ray."""

    def __init__(self, processes: Processes, inbox: Inbox[News]) -> None:
        self._processes = processes
        self.pid_of: Callable[[SubtaskId], int | None] = lambda _: None

        def tell(event: CoordinatorEvent | None) -> None:
            if event is not None:
                inbox.put(event)

        def background(name: str) -> Background[CoordinatorEvent | None]:
            return Background(name, tell, lambda error: inbox.put(_Bug(error)))

        self._background = background("rayflow-storage")
        self._make_lookout = partial(background, "rayflow-discovery")
        self._lookout: Background[CoordinatorEvent | None] | None = None

    def now(self) -> float:
        return time.monotonic()

    def wall_time(self) -> float:
        return time.time()

    def start_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        self._processes.start(subtask, incarnation)

    def stop_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        self._processes.stop(subtask, incarnation, pid=self.pid_of(subtask))

    def send(self, envelope: CommandEnvelope) -> None:
        self._processes.send(envelope)

    def background(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        self._background.put(task)

    def look(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        if self._lookout is None:
            self._lookout = self._make_lookout()
        self._lookout.put(task)


class CoordinatorProcess:
    """The actor class. Everything the loop thread writes and a method reads is guarded by ``_lock``."""

    def __init__(self, replan: int, *slices: bytes) -> None:
        """The first ``replan`` slices are for a driver that wants another parallelism, and are not looked into here."""
        pa.set_cpu_count(1)
        context = ray.get_runtime_context()
        self._self = context.current_actor
        self._node = str(context.get_node_id())
        self._life = uuid.uuid4().hex
        self._inbox: Inbox[News] = Inbox()
        self._lock = threading.Lock()
        self._ended: Ended | None = None
        self._fetched = threading.Event()
        self._uncaught = 0  # processes in a row that raised, since the job last ran
        self._replan, slices = b"".join(slices[:replan]), slices[replan:]
        self._package = package = unpack(slices)
        store, _, in_memory = package.open_stores(begin=True)
        self._store = store
        self._processes = Processes(self._life, self._self, slices, cpus_per_subtask(package.plan), self._inbox.put)
        host = RayCoordinatorHost(self._processes, self._inbox)
        self._runtime = CoordinatorRuntime(
            package.plan,
            settings_of(package.config, package.checkpoints),
            store=store,
            retain=package.checkpoints.retain if package.checkpoints else 1,
            host=host,
            memory_bound=MEMORY_STATE_BYTES_MAX if in_memory else None,
            staging=staging_of(package.plan, package.config, package.checkpoints),
        )
        host.pid_of = self._pid_here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's property warns of a part of itself
            reconstructed = bool(context.was_current_actor_reconstructed)
        threading.Thread(target=self._run, args=(reconstructed,), name="rayflow-coordinator", daemon=True).start()

    # ---------------------------------------------------------------------------------------- called by other processes

    def report(self, life: str, envelope: ReportEnvelope) -> None:
        """From a subtask. Those of an earlier coordinator's life are of no attempt of this one (rule C6)."""
        if life == self._life:
            self._inbox.put(Reported(envelope))

    def status(self) -> JobStatus:
        with self._lock:
            machine = self._runtime.machine
            status = status_of(machine, self._package.plan)
            waiting = waiting_to_start(machine, time.monotonic())
        if waiting:
            free = ray.available_resources().get("CPU", 0.0)
            status = replace(
                status,
                detail=f"{waiting} of {len(machine.subtasks)} processes have not started; the cluster has {free:g} of "
                f"{ray.cluster_resources().get('CPU', 0.0):g} CPUs free, the job takes "
                f"{cpus_needed(self._package.plan)}",
            )
        return status

    def subtasks(self) -> list[SubtaskInfo]:
        with self._lock:
            return subtasks_of(self._runtime.machine, self._package.plan)

    def timeline(self) -> tuple[TimelineEntry, ...]:
        with self._lock:
            return self._runtime.machine.timeline

    def metrics(self) -> dict[str, float]:
        with self._lock:
            return metrics_of(self._runtime, self._package.plan)

    def request_checkpoint(self, kind: CheckpointKind) -> None:
        self._inbox.put(CheckpointRequested(kind))

    def cancel(self) -> None:
        self._inbox.put(CancelRequested())

    def outcome(self) -> Ended | None:
        """None while the job runs. When it has ended, no process of its subtasks is left."""
        return self._ended

    def package(self) -> JobPackage:
        """For a driver that comes back."""
        return self._package

    def replan(self) -> bytes:
        """See `rayflow.cluster.package.pack_replan`."""
        return self._replan

    def savepoint_after(self, checkpoint: int) -> Manifest | None:
        """The newest checkpoint after that one that was taken as a savepoint; for snapshots that only this process
        has."""
        return savepoint_after(self._store, checkpoint)

    def release(self, checkpoint: int) -> None:
        """The copy of this savepoint is complete, and it is needed no longer."""
        self._store.release(CheckpointId(checkpoint))

    def coordinator(self) -> CoordinatorInfo:
        return CoordinatorInfo(os.getpid(), self._node, self._life)

    # -------------------------------------------------------------------------------------------------- the loop thread

    def _run(self, reconstructed: bool) -> None:
        cause: FailureCause | None = None
        try:
            if reconstructed and not self._package.durable:
                cause = _memory_lost(self._package.plan.name)
            else:
                self._loop()
        except BaseException as error:
            traceback.print_exception(error)
            cause = cause_of(error, where=f"coordinator of job {self._package.plan.name!r}")
        self._close_processes()
        with self._lock:
            outcome, machine = self._runtime.outcome, self._runtime.machine
            state = JobState.FAILED if cause is not None or outcome.state is None else outcome.state
            self._ended = Ended(
                state=state,
                cause=cause or outcome.cause,
                manifest=outcome.manifest,
                restarts=machine.restarts,
                timeline=machine.timeline,
                metrics=metrics_of(self._runtime, self._package.plan),
                status=replace(status_of(machine, self._package.plan), state=state.value),
                subtasks=tuple(subtasks_of(machine, self._package.plan)),
            )
        # The driver kills this process when it has the outcome. One that has left for good must not be waited for.
        self._fetched.wait(LINGER_S)
        ray.kill(self._self)

    def _loop(self) -> None:
        runtime = self._runtime
        spare_at: float | None = None
        with self._lock:
            runtime.start()
        while not runtime.ended:
            deadline = runtime.next_deadline()
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = self._inbox.drain(timeout)
            with self._lock:
                for event in events:
                    self._hear(event)
                deadline = runtime.next_deadline()
                if deadline is not None and deadline <= time.monotonic():
                    runtime.handle(Tick())
            if runtime.machine.state is not JobState.RUNNING:
                spare_at = None
            elif spare_at is None:
                self._uncaught = 0
                spare_at = time.monotonic() + SPARE_AFTER_S
            elif spare_at <= time.monotonic() and self._package.config.restart.strategy != "none":
                self._processes.keep_spare()

    def _hear(self, news: News) -> None:
        if isinstance(news, _Bug):
            raise news.error
        if isinstance(news, ProcessEnded):
            reason = self._processes.ended(news)
            if reason is not None:
                self._count_uncaught(news, reason)
                self._runtime.handle(SubtaskDied(news.subtask, news.incarnation, reason))
        else:
            self._runtime.handle(news)

    def _count_uncaught(self, news: ProcessEnded, reason: str) -> None:
        """Processes that raise instead of dying are no accident: they must not be started again for ever."""
        if not uncaught(news.error):
            return
        self._uncaught += 1
        if self._uncaught >= self._package.config.restart.same_failure_limit:
            told, _, story = reason.partition("\n")
            error = ClusterError(f"{news.subtask} cannot run, {self._uncaught} processes failed in a row: {told}")
            error.add_note(story)
            raise error

    def _close_processes(self) -> None:
        """Let those that were told to shut down do so, for a moment; kill the rest."""
        until = time.monotonic() + CLOSE_GRACE_S
        while self._processes.closing and (left := until - time.monotonic()) > 0:
            for news in self._inbox.drain(left):
                if isinstance(news, ProcessEnded):
                    self._processes.ended(news)
        self._processes.kill_all()

    def _pid_here(self, subtask: SubtaskId) -> int | None:
        member = self._runtime.machine.subtasks[subtask]
        return member.pid if member.node == self._node and member.pid else None


def _memory_lost(job: str) -> FailureCause:
    return FailureCause(
        f'the coordinator of job {job!r} died, and with it the snapshots that state="memory" keeps there; starting '
        "over could write output twice, so the job ends here: run it again, with CheckpointConfig(url) to survive this",
        kind="StateLost",
        fatal=True,
    )


CoordinatorActor: Any = ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)(CoordinatorProcess)
