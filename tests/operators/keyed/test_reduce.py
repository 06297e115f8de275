"""Reduce: a loop over rows as the oracle."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import PlanError, UserCodeError
from rayflow.operators.keyed.reduce import Reduce
from tests.operators.helpers import opened, outputs, rows
from tests.operators.keyed.rig import WAYS, Way, by_key, run, table_of

SCHEMA = pa.schema([("v", pa.int64()), ("k", pa.int64()), ("text", pa.string())])
ROW = st.tuples(
    st.one_of(st.none(), st.integers(-9, 9)), st.one_of(st.none(), st.integers(0, 4)), st.sampled_from(["a", "b", None])
)


def longest_tale(state: pa.RecordBatch, rows: pa.RecordBatch) -> dict[str, Any]:
    """Depends on the order of the rows; nulls of text make the state null for good."""
    assert state.column("k").equals(rows.column("k"))
    assert len(set(map(str, state.column("k").to_pylist()))) == len(state)
    text = pc.binary_join_element_wise(state.column("text"), rows.column("text"), "")
    return {"v": pc.subtract(pc.multiply(state.column("v"), 2), rows.column("v")), "text": text}


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, max_size=40), WAYS)
def test_equals_a_loop_whatever_the_way(data: list[tuple[Any, ...]], way: Way) -> None:
    state: dict[Any, tuple[Any, Any]] = {}
    wanted = []
    for v, k, text in data:
        if k in state:
            old, tale = state[k]
            v = None if v is None or old is None else 2 * old - v
            text = None if text is None or tale is None else tale + text
        state[k] = (v, text)
        wanted.append({"v": v, "k": k, "text": text})
    found = run(Reduce(keys=("k",), fn=longest_tale), table_of(SCHEMA, data), way)
    assert by_key(found, ("k",)) == by_key(wanted, ("k",))
    if way.workers == [1]:
        assert found == wanted


def test_the_function_is_called_once_a_round_not_once_a_key() -> None:
    calls: list[int] = []

    def add(state: pa.RecordBatch, rows: pa.RecordBatch) -> pa.RecordBatch:
        calls.append(len(rows))
        return state.set_column(0, "v", pc.add(state.column("v"), rows.column("v")))

    table = table_of(SCHEMA, [(1, key, "") for key in [1, 2, 3, 1, 2, 1]])
    assert [r["v"] for r in rows(outputs(Reduce(keys=("k",), fn=add), table.to_batches()))] == [1, 1, 1, 2, 2, 3]
    assert calls == [2, 1]


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda state, rows: {"v": [1]}, "raised KeyError: 'text' on 1 keys"),
        (lambda state, rows: {"v": [1, 2], "text": ["a"]}, "returned 2 rows for 1 keys; return one row for each"),
        (lambda state, rows: {"v": pa.array(["x"]), "text": ["a"]}, "raised ArrowInvalid"),
        (lambda state, rows: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_wrong_functions_are_named(fn: Any, match: str) -> None:
    operator, _ = opened(Reduce(keys=("k",), fn=fn))
    with pytest.raises(UserCodeError, match=rf"step 'under test' subtask 0/1: the function <lambda> of reduce {match}"):
        operator.process(table_of(SCHEMA, [(1, 1, "a"), (2, 1, "b")]).to_batches()[0], 0)


def test_mistakes_are_found_while_building() -> None:
    with pytest.raises(PlanError, match="needs a function"):
        Reduce(keys=("k",), fn=3)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="columns beside the keys"):
        Reduce(keys=("k",), fn=longest_tale).output_schema(pa.schema([("k", pa.int64())]))
    with pytest.raises(PlanError, match="'nope' is not among"):
        Reduce(keys=("nope",), fn=longest_tale).output_schema(SCHEMA)
