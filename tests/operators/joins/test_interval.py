"""Interval joins: DuckDB as the oracle, whatever the interleaving, batches and restores."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.operators.base import Operator
from rayflow.operators.joins.columns import HOWS
from rayflow.operators.joins.interval import IntervalJoin, IntervalJoinOperator
from tests.operators.joins.harness import CASES, KEYS, LEFT, RIGHT, RIGHT_KEYS, Case, caught, expected, run, same

BOUNDS = [(-5, 5), (0, 0), (-10, -4), (3, 9), (-3, 20), None]


def factory(how: Any, bounds: tuple[int, int] | None, kind: type[IntervalJoin] = IntervalJoin) -> IntervalJoin:
    lower, upper = bounds or (None, None)
    times: dict[str, Any] = {} if bounds is None else {"left_time": "t", "right_time": "t"}
    return kind(
        left_keys=KEYS,
        right_keys=RIGHT_KEYS,
        how=how,
        left_schema=LEFT,
        right_schema=RIGHT,
        lower_us=lower,
        upper_us=upper,
        batch_rows=7,
        **times,
    )


def query(how: str, bounds: tuple[int, int] | None) -> str:
    on = "l.k = r.rk and l.s = r.rs"
    if bounds is not None:
        on += f" and epoch_us(r.t) between epoch_us(l.t) + {bounds[0]} and epoch_us(l.t) + {bounds[1]}"
    if how in ("semi", "anti"):
        return f"select l.* from l {how} join r on {on}"
    time = "" if bounds is None else ", greatest(l.t, r.t) join_time"
    key = "coalesce(l.k, case when l.t is null then r.rk end) k, coalesce(l.s, case when l.t is null then r.rs end) s"
    return f"select {key}, l.t, l.v, r.v v_right, r.t t_right{time} from l {how} join r on {on}"


def check(case: Case, how: str, bounds: tuple[int, int] | None, kind: type[IntervalJoin] = IntervalJoin) -> None:
    time = "t" if how in ("semi", "anti") else "join_time"
    same(run(factory(how, bounds, kind), case, time), expected(case, query(how, bounds)))


@pytest.mark.parametrize("how", HOWS)
@settings(max_examples=30, deadline=None)
@given(case=CASES, bounds=st.sampled_from(BOUNDS))
def test_equals_duckdb_whatever_the_way(how: str, case: Case, bounds: tuple[int, int] | None) -> None:
    check(case, how, bounds)


class ForgetsTooEarly(IntervalJoinOperator):
    """Keeps rows for as long as pairs need them, but not for those that still wait for a decision."""

    def _keep(self, side: int) -> int:
        return max(self._partners[side][1] or 0, 0)


class ForgetsTheWatermark(IntervalJoinOperator):
    """Does not take the watermark back: what was decided is decided again."""

    def restore(self, states: Any) -> None:
        super().restore(states)
        self.watermark = -(2**63)


class PassesTheWatermarkOn(IntervalJoinOperator):
    """Does not hold it back for rows that are still to be decided."""

    def __init__(self, factory: IntervalJoin) -> None:
        super().__init__(factory)
        self.hold_us = 0


BROKEN = {"early": ForgetsTooEarly, "again": ForgetsTheWatermark, "overtaken": PassesTheWatermarkOn}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_variants_are_caught(broken: str) -> None:
    class Broken(IntervalJoin):
        def build(self) -> Operator:
            return BROKEN[broken](self)

    caught(lambda case: check(case, "full", (-5, 5), Broken))
