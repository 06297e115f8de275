"""Every type that has an order goes through running aggregates and top, and comes back out of a checkpoint."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import rayflow.operators.aggregates as rf
from rayflow.operators.keyed.deduplicate import Deduplicate
from rayflow.operators.keyed.reduce import Reduce
from rayflow.operators.keyed.running import RunningAggregate
from rayflow.operators.keyed.top import Top
from tests.operators.keyed.rig import Way, run

MOMENT = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
DAY = dt.date(2024, 1, 1)
VALUES: list[tuple[pa.DataType, list[Any]]] = [
    (pa.bool_(), [False, True]),
    (pa.int8(), [-128, 127]),
    (pa.uint64(), [0, 2**64 - 1]),
    (pa.float16(), [np.float16(-1), np.float16(2)]),
    (pa.float32(), [-1.5, 2.5]),
    (pa.string(), ["a", "é"]),
    (pa.large_string(), ["a", "b"]),
    (pa.binary(), [b"", b"\xff"]),
    (pa.binary(2), [b"aa", b"ab"]),
    (pa.decimal128(38, 3), [decimal.Decimal("-1.500"), decimal.Decimal("2.250")]),
    (pa.decimal256(60, 1), [decimal.Decimal("-1.5"), decimal.Decimal("2.5")]),
    (pa.date32(), [DAY, DAY + dt.timedelta(1)]),
    (pa.date64(), [DAY, DAY + dt.timedelta(1)]),
    (pa.time32("s"), [dt.time(1), dt.time(2)]),
    (pa.time64("us"), [dt.time(1), dt.time(2)]),
    (pa.timestamp("s"), [MOMENT.replace(tzinfo=None), MOMENT.replace(tzinfo=None, year=2025)]),
    (pa.timestamp("ms", "UTC"), [MOMENT, MOMENT + dt.timedelta(1)]),
    (pa.duration("us"), [dt.timedelta(-1), dt.timedelta(1)]),
    (pa.dictionary(pa.int8(), pa.string()), ["a", "b"]),
]


def _table(kind: pa.DataType, values: list[Any]) -> pa.Table:
    low, high = values
    column = pa.array([None, high, low, None, high, low], pa.string() if pa.types.is_dictionary(kind) else kind)
    if pa.types.is_dictionary(kind):
        column = column.cast(kind)
    return pa.table({"k": pa.array([1, 1, 1, 1, 1, 2]), "v": column})


@pytest.mark.parametrize(("kind", "values"), VALUES, ids=lambda v: str(v) if isinstance(v, pa.DataType) else "")
@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4]])
def test_values(kind: pa.DataType, values: list[Any], cuts: list[int]) -> None:
    table, (low, high) = _table(kind, values), values
    way = Way(cuts, restores=True)
    aggregates = {"lo": rf.min("v"), "hi": rf.max("v"), "one": rf.first("v"), "end": rf.last("v"), "n": rf.count("v")}
    found = run(RunningAggregate(keys=("k",), aggregates=aggregates), table, way)
    assert [tuple(r.values())[1:] for r in found] == [
        (None, None, None, None, 0),
        (high, high, high, high, 1),
        (low, high, high, low, 2),
        (low, high, high, low, 2),
        (low, high, high, high, 3),
        (low, low, low, low, 1),
    ]
    best = run(Top(keys=("k",), n=1, by="v"), table, way)
    assert [r["v"] for r in best] == [high, low]
    least = run(Top(keys=("k",), n=2, by="v", descending=False), table, way)
    assert [(r["v"], r["rank"]) for r in least] == [(high, 1), (low, 1), (low, 1)]
    newest = run(Reduce(keys=("k",), fn=lambda state, rows: rows), table, way)
    assert [r["v"] for r in newest] == table.column("v").to_pylist()


@pytest.mark.parametrize(("kind", "values"), VALUES, ids=lambda v: str(v) if isinstance(v, pa.DataType) else "")
def test_keys(kind: pa.DataType, values: list[Any]) -> None:
    table = _table(kind, values)
    found = run(Deduplicate(keys=("v",)), table, Way([1, 2, 3, 4], restores=True))
    assert [r["v"] for r in found] == [None, *reversed(values)]
