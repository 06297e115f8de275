"""Steps without state: what they do, and what is refused while building."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pyarrow as pa
import pytest

from rayflow.errors import PlanError
from rayflow.expressions import col, lit
from rayflow.operators.base import EventTime
from rayflow.operators.stateless import AssignEventTime, Drop, Filter, Identity, Rename, Select, Transform, WithColumns
from tests.operators.helpers import opened, outputs, rows

BATCH = pa.record_batch({"a": [1, 2, None, 4], "b": ["w", "x", "y", None]})
EMPTY = BATCH.slice(0, 0)
ALL = [
    Identity(),
    Filter(col("a") > 0),
    Select((col("b"), (col("a") + 1).alias("c"))),
    WithColumns({"c": col("a") * 2, "a": col("a") - 1}),
    Rename({"a": "b", "b": "a"}),
    Drop(("a",)),
]


@pytest.mark.parametrize("step", ALL, ids=lambda s: type(s).__name__)
def test_contract(step: Transform) -> None:
    """Stateless, picklable, the schema is as promised, and nothing is emitted for nothing."""
    again = pickle.loads(pickle.dumps(step))
    assert step.stateful is False
    (result,) = outputs(again, [BATCH, EMPTY])
    assert result.schema.equals(step.output_schema(BATCH.schema))
    assert result.num_rows > 0
    assert step.output_schema(None) is None
    operator, _ = opened(step)
    operator.restore(())
    assert operator.snapshot(1) is None  # type: ignore[arg-type]
    assert operator.on_watermark(7) == 7


def test_filter_drops_false_and_null() -> None:
    assert rows(outputs(Filter(col("a") > 1), [BATCH])) == [{"a": 2, "b": "x"}, {"a": 4, "b": None}]
    assert outputs(Filter(col("a") > 9), [BATCH]) == []
    assert outputs(Filter(lit(None)), [BATCH]) == []
    assert outputs(Filter(lit(True)), [BATCH]) == [BATCH]


def test_select_and_with_columns() -> None:
    (selected,) = outputs(Select((col("b"), (col("a") + 1).alias("c"))), [BATCH])
    assert selected.to_pydict() == {"b": ["w", "x", "y", None], "c": [2, 3, None, 5]}
    (widened,) = outputs(WithColumns({"c": col("a") * 2, "a": col("a") - 1, "k": lit(7)}), [BATCH])
    assert widened.to_pydict() == {
        "a": [0, 1, None, 3],
        "b": ["w", "x", "y", None],
        "c": [2, 4, None, 8],
        "k": [7] * 4,
    }


def test_names_may_be_swapped_and_dropped() -> None:
    (swapped,) = outputs(Rename({"a": "b", "b": "a"}), [BATCH])
    assert swapped.schema.names == ["b", "a"]
    assert swapped.column("b").to_pylist() == [1, 2, None, 4]
    (dropped,) = outputs(Drop(("a",)), [BATCH])
    assert dropped.schema.names == ["b"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Filter(col("x") > 0).output_schema(BATCH.schema), "x"),
        (lambda: Filter(col("a") + 1).output_schema(BATCH.schema), "true or false"),
        (lambda: Select((col("x"),)).output_schema(BATCH.schema), "x"),
        (lambda: Select(()), "at least one"),
        (lambda: Select((col("a"), col("b").alias("a"))), r"the same name \['a'\]"),
        (lambda: WithColumns({}), "at least one"),
        (lambda: WithColumns({"c": col("x")}).output_schema(BATCH.schema), "x"),
        (lambda: Rename({"x": "y"}).output_schema(BATCH.schema), r"\['x'\]; the input has \['a', 'b'\]"),
        (lambda: Rename({"a": "b"}).output_schema(BATCH.schema), r"\['b'\]"),
        (lambda: Drop(("x",)).output_schema(BATCH.schema), r"\['x'\]; the input has \['a', 'b'\]"),
        (lambda: Drop(("a", "b")).output_schema(BATCH.schema), "at least one"),
        (lambda: AssignEventTime(EventTime("a")).output_schema(BATCH.schema), "int64"),
    ],
)
def test_what_does_not_fit_is_refused_while_building(build: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build()


def test_a_filter_on_numbers_is_refused_at_run_time_too() -> None:
    """Where the schema is not known while building."""
    with pytest.raises(PlanError, match="'under test' subtask 0/1.*true or false"):
        outputs(Filter(col("a") + 1), [BATCH])
