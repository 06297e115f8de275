"""The ``ctx`` of a `KeyedProcess`: `BatchContext` for whole batches, `KeyContext` for one key.

Times are int microseconds since the epoch everywhere: in numpy int64 arrays, or as Python ints.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import PlanError, UserCodeError
from rayflow.operators.base import MAIN, OperatorContext
from rayflow.operators.event_time import TIME_BOUND_US, event_times_us
from rayflow.operators.grouping import Int64Array
from rayflow.operators.process_output import Emitted
from rayflow.operators.state.access import Scope
from rayflow.operators.state.fitting import StateProblem, fitted_mask
from rayflow.operators.state.timers import TimerKind, Timers

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Clock:
    """What both kinds of context know."""

    def __init__(
        self,
        operator: OperatorContext,
        emitted: Emitted,
        watermark: int,
        timer_kind: TimerKind | None,
        times: Callable[[], Int64Array],
    ) -> None:
        self._operator = operator
        self._emitted = emitted
        self._times = times
        self._read: Int64Array | None = None
        self._watermark = watermark
        self._timer_kind = timer_kind

    @property
    def watermark(self) -> int:
        """No row with event time below it follows. In a timer method: the one that made the timers fire."""
        return self._watermark

    @property
    def ended(self) -> bool:
        """The input is over: this is the last firing of event timers, and whoever sets more for ever never ends."""
        return self._watermark == MAX_WATERMARK

    @property
    def wall_time(self) -> int:
        """Processing time."""
        return round(self._operator.wall_time() * 1e6)

    @property
    def timer_kind(self) -> TimerKind | None:
        """``"event"`` or ``"processing"`` in a timer method, else None."""
        return self._timer_kind

    @property
    def subtask(self) -> int:
        """Number of this subtask, from 0."""
        return self._operator.subtask


class BatchContext(_Clock):
    """``ctx`` of ``process_batch`` and ``on_timers``; valid during the call."""

    def __init__(
        self,
        operator: OperatorContext,
        emitted: Emitted,
        watermark: int,
        timer_kind: TimerKind | None,
        times: Callable[[], Int64Array],
        scope: Scope,
        timers: Timers,
    ) -> None:
        super().__init__(operator, emitted, watermark, timer_kind, times)
        self.scope = scope
        self._timers = timers

    @property
    def keys(self) -> pa.RecordBatch:
        """The distinct keys of the batch (or of the timers), in the order in which they first appear; decoded, where
        the key columns are dictionaries."""
        return self.scope.keys

    @property
    def index(self) -> Int64Array:
        """Row of the batch (or timer) -> position of its key in `keys`."""
        return self.scope.index

    @property
    def timestamps(self) -> Int64Array:
        """Event time per row; of the timers in ``on_timers``. Raises `UserCodeError` where there is none."""
        if self._read is None:
            self._read = self._times()
        return self._read

    def emit(self, batch: Any, *, tag: str = MAIN) -> None:
        """Rows for the next step, or for the side output ``tag``: a RecordBatch, a Table or a dict of columns."""
        self._emitted.columns(batch, tag)

    def set_event_timer(self, times: Any, mask: Any = None) -> None:
        """Timers at these event times: an array as long as `keys` (a time per key) or as the batch (a time per row, for
        the row's key). Arrow timestamps, dates and int64, numpy int64 and datetime64, or one time for all. Equal
        timers of a key are one. Raises `UserCodeError` for a null that ``mask`` does not leave out."""
        self._timers.add(*self._timer_rows(times, mask), "event")

    def set_processing_timer(self, times: Any, mask: Any = None) -> None:
        """As `set_event_timer`, by the wall clock. Those that are pending at the end of the input never fire."""
        self._timers.add(*self._timer_rows(times, mask), "processing")

    def delete_event_timer(self, times: Any, mask: Any = None) -> None:
        """Timers that are not there are left out; shapes as in `set_event_timer`."""
        self._timers.delete(*self._timer_rows(times, mask), "event")

    def delete_processing_timer(self, times: Any, mask: Any = None) -> None:
        """As `delete_event_timer`."""
        self._timers.delete(*self._timer_rows(times, mask), "processing")

    def _timer_rows(self, times: Any, mask: Any) -> tuple[pa.RecordBatch, Int64Array]:
        scope = self.scope
        if not scope.live:
            raise self._bad("were set with the ctx of an earlier call; use the ctx of the running one")
        column = self._time_column(times)
        n = len(column)
        if n == scope.keys.num_rows:
            rows = np.arange(n, dtype=np.int64)
        elif n == len(scope.index):
            rows = scope.index
        else:
            raise self._bad(
                f"got {n} times, expected {scope.keys.num_rows} (one per key) or {len(scope.index)} (one per row)"
            )
        try:
            chosen = fitted_mask(mask, n, "time")
        except StateProblem as error:
            raise self._bad(str(error)) from error
        if chosen is not None:
            column, rows = column.filter(chosen), rows[chosen.to_numpy(zero_copy_only=False)]
        if column.null_count:
            raise self._bad(f"got {column.null_count} null times, expected none; leave them out by mask=")
        values = column.to_numpy()
        if len(values) and (int(values.min()) < -TIME_BOUND_US or int(values.max()) > TIME_BOUND_US):
            raise self._bad(
                f"got times from {values.min()} to {values.max()}, expected microseconds since the epoch within "
                f"{TIME_BOUND_US} on either side"
            )
        return scope.keys.take(pa.array(rows)), values

    def _time_column(self, times: Any) -> pa.Array:
        try:
            if isinstance(times, int | datetime | date | np.integer):
                return pa.repeat(pa.scalar(time_us(times), pa.int64()), self.scope.keys.num_rows)
            if isinstance(times, list) and times and isinstance(times[0], datetime | date):
                times = [None if t is None else time_us(t) for t in times]
            column = times if isinstance(times, pa.Array | pa.ChunkedArray) else pa.array(times)
            if isinstance(column, pa.ChunkedArray):
                column = column.combine_chunks()
            if pa.types.is_null(column.type):
                return column.cast(pa.int64())
            return column if pa.types.is_int64(column.type) else event_times_us(column)
        except (pa.ArrowException, PlanError, TypeError, ValueError) as error:
            raise self._bad(
                f"need timestamps, dates or int64 microseconds since the epoch, got {_kind_of(times)}: {error}"
            ) from error

    def _bad(self, text: str) -> UserCodeError:
        return UserCodeError(f"{self._operator}: the timers {text}")


class KeyContext(_Clock):
    """``ctx`` of ``process`` and ``on_timer``; valid during the call."""

    def __init__(
        self,
        operator: OperatorContext,
        emitted: Emitted,
        watermark: int,
        timer_kind: TimerKind | None,
        times: Callable[[], Int64Array],
    ) -> None:
        super().__init__(operator, emitted, watermark, timer_kind, times)
        self.at = -1
        """Position of the key among those of the batch."""
        self.rows: Int64Array | None = None
        """Which rows of the batch are those of the key."""
        self.wanted: dict[tuple[TimerKind, int, int], bool] = {}
        """(kind, position of the key, time) -> to be set or to be deleted; the last word counts."""
        self.on_timer_change: Callable[[TimerKind, int, bool], None] | None = None
        """Hears of every change while timers fire."""

    @property
    def timestamps(self) -> Int64Array:
        """Event time of each row of the key. Raises `UserCodeError` where there is none."""
        if self.rows is None:
            raise UserCodeError(f"{self._operator}: ctx.timestamps is of rows, and on_timer has none; use its time")
        if self._read is None:
            self._read = self._times()
        return self._read[self.rows]

    def emit(self, rows: Any, *, tag: str = MAIN) -> None:
        """Rows for the next step, or for the side output ``tag``: a dict, a list of dicts, a RecordBatch or Table."""
        self._emitted.rows(rows, tag)

    def timer(self, time: int | datetime) -> None:
        """Call ``on_timer`` for this key when event time reaches ``time``. Setting an equal one changes nothing."""
        self._change("event", time, True)

    def processing_timer(self, time: int | datetime) -> None:
        """As `timer`, by the wall clock. Pending at the end of the input, it never fires."""
        self._change("processing", time, True)

    def delete_timer(self, time: int | datetime) -> None:
        """Delete the event timer at ``time``; nothing happens if there is none."""
        self._change("event", time, False)

    def delete_processing_timer(self, time: int | datetime) -> None:
        """As `delete_timer`."""
        self._change("processing", time, False)

    def _change(self, kind: TimerKind, time: Any, wanted: bool) -> None:
        try:
            at = time_us(time)
        except (TypeError, ValueError) as error:
            raise UserCodeError(
                f"{self._operator}: a timer needs int microseconds since the epoch or a datetime, got {time!r}"
            ) from error
        if abs(at) > TIME_BOUND_US:
            raise UserCodeError(
                f"{self._operator}: a timer got the time {at}, expected microseconds since the epoch within "
                f"{TIME_BOUND_US} on either side"
            )
        if self.on_timer_change is not None:
            self.on_timer_change(kind, at, wanted)
        self.wanted[kind, self.at, at] = wanted


def time_us(time: Any) -> int:
    """Microseconds since the epoch; a datetime without zone counts as UTC."""
    if isinstance(time, bool) or time is None:
        raise TypeError("no time")
    if isinstance(time, datetime):
        # Whole numbers: timestamp() is a float and would lose microseconds.
        since = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)) - _EPOCH
        return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    if isinstance(time, date):
        return (time - _EPOCH.date()).days * 86_400_000_000
    if isinstance(time, int | np.integer):
        return int(time)
    raise TypeError(f"{type(time).__name__} is no time")


def _kind_of(times: Any) -> str:
    return str(times.type) if isinstance(times, pa.Array | pa.ChunkedArray) else type(times).__name__


__all__ = ["BatchContext", "KeyContext", "time_us"]
