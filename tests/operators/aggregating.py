"""One aggregate under test: the same values aggregated in several ways, which must agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayflow.operators.aggregates import Aggregate
from rayflow.operators.preaggregate import Preaggregation

TIME = pa.timestamp("us")


def batch_of(values: Any, kind: pa.DataType | None = None, keys: Any = None) -> pa.RecordBatch:
    rows = len(values)
    times = pa.array(np.arange(rows), TIME)
    return pa.record_batch({"k": [0] * rows if keys is None else keys, "x": pa.array(values, kind), "t": times})


def plan_of(batch: pa.RecordBatch, **aggregates: Aggregate) -> Preaggregation:
    return Preaggregation.of_rows(("k",), aggregates, batch.schema, TIME)


def times_of(batch: pa.RecordBatch) -> pa.Array:
    return batch.column("t").view(pa.int64())


def finalised(plan: Preaggregation, partials: pa.Table) -> pa.Table:
    """Output rows of windows of a microsecond."""
    return plan.finalise(partials, lambda starts: starts + 1)


def result_of(aggregate: Aggregate, values: list[Any], kind: pa.DataType | None = None) -> Any:
    """The aggregate over the values, at once, row by row and in halves, which must agree."""
    batch = batch_of(values, kind)
    plan = plan_of(batch, out=aggregate)
    half = len(values) // 2
    pieces = [batch.slice(0, half), batch.slice(half)]
    ways = [
        plan.combine_rows(batch, times_of(batch), 0),
        plan.merge(plan.singles(batch, times_of(batch), 0), 0),
        plan.merge(pa.concat_tables(plan.combine_rows(p, times_of(p), 0) for p in pieces if p.num_rows), None),
    ]
    for way in ways:
        assert way.schema.equals(plan.schema)
    tables = [finalised(plan, way) for way in ways]
    assert all(table.schema.equals(plan.output_schema) for table in tables)
    found = [table.column("out").to_pylist() for table in tables]
    assert all(len(one) == 1 for one in found)
    for (one,) in found[1:]:
        assert one == found[0][0] or (isinstance(one, float) and one == pytest.approx(found[0][0], nan_ok=True))
    return found[0][0]
