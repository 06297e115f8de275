"""What a plan guarantees on every path from a source to a sink: the weakest of the source, the checkpoints, the sink.

A source whose positions cannot be read again loses rows in a failure, whatever stands behind it. With exactly-once
checkpoints a sink decides what becomes of rows that are written again (`rayflow.operators.base.Guarantee`); with
at-least-once checkpoints rows may be processed twice, so that no sink can give more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from rayflow.config import CheckpointConfig
from rayflow.errors import GuaranteeWarning, PlanError
from rayflow.operators.sinks.printing import PrintSink
from rayflow.plan import Plan, PlannedOperator, PlannedSource


class Given(IntEnum):
    """Ascending."""

    AT_MOST_ONCE = 0
    AT_LEAST_ONCE = 1
    IDEMPOTENT = 2
    EXACTLY_ONCE = 3

    def __str__(self) -> str:
        return _WORDS[self]


_WORDS = {
    Given.AT_MOST_ONCE: "at most once",
    Given.AT_LEAST_ONCE: "at least once",
    Given.IDEMPOTENT: "exactly once by key (rows written again replace themselves)",
    Given.EXACTLY_ONCE: "exactly once",
}
_OF_SINKS = {
    "exactly_once": Given.EXACTLY_ONCE,
    "idempotent": Given.IDEMPOTENT,
    "at_least_once": Given.AT_LEAST_ONCE,
}
_OF_MODES = {"exactly_once": Given.EXACTLY_ONCE, "at_least_once": Given.AT_LEAST_ONCE}


@dataclass(frozen=True, slots=True)
class PathGuarantee:
    """From ``source`` to ``sink``. ``because`` names what is weaker than the mode asks for, "" if nothing is."""

    source: PlannedSource
    sink: PlannedOperator
    given: Given
    because: str = ""
    remedy: str = ""

    @property
    def for_people(self) -> bool:
        """Rows are only shown: nobody relies on them."""
        return isinstance(self.sink.factory, PrintSink)


def sink_guarantee(sink: PlannedOperator) -> Given:
    """What the sink makes of exactly-once checkpoints."""
    return _OF_SINKS[getattr(sink.factory, "guarantee", "exactly_once")]


def guarantees(plan: Plan, mode: str = "exactly_once") -> list[PathGuarantee]:
    """Of every path, in the order of the plan."""
    return list(_paths(plan, mode))


def _paths(plan: Plan, mode: str) -> Iterator[PathGuarantee]:
    asked = _OF_MODES[mode]
    for chain in plan.chains:
        sources = [plan.chain(up).source for up in _upstream(plan, chain.id)]
        for sink in (o for o in chain.operators if o.is_sink):
            for source in (s for s in sources if s is not None):
                by_sink = sink_guarantee(sink)
                if not source.source.replayable:
                    because = f"source {source.title!r} cannot be read again, so rows in flight are lost in a failure"
                    remedy = "read from what keeps its rows (files, Kafka)"
                    yield PathGuarantee(source, sink, Given.AT_MOST_ONCE, because, remedy)
                elif by_sink is Given.AT_LEAST_ONCE < asked:
                    because = f"sink {sink.title!r} writes rows again after a failure"
                    remedy = "choose another guarantee= of that sink, or another sink"
                    yield PathGuarantee(source, sink, by_sink, because, remedy)
                else:
                    yield PathGuarantee(source, sink, min(by_sink, asked))


def _upstream(plan: Plan, chain: str) -> list[str]:
    """The chain and all before it, in the order of the plan."""
    found, todo = {chain}, [chain]
    while todo:
        for edge in plan.edges_to(todo.pop()):
            if edge.source not in found:
                found.add(edge.source)
                todo.append(edge.source)
    return [c.id for c in plan.chains if c.id in found]


def check_guarantees(plan: Plan, checkpoints: CheckpointConfig | None) -> None:
    """Whether the plan gives what ``CheckpointConfig(mode)`` asks for.

    A `GuaranteeWarning` for each path that does not; with ``strict`` a `PlanError` that names the step. Rows that are
    printed are not warned of. Without checkpoints nothing was asked for.
    """
    if checkpoints is None:
        return
    mode = checkpoints.mode.replace("_", "-")
    told: set[str] = set()
    for path in guarantees(plan, checkpoints.mode):
        if not path.because or (path.for_people and not checkpoints.strict):
            continue
        what = f"flow {plan.name!r} gives {path.given} and not {mode}: {path.because}; {path.remedy}"
        if checkpoints.strict:
            raise PlanError(f"{what}, or allow it with CheckpointConfig(strict=False)")
        if path.because not in told:
            told.add(path.because)
            warnings.warn(what, GuaranteeWarning, stacklevel=3)


def guarantee_lines(plan: Plan, checkpoints: CheckpointConfig | None) -> list[str]:
    """For `explain`: one line a path."""
    mode = "exactly_once" if checkpoints is None else checkpoints.mode
    aside = "" if checkpoints is not None else "; without checkpoints at most once"
    lines = [f"guarantees with {mode.replace('_', '-')} checkpoints{aside}"]
    for path in guarantees(plan, mode):
        because = f": {path.because}" if path.because else ""
        lines.append(f"  {path.source.id} -> {path.sink.id}: {path.given}{because}")
    return lines


__all__ = ["Given", "PathGuarantee", "check_guarantees", "guarantee_lines", "guarantees", "sink_guarantee"]
