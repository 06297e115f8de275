"""Projection push-down: a source that can leave columns out reads only those that its chain needs.

Walks the chain of a source backwards, from what leaves it to what has to come in. A step that is not known here (a user
function) needs every column, so nothing is left out before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rayflow.expressions import Expr, as_expr
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.stateless import AssignEventTime, Drop, Filter, Identity, Rename, Select, WithColumns
from rayflow.operators.windows import LocalCombine
from rayflow.plan import Chain, Plan

Needed = frozenset[str] | None
"""Column names; None: all of them."""


def push_projections(plan: Plan) -> Plan:
    """The same plan with sources that read only what is used."""
    return replace(plan, chains=tuple(_pushed(chain) for chain in plan.chains))


def _pushed(chain: Chain) -> Chain:
    planned = chain.source
    if planned is None or not hasattr(planned.source, "project"):
        return chain
    if planned.event_time is not None and planned.event_time.derive is not None:
        return chain  # nobody knows what the function looks at
    needed: Needed = None
    for operator in reversed(chain.operators):
        needed = needed_before(operator.factory, needed)
    schema = planned.source.schema()
    if needed is None or schema is None:
        return chain
    if planned.event_time is not None:
        needed |= {planned.event_time.column}
    columns = [name for name in schema.names if name in needed]
    if not columns or len(columns) == len(schema.names):
        return chain
    detail = f"{planned.detail} [{', '.join(columns)}]"
    return replace(chain, source=replace(planned, source=planned.source.project(columns), detail=detail))


def needed_before(factory: Any, after: Needed) -> Needed:
    """Columns that have to come into a step so that those in ``after`` can leave it."""
    match factory:
        case LocalCombine():
            read = _columns(part for a in factory.aggregates.values() if isinstance(a, Aggregate) for part in a.reads)
            return None if read is None else read | {*factory.keys, factory.event_time}
        case Select():
            return _columns(factory.expressions)
        case Filter():
            return _union(after, _columns([factory.condition]))
        case WithColumns():
            kept = None if after is None else after - set(factory.columns)
            return _union(kept, _columns(factory.columns.values()))
        case Rename():
            back = {new: old for old, new in factory.columns.items()}
            return None if after is None else frozenset(back.get(name, name) for name in after) | set(factory.columns)
        case Drop():
            return _union(after, frozenset(factory.columns))
        case AssignEventTime() if factory.event_time.derive is not None:
            return None
        case AssignEventTime():
            return _union(after, frozenset([factory.event_time.column]))
        case Identity():
            return after
        case _:
            return None


def _union(one: Needed, other: Needed) -> Needed:
    return None if one is None or other is None else one | other


def _columns(expressions: Iterable[Expr | str | Any]) -> Needed:
    found: frozenset[str] = frozenset()
    for expression in expressions:
        columns = as_expr(expression).columns()
        if columns is None:
            return None
        found |= columns
    return found
