"""Event time: from a column to int microseconds since the epoch, and from rows to a watermark.

W1  an emitted watermark never decreases (here: `WatermarkTracker.watermark`).

A watermark w promises that **no row with event time < w follows**. A row at exactly w may still come, and a window
[start, end) is complete as soon as end <= w. With rows at most ``max_delay_us`` behind the newest one, the watermark
is therefore ``newest - max_delay_us``, to the microsecond, with nothing more to subtract.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.core.ids import MIN_WATERMARK
from rayflow.errors import ConfigError, DataError, PlanError, RayflowError, UserCodeError
from rayflow.operators.base import EventTime

OnNullTime = Literal["fail", "skip"]
TimeFunction: TypeAlias = Callable[[pa.RecordBatch], Any]
"""User code: the event time of every row of a batch, as an Arrow array (or what becomes one) of timestamps, dates or
int64 microseconds since the epoch. The same rows must have the same times whenever they are read."""
DERIVED_TYPE: Final = pa.timestamp("us")
"""Of the column that a `TimeFunction` makes; UTC."""

# A window's end and a lag must not leave 64 bits. 2**62 us are 146,000 years on either side of 1970.
TIME_BOUND_US: Final = 2**62
_US_PER_DAY: Final = 86_400_000_000
_US_PER_UNIT: Final = {"s": 1_000_000, "ms": 1_000, "us": 1}


def check_event_time(schema: pa.Schema, column: str, *, step: str) -> pa.DataType:
    """The type of the event time column; raises `PlanError` naming ``step`` when it is missing or no time."""
    position = schema.get_field_index(column)
    if position < 0:
        raise PlanError(
            f"{step} needs the event time column {column!r}, but its input has the columns {schema.names}; "
            "name one of them"
        )
    kind = schema.field(position).type
    if not is_event_time(kind):
        raise PlanError(
            f"{step} needs an event time column of type timestamp or date, column {column!r} is {kind}; "
            'cast it first, for example with_columns(time=col("time").cast("timestamp[us]"))'
        )
    return kind


def is_event_time(kind: pa.DataType) -> bool:
    """Timestamps of any unit and zone, date32 and date64. A bare integer does not say its unit and is none."""
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def event_times_us(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Microseconds since the epoch, int64, with the nulls of ``column``.

    Nanoseconds are floored, before 1970 too; a timestamp without zone counts as UTC; a date is its midnight.
    Raises `PlanError` for another type and `DataError` for a time that does not fit in 64 bits of microseconds.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if pa.types.is_timestamp(kind):
        ticks = column.view(pa.int64())
        return _floor_thousands(ticks) if kind.unit == "ns" else _scaled(ticks, _US_PER_UNIT[kind.unit])
    if pa.types.is_date32(kind):
        return _scaled(column.view(pa.int32()).cast(pa.int64()), _US_PER_DAY)
    if pa.types.is_date64(kind):
        return _scaled(column.view(pa.int64()), 1_000)
    raise PlanError(f"event time must be a timestamp or a date, got {kind}; cast the column first")


def to_timestamp(times_us: pa.Array, like: pa.DataType) -> pa.Array:
    """int64 microseconds as ``timestamp_type(like)``, without a copy."""
    return times_us.view(timestamp_type(like))


def timestamp_type(like: pa.DataType) -> pa.DataType:
    """timestamp[us] in the zone of the event time type ``like`` (none for dates)."""
    return pa.timestamp("us", tz=like.tz if pa.types.is_timestamp(like) else None)


def _scaled(ticks: pa.Array, factor: int) -> pa.Array:
    if factor == 1:
        return ticks
    try:
        return pc.multiply_checked(ticks, factor)
    except pa.ArrowInvalid as error:
        extremes = pc.min_max(ticks).as_py()
        raise DataError(
            f"an event time does not fit in 64 bits of microseconds: the values, in units of {factor} us, lie "
            f"between {extremes['min']} and {extremes['max']}; filter out or repair the rows"
        ) from error


def _floor_thousands(ticks: pa.Array) -> pa.Array:
    if ticks.null_count == 0:
        return pa.array(np.floor_divide(ticks.to_numpy(), 1_000))
    floored = np.floor_divide(ticks.fill_null(0).to_numpy(), 1_000)
    return pa.array(floored, mask=ticks.is_null().to_numpy(zero_copy_only=False))


def with_derived(batch: pa.RecordBatch, column: str, function: TimeFunction, *, where: str) -> pa.RecordBatch:
    """``batch`` with the times of a `TimeFunction` as its last column. Raises `UserCodeError` for what the function
    raises and for what is no time of each row."""
    name = getattr(function, "__name__", type(function).__name__)
    if column in batch.schema.names:
        raise UserCodeError(
            f"{where}: the event time function {name} makes the column {column!r}, which the rows have already; give "
            "it another name with into="
        )
    try:
        times = function(batch)
    except RayflowError:
        raise
    except Exception as error:
        raise UserCodeError(
            f"{where}: the event time function {name} raised {type(error).__name__}: {error} on a batch of "
            f"{batch.num_rows} rows"
        ) from error
    try:
        found = times.combine_chunks() if isinstance(times, pa.ChunkedArray) else times
        found = found if isinstance(found, pa.Array) else pa.array(found)
        ticks = found if pa.types.is_int64(found.type) else event_times_us(found)
    except DataError:
        raise
    except Exception as error:
        got = f"an array of {times.type}" if isinstance(times, pa.Array | pa.ChunkedArray) else type(times).__name__
        raise UserCodeError(
            f"{where}: the event time function {name} returned {got}, expected an Arrow array of timestamps, dates or "
            "int64 microseconds since the epoch; return one"
        ) from error
    if len(ticks) != batch.num_rows:
        raise UserCodeError(
            f"{where}: the event time function {name} returned {len(ticks)} times for a batch of {batch.num_rows} "
            "rows; return one a row, null where there is none"
        )
    return batch.append_column(pa.field(column, DERIVED_TYPE), ticks.view(DERIVED_TYPE))


class EventTimeReader:
    """Reads the event times of batches and applies the policy for nulls; says where it stands in errors."""

    def __init__(self, column: str, *, on_error: OnNullTime, where: str) -> None:
        if on_error not in ("fail", "skip"):
            raise ConfigError(f'{where} needs on_error "fail" or "skip", got {on_error!r}')
        self._column = column
        self._on_error = on_error
        self._where = where
        self.skipped_rows = 0
        """Rows dropped because they have no event time."""

    def read(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.Array, int, int]:
        """(rows that have a time, their times as int64 without nulls, earliest, latest).

        The batch is passed on untouched when no time is null. An empty result has earliest 0 and latest -1. Raises
        `DataError` for a null time (``on_error="fail"``) and for times beyond `TIME_BOUND_US`.
        """
        if self._column not in batch.schema.names:
            check_event_time(batch.schema, self._column, step=self._where)
        times = event_times_us(batch.column(self._column))
        if times.null_count:
            if self._on_error == "fail":
                row = pc.index(times.is_null(), True).as_py()
                raise DataError(
                    f"{self._where}: the event time {self._column!r} is null in {times.null_count} of "
                    f"{len(times)} rows, the first is row {row} of the batch: {batch.slice(row, 1).to_pylist()[0]}; "
                    "filter these rows out before the step that takes the event time"
                )
            self.skipped_rows += times.null_count
            present = times.is_valid()
            batch, times = batch.filter(present), times.filter(present)
        if len(times) == 0:
            return batch, times, 0, -1
        values = times.to_numpy()
        earliest, latest = int(values.min()), int(values.max())
        if earliest < -TIME_BOUND_US or latest > TIME_BOUND_US:
            raise DataError(
                f"{self._where}: event times in {self._column!r} lie between {earliest} and {latest} us since the "
                f"epoch, the bound is {TIME_BOUND_US} on either side; filter out or repair the rows"
            )
        return batch, times, earliest, latest


class WatermarkTracker:
    """Turns the rows of one source split or stream into its watermark (rule W1).

    With a bound on the future, rows further ahead of the wall clock than ``max_ahead_us`` do not advance it: one row
    with a wrong date would close every window until then. They fail the job, or are dropped and counted.
    """

    def __init__(
        self,
        event_time: EventTime,
        *,
        on_error: OnNullTime = "fail",
        where: str = "event time",
        wall_time: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._event_time = event_time
        self._max_delay_us = event_time.max_delay_us
        self._where = where
        self._wall_time = wall_time
        self._reader = EventTimeReader(event_time.column, on_error=on_error, where=where)
        self.watermark = MIN_WATERMARK
        """No row with event time below it follows. Stays `MIN_WATERMARK` without a max delay."""
        self.newest: int | None = None
        """Largest event time seen, us; None before the first row."""
        self.ahead_rows = 0
        """Rows dropped because they were too far in the future."""

    @property
    def skipped_rows(self) -> int:
        return self._reader.skipped_rows + self.ahead_rows

    def observe(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Take the event times of ``batch`` into account; returns it, without the rows that are skipped and, with a
        `TimeFunction`, with the column that it makes."""
        if self._event_time.derive is not None:
            batch = with_derived(batch, self._event_time.column, self._event_time.derive, where=self._where)
        batch, times, _, latest = self._reader.read(batch)
        bound_us = self._event_time.max_ahead_us
        if bound_us is not None and batch.num_rows:
            horizon = int(self._wall_time() * 1_000_000) + bound_us
            if latest > horizon:
                batch, latest = self._without_future(batch, times, horizon, bound_us)
        if batch.num_rows:
            self._seen(latest)
        return batch

    def _without_future(
        self, batch: pa.RecordBatch, times: pa.Array, horizon: int, bound_us: int
    ) -> tuple[pa.RecordBatch, int]:
        """(the rows up to ``horizon``, the latest of them); raises `DataError` naming the first other one."""
        kept = pc.less_equal(times, horizon)
        beyond = batch.num_rows - (pc.sum(kept).as_py() or 0)
        if self._event_time.on_ahead == "fail":
            row = pc.index(kept, False).as_py()
            raise DataError(
                f"{self._where}: the event time {self._event_time.column!r} of {beyond} of {batch.num_rows} rows is "
                f"more than max_ahead ({bound_us / 1e6:g} s) ahead of the clock, the first is row {row} of the batch: "
                f'{batch.slice(row, 1).to_pylist()[0]}; repair the rows, or skip and count them with on_ahead="skip"'
            )
        self.ahead_rows += beyond
        times = times.filter(kept)
        return batch.filter(kept), pc.max(times).as_py() if len(times) else 0

    def _seen(self, latest: int) -> None:
        if self.newest is None or latest > self.newest:
            self.newest = latest
            if self._max_delay_us is not None:
                self.watermark = max(self.watermark, latest - self._max_delay_us)

    def restore(self, newest: int | None) -> None:
        """Go on from what ``newest`` of an earlier tracker was; never back (W1)."""
        if newest is not None:
            self._seen(newest)


__all__ = [
    "DERIVED_TYPE",
    "TIME_BOUND_US",
    "EventTimeReader",
    "OnNullTime",
    "TimeFunction",
    "WatermarkTracker",
    "check_event_time",
    "event_times_us",
    "is_event_time",
    "timestamp_type",
    "to_timestamp",
    "with_derived",
]
