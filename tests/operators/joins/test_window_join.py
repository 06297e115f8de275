"""Window joins: DuckDB as the oracle, whatever the interleaving, batches and restores."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.operators.base import Operator
from rayflow.operators.joins.columns import HOWS
from rayflow.operators.joins.window import WindowJoin, WindowJoinOperator
from rayflow.operators.windows import Tumbling
from tests.operators.joins.harness import CASES, KEYS, LEFT, RIGHT, RIGHT_KEYS, Case, caught, expected, run, same


def factory(how: Any, window: Tumbling, kind: type[WindowJoin] = WindowJoin) -> WindowJoin:
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


def query(how: str, window: Tumbling) -> str:
    def start(side: str) -> str:
        return (
            f"(floor((epoch_us({side}.t) - {window.offset_us}) / {window.size_us})::bigint * {window.size_us} + "
            f"{window.offset_us})"
        )

    sides = [f"(select *, make_timestamptz({start(s)}) ws from {s})" for s in ("l", "r")]
    on = "l.k = r.rk and l.s = r.rs and l.ws = r.ws"
    end = f"+ to_microseconds({window.size_us})"
    if how in ("semi", "anti"):
        return f"select l.*, l.ws {end} we from {sides[0]} l {how} join {sides[1]} r on {on}"
    key = "coalesce(l.k, case when l.t is null then r.rk end) k, coalesce(l.s, case when l.t is null then r.rs end) s"
    return (
        f"select {key}, l.t, l.v, r.v v_right, r.t t_right, coalesce(l.ws, r.ws) ws, coalesce(l.ws, r.ws) {end} we "
        f"from {sides[0]} l {how} join {sides[1]} r on {on}"
    )


def check(case: Case, how: str, window: Tumbling, kind: type[WindowJoin] = WindowJoin) -> None:
    same(run(factory(how, window, kind), case, "window_start"), expected(case, query(how, window)))


@pytest.mark.parametrize("how", HOWS)
@settings(max_examples=30, deadline=None)
@given(case=CASES, size=st.sampled_from([1, 7, 10, 1000]), offset=st.sampled_from([0, 3]))
def test_equals_duckdb_whatever_the_way(how: str, case: Case, size: int, offset: int) -> None:
    check(case, how, Tumbling(size, offset % size))


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

    caught(lambda case: check(case, "left", Tumbling(10), Broken))
