"""Lookup joins: a loop with a dict says what is right, whatever the batches, restores and hashes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import SchemaChangedError, StateSchemaError
from rayflow.operators.base import RestoredState
from rayflow.operators.joins import kernels, lookup
from rayflow.operators.joins.lookup import Lookup, LookupOperator
from tests.operators.helpers import frozen, opened, rows

LEFT = pa.schema([("k", pa.int64()), ("row", pa.int64())])
RIGHT = pa.schema([("id", pa.int64()), ("t", pa.timestamp("us")), ("row", pa.int64())])
KEY = st.one_of(st.none(), st.integers(0, 4))
EVENT = st.one_of(
    st.tuples(st.just("rows"), st.lists(KEY, min_size=1, max_size=6)),
    st.tuples(st.just("table"), st.lists(st.tuples(KEY, st.integers(-5, 5)), min_size=1, max_size=6)),
    st.tuples(st.just("restore"), st.integers(1, 3)),
)


def factory(how: Any, *, timed: bool, **options: Any) -> Lookup:
    what: dict[str, Any] = {"left_schema": LEFT, "right_schema": RIGHT} | options
    return Lookup(left_keys=("k",), right_keys=("id",), how=how, right_time="t" if timed else None, **what)


@pytest.mark.parametrize("how", ["inner", "left"])
@settings(max_examples=100, deadline=None)
@given(events=st.lists(EVENT, max_size=12), timed=st.booleans(), collide=st.booleans())
def test_rows_find_the_latest_of_their_key(how: str, events: list[Any], timed: bool, collide: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            for module in (kernels, lookup):
                patch.setattr(module, "hash_columns", _few_hashes)
        found, wanted = _run(how, events, timed)
    for got, (k, row, candidates) in zip(found, wanted, strict=True):
        assert (got["k"], got["row"]) == (k, row)
        assert got["row_right"] in candidates


def _few_hashes(columns: Any) -> Any:
    return (columns[0].to_numpy() % 2).astype(np.uint64)


def _run(how: str, events: list[Any], timed: bool) -> tuple[list[dict[str, Any]], list[tuple[Any, int, set[Any]]]]:
    """What comes out; and for every row what it may find: with event time any row of the latest time."""
    operator, out = opened(factory(how, timed=timed))
    table: dict[int, tuple[int, set[Any]]] = {}
    wanted: list[tuple[Any, int, set[Any]]] = []
    count = 0
    for kind, what in events:
        if kind == "restore":
            states = frozen(operator)
            operator, _ = opened(factory(how, timed=timed), what - 1, what, out)
            operator.restore(states)
        elif kind == "table":
            numbers = list(range(count, count + len(what)))
            arrays = [pa.array(c, f.type) for c, f in zip((*zip(*what, strict=True), numbers), RIGHT, strict=True)]
            operator.process(pa.RecordBatch.from_arrays(arrays, schema=RIGHT), 1)
            for (key, time), number in zip(what, numbers, strict=True):
                latest, same = table.get(key, (-99, set[Any]()))
                if not timed or time > latest:
                    table[key] = (time, {number})
                elif time == latest:
                    table[key] = (time, same | {number})
        else:
            numbers = list(range(count, count + len(what)))
            arrays = [pa.array(c, f.type) for c, f in zip((what, numbers), LEFT, strict=True)]
            operator.process(pa.RecordBatch.from_arrays(arrays, schema=LEFT), 0)
            for key, number in zip(what, numbers, strict=True):
                candidates = table[key][1] if key in table and key is not None else {None}
                if how == "left" or candidates != {None}:
                    wanted.append((key, number, candidates))
        count += 0 if kind == "restore" else len(what)
        if kind == "restore" and what > 1:  # only subtask 0 freezes
            states = frozen(operator) if isinstance(operator, LookupOperator) and operator.ctx.subtask == 0 else states
            operator, _ = opened(factory(how, timed=timed), 0, 1, out)
            operator.restore(states)
    return rows(out.batches.get("main", [])), wanted


def test_only_subtask_0_freezes_the_table() -> None:
    for subtask in (0, 1):
        operator, _ = opened(factory("left", timed=False), subtask, 2)
        batch = pa.RecordBatch.from_pydict({"id": [1], "t": [0], "row": [0]}).cast(RIGHT)
        operator.process(batch, 1)
        state = operator.snapshot(1)  # type: ignore[arg-type]
        assert state is not None
        assert [table.spread for table in state.tables] == ["union"] * (1 - subtask)


def test_other_columns_are_refused() -> None:
    operator, _ = opened(factory("left", timed=False))
    with pytest.raises(SchemaChangedError, match=r"under test.*the left side was planned with"):
        operator.process(pa.RecordBatch.from_pydict({"k": ["a"], "row": [1]}), 0)
    with pytest.raises(StateSchemaError, match=r"under test.*give the step another name="):
        operator.restore([RestoredState("table", pa.table({"id": ["a"]}))])
