"""`Flow`: the job as the user built it, and how it is run."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from rayflow.config import CheckpointConfig, JobConfig
from rayflow.core.events import JobState
from rayflow.errors import JobCancelledError, JobFailedError, PlanError
from rayflow.guarantees import check_guarantees
from rayflow.operators.event_time import check_event_time
from rayflow.plan import Plan, build_plan
from rayflow.pushdown import push_projections
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.coordinator_loop import settings_of
from rayflow.runtime.inprocess import World
from rayflow.runtime.local import LocalDriver
from rayflow.runtime.results import JobResult, collected, metrics_of
from rayflow.runtime.stores import Start, open_stores, staging_of
from rayflow.storage.snapshots import MEMORY_STATE_BYTES_MAX
from rayflow.stream import StreamEnd

if TYPE_CHECKING:
    from rayflow.cluster.job import Job

LOCAL_RESTARTS_MAX = 10
"""Of a run in this process, where the job's `Restart` sets no bound."""


class Flow:
    """A named job: sinks and everything above them. Building it touches neither Ray nor data."""

    def __init__(self, name: str, *sinks: StreamEnd) -> None:
        if not isinstance(name, str) or not name.strip():
            raise PlanError(f"a flow needs a name, got {name!r}; the checkpoint folder is called by it")
        if not sinks:
            raise PlanError(
                f"flow {name!r} has no sink; end a stream with .write_parquet(path), .collect() or .print()"
            )
        for sink in sinks:
            if not isinstance(sink, StreamEnd):
                raise PlanError(
                    f"flow {name!r} takes sinks, got {type(sink).__name__}; end the stream with .write_parquet(path), "
                    ".collect(), .print() or .write(sink), and give what that returns"
                )
        self.name = name
        self.sinks = sinks

    def plan(self, *, parallelism: int = 1, config: JobConfig | None = None, look: bool = True) -> Plan:
        """The physical plan. With ``look`` sources may look into their input, so that all columns and types are
        checked."""
        config = config or JobConfig()
        plan = build_plan(
            self.name,
            [s.node for s in self.sinks],
            parallelism=parallelism,
            max_parallelism=config.max_parallelism,
            look=look,
        )
        for source in plan.sources().values():
            schema = source.source.schema() if look else source.source.declared_schema()
            if schema is not None and source.event_time is not None and source.event_time.derive is None:
                check_event_time(schema, source.event_time.column, step=source.title)
        return push_projections(plan) if look else plan

    def explain(
        self,
        *,
        parallelism: int = 1,
        config: JobConfig | None = None,
        checkpoints: CheckpointConfig | None = None,
    ) -> str:
        """The plan as text: chains, parallelism, edges, state, keys, event time, and the guarantee of every path from a
        source to a sink with these checkpoints (None: with exactly-once ones)."""
        from rayflow.explain import explain

        return explain(self.plan(parallelism=parallelism, config=config), checkpoints)

    def to_mermaid(self, *, parallelism: int = 1, config: JobConfig | None = None) -> str:
        """The plan as a Mermaid flowchart."""
        from rayflow.explain import to_mermaid

        return to_mermaid(self.plan(parallelism=parallelism, config=config))

    def run(
        self,
        *,
        parallelism: int | None = None,
        checkpoints: CheckpointConfig | None = None,
        config: JobConfig | None = None,
        local: bool = False,
        start: Start = "latest",
        allow_dropped: Collection[str] = (),
        allow_other_flow: bool = False,
        progress: bool | None = None,
    ) -> JobResult:
        """Run to the end and return the result; on Ray, or with ``local=True`` in this process.

        ``start="latest"`` goes on from the newest checkpoint in the directory, if there is one (a finished job is then
        finished at once); ``"fresh"`` refuses a directory that has any; a number goes back to that checkpoint and
        gives up all later ones, whose output is then written again. Any other text is the folder or URL of a savepoint
        (`Job.savepoint`), or of a checkpoint of another job (``<url>/<flow>/chk-00000042``, as long as that job keeps
        it): the job begins with that state, at any parallelism and on any back end, and supersedes what is in its own
        directory; started so once more, it begins there once more (``"latest"`` goes on). `restore_plan` tells what
        would be restored. State of a step, splits of a source or output of a sink that the flow no longer has are an
        error, unless ``allow_dropped`` names the step; a savepoint of a flow of another name needs
        ``allow_other_flow``. ``progress`` shows a line on a terminal.

        Raises `PlanError` before anything starts, `StateSchemaError` for state that does not fit, and `JobFailedError`
        with the cause when the job ends with an error.
        """
        if local:
            plan = allowing(self.plan(parallelism=parallelism or 1, config=config), allow_dropped)
            check_guarantees(plan, checkpoints)
            return run_local(
                plan,
                config or JobConfig(),
                checkpoints,
                start=start,
                allow_other_flow=allow_other_flow,
            )
        job = self.submit(
            parallelism=parallelism,
            checkpoints=checkpoints,
            config=config,
            start=start,
            allow_dropped=allow_dropped,
            allow_other_flow=allow_other_flow,
        )
        from rayflow.progress import wait_with_progress

        return wait_with_progress(job, show=progress is not False)

    def submit(
        self,
        *,
        parallelism: int | None = None,
        checkpoints: CheckpointConfig | None = None,
        config: JobConfig | None = None,
        start: Start = "latest",
        allow_dropped: Collection[str] = (),
        allow_other_flow: bool = False,
    ) -> Job:
        """Start on Ray and return at once; the job goes on when this process ends. Arguments as in `run`."""
        from rayflow.cluster.deploy import connect, default_parallelism
        from rayflow.cluster.job import submit

        config = config or JobConfig()
        connect()

        def plan_for(parallelism: int) -> Plan:
            return allowing(self.plan(parallelism=parallelism, config=config), allow_dropped)

        plan = plan_for(parallelism or default_parallelism())
        check_guarantees(plan, checkpoints)
        return submit(
            plan,
            config,
            checkpoints,
            submission=new_submission(),
            start=start,
            allow_other_flow=allow_other_flow,
            plan_for=plan_for,
        )

    def __repr__(self) -> str:
        return f"<Flow {self.name!r} with {len(self.sinks)} sinks>"


