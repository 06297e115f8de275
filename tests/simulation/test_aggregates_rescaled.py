"""Aggregates whose partial results are lists, and one of the user, through crashes, savepoints and two changes of
parallelism: the result is that of all rows at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rayflow.operators import aggregates as rf
from rayflow.operators import list_partials
from rayflow.operators.grouping import Int64Array
from rayflow.operators.preaggregate import Preaggregation
from rayflow.operators.user_aggregate import UserAggregate
from rayflow.operators.windows import tumbling
from rayflow.stream import Stream
from tests.simulation.faults import Violation
from tests.simulation.scenario import SECOND, table_of
from tests.simulation.target import Row
from tests.simulation.test_key_groups_rescaled import CALLS, KEYS, rescaled
from tests.simulation.tiny import forget_local_files, tiny


class Product(UserAggregate):
    """Of whole numbers, modulo a prime."""

    prime = 1_000_003

    def init(self, values: pa.Array, groups: Int64Array, n: int) -> pa.StructArray:
        found = np.ones(n, np.int64)
        numbers = values.to_numpy()
        for turn in range(len(groups)):
            found[groups[turn]] = found[groups[turn]] * (numbers[turn] + 1) % self.prime
        return pa.StructArray.from_arrays([pa.array(found)], ["product"])

    def merge(self, accumulators: pa.StructArray, groups: Int64Array, n: int) -> pa.StructArray:
        parts = accumulators.field("product").to_numpy()
        return self.init(pa.array(parts - 1), groups, n)

    def finish(self, accumulators: pa.StructArray) -> pa.Array:
        return accumulators.field("product")


AGGREGATES: dict[str, Any] = {
    "same": rf.count_distinct("k"),
    "distinct": rf.count_distinct("v"),
    "about": rf.approx_count_distinct("v"),
    "middle": rf.median("v"),
    "listed": rf.collect("v", max=CALLS - 3),
    "last": rf.arg_max("v", "t"),
    "product": rf.aggregate(Product(), "v"),
}
COLUMNS = ("k", *AGGREGATES)


def all_rows() -> pa.RecordBatch:
    rows = [(k, call * SECOND, k + call) for call in range(CALLS) for k in range(KEYS)]
    return table_of(rows).combine_chunks().to_batches()[0]


def at_once() -> pa.Table:
    batch = all_rows()
    plan = Preaggregation.of_rows(("k",), AGGREGATES, batch.schema, pa.timestamp("us"))
    times = batch.column("t").cast(pa.timestamp("us")).view(pa.int64())
    return plan.finalise(plan.combine_rows(batch, times, 0), lambda starts: starts)


def as_rows(columns: Sequence[pa.Array | pa.ChunkedArray]) -> list[Row]:
    return [
        tuple(tuple(value) if isinstance(value, list) else value for value in row)
        for row in zip(*(column.to_pylist() for column in columns), strict=True)
    ]


def joined(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of the target are compared as they are; lists become strings."""
    lists = batch.column("listed").cast(pa.list_(pa.string()))
    columns = [batch.column(name) if name != "listed" else pc.binary_join(lists, " ") for name in COLUMNS]
    return pa.RecordBatch.from_arrays(columns, names=list(COLUMNS))


def flow(stream: Stream, workers: tuple[int, ...]) -> tuple[Stream, Counter[Row]]:
    """One window over everything: what is in it at the first stop is there after the last."""
    result = stream.key_by("k").window(tumbling(CALLS)).agg(**AGGREGATES)
    schema = joined(at_once().combine_chunks().to_batches()[0]).schema
    return result.map_batches(joined, schema=schema), Counter(as_rows(joined(at_once().to_batches()[0]).columns))


@pytest.mark.parametrize("state", ["full", "incremental", "rocksdb"])
def test_the_result_is_that_of_all_rows_at_once(state: str) -> None:
    options: dict[str, Any] = {"state": "rocksdb", "state_memory_bytes": 2_000} if state == "rocksdb" else {}
    options["inflight_bytes"] = 8192
    with nullcontext() if state == "full" else tiny():
        rescaled(flow, (2, 4, 2), 1, **options)
    forget_local_files()


def test_the_oracle_is_right() -> None:
    for k, same, distinct, about, middle, listed, last, product in as_rows(at_once().select(list(COLUMNS)).columns):
        values = list(range(k, k + CALLS))
        assert (same, distinct, last, listed) == (1, CALLS, values[-1], tuple(values[:-3]))
        assert about == pytest.approx(CALLS, abs=2)
        assert middle == pytest.approx(np.median(values), rel=0.01)
        assert product == int(np.prod(np.array(values, object) + 1)) % Product.prime


def test_lists_that_are_not_merged_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken variant: distinct values of two parts are put one after the other."""

    def unmerged(ids: Int64Array, values: pa.Array, groups: int) -> pa.LargeListArray:
        order = np.argsort(ids, kind="stable")
        return list_partials.lists_of(values.take(pa.array(order)), np.bincount(ids, minlength=groups))

    def broken(stream: Stream, workers: tuple[int, ...]) -> tuple[Stream, Counter[Row]]:
        made = flow(stream, workers)
        monkeypatch.setattr(list_partials, "_distinct", unmerged)
        return made

    with pytest.raises((Violation, AssertionError), match="R3|expected|committed"):
        rescaled(broken, (2, 4, 2), 1, inflight_bytes=8192)
