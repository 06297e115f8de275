"""Builders of windows on a keyed stream, for `KeyedStream.window`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from rayflow.config import Duration, duration_us
from rayflow.errors import PlanError
from rayflow.graph import Node, caller_location
from rayflow.keyed import KeyedStream
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.ordering.ranked import Keep
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing.calendar import CalendarDays
from rayflow.operators.windowing.count import CountAggregate, CountWindow
from rayflow.operators.windowing.global_operator import GlobalAggregate, GlobalTimeAggregate
from rayflow.operators.windowing.global_window import GlobalWindow
from rayflow.operators.windowing.progress import Emit, check_emit
from rayflow.operators.windowing.session import Session
from rayflow.operators.windowing.session_operator import SessionAggregate
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windowing.triggers import Clock, Every
from rayflow.operators.windows import LocalCombine, WindowAggregate
from rayflow.ordered import window_deduplicate, window_top
from rayflow.stream import Stream

AnyWindow: TypeAlias = Tumbling | CalendarDays | Sliding | Session | CountWindow | GlobalWindow


def window(
    keyed: KeyedStream,
    spec: AnyWindow,
    *,
    allowed_lateness: Duration = "0s",
    emit: Emit = "final",
    early: Duration | Every | None = None,
) -> WindowedStream:
    """Raises `PlanError` for a stream without event time, for what is no window and for options that mean nothing."""
    if not isinstance(spec, AnyWindow):
        raise PlanError(
            f"step 'window' ({caller_location()}): window() needs windows such as rf.tumbling(\"1m\") or "
            f'rf.sliding("10m", every="1m") or rf.session(gap="5m"), got {spec!r}'
        )
    if keyed._event_time is None and _result_time(spec) is not None:
        raise PlanError(
            f"step 'window' ({caller_location()}): the stream has no event time; pass event_time= to the source or "
            "call .with_event_time(column) before key_by"
        )
    trigger = (
        early if isinstance(early, Every) or early is None else Every(duration_us(early, what="early", minimum_us=1))
    )
    early_us, clock = (None, "event") if trigger is None else (trigger.period_us, trigger.clock)
    options = Options(duration_us(allowed_lateness, what="allowed_lateness"), emit, early_us, clock)
    try:
        if trigger is not None and trigger.rows is not None:
            raise PlanError(f'early= is a period such as "10s" or rf.every("10s", clock="processing"), got {trigger}')
        check_emit(emit, early_us)
        if isinstance(spec, CountWindow | GlobalWindow) and options != Options():
            raise PlanError(
                f"window {spec} says itself when there are results: leave allowed_lateness, emit and early out"
            )
        if isinstance(spec, Session) and early is not None:
            raise PlanError(
                f"{spec} has no early results: it is not known where an open session will begin; leave early out"
            )
    except PlanError as error:
        raise PlanError(f"step 'window' ({caller_location()}): {error}") from error
    return WindowedStream(keyed, spec, options)


def _result_time(spec: AnyWindow) -> str | None:
    """The event time of the results of windows of event time; None for others."""
    if isinstance(spec, GlobalWindow):
        return "window_end" if spec.trigger.period_us is not None and spec.trigger.clock == "event" else None
    return None if isinstance(spec, CountWindow) else "window_start"


@dataclass(frozen=True, slots=True)
class Options:
    """When windows give results; see `KeyedStream.window`."""

    allowed_lateness_us: int = 0
    emit: Emit = "final"
    early_us: int | None = None
    early_clock: Clock = "event"

    def __str__(self) -> str:
        said = [] if not self.allowed_lateness_us else [f"late by {timedelta(microseconds=self.allowed_lateness_us)}"]
        said += ["updates"] if self.emit == "update" else []
        said += [f"early {Every(self.early_us, clock=self.early_clock)}"] if self.early_us else []
        return "".join(f", {each}" for each in said)


class WindowedStream:
    """What `KeyedStream.window` gives; call `agg`, `deduplicate` or `top`."""

    def __init__(self, keyed: KeyedStream, spec: AnyWindow, options: Options) -> None:
        self._keyed = keyed
        self._spec = spec
        self._options = options

    def agg(self, *, name: str | None = None, **aggregates: Aggregate) -> WindowResult:
        """One row a key and window: the keys, ``window_start``, ``window_end`` and the named aggregates.

        The event time of the result is ``window_start``. That of `rf.count_window` has none: its windows are complete
        in the order of their last rows, and ``window_start`` and ``window_end`` are the earliest and latest event time
        of their rows, if these have one. That of `rf.global_window` by event time is ``window_end``, the end of the
        period; by rows or the clock it has neither column nor event time.
        """
        keyed = self._keyed
        for out, aggregate in aggregates.items():
            if not isinstance(aggregate, Aggregate):
                raise PlanError(
                    f"step 'window' ({caller_location()}): {out}= must be an aggregate such as rf.count(), "
                    f"got {aggregate!r}"
                )
        if not aggregates:
            raise PlanError(f"step 'window' ({caller_location()}): agg needs at least one aggregate, got none")
        what: dict[str, Any] = {
            "keys": keyed._keys,
            "spec": self._spec,
            "aggregates": dict(aggregates),
            "event_time": keyed._event_time,
        }
        factories: dict[str, Any]
        try:
            if isinstance(self._spec, Session):
                lateness, emit = self._options.allowed_lateness_us, self._options.emit
                factories = {"operator": SessionAggregate(**what, allowed_lateness_us=lateness, emit=emit)}
            elif isinstance(self._spec, GlobalWindow):
                if _result_time(self._spec) is None:
                    factories = {"operator": GlobalAggregate(**what)}
                else:
                    what["period_us"] = what.pop("spec").trigger.period_us
                    factories = {"operator": GlobalTimeAggregate(**what)}
            elif isinstance(self._spec, CountWindow):
                factories = {"operator": CountAggregate(**what)}
            else:
                options = asdict(self._options)
                factories = {
                    "operator": WindowAggregate(**what, **options),
                    "combiner": LocalCombine(**what),
                    "combined": WindowAggregate(**what, **options, input_is_partial=True),
                }
        except PlanError as error:
            raise PlanError(f"step {name or 'window'!r} ({caller_location()}): {error}") from error
        node = Node(
            "window",
            (keyed._input(),),
            detail=f"{self._spec}{self._options} by {', '.join(keyed._keys)}: {', '.join(aggregates)}",
            name=name,
            location=caller_location(),
            **factories,
        )
        node.schema(look=False)
        return WindowResult(node, event_time=_result_time(self._spec))

    def deduplicate(self, *, keep: Keep = "first", name: str | None = None) -> WindowResult:
        """The first or last row of each key and window by event time, when the window closes.

        Keys, ``window_start``, ``window_end`` and the other columns. Of rows of the same time the one that is smaller,
        compared column by column. For `rf.tumbling` and `rf.sliding`.
        """
        self._refuse_options("deduplicate", name)
        return WindowResult(window_deduplicate(self._keyed, self._spec, keep=keep, name=name))

    def top(self, n: int, *, by: str, descending: bool = True, name: str | None = None) -> WindowResult:
        """The best ``n`` rows of each key and window, when the window closes, with their ``rank`` (1 is the best).

        Keys, ``window_start``, ``window_end``, the other columns, ``rank``. Of equal values the earlier event time
        ranks first, then the row that is smaller, compared column by column; NaN is the largest number; rows with null
        in ``by`` are not ranked. For `rf.tumbling` and `rf.sliding`.
        """
        self._refuse_options("top", name)
        return WindowResult(window_top(self._keyed, self._spec, n, by=by, descending=descending, name=name))

    def _refuse_options(self, label: str, name: str | None) -> None:
        if self._options != Options():
            raise PlanError(
                f"step {name or label!r} ({caller_location()}): {label} gives rows when the window closes; leave "
                "allowed_lateness, emit and early out of window()"
            )


class WindowResult(Stream):
    """Results of windows; ``late`` are the rows that came after all their windows were gone."""

    def __init__(self, node: Node, *, event_time: str | None = "window_start") -> None:
        super().__init__(node, event_time=event_time)

    @property
    def late(self) -> Stream:
        """Rows too late for their windows, with the columns of the input."""
        return Stream(self._node, tag="late")


__all__ = ["WindowResult", "WindowedStream", "window"]