def allowing(plan: Plan, allow_dropped: Collection[str]) -> Plan:
    """The plan that may leave behind what a checkpoint holds of these steps.

    Raises `PlanError` for one that it has.
    """
    if isinstance(allow_dropped, str):
        raise PlanError(f"allow_dropped takes the names of steps, as in ({allow_dropped!r},), got one text")
    present = sorted(set(allow_dropped) & {*plan.operators(), *plan.sources()})
    if present:
        raise PlanError(
            f"allow_dropped names step {present[0]!r}, which this flow has: its state cannot be left behind; leave the "
            "name out, or give the step another name="
        )
    return replace(plan, allow_dropped=frozenset(allow_dropped))


def _bounded(config: JobConfig) -> JobConfig:
    """Time is virtual here: a delay waits for nothing, so a restart that has not helped ten times never will."""
    if config.restart.max_attempts is not None:
        return config
    return replace(config, restart=replace(config.restart, max_attempts=LOCAL_RESTARTS_MAX))


def attach(name: str) -> Job:
    """Come back to a job that runs on the cluster, by the name of its flow or by `Job.name`.

    Raises `ClusterError` if there is none, or several of that name.
    """
    from rayflow.cluster.job import attach

    return attach(name)


def new_submission() -> str:
    return uuid.uuid4().hex[:12]


def run_local(
    plan: Plan,
    config: JobConfig,
    checkpoints: CheckpointConfig | None,
    *,
    start: Start = "latest",
    allow_other_flow: bool = False,
    on_round: Callable[[World], None] | None = None,
) -> JobResult:
    """Run the plan in this process, without Ray, in a fixed order and with virtual time."""
    store, snapshots, in_memory = open_stores(
        plan, config, checkpoints, start=start, look=True, allow_other_flow=allow_other_flow
    )
    exactly_once = checkpoints is None or checkpoints.mode == "exactly_once"
    spec = JobSpec(
        plan,
        config,
        exactly_once,
        new_submission(),
        heartbeat_s=None,
        staging=staging_of(plan, config, checkpoints),
    )
    world = World(
        plan,
        spec,
        settings_of(_bounded(config), checkpoints),
        checkpoints=store,
        snapshots=snapshots,
        retain=checkpoints.retain if checkpoints else 1,
        memory_bound=MEMORY_STATE_BYTES_MAX if in_memory else None,
        wall_time=time.time,
    )
    LocalDriver(world, on_round=on_round).run()
    outcome, machine = world.coordinator.outcome, world.coordinator.machine
    if outcome.state is JobState.FAILED:
        cause = outcome.cause
        message = f"job {plan.name!r} failed: {cause.message if cause else 'unknown cause'}"
        raise JobFailedError(message) from world.last_error
    if outcome.state is JobState.CANCELLED:
        raise JobCancelledError(f"job {plan.name!r} was cancelled")
    assert outcome.state is not None
    return JobResult(
        name=plan.name,
        status=outcome.state.value,
        checkpoint=outcome.manifest.checkpoint if outcome.manifest else None,
        restarts=machine.restarts,
        tables=collected(plan, outcome.manifest, snapshots),
        timeline=machine.timeline,
        metrics=metrics_of(world.coordinator, plan),
    )
