"""What a job tells its user while it runs and when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from rayflow.core.manifest import Manifest
from rayflow.core.timeline import TimelineEntry
from rayflow.errors import PlanError
from rayflow.operators.sinks.collect import CollectSink
from rayflow.plan import Plan
from rayflow.runtime.coordinator_loop import CoordinatorRuntime
from rayflow.runtime.ports import SnapshotStore


@dataclass(frozen=True, slots=True)
class SubtaskInfo:
    """One subtask as `Job.subtasks` lists it."""

    step: str
    index: int
    pid: int
    node: str
    attempt: int
    state: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What it counts in this attempt, at most a second old: ``rows_in``, ``rows_out``, ``restored_bytes`` …"""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A running job at one moment."""

    state: str
    attempt: int
    restarts: int
    last_checkpoint: int | None
    rows_in: int
    """Rows read by the sources so far, counted anew after a restart."""
    watermark_us: int | None
    """The lowest event time of the last steps; None before there is any."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended, and what `collect` sinks hold."""

    name: str
    status: str
    """``finished``, ``stopped`` or ``cancelled``; a failed job raises `JobFailedError` instead."""
    checkpoint: int | None
    """Id of the newest complete checkpoint."""
    restarts: int
    tables: Mapping[str, pa.Table] = field(default_factory=dict, repr=False)
    """Rows of each `collect` sink by step id."""
    timeline: tuple[TimelineEntry, ...] = field(default=(), repr=False)
    metrics: Mapping[str, float] = field(default_factory=dict)
    savepoint: str | None = None
    """URL of the savepoint that it was stopped with."""

    def table(self, name: str | None = None) -> pa.Table:
        """Rows of the `collect` sink ``name``, or of the only one."""
        if name is not None and name in self.tables:
            return self.tables[name]
        if name is None and len(self.tables) == 1:
            return next(iter(self.tables.values()))
        raise PlanError(
            f"job {self.name!r} has collect sinks {sorted(self.tables)}, asked for {name!r}; "
            "name one of them, or end a stream with .collect()"
        )


def collected(plan: Plan, manifest: Manifest | None, snapshots: SnapshotStore) -> dict[str, pa.Table]:
    """Rows of every `collect` sink, read from the state in the newest complete checkpoint (rule R1)."""
    tables: dict[str, pa.Table] = {}
    for operator, planned in plan.sinks().items():
        if not isinstance(planned.factory, CollectSink):
            continue
        states = () if manifest is None else [h for s in manifest.subtasks for h in s.states if h.operator == operator]
        pieces = [snapshots.read(handle, None).table for handle in sorted(states, key=lambda h: h.subtask)]
        filled = [p for p in pieces if p.num_rows] or pieces[:1]
        empty = pa.table({}) if planned.schema is None else planned.schema.empty_table()
        tables[operator] = pa.concat_tables(filled) if filled else empty
    return tables


def metrics_of(coordinator: CoordinatorRuntime, plan: Plan) -> dict[str, float]:
    """What the subtasks last counted, summed (``peak_…``: the largest), and what checkpoints cost.

    ``rows_in`` counts the rows that sources read, not those of every step.
    """
    totals: dict[str, float] = dict(coordinator.checkpoint_figures)
    sources = plan.sources()
    for member in coordinator.machine.subtasks.values():
        for name, value in member.metrics.items():
            if name == "watermark" or (name == "rows_in" and member.subtask.chain not in sources):
                continue
            before = totals.get(name, 0.0)
            totals[name] = max(before, value) if name.startswith("peak_") else before + value
    return totals
