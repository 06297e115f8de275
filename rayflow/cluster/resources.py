"""How many CPUs a plan takes: one for each unit of parallelism, shared by the subtasks that work on the same rows.

As with Flink's slots: a row passes through one subtask of every chain, so these share a CPU, and a job of parallelism p
takes p of them however many chains it has.
"""

from __future__ import annotations

import math

from rayflow.errors import ClusterError
from rayflow.plan import Plan

_UNIT = 10_000
"""Ray counts in ten-thousandths."""


def cpus_per_subtask(plan: Plan) -> dict[str, float]:
    """Chain id -> CPUs of each of its subtasks."""
    share = (_UNIT // len(plan.chains)) / _UNIT
    return {chain.id: share for chain in plan.chains}


def cpus_needed(plan: Plan) -> int:
    """Whole CPUs that the subtasks of the plan take together."""
    share = cpus_per_subtask(plan)
    return math.ceil(sum(share[c.id] * c.parallelism for c in plan.chains) - 1e-9)


def check_fits(plan: Plan, available: float) -> None:
    """Raises `ClusterError` with the numbers when a cluster of ``available`` CPUs could never run the plan."""
    needed = cpus_needed(plan)
    if needed > available:
        widest = max(c.parallelism for c in plan.chains)
        raise ClusterError(
            f"job {plan.name!r} needs {needed} CPUs for parallelism {widest}, the cluster has {available:g}; "
            "lower parallelism or add nodes"
        )
