"""State of joins in checkpoints: pieces uploaded once, freezing without a copy, and states that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, SchemaChangedError, StateSchemaError
from rayflow.operators.base import Collected, FrozenState, Operator
from rayflow.operators.joins import buffer as buffer_module
from rayflow.operators.joins.asof import AsofJoin
from rayflow.operators.joins.buffer import Buffer
from rayflow.operators.joins.interval import IntervalJoin
from rayflow.operators.joins.kernels import SortedRows, merged, sort_rows
from rayflow.operators.joins.operator import Join
from rayflow.operators.joins.window import WindowJoin
from rayflow.operators.windows import Tumbling
from tests.operators.helpers import frozen, opened

SCHEMA = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.int64())])
SIDES: dict[str, Any] = {
    "left_keys": ("k",),
    "right_keys": ("k",),
    "left_time": "t",
    "right_time": "t",
    "left_schema": SCHEMA,
    "right_schema": SCHEMA,
}
ROWS = 8_192
"""More than a piece."""


def _interval(**options: Any) -> IntervalJoin:
    return IntervalJoin(**(SIDES | {"lower_us": -5 * ROWS, "upper_us": 5 * ROWS} | options))


FACTORIES: dict[str, Join] = {
    "interval": _interval(),
    "window": WindowJoin(**SIDES, window=Tumbling(100 * ROWS)),
    "asof": AsofJoin(**SIDES, how="left"),
}


def _batch(start: int, rows: int = ROWS) -> pa.RecordBatch:
    """Unique keys, a microsecond apart."""
    at = np.arange(start, start + rows)
    return pa.RecordBatch.from_arrays([pa.array(at), pa.array(at, pa.timestamp("us")), pa.array(at)], schema=SCHEMA)


def _pieces(state: FrozenState, name: str) -> list[str]:
    (table,) = (table for table in state.tables if table.name == name)
    return [piece.id for piece in table.pieces]


def _snapshot(operator: Operator) -> FrozenState:
    state = operator.snapshot(CheckpointId(1))
    assert state is not None
    return state


@pytest.mark.parametrize("kind", FACTORIES)
def test_a_run_is_uploaded_once(kind: str) -> None:
    operator, _ = opened(FACTORIES[kind])
    operator.process(_batch(0, 8 * ROWS), 1)
    operator.process(_batch(0, 8 * ROWS), 0)
    first = _snapshot(operator)
    operator.process(_batch(8 * ROWS), 1)
    second = _snapshot(operator)
    for side in ("left", "right"):
        (before,) = _pieces(first, side)
        assert _pieces(second, side)[0] == before
    assert len(_pieces(second, "right")) == 2
    assert len(_pieces(second, "left")) == 1


@pytest.mark.parametrize("kind", FACTORIES)
def test_restored_pieces_keep_their_names(kind: str) -> None:
    operator, _ = opened(FACTORIES[kind])
    operator.process(_batch(0), 0)
    operator.process(_batch(0), 1)
    before = _snapshot(operator)
    again, out = opened(FACTORIES[kind])
    again.restore(frozen(operator))
    for side in ("left", "right"):
        assert _pieces(_snapshot(again), side) == _pieces(before, side)
    again.on_watermark(2**63 - 1)
    assert sum(batch.num_rows for batch in out.batches.get("main", [])) == (0 if kind == "interval" else ROWS)


@pytest.mark.parametrize("kind", FACTORIES)
def test_what_is_frozen_does_not_change(kind: str) -> None:
    operator, _ = opened(FACTORIES[kind])
    operator.process(_batch(0, 10), 0)
    operator.process(_batch(0, 10), 1)
    tables = [(table, [batch.to_pylist() for batch in table.batches]) for table in _snapshot(operator).tables]
    operator.process(_batch(10, 100), 0)
    operator.process(_batch(10, 100), 1)
    operator.on_watermark(100 * ROWS)
    for table, rows in tables:
        assert [batch.to_pylist() for batch in table.batches] == rows


@pytest.mark.parametrize("how", ["inner", "full"])
def test_state_expires_with_the_watermark(how: str) -> None:
    """Rows of both sides stay as long as their partners may come, and not much longer."""
    reach = 2 * ROWS
    operator, _ = opened(_interval(how=how, lower_us=-reach, upper_us=reach))
    most = 0
    for start in range(0, 40 * ROWS, ROWS):
        for side in (0, 1):
            operator.process(_batch(start), side)
        operator.on_watermark(start + ROWS)
        most = max(most, *(buffer.rows for buffer in operator.buffers))  # type: ignore[attr-defined]
    kept = 1 if how == "inner" else 2  # those that are still to be decided need their partners
    assert most <= 2 * (kept * reach + ROWS) + 2 * ROWS


def test_versions_that_are_superseded_are_forgotten() -> None:
    operator, _ = opened(FACTORIES["asof"])
    for start in range(0, 100 * ROWS, ROWS):
        batch = _batch(start)
        operator.process(batch.set_column(0, "k", pa.array(np.arange(ROWS) % 50)), 1)
        operator.on_watermark(start + ROWS)
    assert operator.buffers[1].rows <= 2 * 50 + 65_536 + ROWS  # type: ignore[attr-defined]


def test_state_of_another_join_is_refused() -> None:
    operator, _ = opened(_interval(how="left"))
    operator.process(_batch(0, 10), 0)
    states = frozen(operator)
    for factory in (_interval(how="inner"), _interval(how="left", upper_us=6 * ROWS), FACTORIES["asof"]):
        with pytest.raises(StateSchemaError, match=r"under test.*rows that it needs may be gone"):
            opened(factory)[0].restore(states)
    other = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.string())])
    with pytest.raises(StateSchemaError, match=r"rows of the left side have .*v: string, in the checkpoint .*v: int64"):
        opened(_interval(how="left", left_schema=other))[0].restore(states)
    with pytest.raises(DataError, match="knows the states"):
        opened(_interval(how="left"))[0].restore([replace(states[0], name="other")])


def test_rows_of_another_schema_and_null_times_are_refused() -> None:
    operator, _ = opened(_interval())
    with pytest.raises(SchemaChangedError, match=r"under test.*the right side was planned with k: int64"):
        operator.process(_batch(0, 3).rename_columns(["k", "t", "w"]), 1)
    nulls = _batch(0, 3).set_column(1, "t", pa.array([1, None, 2], pa.timestamp("us")))
    with pytest.raises(DataError, match=r"under test.*left side: the event time 't' is null in 1 of 3 rows"):
        operator.process(nulls, 0)


@pytest.mark.parametrize("kind", FACTORIES)
def test_late_rows_are_counted_through_restores(kind: str) -> None:
    factory = FACTORIES[kind]
    operator, out = opened(factory)
    operator.on_watermark(100 * ROWS)
    operator.process(_batch(-3, 3), 0)
    operator.process(_batch(-2, 2), 1)
    again, out = opened(factory, out=out)
    again.restore(frozen(operator))
    again.process(_batch(-1, 1), 1)
    assert again.late_rows == 6  # type: ignore[attr-defined]
    assert {tag: sum(b.num_rows for b in found) for tag, found in out.batches.items()} == {
        "late_left": 3,
        "late_right": 3,
    }


def test_encoded_columns_and_mixed_units_are_joined() -> None:
    """Event times of other units and zones, before 1970 too; dictionaries, in which batches may differ."""
    left = pa.schema([("k", pa.dictionary(pa.int8(), pa.string())), ("t", pa.timestamp("ns", "Asia/Tokyo"))])
    right = pa.schema([("k", pa.string()), ("t", pa.date32())])
    factory = _interval(left_schema=left, right_schema=right, lower_us=0, upper_us=0, how="full")
    operator, out = opened(factory)
    day = 86_400_000_000_000
    for name in ("a", "b"):
        keys = pa.array([name]).dictionary_encode().cast(left.field("k").type)
        times = pa.array([-day], left.field("t").type)
        operator.process(pa.RecordBatch.from_arrays([keys, times], schema=left), 0)
    days = pa.RecordBatch.from_arrays([pa.array(["b", "c"]), pa.array([-1, -1], pa.date32())], schema=right)
    operator.process(days, 1)
    assert operator.on_watermark(MIN_WATERMARK) == MIN_WATERMARK
    operator.on_watermark(2**63 - 1)
    found = _table(out)
    assert found.schema.names == ["k", "t", "t_right", "join_time"]
    assert found.schema.field("join_time").type == pa.timestamp("us", "Asia/Tokyo")
    rows = zip(*(found.column(i).is_null().to_pylist() for i in (1, 2)), found.column(0).to_pylist(), strict=True)
    assert sorted(rows) == [(False, False, "b"), (False, True, "a"), (True, False, "c")]
    assert set(found.column("join_time").cast(pa.int64()).to_pylist()) == {-day // 1_000}


def _table(out: Collected) -> pa.Table:
    found = out.table()
    assert found is not None
    return found


def test_a_row_that_is_kept_for_ever_is_copied_by_few_merges_and_found_in_few_runs(monkeypatch: Any) -> None:
    copied: list[int] = []

    def counting(parts: Sequence[SortedRows]) -> SortedRows:
        copied.append(sum(len(part) for part in parts))
        return merged(parts)

    monkeypatch.setattr(buffer_module, "merged", counting)
    monkeypatch.setattr(buffer_module, "SMALL_RUN_BYTES", 16_000)
    buffer, rows = Buffer(), 2_000
    for number in range(100):
        batch = pa.record_batch({"k": np.arange(rows) % 7, "v": np.full(rows, number)})
        buffer.append(sort_rows(batch, ["k"], np.zeros(rows, np.int64)))
    assert buffer.rows == 100 * rows
    assert len(buffer.runs) <= 2 * (buffer_module.FAN_IN - 1)
    assert sum(copied) <= 2 * 100 * rows  # merged in pairs: five times


def test_small_runs_and_large_ones_between_each_other_stay_few() -> None:
    buffer, rng = Buffer(), np.random.default_rng(1)
    for rows in rng.choice([1, 10, 3_000, 200_000], 300, p=[0.5, 0.3, 0.15, 0.05]).tolist():
        buffer.append(sort_rows(pa.record_batch({"k": np.zeros(rows, np.int64)}), ["k"], np.zeros(rows, np.int64)))
    assert len(buffer.runs) <= 40
