"""`KeyedStream`: rows by key, and what can be done with them. Every step itself is built in a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from rayflow import keyed_steps
from rayflow.config import Duration
from rayflow.graph import Exchange
from rayflow.operators.aggregates import Aggregate
from rayflow.stream import Stream

if TYPE_CHECKING:
    from rayflow.joins import JoinResult, Within
    from rayflow.keyed_process import ConnectedStream, ProcessResult
    from rayflow.operators.joins.columns import How
    from rayflow.operators.process import KeyedProcess
    from rayflow.operators.windowing.triggers import Every
    from rayflow.windowed import AnyWindow, WindowedStream


class KeyedStream(Stream):
    """A stream whose rows go to the subtask that owns their key. Any step may follow; windows need it."""

    def __init__(self, stream: Stream, keys: tuple[str, ...]) -> None:
        super().__init__(stream._node, exchange=Exchange("hash", keys), tag=stream._tag, event_time=stream._event_time)
        self._keys = keys

    def window(
        self,
        spec: AnyWindow,
        *,
        allowed_lateness: Duration = "0s",
        emit: Literal["final", "update"] = "final",
        early: Duration | Every | None = None,
    ) -> WindowedStream:
        """Cut each key's rows into windows of event time (`rf.tumbling`, `rf.sliding`, `rf.session`), of a number of
        rows (`rf.count_window`), or into one that never ends (`rf.global_window`).

        Rows count while the watermark is less than ``allowed_lateness`` behind the end of their window; later ones are
        in ``.late`` of the result. ``emit="final"``: each key and window gives one result, when no row can change it
        any more. ``emit="update"``: the result comes when the watermark reaches the end of the window, and again for
        every batch that changes it; the last one of a key and window counts (an upsert by key and ``window_start``).
        ``early="10s"``, with ``update``: open windows give what they have so often, in event time; how often a result
        is updated depends on how the stream is cut, what the last one says does not. ``early=rf.every("10s",
        clock="processing")``: so often by the clock of the machine, for windows that have changed since.

        Late rows may join sessions: those that were told and are no more are told again with a true ``retracted``, a
        column that `rf.session` with ``update`` adds. Sessions take no ``early``, count and global windows none of
        these. Raises `PlanError` when the stream has no event time, which only `rf.count_window` and `rf.global_window`
        by rows or the clock do without.
        """
        from rayflow.windowed import window

        return window(self, spec, allowed_lateness=allowed_lateness, emit=emit, early=early)

    def process(
        self, process: KeyedProcess | type[KeyedProcess], *, parallelism: int | None = None, name: str | None = None
    ) -> ProcessResult:
        """Your own code with state and timers by key: a class derived from `rf.KeyedProcess`, or an instance of it."""
        from rayflow.keyed_process import process_step

        return process_step(self, process, parallelism=parallelism, name=name)

    def connect(self, other: Stream) -> ConnectedStream:
        """With every row of ``other`` in every subtask: ``keyed.connect(rules).process(Mine)``, an
        `rf.BroadcastProcess`."""
        from rayflow.keyed_process import connect

        return connect(self, other)

    def join(
        self,
        right: KeyedStream,
        *,
        within: Within | None = None,
        window: AnyWindow | None = None,
        retention: Duration | None = None,
        how: How = "inner",
        suffix: str = "_right",
        name: str | None = None,
    ) -> JoinResult:
        """Rows of both streams with equal keys, side by side; what is joined is what ``key_by`` named on each side.

        Give one of: ``within=("-5m", "10m")``, a right row belongs to a left one if its event time lies so far from
        that of the left one (``"5m"``: up to so far before or after it), and the result has the event time
        ``join_time``, the later of both; ``retention="1h"``, rows are kept for so long, which is
        ``within=("-1h", "1h")``; ``window=rf.tumbling("1m")`` or ``rf.sliding``, all pairs of each window when it
        closes, with ``window_start`` and ``window_end``. With none of them all rows are joined with all, which needs
        two streams that end.

        ``how``: ``inner``, ``left``, ``right``, ``full``, and ``semi`` and ``anti``: left rows with and without a
        partner. Rows without a partner come out when no partner can come any more. Null keys have no partner. Columns
        of the right side whose names are taken get the ``suffix``; keys come once, under the names of the left side.
        Raises `PlanError` for keys of different number or type, missing event time, and streams that never end in a
        join that would keep everything.
        """
        from rayflow.joins import join

        return join(self, right, within=within, window=window, retention=retention, how=how, suffix=suffix, name=name)

    def join_asof(
        self,
        right: KeyedStream,
        *,
        tolerance: Duration | None = None,
        how: Literal["inner", "left"] = "left",
        suffix: str = "_right",
        name: str | None = None,
    ) -> JoinResult:
        """Each row with the version of its key that was valid at its event time: the latest row of ``right`` that is
        not after it, and not more than ``tolerance`` before it.

        Rows wait until the watermark says that no such version can come any more; the event time of the result is that
        of the row. ``left``: rows without a version come out too, with nulls. Without a ``tolerance`` the last version
        of every key is kept for ever. Else as `join`.
        """
        from rayflow.joins import join_asof

        return join_asof(self, right, tolerance=tolerance, how=how, suffix=suffix, name=name)

    def agg(
        self, *, emit: Literal["every", "batch"] = "every", name: str | None = None, **aggregates: Aggregate
    ) -> Stream:
        """Running aggregates: for every row the keys, the event time and the named aggregates of its key up to it.

        With ``emit="batch"`` only the last of the rows of a key that come in one batch: fewer rows, as often as it
        happens. ``first`` and ``last`` go by event time and, without one, by the order in which rows come.
        """
        node = keyed_steps.running_aggregate(self, aggregates, emit=emit, event_time=self._event_time, name=name)
        return Stream(node, event_time=self._event_time)

    def reduce(self, fn: Callable[[pa.RecordBatch, pa.RecordBatch], Any], *, name: str | None = None) -> Stream:
        """For every row the updated row of its key: ``fn(state, rows)`` for many keys at once.

        Both are record batches of the input's columns, row i of both of one key and every key once: what its rows have
        been reduced to, and its next row. ``fn`` returns the new state, as a batch or a mapping of column to array;
        keys may be left out, and the event time of the result is what it says. A key's first row goes out as it is.
        A key with n rows in a batch takes n calls: where few keys have most of the rows, `agg` is faster by far.
        """
        return Stream(keyed_steps.reduce(self, fn, name=name), event_time=self._event_time)

    def deduplicate(self, *, within: Duration | None = None, name: str | None = None) -> DeduplicatedStream:
        """The first row of each key; later ones never pass.

        With ``within`` a row passes again if its event time is at least so much later than that of the last row of its
        key that passed. Keys are then forgotten as event time goes on, and rows behind the watermark do not pass: see
        `DeduplicatedStream.late`.
        """
        node = keyed_steps.deduplicate(self, within=within, event_time=self._event_time, name=name)
        return DeduplicatedStream(node, event_time=self._event_time)

    def top(
        self,
        n: int,
        *,
        by: str,
        descending: bool = True,
        emit: Literal["every", "batch"] = "every",
        name: str | None = None,
    ) -> Stream:
        """Rows that are among the best ``n`` of their key when they come, with their ``rank`` (1 is the best) then.

        Of equal values the earlier row ranks first; rows with null in ``by`` are never ranked. The ranking at any
        moment is the top ``n`` of the rows that have come out: those that fall behind are not taken back.

        With ``emit="batch"`` only those that are still among the best when the batch with which they came is done, with
        their rank then: fewer rows, and the same top ``n`` of them, as often as it happens.
        """
        node = keyed_steps.top(self, n, by=by, descending=descending, emit=emit, name=name)
        return Stream(node, event_time=self._event_time)


class DeduplicatedStream(Stream):
    """What `KeyedStream.deduplicate` gives."""

    @property
    def late(self) -> Stream:
        """With ``within``: rows behind the watermark, which never pass, with the columns of the input."""
        return Stream(self._node, tag="late")
