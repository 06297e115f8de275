"""``KeyedStream.join``, ``KeyedStream.join_asof`` and ``Stream.lookup``: from two streams to a step of the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

from rayflow.config import Duration, duration_us
from rayflow.errors import PlanError
from rayflow.graph import Exchange, Input, Node, caller_location
from rayflow.keyed import KeyedStream
from rayflow.operators.base import EventTime
from rayflow.operators.joins.asof import AsofJoin
from rayflow.operators.joins.columns import How
from rayflow.operators.joins.interval import JOIN_TIME, IntervalJoin
from rayflow.operators.joins.lookup import Lookup
from rayflow.operators.joins.operator import LATE_LEFT, LATE_RIGHT, Join
from rayflow.operators.joins.window import WINDOW, WindowJoin
from rayflow.operators.windowing.session import Session
from rayflow.stream import Stream
from rayflow.windowed import AnyWindow

if TYPE_CHECKING:
    import pyarrow as pa

Within: TypeAlias = Duration | tuple[Duration, Duration]
"""How far the event time of a right row may be from that of a left one: ("-5m", "10m"), or "5m" either way."""


class JoinResult(Stream):
    """What `KeyedStream.join` and `KeyedStream.join_asof` give."""

    @property
    def late_left(self) -> Stream:
        """Rows of the left side that came behind the watermark, with their own columns."""
        return Stream(self._node, tag=LATE_LEFT)

    @property
    def late_right(self) -> Stream:
        """Rows of the right side that came behind the watermark, with their own columns."""
        return Stream(self._node, tag=LATE_RIGHT)


def join(
    left: KeyedStream,
    right: Any,
    *,
    within: Within | None,
    window: AnyWindow | None,
    retention: Duration | None,
    how: How,
    suffix: str,
    name: str | None,
) -> JoinResult:
    where = f"step {name or 'join'!r} ({caller_location()})"
    given = {"within": within, "window": window, "retention": retention}
    named = [f"{option}=" for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise PlanError(f"{where}: give one of within=, window= and retention=, got {' and '.join(named)}")
    if window is not None:
        if not isinstance(window, AnyWindow) or isinstance(window, Session):
            raise PlanError(
                f'{where}: window= must be windows such as rf.tumbling("1m") or rf.sliding("10m", every="1m"), got '
                f"{window!r}; sessions of two streams have no windows in common"
            )
        what: dict[str, Any] = {"window": window}
        return _step(where, "join", left, right, WindowJoin, what, how, suffix, name, str(window), lambda _: WINDOW[0])
    bounds: tuple[int, int] | None = None
    if within is not None:
        bounds = _bounds(where, within)
    elif retention is not None:
        kept = duration_us(retention, what="join(retention)")
        bounds = (-kept, kept)
    else:
        for stream, side in ((left, "left"), (right, "right")):
            if isinstance(stream, Stream) and not _ends(stream._node):
                raise PlanError(
                    f"{where}: the {side} side never ends, so a join of all rows with all would keep everything for "
                    'ever; give within=("-5m", "5m"), retention="1h" or window=rf.tumbling("1m")'
                )
    what = {} if bounds is None else {"lower_us": bounds[0], "upper_us": bounds[1]}
    detail = "all rows" if bounds is None else f"within {_text(bounds[0])} to {_text(bounds[1])}"

    def event_time(keyed: KeyedStream) -> str | None:
        if bounds is None:
            return None
        return keyed._event_time if how in ("semi", "anti") else JOIN_TIME

    return _step(where, "join", left, right, IntervalJoin, what, how, suffix, name, detail, event_time)


def join_asof(
    left: KeyedStream, right: Any, *, tolerance: Duration | None, how: Any, suffix: str, name: str | None
) -> JoinResult:
    where = f"step {name or 'join_asof'!r} ({caller_location()})"
    tolerance_us = None if tolerance is None else duration_us(tolerance, what="join_asof(tolerance)")
    detail = "the version of the time" + ("" if tolerance is None else f", at most {tolerance} old")
    what = {"tolerance_us": tolerance_us}
    return _step(
        where, "join_asof", left, right, AsofJoin, what, how, suffix, name, detail, lambda keyed: keyed._event_time
    )


def lookup(
    left: Stream, table: Any, *, on: str | Sequence[str] | None, how: Any, suffix: str, name: str | None
) -> Stream:
    where = f"step {name or 'lookup'!r} ({caller_location()})"
    if not isinstance(table, KeyedStream):
        raise PlanError(
            f"{where}: the table must be keyed by what it is looked up by, got {type(table).__name__}; write "
            'left.lookup(table.key_by("id"), on="id")'
        )
    keys = table._keys if on is None else (on,) if isinstance(on, str) else tuple(on)
    schema = _schema(left)
    try:
        for key in keys:
            if schema is not None and key not in schema.names:
                raise PlanError(f"on= names the column {key!r}, which is not among {', '.join(schema.names)}")
        operator = Lookup(
            left_keys=keys,
            right_keys=table._keys,
            how=how,
            suffix=suffix,
            right_time=table._event_time,
            left_schema=schema,
            right_schema=_schema(table),
        )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    node = Node(
        "lookup",
        (left._input(), Input(table._node, Exchange("broadcast"), table._tag)),
        operator,
        detail=f"{how} by {', '.join(keys)}",
        name=name,
        location=caller_location(),
    )
    node.schema(look=False)
    return Stream(node, event_time=left._event_time)


def _step(
    where: str,
    label: str,
    left: KeyedStream,
    right: Any,
    factory: Callable[..., Join],
    what: dict[str, Any],
    how: How,
    suffix: str,
    name: str | None,
    detail: str,
    event_time: Callable[[KeyedStream], str | None],
) -> JoinResult:
    if not isinstance(right, KeyedStream):
        raise PlanError(
            f"{where}: the right side must be keyed by what the left side is compared with, got "
            f"{type(right).__name__}; write right.key_by({', '.join(map(repr, left._keys))})"
        )
    timed = bool(what)
    if timed:
        for stream, side in ((left, "left"), (right, "right")):
            if not _advances(stream._node):
                raise PlanError(
                    f"{where}: the {side} side never ends and its event time has no max_delay, so its watermark never "
                    "rises and nothing could be forgotten; pass max_delay= where the event time is named"
                )
    try:
        operator = factory(
            left_keys=left._keys,
            right_keys=right._keys,
            how=how,
            suffix=suffix,
            left_time=left._event_time if timed else None,
            right_time=right._event_time if timed else None,
            left_schema=_schema(left),
            right_schema=_schema(right),
            **what,
        )
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error
    node = Node(
        label,
        (left._input(), right._input()),
        operator,
        detail=f"{how} by {', '.join(left._keys)}: {detail}",
        name=name,
        location=caller_location(),
    )
    node.schema(look=False)
    return JoinResult(node, event_time=event_time(left))


def _schema(stream: Stream) -> pa.Schema | None:
    return stream._input().node.side_schema(stream._tag) if stream._tag != "main" else stream._node.schema(look=False)


def _bounds(where: str, within: Any) -> tuple[int, int]:
    if isinstance(within, tuple | list):
        if len(within) != 2:
            raise PlanError(f'{where}: within= takes two bounds such as ("-5m", "10m"), got {within!r}')
        return _signed_us(within[0]), _signed_us(within[1])
    apart = duration_us(within, what="join(within)")
    return -apart, apart


def _signed_us(value: Any) -> int:
    """A duration that may be below zero."""
    if isinstance(value, str) and value.strip().startswith("-"):
        return -duration_us(value.strip()[1:].strip(), what="join(within)")
    if isinstance(value, str) and value.strip().startswith("+"):
        return duration_us(value.strip()[1:].strip(), what="join(within)")
    return duration_us(value, what="join(within)", minimum_us=-(2**62))


def _text(us: int) -> str:
    return f"-{timedelta(microseconds=-us)}" if us < 0 else str(timedelta(microseconds=us))


def _ends(node: Node) -> bool:
    """Whether all sources above are bounded."""
    if node.source is not None:
        return bool(node.source.bounded)
    return all(_ends(each.node) for each in node.inputs)


def _advances(node: Node) -> bool:
    """Whether event time rises before the end, or there is an end."""
    time = node.event_time if node.source is not None else getattr(node.operator, "event_time", None)
    if isinstance(time, EventTime) and time.max_delay_us is not None:
        return True
    if node.source is not None:
        return bool(node.source.bounded)
    if isinstance(time, EventTime):
        return _ends(node)
    return all(_advances(each.node) for each in node.inputs)


__all__ = ["JoinResult", "Within", "join", "join_asof", "lookup"]
