"""Joins under test: two sides in any interleaving, watermarks, restores at other parallelisms; DuckDB says what is
right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.core.keygroups import owner_of
from rayflow.operators.base import MAIN, Collected, Operator, RestoredState
from rayflow.operators.grouping import flat
from rayflow.operators.joins.operator import Join
from rayflow.partition import hash_columns, key_groups
from tests.operators.helpers import frozen, opened, rows

TIME = pa.timestamp("us", "UTC")
LEFT = pa.schema([("k", pa.int64()), ("s", pa.string()), ("t", TIME), ("v", pa.int64())])
RIGHT = pa.schema([("rk", pa.int64()), ("rs", pa.string()), ("v", pa.int64()), ("t", TIME)])
KEYS = ("k", "s")
RIGHT_KEYS = ("rk", "rs")
DELAY = 12

Row = tuple[Any, Any, int, int]
"""Key, key, event time, value."""


@dataclass(frozen=True)
class Case:
    """Rows of both sides in the order in which they come, the cuts between batches, and what happens after each."""

    left: list[Row]
    right: list[Row]
    batch_rows: int
    turns: list[int]
    """Which side comes next, again and again."""
    workers: list[int]
    """Parallelism after each restore; one alone: no restore."""
    pieces: bool


def _rows(keys: int) -> st.SearchStrategy[list[Row]]:
    row = st.tuples(
        st.one_of(st.none(), st.integers(0, keys)),
        st.sampled_from(["a", "a", "a", "b", None]),
        st.integers(0, 9),
        st.integers(0, DELAY),
    )

    def timed(steps: list[tuple[Any, Any, int, int]]) -> list[Row]:
        now, found = -40, []
        for at, (k, s, step, delay) in enumerate(steps):
            now += step
            found.append((k, s, now - delay, at))
        return found

    return st.lists(row, max_size=25).map(timed)


CASES = st.builds(
    Case,
    left=_rows(2),
    right=_rows(2),
    batch_rows=st.integers(1, 6),
    turns=st.lists(st.integers(0, 1), min_size=1, max_size=12),
    workers=st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
    pieces=st.booleans(),
)


def table(side: int, data: Sequence[Row]) -> pa.Table:
    k, s, t, v = (pa.array([row[i] for row in data], kind) for i, kind in enumerate(LEFT.types))
    return pa.table([k, s, t, v], schema=LEFT) if side == 0 else pa.table([k, s, v, t], schema=RIGHT)


def batch(side: int, *data: Row) -> pa.RecordBatch:
    return table(side, data).combine_chunks().to_batches()[0]


class Watched(Collected):
    """Keeps what is emitted and sees to W1: nothing is older than the watermark that was passed on."""

    def __init__(self, time: str, passed_on: int = MIN_WATERMARK) -> None:
        Collected.__init__(self)
        self.time = time
        self.passed_on = passed_on

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
        Collected.emit(self, batch, tag)
        if tag == MAIN and self.time in batch.schema.names and batch.num_rows:
            times = batch.column(self.time).view(pa.int64())
            assert not times.null_count
            assert min(times.to_pylist()) >= self.passed_on, "W1"


Restore = Callable[[Join, Sequence[Sequence[RestoredState]], int, Watched], list[Operator]]


def run(factory: Join, case: Case, time: str) -> list[dict[str, object]]:
    """All rows that come out, of all subtasks."""
    workers = case.workers[0]
    outs: list[Watched] = [Watched(time) for _ in range(workers)]
    kept = list(outs)
    operators = [opened(factory, i, workers, out)[0] for i, out in enumerate(outs)]
    waiting = [_cut(0, case.left, case.batch_rows), _cut(1, case.right, case.batch_rows)]
    marks = [MIN_WATERMARK, MIN_WATERMARK]
    turn = 0
    while waiting[0] or waiting[1]:
        side = case.turns[turn % len(case.turns)]
        turn += 1
        side = side if waiting[side] else 1 - side
        data = waiting[side].pop(0)
        newest = max(row[2] for row in data)
        marks[side] = MAX_WATERMARK if not waiting[side] else max(marks[side], newest - DELAY)
        for other in (0, 1):
            if not (case.left, case.right)[other]:
                marks[other] = MAX_WATERMARK
        deal(batch(side, *data), side, operators)
        if len(case.workers) > 1:
            states = [frozen(operator, pieces=case.pieces) for operator in operators]
            workers = case.workers[turn % len(case.workers)]
            passed_on = outs[0].passed_on
            outs = [Watched(time, passed_on) for _ in range(workers)]
            kept += outs
            operators = restored(factory, states, workers, outs)
        _advance(operators, outs, min(marks))
    _advance(operators, outs, MAX_WATERMARK)
    for out in kept:
        assert set(out.batches) <= {MAIN}, "no row is late"
    return [row for out in kept for row in rows(out.batches.get(MAIN, []))]


def _advance(operators: Sequence[Operator], outs: Sequence[Watched], mark: int) -> None:
    for operator, out in zip(operators, outs, strict=True):
        passed_on = operator.on_watermark(mark)
        assert out.passed_on <= passed_on <= mark, "W1"
        out.passed_on = passed_on


def _cut(side: int, data: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def deal(rows: pa.RecordBatch, side: int, operators: Sequence[Operator]) -> None:
    """What the hash exchange does (K1-K3)."""
    owners = _owners(rows, (KEYS, RIGHT_KEYS)[side], len(operators))
    for index, operator in enumerate(operators):
        operator.process(rows.filter(pa.array(owners == index)), side)


def _owners(rows: pa.RecordBatch | pa.Table, keys: Sequence[str], workers: int) -> Any:
    groups = key_groups(hash_columns([flat(rows.column(k)) for k in keys]), 128)
    return np.array([owner_of(int(g), workers, 128) for g in groups])


def restored(
    factory: Join, states: Sequence[Sequence[RestoredState]], workers: int, outs: Sequence[Watched]
) -> list[Operator]:
    """Every new subtask gets its rows of every old one."""
    operators = []
    for index in range(workers):
        operator, _ = opened(factory, index, workers, outs[index])
        given_back = []
        for state in (state for old in states for state in old):
            keys = RIGHT_KEYS if state.name == "right" else KEYS
            mine = _owners(state.table, keys, workers) == index if state.table.num_rows else np.zeros(0, bool)
            mine_only = state.table.filter(pa.array(mine, pa.bool_()))
            piece = state.piece and (state.piece if mine.all() else f"{state.piece}@{index}")
            given_back.append(RestoredState(state.name, mine_only, state.meta, piece))
        operator.restore(given_back)
        operators.append(operator)
    return operators


def expected(case: Case, query: str) -> list[dict[str, object]]:
    """DuckDB's answer; its tables are l and r."""
    with duckdb.connect(config={"threads": 1}) as db:
        db.execute("set timezone = 'UTC'")
        db.register("l", table(0, case.left))
        db.register("r", table(1, case.right))
        found: list[dict[str, object]] = db.sql(query).to_arrow_table().to_pylist()
    return found


