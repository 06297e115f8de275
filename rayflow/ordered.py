"""Builders of the steps that order rows, for `WindowedStream.deduplicate` and `.top`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rayflow.errors import PlanError
from rayflow.graph import Node, caller_location
from rayflow.operators.ordering.ranked import Keep, Ranking, WindowRank
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing.sliding import Sliding

if TYPE_CHECKING:
    from rayflow.stream import KeyedStream


def window_deduplicate(keyed: KeyedStream, spec: object, *, keep: Keep, name: str | None) -> Node:
    where = f"step {name or 'deduplicate'!r} ({caller_location()})"
    if keep not in ("first", "last"):
        raise PlanError(f'{where}: keep must be "first" or "last", got {keep!r}')
    ranking = Ranking(n=1, time=_time(keyed), descending=keep == "last", ranked=False)
    return _window(keyed, spec, "deduplicate", ranking, f"{keep} row", where, name)


def window_top(keyed: KeyedStream, spec: object, n: int, *, by: str, descending: bool, name: str | None) -> Node:
    where = f"step {name or 'top'!r} ({caller_location()})"
    ranking = Ranking(n=n, time=_time(keyed), by=by, descending=descending)
    return _window(keyed, spec, "top", ranking, f"{n} {'highest' if descending else 'lowest'} {by}", where, name)


def _window(
    keyed: KeyedStream, spec: object, label: str, ranking: Ranking, what: str, where: str, name: str | None
) -> Node:
    if not isinstance(spec, Tumbling | Sliding):
        raise PlanError(f"{where}: {label} needs rf.tumbling or rf.sliding windows, got {spec}")
    try:
        operator = WindowRank(keys=keyed._keys, spec=spec, ranking=ranking, event_time=ranking.time)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    detail = f"{spec} by {', '.join(keyed._keys)}: {what}"
    node = Node(label, (keyed._input(),), operator, detail=detail, name=name, location=caller_location())
    node.schema(look=False)
    return node


def _time(keyed: KeyedStream) -> str:
    assert keyed._event_time is not None  # `rayflow.windowed.window` has seen to it
    return keyed._event_time
