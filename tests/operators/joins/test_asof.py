"""Temporal joins: DuckDB's asof join as the oracle, whatever the interleaving, batches and restores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.operators.base import Operator
from rayflow.operators.joins.asof import ASOF_HOWS, AsofJoin, AsofJoinOperator
from rayflow.operators.joins.buffer import Buffer
from tests.operators.joins.harness import CASES, KEYS, LEFT, RIGHT, RIGHT_KEYS, Case, caught, expected, run, same


def factory(how: Any, tolerance: int | None, kind: type[AsofJoin] = AsofJoin) -> AsofJoin:
    return kind(
        left_keys=KEYS,
        right_keys=RIGHT_KEYS,
        how=how,
        left_schema=LEFT,
        right_schema=RIGHT,
        left_time="t",
        right_time="t",
        tolerance_us=tolerance,
        batch_rows=7,
    )


def query(how: str, tolerance: int | None) -> str:
    at = "from r where r.rk = l.k and r.rs = l.s and r.t <= l.t"
    if tolerance is not None:
        at += f" and epoch_us(r.t) >= epoch_us(l.t) - {tolerance}"
    found = f"select l.*, (select max(r.t) {at}) t_right from l"
    return found if how == "left" else f"select * from ({found}) where t_right is not null"


def check(case: Case, how: str, tolerance: int | None, kind: type[AsofJoin] = AsofJoin) -> None:
    """Of versions of one key and time any may be taken, but it must be one of that key and time."""
    found = run(factory(how, tolerance, kind), case, "t")
    versions = {(k, s, t): set[Any]() for k, s, t, _ in case.right}
    for k, s, t, v in case.right:
        versions[(k, s, t)].add(v)
    for row in found:
        version, time = row.pop("v_right"), row["t_right"]
        assert (version is None) == (time is None)
        if time is not None:
            assert version in versions[(row["k"], row["s"], _us(time))]
    same(found, expected(case, query(how, tolerance)))


def _us(time: Any) -> int:
    seconds: float = time.timestamp()
    return round(seconds * 1e6)


@pytest.mark.parametrize("how", ASOF_HOWS)
@settings(max_examples=30, deadline=None)
@given(case=CASES, tolerance=st.sampled_from([None, 0, 6]), prune=st.booleans())
def test_equals_duckdb_whatever_the_way(how: str, case: Case, tolerance: int | None, prune: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if prune:
            patch.setattr("rayflow.operators.joins.buffer.PRUNE_ROWS", 1)
        check(case, how, tolerance)


@settings(max_examples=30, deadline=None)
@given(case=CASES, turns=st.lists(st.integers(0, 1), min_size=1, max_size=12), batch_rows=st.integers(1, 6))
def test_of_versions_of_one_time_the_same_one_is_taken_always(case: Case, turns: list[int], batch_rows: int) -> None:
    other = replace(case, right=case.right, turns=turns, batch_rows=batch_rows)
    one = run(factory("left", None), case, "t")
    same(one, run(factory("left", None), other, "t"))


class PrunesByTheNewest(Buffer):
    """Forgets every version but the last, though rows may come that need an older one."""

    def prune(self, time: int) -> None:
        self._pruned_rows = -65_536
        if self.runs:
            super().prune(2**63 - 1)


class ForgetsTooEarly(AsofJoinOperator):
    def __init__(self, factory: AsofJoin) -> None:
        super().__init__(factory)
        self.buffers = (Buffer(), PrunesByTheNewest())


class DoesNotWait(AsofJoinOperator):
    """Decides rows that versions may still come for."""

    def take(self, side: int, rows: Any) -> None:
        if side == 1:
            super().take(side, rows)
        else:
            self._decide(rows)


class ForgetsTheWatermark(AsofJoinOperator):
    """Does not take the watermark back: what was decided is decided again."""

    def restore(self, states: Any) -> None:
        super().restore(states)
        self.watermark = -(2**63)


BROKEN = {"early": ForgetsTooEarly, "hasty": DoesNotWait, "again": ForgetsTheWatermark}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_variants_are_caught(broken: str) -> None:
    class Broken(AsofJoin):
        def build(self) -> Operator:
            return BROKEN[broken](self)

    caught(lambda case: check(case, "left", None, Broken))
