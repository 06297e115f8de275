"""Aggregates of the user's own: types from no rows, any grouping of partial results, and mistakes by name."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow as rf
from rayflow.operators.grouping import Int64Array
from rayflow.operators.keyed.running import RunningAggregate
from rayflow.operators.preaggregate import Preaggregation
from tests.operators.aggregating import batch_of, finalised, plan_of, result_of, times_of


class WeightedMean(rf.UserAggregate):
    """Of two columns, x and k; rows with a null are skipped."""

    def init(self, values: pa.Array, groups: Int64Array, n: int) -> pa.StructArray | pa.RecordBatch:
        value, weight = values.flatten()
        valid = pc.and_(value.is_valid(), weight.is_valid()).to_numpy(zero_copy_only=False)
        x, w = (np.where(valid, part.fill_null(0).to_numpy().astype(float), 0.0) for part in (value, weight))
        return pa.record_batch(
            {"sum": pa.array(np.bincount(groups, x * w, n)), "weight": pa.array(np.bincount(groups, w, n))}
        )

    def merge(self, accumulators: pa.StructArray, groups: Int64Array, n: int) -> pa.StructArray | pa.RecordBatch:
        sums, weights = (np.bincount(groups, part.to_numpy(), n) for part in accumulators.flatten())
        return pa.record_batch({"sum": pa.array(sums), "weight": pa.array(weights)})

    def finish(self, accumulators: pa.StructArray) -> pa.Array:
        sums, weights = (part.to_numpy() for part in accumulators.flatten())
        return pa.array(sums / np.where(weights == 0, 1, weights), mask=weights == 0)


class Longest(rf.UserAggregate):
    """The longest string, the first of them in alphabetical order: its state is a string, and no number."""

    def init(self, values: pa.Array, groups: Int64Array, n: int) -> pa.StructArray:
        order = pc.sort_indices(
            pa.table({"g": groups, "l": pc.utf8_length(values), "v": values}),
            sort_keys=[("g", "ascending"), ("l", "descending"), ("v", "ascending")],
        ).to_numpy()
        _, at = np.unique(groups[order], return_index=True)
        return pa.StructArray.from_arrays([values.take(pa.array(order[at], pa.int64()))], ["longest"])

    def merge(self, accumulators: pa.StructArray, groups: Int64Array, n: int) -> pa.StructArray:
        return self.init(accumulators.field("longest"), groups, n)

    def finish(self, accumulators: pa.StructArray) -> pa.Array:
        return accumulators.field("longest")


def test_the_example_of_the_documentation_works() -> None:
    text = inspect.getdoc(rf.UserAggregate) or ""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"rf": rf, "np": np, "pa": pa}
    exec(textwrap.dedent(code), names)
    assert result_of(rf.aggregate(names["GeometricMean"](), "x"), [1, 10, 100]) == pytest.approx(10.0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(-9, 9))), min_size=1, max_size=20),
    st.lists(st.integers(1, 19), max_size=4),
)
def test_any_cut_gives_the_same(rows: list[tuple[int, int | None]], cuts: list[int]) -> None:
    words = ["a" * abs(x) + str(x) if x is not None else None for _, x in rows]
    batch = batch_of([x for _, x in rows], pa.int64(), keys=[k for k, _ in rows]).append_column(
        "s", pa.array(words, pa.string())
    )
    aggregates = {
        "mean": rf.aggregate(WeightedMean(), "x", rf.col("k") + 1),
        "word": rf.aggregate(Longest(), "s"),
        "low": rf.aggregate(Longest(), "s", where=rf.col("x") < 0),
        "two": rf.aggregate(WeightedMean(), "x", rf.col("k") + 1, where=rf.col("x") > 0),
    }
    plan = plan_of(batch, **aggregates)
    assert "mean.weight" in plan.schema.names, "partial results can be read by whoever opens a checkpoint"
    edges = sorted({0, len(rows), *(cut for cut in cuts if cut < len(rows))})
    parts = []
    for i, (a, b) in enumerate(pairwise(edges)):
        part = batch.slice(a, b - a)
        parts.append((plan.singles if i % 2 else plan.combine_rows)(part, times_of(part), 0))
    again = Preaggregation.of_partials(("k",), aggregates, plan.schema)
    for row in finalised(again, again.merge(pa.concat_tables(parts), 0)).to_pylist():
        mine = [(x, word) for (k, x), word in zip(rows, words, strict=True) if k == row["k"] and word is not None]
        assert row["mean"] == (pytest.approx(np.mean([x for x, _ in mine])) if mine else None)
        assert row["word"] == min((word for _, word in mine), key=lambda w: (-len(w), w), default=None)
        low = [word for x, word in mine if x is not None and x < 0]
        assert row["low"] == min(low, key=lambda w: (-len(w), w), default=None)
        high = [x for x, _ in mine if x is not None and x > 0]
        assert row["two"] == (pytest.approx(np.mean(high)) if high else None)


class Seen(Longest):
    """Remembers what it was given, which no real one may."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def init(self, values: pa.Array, groups: Int64Array, n: int) -> pa.StructArray:
        self.values += values.to_pylist()
        assert set(groups.tolist()) == set(range(n)), "every group has a row"
        return super().init(values, groups, n)


