"""Window joins: DuckDB as the oracle, whatever the interleaving, batches and restores."""

from __future__ import annotations

from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow as rf
from rayflow.core.ids import MAX_WATERMARK
from rayflow.operators.base import Operator
from rayflow.operators.joins.columns import HOWS
from rayflow.operators.joins.window import WindowJoin, WindowJoinOperator
from rayflow.operators.windowing.sliding import Sliding
from rayflow.operators.windows import Tumbling
from tests.operators.helpers import opened, rows
from tests.operators.joins.harness import (
    CASES,
    KEYS,
    LEFT,
    RIGHT,
    RIGHT_KEYS,
    TIME,
    Case,
    batch,
    caught,
    expected,
    run,
    same,
)

Window: TypeAlias = Tumbling | Sliding


def factory(how: Any, window: Any, kind: type[WindowJoin] = WindowJoin) -> WindowJoin:
    return kind(
        left_keys=KEYS,
        right_keys=RIGHT_KEYS,
        how=how,
        left_schema=LEFT,
        right_schema=RIGHT,
        left_time="t",
        right_time="t",
        window=window,
        batch_rows=7,
    )


def query(how: str, window: Window) -> str:
    size, offset = window.size_us, window.offset_us
    every = window.every_us if isinstance(window, Sliding) else size

    def windows(side: str) -> str:
        """Every row, as often as there are windows that it is in."""
        last = f"(floor((epoch_us(t) - {offset}) / {every})::bigint * {every} + {offset})"
        start = f"{last} - j * {every}"
        return (
            f"(select {side}.*, make_timestamptz({start}) ws from {side}, range({-(-size // every)}) x(j) "
            f"where {start} + {size} > epoch_us(t))"
        )

    on = "l.k = r.rk and l.s = r.rs and l.ws = r.ws"
    end = f"+ to_microseconds({size})"
    if how in ("semi", "anti"):
        return f"select l.*, l.ws {end} we from {windows('l')} l {how} join {windows('r')} r on {on}"
    key = "coalesce(l.k, case when l.t is null then r.rk end) k, coalesce(l.s, case when l.t is null then r.rs end) s"
    return (
        f"select {key}, l.t, l.v, r.v v_right, r.t t_right, coalesce(l.ws, r.ws) ws, coalesce(l.ws, r.ws) {end} we "
        f"from {windows('l')} l {how} join {windows('r')} r on {on}"
    )


def check(case: Case, how: str, window: Window, kind: type[WindowJoin] = WindowJoin) -> None:
    same(run(factory(how, window, kind), case, "window_start"), expected(case, query(how, window)))


TUMBLING = [Tumbling(1), Tumbling(7), Tumbling(10, 3), Tumbling(1000)]
SLIDING = [Sliding(10, 5), Sliding(10, 3, 1), Sliding(7, 7), Sliding(40, 1), Sliding(9, 6, 2)]


@pytest.mark.parametrize("how", HOWS)
@settings(max_examples=30, deadline=None)
@given(case=CASES, window=st.sampled_from([*TUMBLING, *SLIDING]))
def test_equals_duckdb_whatever_the_way(how: str, case: Case, window: Window) -> None:
    check(case, how, window)


def test_days_of_a_zone_are_joined_by_its_clocks() -> None:
    """23:30 and 0:30 in Berlin are one day in UTC and two there; the day of the change has 23 hours."""
    window = rf.tumbling("1d", zone="Europe/Berlin")
    at = [
        pc.cast(pa.scalar(text), TIME).value for text in ("2024-03-30T22:30Z", "2024-03-30T23:30Z", "2024-03-31T21:30Z")
    ]
    operator, out = opened(factory("inner", window))
    for side in (0, 1):
        operator.process(batch(side, *((1, "a", t, n) for n, t in enumerate(at))), side)
    operator.on_watermark(MAX_WATERMARK)
    found = rows(out.batches["main"])
    assert sorted((row["v"], row["v_right"]) for row in found) == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2)]
    hours = {row["v"]: (row["window_end"] - row["window_start"]).total_seconds() / 3600 for row in found}  # type: ignore[operator]
    assert hours == {0: 24.0, 1: 23.0, 2: 23.0}


class ForgetsTooEarly(WindowJoinOperator):
    """Drops the rows of a window that is open."""

    def advance(self, before: int, now: int) -> None:
        super().advance(before, now)
        for buffer in self.buffers:
            buffer.expire(now + 10)


class ForgetsTheWatermark(WindowJoinOperator):
    """Does not take the watermark back: what has fired fires again."""

    def restore(self, states: Any) -> None:
        super().restore(states)
        self.watermark = -(2**63)


BROKEN = {"early": ForgetsTooEarly, "again": ForgetsTheWatermark}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_variants_are_caught(broken: str) -> None:
    class Broken(WindowJoin):
        def build(self) -> Operator:
            return BROKEN[broken](self)

    for window in (Tumbling(10), Sliding(10, 5)):
        caught(lambda case, window=window: check(case, "left", window, Broken))  # type: ignore[misc]
