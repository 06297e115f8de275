"""Event times in microseconds, and what a watermark promises."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.base import EventTime
from rayflow.operators.event_time import (
    TIME_BOUND_US,
    WatermarkTracker,
    check_event_time,
    event_times_us,
    timestamp_type,
    to_timestamp,
)
from rayflow.operators.stateless import AssignEventTime, EventTimeOperator
from tests.operators.helpers import opened, rows


@pytest.mark.parametrize(
    ("kind", "ticks", "expected"),
    [
        (pa.timestamp("s"), [-1, 0, 2, None], [-1_000_000, 0, 2_000_000, None]),
        (pa.timestamp("ms", "UTC"), [-1, 7], [-1_000, 7_000]),
        (pa.timestamp("us", "America/New_York"), [-1, 7], [-1, 7]),
        (pa.timestamp("ns"), [-1, -1_000, -1_001, 0, 999, 1_000, None], [-1, -1, -2, 0, 0, 1, None]),
        (pa.date32(), [-1, 1, None], [-86_400_000_000, 86_400_000_000, None]),
        (pa.date64(), [-86_400_000, None], [-86_400_000_000, None]),
    ],
)
def test_every_unit_becomes_microseconds(
    kind: pa.DataType, ticks: list[int | None], expected: list[int | None]
) -> None:
    physical = pa.int32() if kind == pa.date32() else pa.int64()
    column = pa.array(ticks, physical).view(kind)
    assert event_times_us(column).to_pylist() == expected
    assert event_times_us(column.slice(1)).to_pylist() == expected[1:]
    assert event_times_us(pa.chunked_array([column, column])).to_pylist() == expected * 2
    assert event_times_us(column).type == pa.int64()


def test_a_time_beyond_64_bits_of_microseconds_is_an_error() -> None:
    with pytest.raises(DataError, match="does not fit in 64 bits"):
        event_times_us(pa.array([2**60], pa.int64()).view(pa.timestamp("s")))


def test_the_zone_of_the_event_time_is_kept() -> None:
    assert timestamp_type(pa.timestamp("ns", "Asia/Tokyo")) == pa.timestamp("us", "Asia/Tokyo")
    assert timestamp_type(pa.date32()) == pa.timestamp("us")
    assert to_timestamp(pa.array([1]), pa.timestamp("s", "UTC")).type == pa.timestamp("us", "UTC")


def test_wrong_columns_are_found_while_building() -> None:
    schema = pa.schema([("n", pa.int64()), ("t", pa.timestamp("us"))])
    assert check_event_time(schema, "t", step="window") == pa.timestamp("us")
    with pytest.raises(PlanError, match=r"'x'.*\['n', 't'\]"):
        check_event_time(schema, "x", step="window")
    with pytest.raises(PlanError, match="'n' is int64"):
        AssignEventTime(EventTime("n")).output_schema(schema)
    with pytest.raises(ConfigError, match="on_error"):
        AssignEventTime(EventTime("t"), on_error="ignore")  # type: ignore[arg-type]


def _batch(*times: int | None) -> pa.RecordBatch:
    return pa.record_batch({"t": pa.array(times, pa.timestamp("us")), "row": list(range(len(times)))})


def test_the_watermark_lies_the_delay_behind_the_newest_row() -> None:
    tracker = WatermarkTracker(EventTime("t", max_delay_us=10))
    assert tracker.watermark == MIN_WATERMARK
    tracker.observe(_batch(100, 95))
    assert tracker.watermark == 90
    tracker.observe(_batch(50))
    assert tracker.watermark == 90, "W1"
    tracker.observe(_batch())
    assert tracker.watermark == 90


def test_without_a_delay_only_the_end_advances_event_time() -> None:
    tracker = WatermarkTracker(EventTime("t"))
    tracker.observe(_batch(100))
    assert (tracker.watermark, tracker.newest) == (MIN_WATERMARK, 100)


@given(st.lists(st.lists(st.integers(-1_000, 1_000), max_size=4), max_size=6), st.integers(0, 100))
def test_no_row_within_the_delay_is_below_the_watermark(batches: list[list[int]], delay: int) -> None:
    """The promise: a row that is at most ``delay`` behind the newest one before it is never below the watermark."""
    tracker = WatermarkTracker(EventTime("t", max_delay_us=delay))
    newest: int | None = None
    for times in batches:
        in_time = [t for t in times if newest is None or t >= newest - delay]
        assert all(t >= tracker.watermark for t in in_time)
        before = tracker.watermark
        tracker.observe(_batch(*times))
        assert tracker.watermark >= before
        newest = max([*times, *([] if newest is None else [newest])], default=None)


def test_a_tracker_goes_on_from_its_position() -> None:
    tracker = WatermarkTracker(EventTime("t", max_delay_us=1))
    tracker.observe(_batch(5))
    again = WatermarkTracker(EventTime("t", max_delay_us=1))
    again.restore(tracker.newest)
    assert again.watermark == tracker.watermark == 4
    again.restore(None)
    assert again.watermark == 4


def test_null_times_fail_by_name_or_are_skipped_and_counted() -> None:
    operator, _ = opened(AssignEventTime(EventTime("t", 0)))
    with pytest.raises(DataError, match=r"'under test' subtask 0/1.*'t' is null in 1 of 2 rows.*row 1"):
        operator.process(_batch(1, None), 0)
    skipping, out = opened(AssignEventTime(EventTime("t", 0), on_error="skip"))
    skipping.process(_batch(1, None, 3), 0)
    skipping.process(_batch(None), 0)
    assert [row["row"] for row in rows(out.batches["main"])] == [0, 2]
    assert isinstance(skipping, EventTimeOperator)
    assert skipping.skipped_rows == 2


def test_times_beyond_the_bound_are_an_error() -> None:
    operator, _ = opened(AssignEventTime(EventTime("t", 0)))
    for time in (TIME_BOUND_US + 1, -TIME_BOUND_US - 1):
        with pytest.raises(DataError, match="the bound is"):
            operator.process(_batch(time), 0)


def test_an_upstream_watermark_is_swallowed_except_that_of_the_end() -> None:
    operator, _ = opened(AssignEventTime(EventTime("t", 10)))
    assert isinstance(operator, EventTimeOperator)
    operator.process(_batch(100), 0)
    assert operator.current_watermark() == 90
    assert operator.on_watermark(5_000) == 90
    assert operator.on_watermark(MAX_WATERMARK) == MAX_WATERMARK
    assert operator.current_watermark() == MAX_WATERMARK


def test_dates_serve_as_event_time() -> None:
    tracker = WatermarkTracker(EventTime("d", max_delay_us=0))
    tracker.observe(pa.record_batch({"d": [dt.date(1970, 1, 2)]}))
    assert tracker.watermark == 86_400_000_000
