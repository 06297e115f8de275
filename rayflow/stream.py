"""The fluent builder. A `Stream` is an immutable node of a graph; building touches neither Ray nor data.

Steps are checked while building wherever the schema is known (`from_arrow`, declared schemas), and all of them before
a job starts, when sources may look into their input. Messages name the step and the line that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from rayflow.config import Duration, duration_us
from rayflow.delta import WritesDelta
from rayflow.errors import PlanError
from rayflow.expressions import Expr, as_expr
from rayflow.files import WritesFiles
from rayflow.graph import FORWARD, MAIN_TAG, Exchange, Input, Node, caller_location
from rayflow.iceberg import WritesIceberg
from rayflow.kafka_sink import WritesKafka
from rayflow.operators.base import EventTime, SinkFactory
from rayflow.operators.event_time import TimeFunction
from rayflow.operators.sinks.collect import CollectSink
from rayflow.operators.sinks.printing import PrintSink
from rayflow.operators.stateless import (
    AssignEventTime,
    Drop,
    Filter,
    FlatMap,
    Identity,
    Map,
    MapBatches,
    Rename,
    Select,
    WithColumns,
)
from rayflow.partition import check_key_type
from rayflow.sql import WritesTables

if TYPE_CHECKING:
    from rayflow.keyed import KeyedStream
    from rayflow.ordered import SortedStream

ExprLike = Any
"""A `rayflow.Expr`, a ``pyarrow.compute.Expression``, a column name or a Python scalar."""


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """The end of a stream; give it to `Flow`."""

    node: Node


class Stream(WritesFiles, WritesTables, WritesKafka, WritesDelta, WritesIceberg):
    """Rows on their way. Every method returns a new stream and leaves this one as it was."""

    def __init__(
        self, node: Node, *, exchange: Exchange = FORWARD, tag: str = MAIN_TAG, event_time: str | None = None
    ) -> None:
        self._node = node
        self._exchange = exchange
        self._tag = tag
        self._event_time = event_time

    # ------------------------------------------------------------------------------------------------------- plumbing

    def _input(self) -> Input:
        return Input(self._node, self._exchange, self._tag)

    def _step(
        self,
        label: str,
        operator: Any,
        *,
        detail: str = "",
        name: str | None = None,
        parallelism: int | None = None,
        event_time: str | None = None,
    ) -> Stream:
        node = Node(
            label,
            (self._input(),),
            operator,
            detail=detail,
            name=name,
            parallelism=parallelism,
            location=caller_location(),
        )
        node.schema(look=False)
        return Stream(node, event_time=event_time if event_time is not None else self._event_time)

    def _sink(self, label: str, operator: Any, *, detail: str = "", name: str | None = None) -> StreamEnd:
        node = Node(label, (self._input(),), operator, detail=detail, name=name, location=caller_location())
        return StreamEnd(node)

    @property
    def schema(self) -> pa.Schema | None:
        """Schema of the rows, None when only running tells. Sources may look into their input."""
        return self._node.schema(look=True) if self._tag == MAIN_TAG else self._node.side_schema(self._tag)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._node.where()}>"

    # ------------------------------------------------------------------------------------------------ stateless steps

    def map_batches(
        self,
        fn: Callable[..., Any] | type,
        *,
        schema: pa.Schema | None = None,
        batch_size: int | None = None,
        fn_args: Sequence[Any] = (),
        fn_kwargs: Mapping[str, Any] | None = None,
        fn_constructor_args: Sequence[Any] = (),
        fn_constructor_kwargs: Mapping[str, Any] | None = None,
        parallelism: int | None = None,
        name: str | None = None,
    ) -> Stream:
        """``fn(pyarrow.RecordBatch)`` gives a RecordBatch, a Table, a dict of columns, or an iterable of those.

        A class is built once in every subtask and then called for every batch. Without ``schema`` the first output
        decides and all later ones must agree. Raises `UserCodeError` at run time, naming step, expected and got.
        """
        operator = MapBatches(
            fn,
            schema=schema,
            batch_size=batch_size,
            fn_args=tuple(fn_args),
            fn_kwargs=dict(fn_kwargs or {}),
            fn_constructor_args=tuple(fn_constructor_args),
            fn_constructor_kwargs=dict(fn_constructor_kwargs or {}),
        )
        return self._step(
            "map_batches", operator, detail=getattr(fn, "__name__", repr(fn)), name=name, parallelism=parallelism
        )

    def map_batches_async(
        self,
        fn: Callable[..., Any] | type,
        *,
        schema: pa.Schema | None = None,
        concurrency: int = 8,
        ordered: bool = True,
        timeout: Duration | None = "30s",
        retries: int = 0,
        batch_size: int | None = None,
        fn_args: Sequence[Any] = (),
        fn_kwargs: Mapping[str, Any] | None = None,
        fn_constructor_args: Sequence[Any] = (),
        fn_constructor_kwargs: Mapping[str, Any] | None = None,
        parallelism: int | None = None,
        name: str | None = None,
    ) -> Stream:
        """As `map_batches`, with an ``async def`` function or a class with ``async def __call__``: for code that waits.

        In each subtask up to ``concurrency`` batches are in flight, in an asyncio loop of its own. Their results go on
        in the order of the batches, or without ``ordered`` as they come. A call that raises or takes longer than
        ``timeout`` (None: as long as it likes) is made again up to ``retries`` times, then it is a `UserCodeError`.
        Batches in flight are part of checkpoints and called again after a failure: a call may happen twice, its rows
        come out once. Watermarks wait for the rows before them. Run locally, results always keep their order.
        """
        from rayflow.operators.async_map import MapBatchesAsync

        operator = MapBatchesAsync(
            fn,
            schema=schema,
            batch_size=batch_size,
            fn_args=tuple(fn_args),
            fn_kwargs=dict(fn_kwargs or {}),
            fn_constructor_args=tuple(fn_constructor_args),
            fn_constructor_kwargs=dict(fn_constructor_kwargs or {}),
            concurrency=concurrency,
            ordered=ordered,
            timeout_s=None
            if timeout is None
            else duration_us(timeout, what="map_batches_async(timeout)", minimum_us=1) / 1_000_000,
            retries=retries,
        )
        detail = f"{getattr(fn, '__name__', repr(fn))}, {concurrency} in flight" + ("" if ordered else ", unordered")
        return self._step("map_batches_async", operator, detail=detail, name=name, parallelism=parallelism)

    def map(
        self,
        fn: Callable[[dict[str, Any]], Mapping[str, Any]],
        *,
        schema: pa.Schema | None = None,
        name: str | None = None,
    ) -> Stream:
        """One row (a dict) in, one row out; for convenience, slower than `map_batches` by orders of magnitude."""
        return self._step("map", Map(fn, schema=schema), detail=getattr(fn, "__name__", repr(fn)), name=name)

    def flat_map(
        self,
        fn: Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]],
        *,
        schema: pa.Schema | None = None,
        name: str | None = None,
    ) -> Stream:
        """One row (a dict) in, any number of rows out."""
        return self._step("flat_map", FlatMap(fn, schema=schema), detail=getattr(fn, "__name__", repr(fn)), name=name)

    def filter(self, condition: ExprLike, *, name: str | None = None) -> Stream:
        """Rows for which the condition is true; null counts as false."""
        expr = as_expr(condition)
        return self._step("filter", Filter(expr), detail=str(expr), name=name)

    def select(self, *columns: ExprLike, name: str | None = None, **named: ExprLike) -> Stream:
        """These columns only, by name or expression, in this order; ``out=expr`` names the result."""
        exprs = [as_expr(c) for c in columns] + [as_expr(e).alias(out) for out, e in named.items()]
        return self._step("select", Select(tuple(exprs)), detail=", ".join(str(e) for e in exprs), name=name)

    def with_columns(self, *, name: str | None = None, **columns: ExprLike) -> Stream:
        """All columns, and these added or replaced."""
        return self._with({out: as_expr(e) for out, e in columns.items()}, name)

    def _with(self, exprs: Mapping[str, Expr], name: str | None) -> Stream:
        return self._step("with_columns", WithColumns(exprs), detail=", ".join(exprs), name=name)

    def rename(self, columns: Mapping[str, str], *, name: str | None = None) -> Stream:
        """``{"old": "new"}``."""
        event_time = columns.get(self._event_time, self._event_time) if self._event_time else None
        detail = ", ".join(f"{old} -> {new}" for old, new in columns.items())
        return self._step("rename", Rename(dict(columns)), detail=detail, name=name, event_time=event_time)

    def drop(self, *columns: str, name: str | None = None) -> Stream:
        """All columns but these."""
        return self._step("drop", Drop(columns), detail=", ".join(columns), name=name)

    def union(self, *others: Stream, name: str | None = None) -> Stream:
        """The rows of all streams, which must have the same schema. Event time is the minimum over them."""
        inputs = (self._input(), *(other._input() for other in others))
        node = Node("union", inputs, Identity(), name=name, location=caller_location())
        node.schema(look=False)
        times = {s._event_time for s in (self, *others)}
        return Stream(node, event_time=times.pop() if len(times) == 1 else None)

    def lookup(
        self,
        table: KeyedStream,
        *,
        on: str | Sequence[str] | None = None,
        how: Literal["inner", "left"] = "left",
        suffix: str = "_right",
        name: str | None = None,
    ) -> Stream:
        """Each row with the row of its key that ``table`` has just then; ``on`` names the columns to look up by, where
        they are not called as those that the table is keyed by.

        Every subtask keeps the whole table, so it must be small, and this stream stays where it is. The latest row of
        a key counts, by event time if the table has one. Rows do not wait: what they find depends on how far the table
        has come, so after a restart it may be something newer; `KeyedStream.join_asof` and `KeyedStream.join` are
        exact. ``left``: rows that find nothing come out too, with nulls.
        """
        from rayflow.joins import lookup

        return lookup(self, table, on=on, how=how, suffix=suffix, name=name)

    def rebalance(self, *, parallelism: int | None = None) -> Stream:
        """Deal batches out evenly over the subtasks of the next step."""
        return self._exchanged("rebalance", parallelism)

    def broadcast(self, *, parallelism: int | None = None) -> Stream:
        """Give every subtask of the next step every row."""
        return self._exchanged("broadcast", parallelism)

    def _exchanged(self, kind: Literal["rebalance", "broadcast"], parallelism: int | None) -> Stream:
        up = Input(self._node, Exchange(kind), self._tag)
        node = Node(kind, (up,), Identity(), parallelism=parallelism, location=caller_location())
        return Stream(node, event_time=self._event_time)

    # ------------------------------------------------------------------------------------------------ time and keys

    def with_event_time(
        self,
        column: ExprLike | TimeFunction,
        *,
        into: str = "event_time",
        max_delay: Duration | None = None,
        idle_timeout: Duration | None = None,
        max_ahead: Duration | None = None,
        on_ahead: Literal["fail", "skip"] = "fail",
        max_drift: Duration | None = None,
        name: str | None = None,
    ) -> Stream:
        """Use ``column`` as event time: a timestamp of any unit and zone, or a date; or an expression that makes one,
        which adds its column (``rf.col("ms").cast("timestamp[ms]").alias("time")``). Without a zone it is UTC. Or a
        function from a record batch to the times of its rows, an Arrow array of timestamps, dates or int64 microseconds
        since the epoch; they are added as the column ``into``, a timestamp in microseconds.

        ``max_delay`` bounds how late a row may come behind the latest one before it in reading order. None: rows may
        come in any order, so windows fire at the end of the input.
        ``idle_timeout``: a source without rows for so long does not hold event time back. When it has rows again, those
        older than the watermark are late: results then depend on when rows come, so none by default.
        ``max_ahead``: rows whose time is further ahead of the clock fail the job, or with ``on_ahead="skip"`` are
        dropped and counted. None, the default: the same input gives the same result, whenever it is read.
        ``max_drift``: of the sources that say this, those that are further ahead of the slowest wait for it.

        Right behind a source this is done by the source, for each of its splits where they are read side by side.
        """
        stream: Stream = self
        derive: TimeFunction | None = column if callable(column) else None
        if derive is not None:
            column = into
        elif not isinstance(column, str):
            expr = as_expr(column)
            column, stream = expr.output_name(), self._with({expr.output_name(): expr}, None)
        event_time = event_time_of(
            column, max_delay, idle_timeout=idle_timeout, max_ahead=max_ahead, on_ahead=on_ahead, max_drift=max_drift
        )
        assert event_time is not None
        event_time = replace(event_time, derive=derive)
        source = stream._node if stream._node.source is not None else None
        return stream._step(
            "with_event_time",
            AssignEventTime(event_time),
            detail=column,
            name=name,
            parallelism=None if source is None else source.parallelism,  # to be done by the source, see plan.py
            event_time=column,
        )

    def key_by(self, *keys: ExprLike) -> KeyedStream:
        """Rows of equal keys meet in one subtask. Keys are column names or named expressions."""
        if not keys:
            raise PlanError('key_by needs at least one column, got none; write key_by("column")')
        stream, names = self, []
        for key in keys:
            if isinstance(key, str):
                names.append(key)
            else:
                expr = as_expr(key)
                names.append(expr.output_name())
                stream = stream._with({expr.output_name(): expr}, None)
        schema = stream._node.schema(look=False) if stream._tag == MAIN_TAG else None
        if schema is not None:
            for name in names:
                if name not in schema.names:
                    raise PlanError(
                        f"step 'key_by' ({caller_location()}): column {name!r} is not in the schema; "
                        f"available: {', '.join(schema.names)}"
                    )
                check_key_type(name, schema.field(name).type)
        from rayflow.keyed import KeyedStream

        return KeyedStream(stream, tuple(names))

    def sort_by_event_time(self, *ties: str, name: str | None = None) -> SortedStream:
        """Rows in the order of their event time: of each key behind ``key_by``, else of each subtask.

        They wait until the watermark has passed them. Of rows with the same time the columns ``ties`` decide, the first
        counts most, then all other columns from left to right: not the order in which rows came. Rows behind the
        watermark do not pass: see `late` of the result.
        """
        from rayflow.ordered import sort_by_event_time

        return sort_by_event_time(self, ties, name=name)

    # ---------------------------------------------------------------------------------------------------------- sinks

    def collect(self, *, name: str | None = None) -> StreamEnd:
        """Rows come back in `JobResult.table`; exactly-once, because they are part of the job's state."""
        return self._sink("collect", CollectSink(), name=name)

    def write(self, sink: SinkFactory, *, name: str | None = None) -> StreamEnd:
        """A sink of your own: derive it from `rf.Sink` (docs/custom-sinks.md); its operator, from `rf.SinkOperator`.

        What `snapshot` returns as `rf.FrozenTable` comes back in `restore`: with ``spread="list"`` its rows are dealt
        out over the subtasks when the parallelism has changed, with ``"union"`` every subtask gets the rows of all.
        ``sink`` is immutable and picklable; ``sink.committer()`` is None or makes prepared output visible (S1).
        """
        missing = [part for part in ("build", "committer", "stateful") if not hasattr(sink, part)]
        if missing:
            raise PlanError(
                f"step 'write' ({caller_location()}): a sink needs build(), committer() and stateful, "
                f"{type(sink).__name__} has no {missing[0]}"
            )
        made = self._sink("write", sink, detail=type(sink).__name__, name=name)
        made.node.schema(look=False)
        return made

    def print(self, *, limit: int | None = None, name: str | None = None) -> StreamEnd:
        """Print rows as they come (at least once)."""
        return self._sink("print", PrintSink(limit), name=name)

    # --------------------------------------------------------------------------------------------------------- samples

    def take(self, n: int = 10) -> pa.Table:
        """The first ``n`` rows that come out, from a run in this process."""
        from rayflow.sample import take

        return take(self, n)

    def to_arrow(self) -> pa.Table:
        """All rows of a bounded stream, from a run in this process."""
        from rayflow.sample import take

        return take(self, None)

    def show(self, n: int = 10) -> None:
        """Print the first ``n`` rows as a table."""
        from rayflow.sample import show

        show(self, n)


