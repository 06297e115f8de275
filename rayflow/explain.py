"""The plan for people: as text and as a Mermaid flowchart."""

from __future__ import annotations

from rayflow.plan import Chain, Plan


def explain(plan: Plan) -> str:
    """One paragraph a chain: operators, parallelism, where its rows come from, what state it keeps."""
    subtasks = sum(c.parallelism for c in plan.chains)
    lines = [f"flow {plan.name!r}: {len(plan.chains)} chains, {subtasks} subtasks, {plan.max_parallelism} key groups"]
    for chain in plan.chains:
        lines.append("")
        lines.append(f"chain {chain.id} x{chain.parallelism}")
        for edge in plan.edges_to(chain.id):
            tag = "" if edge.tag == "main" else f" ({edge.tag})"
            lines.append(f"  <- {edge.source}{tag} by {edge.exchange}")
        lines += _steps(chain)
    return "\n".join(lines)


def _steps(chain: Chain) -> list[str]:
    lines: list[str] = []
    if chain.source is not None:
        source = chain.source
        lines.append(f"  {source.title} {source.detail}".rstrip())
        if source.event_time is not None:
            delay = source.event_time.max_delay_us
            known = "any order: event time advances at the end" if delay is None else f"max delay {delay / 1e6:g} s"
            lines.append(f"    event time {source.event_time.column!r}, {known}")
    for operator in chain.operators:
        lines.append(f"  {operator.title} {operator.detail}".rstrip())
        keys = getattr(operator.factory, "keys", ())
        if operator.stateful:
            lines.append("    state" + (f", keyed by {', '.join(keys)}" if keys else ", of the operator"))
        if operator.is_sink:
            guarantee = "exactly once" if getattr(operator.factory, "exactly_once", True) else "at least once"
            lines.append(f"    sink, {guarantee}")
    return lines


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