def test_rows_that_do_not_count_are_never_seen() -> None:
    batch = batch_of(["b", "a", None, "c"], keys=[1, 1, 2, 3])
    for where, seen, wanted in (
        (rf.col("k") < 3, ["b", "a", None], {1: "a", 2: None, 3: None}),
        (rf.col("k") > 9, [], {1: None, 2: None, 3: None}),
        (rf.lit(None).cast("bool"), [], {1: None, 2: None, 3: None}),
    ):
        user = Seen()
        plan = plan_of(batch, out=rf.aggregate(user, "x", where=where))
        user.values.clear()
        partials = plan.combine_rows(batch, times_of(batch), 0)
        assert user.values == seen
        found = finalised(plan, plan.merge(partials, 0))
        assert dict(zip(found["k"].to_pylist(), found["out"].to_pylist(), strict=True)) == wanted


def broken(**functions: Callable[..., Any]) -> rf.UserAggregate:
    return type("Broken", (WeightedMean,), functions)()  # type: ignore[no-any-return]


def total(accumulators: pa.StructArray, groups: Int64Array, n: int) -> pa.StructArray:
    return pa.StructArray.from_arrays([pa.array(np.bincount(groups, minlength=n))], ["sum"])


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (broken(init=lambda self, values, groups, n: 3), "Broken does not work on a row of zero.*record batch, got 3"),
        (broken(init=lambda self, values, groups, n: values[1]), "does not work on a row of zero"),
        (broken(merge=lambda self, *args: total(*args)), "merge must return struct<sum: double, weight: double>"),
        (broken(finish=lambda self, accumulators: [1]), r"finish must return an array, got \[1\]"),
        (
            broken(init=lambda self, v, g, n: pa.StructArray.from_arrays([pa.nulls(n)], ["a"])),
            "a type that is not null",
        ),
    ],
)
def test_types_that_do_not_fit_are_found_while_building(user: rf.UserAggregate, message: str) -> None:
    with pytest.raises(rf.PlanError, match=f"(?s)'out'.*{message}"):
        plan_of(batch_of([1]), out=rf.aggregate(user, "x", "k"))


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (
            broken(init=lambda self, v, g, n: WeightedMean.init(self, v, g, n).slice(n - 1)),
            "'out': Broken.init must return 2 of struct.*got 1 of struct",
        ),
        (
            broken(finish=lambda self, a: WeightedMean.finish(self, a).slice(1)),
            "Broken.finish must return an array of 2",
        ),
        (
            broken(merge=lambda self, a, g, n: WeightedMean.merge(self, a, g, n) if n == 1 else 1 / 0),
            "Broken.merge raised ZeroDivisionError",
        ),
        (
            broken(merge=lambda self, a, g, n: WeightedMean.merge(self, a, g, n) if n == 1 else pa.nulls(n, a.type)),
            "must return accumulators that are not null",
        ),
    ],
)
def test_what_goes_wrong_on_rows_is_named(user: rf.UserAggregate, message: str) -> None:
    batch = batch_of([1, 2], keys=[1, 2])
    plan = plan_of(batch, out=rf.aggregate(user, "x", "k"))
    with pytest.raises(rf.UserCodeError, match=message):
        finalised(plan, plan.merge(plan.combine_rows(batch, times_of(batch), 0), 0))


def test_other_mistakes() -> None:
    with pytest.raises(rf.PlanError, match=r"needs an instance of rf.UserAggregate, got <class"):
        rf.aggregate(WeightedMean, "x")  # type: ignore[arg-type]
    with pytest.raises(rf.PlanError, match="needs a column"):
        rf.aggregate(WeightedMean())
    with pytest.raises(rf.PlanError, match="needs a condition as where=, which is bool, got int64"):
        plan_of(batch_of([1]), out=rf.aggregate(WeightedMean(), "x", "x", where="x"))
    with pytest.raises(rf.PlanError, match=r"aggregate\(WeightedMean, 'x', 'y'\) needs a column 'y'"):
        plan_of(batch_of([1]), out=rf.aggregate(WeightedMean(), "x", "y"))
    running = RunningAggregate(keys=("k",), aggregates={"out": rf.aggregate(Longest(), "x")})
    with pytest.raises(rf.PlanError, match="no running form"):
        running.output_schema(pa.schema([("k", pa.int64()), ("x", pa.string())]))
    schema = plan_of(batch_of([1]), out=rf.sum("x")).schema
    for aggregate in (rf.aggregate(WeightedMean(), "x", "k"), rf.aggregate(Longest(), "x")):
        with pytest.raises(rf.PlanError, match="'out'"):
            Preaggregation.of_partials(("k",), {"out": aggregate}, schema)
