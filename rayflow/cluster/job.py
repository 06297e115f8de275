"""`Job`: a running flow as its driver sees it; submitting one, and coming back to one."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import ray

from rayflow.cluster.coordinator_actor import LINGER_S, CoordinatorActor
from rayflow.cluster.deploy import check_cluster, connect
from rayflow.cluster.outcome import ended_before, failure_of, patiently
from rayflow.cluster.package import JobPackage, PlanFor, pack, pack_replan, slices_of, unpack_replan
from rayflow.cluster.processes import reason_of, uncaught
from rayflow.cluster.view import CoordinatorInfo, Ended
from rayflow.config import CheckpointConfig, JobConfig
from rayflow.core.events import JobState
from rayflow.core.manifest import Manifest
from rayflow.core.messages import CheckpointKind
from rayflow.core.timeline import CHECKPOINT_ABORTED, TimelineEntry
from rayflow.errors import (
    ClusterError,
    ConfigError,
    JobCancelledError,
    JobFailedError,
    StorageError,
)
from rayflow.plan import Plan
from rayflow.runtime.results import JobResult, JobStatus, SubtaskInfo, collected
from rayflow.runtime.stores import Start, open_stores
from rayflow.storage.checkpoints import CheckpointInfo
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root
from rayflow.storage.savepoint_copy import Progress, SavepointCopier, all_committed
from rayflow.storage.savepoints import savepoint_after

NAMESPACE: Final = "rayflow"
COORDINATOR_PATIENCE_S: Final = 60.0
"""How long a coordinator may be away (Ray is starting it again) before a call gives up."""
CANCEL_TIMEOUT_S: Final = 60.0
RELEASE_PATIENCE_S: Final = 10.0
"""How long the cluster may take to forget a coordinator that was killed; the job has ended whether it does or not."""


def submit(
    plan: Plan,
    config: JobConfig,
    checkpoints: CheckpointConfig | None,
    *,
    submission: str,
    start: Start = "latest",
    allow_other_flow: bool = False,
    plan_for: PlanFor | None = None,
) -> Job:
    """Start the plan on Ray; the job goes on when this process ends. ``plan_for`` is what `Job.rescale` needs.

    Raises `ClusterError` if the cluster is too small, `PlanError` if a user function cannot be sent there, and what
    `open_stores` raises.
    """
    connect()
    check_cluster(plan)
    # The processes of the job have other working directories.
    if checkpoints is not None:
        checkpoints = replace(checkpoints, url=ObjectStore(checkpoints.url).url)
    if isinstance(start, str) and start not in ("latest", "fresh"):
        start = ObjectStore(start).url
    package = JobPackage(plan, config, checkpoints, submission, secrets.token_hex(32), start)
    packed = pack(package)
    open_stores(plan, config, checkpoints, start=start, look=True, allow_other_flow=allow_other_flow)
    replan = slices_of(pack_replan(plan_for, len(packed)))
    name = f"{plan.name}:{submission}"
    actor = CoordinatorActor.options(name=name, namespace=NAMESPACE, lifetime="detached").remote(
        len(replan), *replan, *slices_of(packed)
    )
    job = Job(name, actor, package)
    job._ask("coordinator")
    return job


def attach(name: str, *, start: bool = True) -> Job:
    """Come back to a job that runs on the cluster: by the name of its flow, or by ``Job.name``. ``start`` as in
    `connect`.

    Raises `ClusterError` if there is none, or several of that name.
    """
    connect(start=start)
    names = running_jobs()
    found = [n for n in names if name in (n, n.rpartition(":")[0])]
    if len(found) != 1:
        what = f"{len(found)} jobs of that name run" if found else "no such job runs"
        raise ClusterError(f"cannot attach to job {name!r}: {what}; running jobs: {', '.join(names) or 'none'}")
    actor = ray.get_actor(found[0], namespace=NAMESPACE)
    job = Job(found[0], actor, None)
    job._package = job._ask("package")
    return job


def running_jobs() -> list[str]:
    """Names of all jobs on the cluster, those included that ended lately and whose outcome nobody has read."""
    entries = ray.util.list_named_actors(all_namespaces=True)
    return sorted(str(e["name"]) for e in entries if e["namespace"] == NAMESPACE)


class Job:
    """A job on the cluster. Every method may be called at any time, also when the job has ended."""

    def __init__(self, name: str, actor: Any, package: JobPackage | None) -> None:
        self.name = name
        """``<flow name>:<run id>``; see `attach`."""
        self._actor = actor
        self._package = package
        self._ended: Ended | None = None

    def __repr__(self) -> str:
        return f"<Job {self.name}>"

    # ----------------------------------------------------------------------------------------------------- what is seen

    def status(self) -> JobStatus:
        ended = self._poll()
        return ended.status if ended is not None else self._read("status", "status")

    def subtasks(self) -> list[SubtaskInfo]:
        """Every subtask with its process, in plan order."""
        ended = self._poll()
        return list(ended.subtasks) if ended is not None else self._read("subtasks", "subtasks")

    def coordinator(self) -> CoordinatorInfo:
        """The process that leads the job. Raises `ClusterError` when the job has ended."""
        if self._poll() is not None:
            raise ClusterError(f"job {self.name} has ended and has no coordinator any more")
        found = self._ask("coordinator")
        assert isinstance(found, CoordinatorInfo)
        return found

    def timeline(self) -> tuple[TimelineEntry, ...]:
        """The story of the job since its present coordinator began; `TimelineEntry.at` in seconds of that process."""
        ended = self._poll()
        return ended.timeline if ended is not None else self._read("timeline", "timeline")

    def metrics(self) -> dict[str, float]:
        """Sums over all subtasks, of this attempt and at most a second old."""
        ended = self._poll()
        return dict(ended.metrics) if ended is not None else self._read("metrics", "metrics")

    def checkpoints(self) -> list[CheckpointInfo]:
        """The retained checkpoints, read from storage; none with ``state="memory"``."""
        return self._stores().open_stores()[0].list()

    # ----------------------------------------------------------------------------------------------------- what is done

    def wait(self, timeout: float | None = None) -> JobResult:
        """The result, when the job has ended.

        Raises `TimeoutError` when it goes on after ``timeout`` seconds, `JobFailedError` with its cause, and
        `JobCancelledError`.
        """
        ended = self._wait(timeout)
        if ended is None:
            raise TimeoutError(f"job {self.name} has not ended within {timeout:g} s; it goes on")
        if ended.state is JobState.FAILED:
            raise failure_of(ended, self._stores().plan.name)
        if ended.state is JobState.CANCELLED:
            raise JobCancelledError(f"job {self.name} was cancelled")
        package = self._stores()
        _, snapshots, _ = package.open_stores()
        return JobResult(
            name=package.plan.name,
            status=ended.state.value,
            checkpoint=ended.manifest.checkpoint if ended.manifest else None,
            restarts=ended.restarts,
            tables=collected(package.plan, ended.manifest, snapshots),
            timeline=ended.timeline,
            metrics=ended.metrics,
        )

    def checkpoint(self, timeout: float = 60.0) -> int:
        """Take a checkpoint now, and return the id of the first one that completes after this call.

        Raises `TimeoutError` if none does, and `JobFailedError` if the job ends without.
        """
        before = self.status().last_checkpoint or 0
        self._ask("request_checkpoint", CheckpointKind.PERIODIC)
        for _ in patiently(timeout):
            status = self.status()
            if (status.last_checkpoint or 0) > before:
                return int(status.last_checkpoint or 0)
            if self._ended is not None:
                raise ended_before(self._ended, self._stores().plan.name, "a checkpoint completed")
        raise TimeoutError(
            f"job {self.name} completed no checkpoint within {timeout:g} s; it is {_told(self.status())}; see "
            "Job.timeline()"
        )

    def savepoint(
        self,
        path: str | None = None,
        *,
        timeout: float = 600.0,
        storage_options: Mapping[str, Any] | None = None,
        on_progress: Progress | None = None,
    ) -> str:
        """Take a savepoint of the running job, and return its URL: a folder of its own that can be moved, and that
        rayflow never deletes.

        ``path`` is an empty or new folder or URL; by default one below ``savepoints/`` in the job's checkpoint
        directory (with ``state="memory"`` there is none, and ``path`` is needed). ``storage_options`` are those of the
        checkpoints unless given. ``on_progress(done, total)`` is told the bytes copied.

        What sinks had prepared at that moment is committed by this job, and again, which changes nothing, by the job
        that starts from the savepoint; output written after that moment is not taken back. Raises `TimeoutError`,
        `JobFailedError` if the job ends before, `StorageError` if the checkpoint or the copy fails; the job goes on.
        """
        copier = self._copier(path, storage_options)
        before = self.status().last_checkpoint or 0
        aborted = set(self._aborted_savepoints())
        life = self._life()
        self._ask("request_checkpoint", CheckpointKind.SAVEPOINT)
        seen, turns = before, 0
        for _ in patiently(timeout):
            status = self.status()
            last = status.last_checkpoint or 0
            forgotten = status.state == "running" and self._life() != life
            manifest = self._savepoint_after(before) if last > seen or forgotten else None
            if manifest is not None:
                return self._copied(manifest, copier, on_progress)
            if self._ended is not None:
                raise ended_before(self._ended, self._stores().plan.name, "a savepoint was complete")
            if forgotten:
                raise StorageError(
                    f"no savepoint of job {self.name}: its coordinator died meanwhile; the job goes on, ask again"
                )
            seen, turns = last, turns + 1
            if turns % 10 == 0 and (failed := [e for e in self._aborted_savepoints() if e not in aborted]):
                raise StorageError(
                    f"no savepoint of job {self.name}: checkpoint {failed[0]}; the job goes on, ask again"
                )
        raise TimeoutError(
            f"job {self.name} completed no savepoint within {timeout:g} s; it is {_told(self.status())}; see "
            "Job.timeline()"
        )

    def stop(
        self,
        timeout: float | None = None,
        *,
        savepoint: bool | str = False,
        storage_options: Mapping[str, Any] | None = None,
        on_progress: Progress | None = None,
    ) -> JobResult:
        """Stop reading, take a last checkpoint, commit, end. The job can go on from there when it is run again.

        With ``savepoint`` (True, or where to write it: see `savepoint`) that checkpoint is copied then, and
        `JobResult.savepoint` is its URL.
        """
        copier = self._copier(savepoint if isinstance(savepoint, str) else None, storage_options) if savepoint else None
        self._ask("request_checkpoint", CheckpointKind.STOP)
        try:
            result = self.wait(timeout)
        except TimeoutError:
            raise TimeoutError(
                f"job {self.name} was told to stop and has not ended within {timeout:g} s; it will: call wait(), or "
                f"stop() again{' for the savepoint' if copier is not None else ''}"
            ) from None
        if copier is None:
            return result
        assert self._ended is not None
        if self._ended.manifest is None:
            raise JobFailedError(f"job {self.name} ended without a checkpoint, so there is no savepoint")
        return replace(result, savepoint=self._copied(all_committed(self._ended.manifest), copier, on_progress))

    def rescale(self, parallelism: int, *, savepoint: str | None = None, timeout: float | None = None) -> Job:
        """Stop with a savepoint and start the same flow from it at another parallelism; the new job.

        Steps whose parallelism the flow sets itself keep it. Everything that can be checked is checked before the job
        is stopped. ``savepoint`` says where to write it; it stays, and is what to start from if starting fails. Raises
        `ConfigError` for a parallelism the job cannot have, `ClusterError` if the cluster is too small, or, naming the
        savepoint, if the stopped job could not be started again.
        """
        package = self._stores()
        data = self._ask("replan")
        if not data:
            raise ClusterError(
                f"job {self.name} does not carry its flow (it is too large or cannot be sent), so it cannot be planned "
                "anew here; call Job.stop(savepoint=True), and run the flow with start= that savepoint"
            )
        plan_for: PlanFor = unpack_replan(data)
        plan = plan_for(parallelism)
        check_cluster(plan)
        where = self.stop(timeout, savepoint=savepoint or True).savepoint
        assert where is not None
        try:
            return submit(
                plan,
                package.config,
                package.checkpoints,
                submission=secrets.token_hex(6),
                start=where,
                plan_for=plan_for,
            )
        except Exception as error:
            raise ClusterError(
                f"job {self.name} is stopped, and could not be started at parallelism {parallelism}: {error}; nothing "
                f"is lost: run the flow with start={where!r}"
            ) from error

    def cancel(self) -> None:
        """End the job at once. What is committed stays; what is not is dropped. Returns when no process is left."""
        if self._poll() is None:
            self._ask("cancel")
        if self._wait(CANCEL_TIMEOUT_S) is None:
            self._release()
            raise TimeoutError(f"job {self.name} did not cancel within {CANCEL_TIMEOUT_S:g} s and was killed")

    # --------------------------------------------------------------------------------------------------------- the rest

    def _copier(self, path: str | None, storage_options: Mapping[str, Any] | None) -> SavepointCopier:
        """Raises before anything happens when there is no place for a savepoint."""
        package = self._stores()
        checkpoints = package.checkpoints
        options = dict(checkpoints.storage_options) if checkpoints is not None else {}
        own = job_root(checkpoints.url, package.plan.name) if checkpoints is not None and package.durable else None
        if path is None and own is None:
            raise ConfigError(
                f'job {self.name} keeps its checkpoints in memory (state="memory"), so a savepoint needs a place: pass '
                "its folder or URL"
            )
        return SavepointCopier(own, options, path, options if storage_options is None else storage_options)

    def _copied(self, manifest: Manifest, copier: SavepointCopier, on_progress: Progress | None) -> str:
        try:
            return copier.copy(manifest, on_progress)
        finally:
            # Of no use to anybody else if the copy has failed; a pin that stays costs room and no more.
            with contextlib.suppress(StorageError, ClusterError):
                if self._stores().durable:
                    copier.release(manifest)
                elif self._ended is None:
                    self._ask("release", manifest.checkpoint)

    def _savepoint_after(self, checkpoint: int) -> Manifest | None:
        package = self._stores()
        if package.durable:
            return savepoint_after(package.open_stores()[0], checkpoint)
        found: Manifest | None = self._ask("savepoint_after", checkpoint) if self._poll() is None else None
        return found

    def _life(self) -> str | None:
        """Which coordinator leads the job; None when it has ended."""
        return None if self._poll() is not None else self._ask("coordinator").life

    def _aborted_savepoints(self) -> list[str]:
        kind = f"({CheckpointKind.SAVEPOINT.value})"
        return [e.detail for e in self.timeline() if e.what == CHECKPOINT_ABORTED and kind in e.detail]

    def _stores(self) -> JobPackage:
        assert self._package is not None
        return self._package

    def _wait(self, timeout: float | None) -> Ended | None:
        for _ in patiently(timeout):
            if (ended := self._poll()) is not None:
                return ended
        return None

    def _poll(self) -> Ended | None:
        if self._ended is None:
            ended = self._ask("outcome")
            if ended is not None:
                self._ended = ended
                self._release()
        return self._ended

    def _release(self) -> None:
        """End the coordinator, and return when the cluster has forgotten it: `ray.kill` only asks for that."""
        with contextlib.suppress(Exception):  # gone already
            ray.kill(self._actor)
            for _ in patiently(RELEASE_PATIENCE_S):
                if self.name not in running_jobs():
                    return

    def _read(self, method: str, field: str) -> Any:
        """What the coordinator says; what it said last when the job has just ended."""
        try:
            return self._ask(method)
        except ClusterError:
            if self._ended is None:
                raise
            return getattr(self._ended, field)

    def _ask(self, method: str, *args: Any) -> Any:
        """Call the coordinator; while Ray is starting it again, wait for it."""
        last: Exception = TimeoutError()
        for _ in patiently(COORDINATOR_PATIENCE_S):
            try:
                return ray.get(getattr(self._actor, method).remote(*args))
            except ray.exceptions.RayActorError as error:
                last = error
                if uncaught(error):
                    raise ClusterError(f"the coordinator of job {self.name} cannot start: {reason_of(error)}") from None
                if not self._exists():
                    break
        raise ClusterError(
            f"the coordinator of job {self.name} is gone: {reason_of(last)}; an outcome that nobody has read is kept "
            f"for {LINGER_S:g} s and given once. Run the flow again: it goes on from its newest checkpoint"
        ) from last

    def _exists(self) -> bool:
        try:
            ray.get_actor(self.name, namespace=NAMESPACE)
        except ValueError:
            return False
        return True


def _told(status: JobStatus) -> str:
    return f"{status.state} ({status.detail})" if status.detail else status.state
