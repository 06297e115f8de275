"""What people see of a running job, read from the coordinator's machine. Plain values that travel to the driver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rayflow.core.coordinator import CoordinatorMachine
from rayflow.core.events import JobState
from rayflow.core.ids import MIN_WATERMARK
from rayflow.core.manifest import Manifest
from rayflow.core.messages import FailureCause
from rayflow.core.timeline import TimelineEntry
from rayflow.plan import Plan
from rayflow.runtime.results import JobStatus, SubtaskInfo

START_TAKES_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class CoordinatorInfo:
    """The process that leads a job. ``life`` changes when it has died and begun again."""

    pid: int
    node: str
    life: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended, with all that the driver needs to give its result."""

    state: JobState
    cause: FailureCause | None
    manifest: Manifest | None
    restarts: int
    timeline: tuple[TimelineEntry, ...]
    metrics: dict[str, float]
    status: JobStatus
    subtasks: tuple[SubtaskInfo, ...]


def status_of(machine: CoordinatorMachine, plan: Plan) -> JobStatus:
    members = machine.subtasks.values()
    sources = plan.sources()
    upstream = {edge.source for edge in plan.edges}
    last = [m.metrics.get("watermark") for m in members if m.subtask.chain not in upstream]
    watermarks = [int(w) for w in last if w is not None and w > MIN_WATERMARK]
    return JobStatus(
        state=machine.state.value,
        attempt=machine.attempt,
        restarts=machine.restarts,
        last_checkpoint=machine.last_completed,
        rows_in=int(sum(m.metrics.get("rows_in", 0.0) for m in members if m.subtask.chain in sources)),
        watermark_us=min(watermarks) if last and len(watermarks) == len(last) else None,
        detail="" if machine.cause is None else machine.cause.message,
    )


def waiting_to_start(machine: CoordinatorMachine, now: float) -> int:
    """Processes that have given no sign for longer than starting takes."""
    return sum(m.state.up and not m.heard and now - m.last_seen > START_TAKES_S for m in machine.subtasks.values())


def subtasks_of(machine: CoordinatorMachine, plan: Plan) -> list[SubtaskInfo]:
    titles = {chain.id: chain.title for chain in plan.chains}
    return [
        SubtaskInfo(
            titles[m.subtask.chain],
            m.subtask.index,
            m.pid,
            m.node,
            attempt=machine.attempt,
            state=m.state.value,
            metrics=dict(m.metrics),
        )
        for m in machine.subtasks.values()
    ]
