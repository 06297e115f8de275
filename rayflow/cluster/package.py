"""A job as it is sent to the cluster: one value that holds all its processes need, pickled by value.

The coordinator must be able to start again after its own death, when the driver may be gone. Ray keeps the arguments of
an actor for that, but an argument above 100 KB lies in the object store of the driver and goes with it; so the bytes
travel in slices that Ray keeps itself (tried: 150 of them). Only above `KEPT_BYTES_MAX` they do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import cloudpickle

from rayflow.config import CheckpointConfig, JobConfig, duration_us
from rayflow.errors import ClusterError, PlanError
from rayflow.plan import Plan
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.stores import Start, open_stores, staging_of
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.snapshots import SnapshotStore

SLICE_BYTES: Final = 64 * 1024
KEPT_BYTES_MAX: Final = 8 * 1024 * 1024
"""Ray inlines at most 10 MB of arguments in all; a larger job cannot be restarted once its driver has left."""

HEARTBEAT_S_MAX: Final = 1.0

PlanFor = Callable[[int], Plan]
"""The plan of the same flow at this parallelism."""


@dataclass(frozen=True, slots=True)
class JobPackage:
    """The job, and the secret that opens its exchange ports. Never written to storage."""

    plan: Plan
    config: JobConfig
    checkpoints: CheckpointConfig | None
    submission: str
    """Tells the starts of a job apart; part of the name by which the cluster knows it."""
    token: str
    start: Start = "latest"
    """Where a job with ``state="memory"`` begins; that of others stands in their directory before they start."""

    @property
    def durable(self) -> bool:
        """Whether a new coordinator can go on where the last one was."""
        return self.checkpoints is not None and self.config.state != "memory"

    def spec(self) -> JobSpec:
        exactly_once = self.checkpoints is None or self.checkpoints.mode == "exactly_once"
        # Several signs of life within the time after which a silent subtask counts as hung, or healthy ones are killed.
        hang_timeout_s = duration_us(self.config.hang_timeout) / 1e6
        heartbeat_s = min(HEARTBEAT_S_MAX, hang_timeout_s / 4)
        staging = staging_of(self.plan, self.config, self.checkpoints)
        return JobSpec(
            self.plan, self.config, exactly_once, self.submission, heartbeat_s, threads=True, staging=staging
        )

    def open_stores(self, *, begin: bool = False) -> tuple[CheckpointStore, SnapshotStore, bool]:
        """With ``begin``, for the coordinator: what the job starts from is in the checkpoint store."""
        start = self.start if begin and not self.durable else "latest"
        return open_stores(self.plan, self.config, self.checkpoints, start=start, allow_other_flow=True)


def pack(package: JobPackage) -> bytes:
    """Raises `PlanError` naming the step whose function cannot be sent to another process."""
    try:
        return bytes(cloudpickle.dumps(package))
    except Exception as error:
        step = _culprit(package.plan)
        raise PlanError(
            f"{step} cannot be sent to the processes of the cluster: {type(error).__name__}: {error}; open files, "
            "connections, locks and models inside the function (or in the class given to map_batches), not outside"
        ) from error


def pack_replan(plan_for: PlanFor | None, beside: int) -> bytes:
    """The way to plan the job anew at another parallelism; empty when it cannot be sent, or not be kept beside the
    package of ``beside`` bytes. The plan alone is not enough: what is fused depends on the parallelism."""
    if plan_for is None:
        return b""
    try:
        data = bytes(cloudpickle.dumps(plan_for))
    except Exception:
        return b""  # nothing of the job needs it; `Job.rescale` says what to do instead
    return data if len(data) + beside <= KEPT_BYTES_MAX else b""


def unpack_replan(data: bytes) -> PlanFor:
    """Raises `ClusterError` when the user's modules are not to be found here."""
    try:
        plan_for: PlanFor = cloudpickle.loads(data)
    except Exception as error:
        raise ClusterError(
            f"the flow cannot be loaded here: {type(error).__name__}: {error}; call this where its modules are"
        ) from error
    return plan_for


def unpack(slices: tuple[bytes, ...]) -> JobPackage:
    """Raises `ClusterError` when the user's modules are not to be found where this runs."""
    try:
        package = cloudpickle.loads(b"".join(slices))
    except Exception as error:
        raise ClusterError(
            f"the job cannot be loaded in a process of the cluster: {type(error).__name__}: {error}; modules that the "
            "flow uses must be installed on every node, or be sent along by "
            'ray.init(runtime_env={"working_dir": "."}) before the flow is run'
        ) from error
    assert isinstance(package, JobPackage)
    return package


def slices_of(data: bytes) -> list[bytes]:
    if len(data) > KEPT_BYTES_MAX:
        return [data]
    return [data[at : at + SLICE_BYTES] for at in range(0, len(data), SLICE_BYTES)]


def _culprit(plan: Plan) -> str:
    for chain in plan.chains:
        parts = [(chain.source.title, chain.source)] if chain.source is not None else []
        for title, part in [*parts, *((o.title, o.factory) for o in chain.operators)]:
            try:
                cloudpickle.dumps(part)
            except Exception:
                return f"step {title!r} of job {plan.name!r}"
    return f"job {plan.name!r}"
