"""Bad and unusual event times, and windows that cannot be, for every kind of window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

import rayflow as facade
import rayflow.operators.aggregates as rf
from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import ConfigError, DataError, PlanError, RayflowError
from rayflow.operators.base import MAIN, OperatorFactory
from rayflow.operators.event_time import TIME_BOUND_US
from rayflow.operators.ordering.ranked import Ranking, WindowRank
from rayflow.operators.ordering.sort import SortByTime
from rayflow.operators.windowing.calendar import tumbling as calendar
from rayflow.operators.windowing.count import CountAggregate, CountWindow
from rayflow.operators.windowing.global_operator import GlobalAggregate, GlobalTimeAggregate
from rayflow.operators.windowing.global_window import global_window
from rayflow.operators.windowing.session import Session
from rayflow.operators.windowing.session_operator import SessionAggregate
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windowing.triggers import every
from rayflow.operators.windows import LATE, LocalCombine, Tumbling, WindowAggregate
from tests.operators.helpers import opened, rows

S = 1_000_000
WHAT: dict[str, Any] = {"keys": ("k",), "aggregates": {"n": rf.count(), "total": rf.sum("v")}, "event_time": "t"}
KINDS: dict[str, Callable[[], OperatorFactory]] = {
    "tumbling": lambda: WindowAggregate(spec=Tumbling(10 * S, 3 * S), **WHAT),
    "days": lambda: WindowAggregate(spec=calendar("1d", zone="Europe/Berlin"), **WHAT),
    "sliding": lambda: WindowAggregate(spec=Sliding(10 * S, 4 * S), **WHAT),
    "session": lambda: SessionAggregate(spec=Session(10 * S), **WHAT),
    "session with updates": lambda: SessionAggregate(
        spec=Session(10 * S), **WHAT, allowed_lateness_us=S, emit="update"
    ),
    "count": lambda: CountAggregate(spec=CountWindow(1), **WHAT),
    "global by rows": lambda: GlobalAggregate(spec=global_window(trigger=every(rows=1)), **WHAT),
    "global": lambda: GlobalTimeAggregate(period_us=10 * S, **WHAT),
    "top": lambda: WindowRank(
        keys=("k",), spec=Tumbling(10 * S), ranking=Ranking(n=2, time="t", by="v"), event_time="t"
    ),
    "sort": lambda: SortByTime(event_time="t", ties=("v",), keys=("k",)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch(*times: int | None, kind: pa.DataType = pa.timestamp("us", "UTC")) -> pa.RecordBatch:  # noqa: B008
    column = pa.array(times, pa.int64()).cast(kind)
    return pa.RecordBatch.from_arrays(
        [pa.array([1] * len(times)), column, pa.array(range(len(times)))], names=["k", "t", "v"]
    )


def ran(kind: str, *batches: pa.RecordBatch) -> list[tuple[Any, ...]]:
    """Results, with times as us."""
    operator, out = opened(KINDS[kind]())
    for each in batches:
        operator.process(each, 0)
    operator.on_watermark(MAX_WATERMARK)
    operator.on_end()
    assert LATE not in out.batches
    found = []
    for part in out.batches.get(MAIN, []):
        columns = [
            column.cast(pa.timestamp("us")).cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
            for column in part.columns
        ]
        found += [tuple(row.values()) for row in rows([pa.RecordBatch.from_arrays(columns, names=part.schema.names)])]
    return sorted(found)


@every_kind
def test_a_null_time_is_an_error_that_names_the_step(kind: str) -> None:
    operator, _ = opened(KINDS[kind]())
    with pytest.raises(DataError, match=r"'under test' subtask 0/1.*'t' is null in 1 of 2 rows"):
        operator.process(batch(1, None), 0)


@every_kind
@pytest.mark.parametrize(
    ("unit", "scale"), [("s", 1), ("ms", 1_000), ("us", 1_000_000), ("ns", 1_000_000_000)], ids=["s", "ms", "us", "ns"]
)
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_every_unit_and_zone_means_the_same_before_1970_too(kind: str, unit: str, scale: int, zone: str | None) -> None:
    times = [-100_000, -7, -1, 0, 1, 4, 12, 100_000]
    expected = ran(kind, batch(*(time * S for time in times)))
    assert expected
    assert ran(kind, batch(*(time * scale for time in times), kind=pa.timestamp(unit, zone))) == expected


@every_kind
@pytest.mark.parametrize("other", [pa.timestamp("us", "Europe/Berlin"), pa.timestamp("us")], ids=str)
def test_another_zone_in_the_middle_of_a_stream_is_an_error(kind: str, other: pa.DataType) -> None:
    """Else it would be open which of them the columns of results have."""
    with pytest.raises(RayflowError, match="'under test' subtask 0/1"):
        ran(kind, batch(0, S), batch(2 * S, kind=other))


@every_kind
@pytest.mark.parametrize("value", [pa.array([float("nan"), 1.0]), pa.array([1, 2]), pa.array(["2020", "x"])])
def test_what_is_no_time_is_refused_while_building(kind: str, value: pa.Array) -> None:
    """NaN among them: it can only be in a float."""
    data = pa.RecordBatch.from_arrays([pa.array([1, 1]), value, pa.array([1, 2])], names=["k", "t", "v"])
    with pytest.raises(PlanError, match=r"'t' is (double|int64|string)"):
        KINDS[kind]().output_schema(data.schema)  # type: ignore[attr-defined]


@every_kind
def test_times_at_the_ends_of_what_is_known(kind: str) -> None:
    """Far from 1970, where the ends of windows still fit; beyond that a row is an error."""
    far = TIME_BOUND_US - 1
    if kind == "days":
        with pytest.raises(DataError, match="calendar days are known from the year 2 to the year 9998"):
            ran(kind, batch(-far, far))
    else:
        both = batch(-far, far)
        found = ran(kind, both)
        assert len(found) >= 2
        assert ran(kind, both.slice(0, 1), both.slice(1)) == found
    with pytest.raises(RayflowError, match="64 bits of microseconds|beyond|range|more than"):
        ran(kind, batch(2**61, kind=pa.timestamp("s")))


@pytest.mark.parametrize("spec", [Tumbling(10), Sliding(10, 4)])
def test_the_combiner_refuses_what_the_window_does(spec: Tumbling | Sliding) -> None:
    operator, _ = opened(LocalCombine(spec=spec, **WHAT))
    with pytest.raises(DataError, match="null in 1 of 2"):
        operator.process(batch(1, None), 0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: facade.tumbling("0s"),
        lambda: facade.tumbling("-1s"),
        lambda: facade.tumbling("0s", zone="UTC"),
        lambda: facade.tumbling("36h", zone="UTC"),
        lambda: facade.sliding("0s", every="1s"),
        lambda: facade.sliding("10s", every="0s"),
        lambda: facade.sliding("10s", every="11s"),
        lambda: facade.session(gap="0s"),
        lambda: facade.count_window(0),
        lambda: facade.every("0s"),
        lambda: facade.tumbling("300000000d"),
    ],
)
def test_a_window_that_cannot_be_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        build()


def test_a_slide_that_does_not_divide_the_size_is_valid() -> None:
    """Windows [4n, 4n + 10)."""
    found = ran("sliding", batch(0, 5 * S, 9 * S))
    assert [(row[1] // S, row[3]) for row in found] == [(-8, 1), (-4, 2), (0, 3), (4, 2), (8, 1)]