def event_time_of(
    column: str | None,
    max_delay: Duration | None,
    *,
    idle_timeout: Duration | None = None,
    max_ahead: Duration | None = None,
    on_ahead: Literal["fail", "skip"] = "fail",
    max_drift: Duration | None = None,
) -> EventTime | None:
    """Raises `PlanError` for options that mean nothing together, `ConfigError` for what is no duration."""
    if column is None:
        if max_delay is not None:
            raise PlanError(f"max_delay={max_delay!r} needs event_time= to name the column it speaks of")
        return None
    for option, value in (("idle_timeout", idle_timeout), ("max_drift", max_drift)):
        if value is not None and max_delay is None:
            raise PlanError(
                f"{option}={value!r} needs max_delay: without one event time advances at the end of the input only; "
                'say how late rows may be, max_delay="0s" if they are in order'
            )
    if on_ahead not in ("fail", "skip"):
        raise PlanError(f'on_ahead must be "fail" or "skip", got {on_ahead!r}')
    if on_ahead == "skip" and max_ahead is None:
        raise PlanError('on_ahead="skip" needs max_ahead, which says what is too far in the future')

    def us(what: str, value: Duration | None, minimum_us: int) -> int | None:
        return None if value is None else duration_us(value, what=what, minimum_us=minimum_us)

    return EventTime(
        column,
        us("max_delay", max_delay, 0),
        idle_timeout_us=us("idle_timeout", idle_timeout, 1_000),
        max_ahead_us=us("max_ahead", max_ahead, 0),
        on_ahead=on_ahead,
        max_drift_us=us("max_drift", max_drift, 1_000),
    )
