"""Calendar days in a zone: Python's own zoneinfo as the oracle."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import ConfigError, DataError, StateSchemaError
from rayflow.operators.tumbling import Tumbling, WindowSpec
from rayflow.operators.windowing.calendar import CalendarDays, tumbling
from rayflow.operators.windows import WindowAggregate
from tests.operators.helpers import frozen, opened
from tests.operators.windowing.helpers import SCHEMA, WAYS, Way, batch, ordered, results, run

HOUR = 3_600_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ZONES = ["Europe/Berlin", "America/Sao_Paulo", "America/Havana", "Asia/Kathmandu", "Pacific/Apia", "UTC"]
CHANGES = [
    datetime(2024, 3, 31, tzinfo=UTC), datetime(2024, 10, 27, tzinfo=UTC), datetime(2018, 2, 18, tzinfo=UTC),
    datetime(2018, 11, 4, tzinfo=UTC), datetime(2011, 12, 30, tzinfo=UTC), datetime(1966, 5, 1, tzinfo=UTC),
]  # fmt: skip


def us(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


TIMES = st.one_of(
    st.builds(lambda change, minutes: us(change + timedelta(minutes=minutes)), st.sampled_from(CHANGES),
              st.integers(-72 * 60, 72 * 60)),
    st.integers(us(datetime(1960, 1, 1, tzinfo=UTC)), us(datetime(2040, 1, 1, tzinfo=UTC))),
)  # fmt: skip


def begins(day: int, offset: timedelta, zone: ZoneInfo) -> int:
    """First instant at which the clocks have reached this time of that day."""
    shown = EPOCH.replace(tzinfo=None) + timedelta(days=day) + offset
    at = us(shown.replace(tzinfo=zone, fold=0).astimezone(UTC))
    if (EPOCH + timedelta(microseconds=at)).astimezone(zone).replace(tzinfo=None) == shown:
        return at
    # Skipped: right after the change, which lies between the two readings of it.
    low, high = sorted((at, us(shown.replace(tzinfo=zone, fold=1).astimezone(UTC))))
    before = (EPOCH + timedelta(microseconds=low)).astimezone(zone).utcoffset()
    while high - low > 1:
        middle = (low + high) // 2
        if (EPOCH + timedelta(microseconds=middle)).astimezone(zone).utcoffset() == before:
            low = middle
        else:
            high = middle
    return high


@settings(max_examples=300, deadline=None)
@given(TIMES, st.sampled_from(ZONES), st.sampled_from([0, 2, 3.5, 23]), st.sampled_from([1, 7]))
def test_equals_zoneinfo(time: int, name: str, offset_hours: float, days: int) -> None:
    spec = CalendarDays(days, int(offset_hours * HOUR), name)
    zone, offset = ZoneInfo(name), timedelta(hours=offset_hours)
    near = time // (24 * HOUR) // days * days
    edges = sorted({begins(day, offset, zone) for day in range(near - 2 * days, near + 3 * days, days)})
    start = max(edge for edge in edges if edge <= time)
    end = min(edge for edge in edges if edge > time)
    assert (spec.start_of(time), spec.next_start(start), spec.first_open(time)) == (start, end, start)
    assert spec.ends_of(np.array([start])).tolist() == [end]
    others = pa.array([time, time + 30 * HOUR, time - 30 * HOUR])
    starts = spec.window_starts(others, time - 30 * HOUR, time + 30 * HOUR)
    assert ([starts] * 3 if isinstance(starts, int) else starts.tolist()) == [
        spec.start_of(each) for each in others.to_pylist()
    ]


def factory(spec: WindowSpec) -> WindowAggregate:
    aggregates = {"n": rf.count()}
    return WindowAggregate(keys=("k",), spec=spec, aggregates=aggregates, event_time="t", schema=SCHEMA)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), TIMES, st.just(1)), max_size=30), st.sampled_from(ZONES), WAYS)
def test_windows_equal_the_oracle_whatever_the_way(data: list[Any], zone: str, way: Way) -> None:
    spec, data = CalendarDays(1, 2 * HOUR, zone), sorted(data, key=lambda row: row[1])
    with tempfile.TemporaryDirectory() as folder:
        out = run(factory(spec), data, way, delay=0, scratch=Path(folder))
    counts: dict[tuple[int, int], int] = {}
    for k, t, _ in data:
        counts[k, spec.start_of(t)] = counts.get((k, spec.start_of(t)), 0) + 1
    assert results(out) == ordered([(k, s, spec.next_start(s), n) for (k, s), n in counts.items()])


def test_days_have_23_and_25_hours() -> None:
    spec = tumbling("1d", zone="Europe/Berlin")
    lengths = [
        int(spec.ends_of(np.array([spec.start_of(us(day) + 12 * HOUR)]))[0]) - spec.start_of(us(day) + 12 * HOUR)
        for day in (CHANGES[0], CHANGES[1], CHANGES[2])
    ]
    assert lengths == [23 * HOUR, 25 * HOUR, 24 * HOUR]
    assert str(spec) == "tumbling 1 calendar day of Europe/Berlin"
    assert isinstance(tumbling("1d"), Tumbling)


def test_weeks_begin_on_monday() -> None:
    spec = tumbling("7d", offset="4d", zone="Europe/Berlin")
    start = EPOCH + timedelta(microseconds=spec.start_of(us(datetime(2024, 5, 16, tzinfo=UTC))))
    assert start == datetime(2024, 5, 12, 22, tzinfo=UTC)


def test_watermarks_at_the_ends_of_time() -> None:
    spec = CalendarDays(1, 0, "Europe/Berlin")
    assert (spec.first_open(MIN_WATERMARK), spec.first_open(MAX_WATERMARK)) == (MIN_WATERMARK, MAX_WATERMARK)
    operator, _ = opened(factory(spec))
    with pytest.raises(DataError, match="year 2 to the year 9998"):
        operator.process(batch([(1, 2**60, 1)]), 0)


def test_another_zone_is_refused_on_restore() -> None:
    operator, _ = opened(factory(CalendarDays(1, 0, "Europe/Berlin")))
    operator.process(batch([(1, 0, 1)]), 0)
    for spec in (CalendarDays(1, 0, "Europe/Paris"), Tumbling(24 * HOUR)):
        other, _ = opened(factory(spec))
        with pytest.raises(StateSchemaError, match="Europe/Berlin"):
            other.restore(frozen(operator))
    other, _ = opened(factory(CalendarDays(1, 0, "UTC")))
    plain, _ = opened(factory(Tumbling(24 * HOUR)))
    with pytest.raises(StateSchemaError, match="of UTC"):
        other.restore(frozen(plain))


@pytest.mark.parametrize(
    ("size", "zone", "message"),
    [("36h", "UTC", "whole days"), ("1d", "Mars/Base", "Mars/Base"), ("1d", "", "zone"), ("0d", "UTC", "size")],
)
def test_mistakes_are_found_while_building(size: str, zone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tumbling(size, zone=zone)
