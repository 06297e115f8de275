"""Builders of the steps on a keyed stream without windows, for `KeyedStream`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rayflow.config import Duration, duration_us
from rayflow.errors import PlanError
from rayflow.graph import Node, caller_location
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.keyed.deduplicate import Deduplicate
from rayflow.operators.keyed.reduce import Reduce, ReduceFn
from rayflow.operators.keyed.running import Emit, RunningAggregate
from rayflow.operators.keyed.top import Top

if TYPE_CHECKING:
    from rayflow.keyed import KeyedStream


def running_aggregate(
    keyed: KeyedStream, aggregates: dict[str, Aggregate], *, emit: Emit, event_time: str | None, name: str | None
) -> Node:
    detail = f"by {', '.join(keyed._keys)}: {', '.join(aggregates)}" + (", once a batch" if emit == "batch" else "")
    what: dict[str, Any] = {"aggregates": aggregates, "event_time": event_time, "emit": emit}
    return _node(keyed, "agg", RunningAggregate, what, detail, name)


def reduce(keyed: KeyedStream, fn: ReduceFn, *, name: str | None) -> Node:
    detail = f"by {', '.join(keyed._keys)}: {getattr(fn, '__name__', repr(fn))}"
    return _node(keyed, "reduce", Reduce, {"fn": fn}, detail, name)


def deduplicate(keyed: KeyedStream, *, within: Duration | None, event_time: str | None, name: str | None) -> Node:
    detail = f"by {', '.join(keyed._keys)}" + ("" if within is None else f" within {within}")
    within_us = None if within is None else duration_us(within, what="deduplicate(within)")
    return _node(keyed, "deduplicate", Deduplicate, {"within_us": within_us, "event_time": event_time}, detail, name)


def top(keyed: KeyedStream, n: int, *, by: str, descending: bool, emit: Emit, name: str | None) -> Node:
    detail = f"{n} by {', '.join(keyed._keys)}: {'highest' if descending else 'lowest'} {by}"
    detail += ", once a batch" if emit == "batch" else ""
    what: dict[str, Any] = {"n": n, "by": by, "descending": descending, "emit": emit}
    return _node(keyed, "top", Top, what, detail, name)


def _node(keyed: KeyedStream, label: str, factory: Any, what: dict[str, Any], detail: str, name: str | None) -> Node:
    location = caller_location()
    try:
        operator = factory(keys=keyed._keys, **what)
    except PlanError as error:
        raise type(error)(f"step {name or label!r} ({location}): {error}") from error
    node = Node(label, (keyed._input(),), operator, detail=detail, name=name, location=location)
    node.schema(look=False)
    return node
