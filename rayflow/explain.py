"""The plan for people: as text and as a Mermaid flowchart."""

from __future__ import annotations

from rayflow.config import CheckpointConfig
from rayflow.guarantees import guarantee_lines, sink_guarantee
from rayflow.operators.base import EventTime
from rayflow.operators.stateless import AssignEventTime
from rayflow.plan import Chain, Plan


def explain(plan: Plan, checkpoints: CheckpointConfig | None = None) -> str:
    """One paragraph a chain: operators, parallelism, where its rows come from, what state it keeps. In the end what is
    guaranteed on each path from a source to a sink, with these checkpoints (None: exactly-once ones)."""
    subtasks = sum(c.parallelism for c in plan.chains)
    lines = [f"flow {plan.name!r}: {len(plan.chains)} chains, {subtasks} subtasks, {plan.max_parallelism} key groups"]
    for chain in plan.chains:
        lines.append("")
        lines.append(f"chain {chain.id} x{chain.parallelism}")
        for edge in plan.edges_to(chain.id):
            tag = "" if edge.tag == "main" else f" ({edge.tag})"
            lines.append(f"  <- {edge.source}{tag} by {edge.exchange}")
        lines += _steps(chain)
    lines += ["", *guarantee_lines(plan, checkpoints)]
    return "\n".join(lines)


def _steps(chain: Chain) -> list[str]:
    lines: list[str] = []
    if chain.source is not None:
        source = chain.source
        lines.append(f"  {source.title} {source.detail}".rstrip())
        if source.event_time is not None:
            lines.append(f"    {event_time_text(source.event_time)}")
            if source.source.in_turns:
                lines.append("    watermark: the lowest of the splits, which are read in turns")
    for operator in chain.operators:
        lines.append(f"  {operator.title} {operator.detail}".rstrip())
        if isinstance(operator.factory, AssignEventTime):
            lines.append(f"    {event_time_text(operator.factory.event_time)}")
        keys = getattr(operator.factory, "keys", ())
        if operator.stateful:
            lines.append("    state" + (f", keyed by {', '.join(keys)}" if keys else ", of the operator"))
        if operator.is_sink:
            lines.append(f"    sink, {sink_guarantee(operator)}")
    return lines


def event_time_text(event_time: EventTime) -> str:
    """``event time 'at', max delay 5 s, idle after 30 s, at most 60 s ahead of the clock (fail)``, and so on."""
    delay, idle = event_time.max_delay_us, event_time.idle_timeout_us
    ahead, drift = event_time.max_ahead_us, event_time.max_drift_us
    parts = [f"event time {event_time.column!r}"]
    parts.append("any order: event time advances at the end" if delay is None else f"max delay {_seconds(delay)}")
    if idle is not None:
        parts.append(f"idle after {_seconds(idle)}")
    if ahead is not None:
        parts.append(f"at most {_seconds(ahead)} ahead of the clock (else {event_time.on_ahead})")
    if drift is not None:
        parts.append(f"waits when {_seconds(drift)} ahead of the slowest source")
    return ", ".join(parts)


def _seconds(us: int) -> str:
    return f"{us / 1e6:g} s"


def to_mermaid(plan: Plan) -> str:
    """A flowchart: one node a chain, one arrow an edge."""
    number = {chain.id: f"c{i}" for i, chain in enumerate(plan.chains)}
    lines = ["flowchart LR"]
    for chain in plan.chains:
        label = f"{chain.title} x{chain.parallelism}".replace('"', "#quot;")
        lines.append(f'  {number[chain.id]}["{label}"]')
    for edge in plan.edges:
        label = str(edge.exchange).replace('"', "#quot;")
        lines.append(f'  {number[edge.source]} -->|"{label}"| {number[edge.target]}')
    return "\n".join(lines)
