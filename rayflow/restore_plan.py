"""`restore_plan`: what a savepoint would give to a flow, before anything starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rayflow.config import JobConfig
from rayflow.flow import Flow, allowing
from rayflow.runtime.restoring import RestoreLine, RestorePlan, Verdict
from rayflow.runtime.stores import look_at


def restore_plan(
    flow: Flow,
    url: str,
    *,
    parallelism: int = 1,
    config: JobConfig | None = None,
    storage_options: Mapping[str, Any] | None = None,
    allow_dropped: Collection[str] = (),
    allow_other_flow: bool = False,
) -> RestorePlan:
    """What ``flow.run(start=url, …)`` would restore: a dry run, which changes nothing.

    ``url`` is a savepoint, or the folder of a checkpoint. ``print`` it for people; `RestorePlan.refused` says whether
    the run would be refused, `RestorePlan.problems` why. Raises `ConfigError` when there is no savepoint at ``url``,
    and `CorruptCheckpointError` when it is not whole.
    """
    plan = allowing(flow.plan(parallelism=parallelism, config=config), allow_dropped)
    return look_at(url, plan, storage_options or {}, allow_other_flow=allow_other_flow)[1]


__all__ = ["RestoreLine", "RestorePlan", "Verdict", "restore_plan"]