def same(found: Sequence[dict[str, object]], wanted: Sequence[dict[str, object]]) -> None:
    """As multisets, whatever the order."""
    got, want = (Counter(repr([plain(v) for v in row.values()]) for row in some) for some in (found, wanted))
    assert got == want, f"too many: {got - want}, missing: {want - got}"


def plain(value: object) -> object:
    return value.isoformat() if hasattr(value, "isoformat") else value


def caught(check: Callable[[Case], None]) -> None:
    """The check fails on a case in which rows wait, expire and are decided: what a broken variant must do."""
    with pytest.raises(AssertionError):
        check(EVENTFUL)


def _eventful() -> Case:
    """Two rows of each side at the end keep the watermark at 13 for a while, with a restore after every row."""
    left = [(0, 17), (0, 17), (0, 17), (0, 10), (3, 5), (1, 10), (2, 10), (0, 25), (0, 26)]
    right = [(0, 6), (0, 6), (0, 6), (1, 9), (0, 25), (0, 26)]
    rows: list[list[Row]] = [[(k, "a", t, at) for at, (k, t) in enumerate(side)] for side in (left, right)]
    turns = [1, 1, 1, *[0] * 8, 1, 1, 0, 1]
    return Case(rows[0], rows[1], batch_rows=1, turns=turns, workers=[1, 1], pieces=True)


EVENTFUL = _eventful()
