"""Builders of the steps that order rows: the best of windows, and sorting by event time."""

from __future__ import annotations

from rayflow.errors import PlanError
from rayflow.graph import Node, caller_location
from rayflow.keyed import KeyedStream
from rayflow.operators.ordering.ranked import Keep, Ranking, WindowRank
from rayflow.operators.ordering.sort import LATE, SortByTime
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing.calendar import CalendarDays
from rayflow.operators.windowing.sliding import Sliding
from rayflow.stream import Stream


class SortedStream(Stream):
    """What `Stream.sort_by_event_time` gives."""

    @property
    def late(self) -> Stream:
        """Rows that came behind the watermark, with the columns of the input."""
        return Stream(self._node, tag=LATE)


def sort_by_event_time(stream: Stream, ties: tuple[str, ...], *, name: str | None) -> SortedStream:
    where = f"step {name or 'sort_by_event_time'!r} ({caller_location()})"
    for column in ties:
        if not isinstance(column, str):
            raise PlanError(f"{where}: columns that decide between equal times are given by name, got {column!r}")
    if stream._event_time is None:
        raise PlanError(
            f"{where}: the stream has no event time; pass event_time= to the source or call .with_event_time(column)"
        )
    keys = stream._keys if isinstance(stream, KeyedStream) else ()
    operator = SortByTime(event_time=stream._event_time, ties=ties, keys=keys)
    detail = ", ".join((stream._event_time, *ties)) + (f" by {', '.join(keys)}" if keys else "")
    node = Node(
        "sort_by_event_time", (stream._input(),), operator, detail=detail, name=name, location=caller_location()
    )
    node.schema(look=False)
    return SortedStream(node, event_time=stream._event_time)


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
    if not isinstance(spec, Tumbling | CalendarDays | Sliding):
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
