"""All aggregates through windows and whole flows: combiner, restores, other parallelisms, local disk, batch sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow as rf
import rayflow.operators.runs as runs_module
import rayflow.operators.spill as spill_module
from rayflow import col
from rayflow.core.ids import MAX_WATERMARK
from rayflow.core.keygroups import owner_of
from rayflow.operators.base import MAIN, Collected, Operator, RestoredState, StateBackend
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.windows import Combiner, LocalCombine, WindowAggregate, tumbling
from rayflow.partition import hash_columns, key_groups
from tests.operators.helpers import frozen, opened, outputs, rows

SCHEMA = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.int64()), ("s", pa.string())])


class Range(rf.UserAggregate):
    """Largest minus smallest; with a list in its state, of no use but to be carried along."""

    def init(self, values: pa.Array, groups: Int64Array, n: int) -> pa.StructArray:
        numbers = values.fill_null(0)
        table = pa.table({"g": groups, "v": numbers}).group_by("g", use_threads=False).aggregate(
            [("v", "min"), ("v", "max")]
        )  # fmt: skip
        order = pa.array(np.argsort(table["g"].to_numpy()))
        low, high = (flat(table[name].take(order)) for name in ("v_min", "v_max"))
        lists = pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32)), low)
        return pa.StructArray.from_arrays([low, high, lists], ["low", "high", "lists"])

    def merge(self, accumulators: pa.StructArray, groups: Int64Array, n: int) -> pa.StructArray:
        low = self.init(accumulators.field("low"), groups, n)
        high = self.init(accumulators.field("high"), groups, n)
        return pa.StructArray.from_arrays(
            [low.field("low"), high.field("high"), low.field("lists")], ["low", "high", "lists"]
        )

    def finish(self, accumulators: pa.StructArray) -> pa.Array:
        low, high = (accumulators.field(i).to_numpy() for i in range(2))
        return pa.array(high - low)


AGGREGATES = {
    "variance": rf.variance("v"),
    "distinct": rf.count_distinct("s"),
    "about": rf.approx_count_distinct("v"),
    "middle": rf.median("v"),
    "levels": rf.quantile("v", [0.1, 0.9], where=col("s") != "a"),
    "listed": rf.collect("s", max=3),
    "low": rf.arg_min("s", "v"),
    "high": rf.arg_max("v", "t"),
    "some": rf.count(where=col("v") > 0),
    "total": rf.sum("v", where=col("s") == "a"),
    "range": rf.aggregate(Range(), "v"),
}
ROW = st.tuples(
    st.integers(0, 4),
    st.integers(-20, 20),
    st.one_of(st.none(), st.integers(-9, 9)),
    st.one_of(st.none(), st.sampled_from(["a", "b", "cc", ""])),
)


def _factory(*, partial: bool = False) -> WindowAggregate:
    what: dict[str, Any] = {"keys": ("k",), "aggregates": AGGREGATES, "event_time": "t", "schema": SCHEMA}
    return WindowAggregate(spec=tumbling("10us"), input_is_partial=partial, **what)


def _batch(data: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
    arrays = [pa.array([row[i] for row in data], field.type) for i, field in enumerate(SCHEMA)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def _owners(batch: pa.RecordBatch | pa.Table, workers: int) -> Any:
    return np.array([owner_of(int(g), workers, 128) for g in key_groups(hash_columns([flat(batch.column("k"))]), 128)])


def _restored(states: list[list[RestoredState]], workers: int, out: Collected, **how: Any) -> list[Operator]:
    operators = []
    for index in range(workers):
        operator, _ = opened(_factory(partial=how["partial"]), index, workers, out, how["backend"])
        given_back = []
        for state in (state for old in states for state in old):
            mine = _owners(state.table, workers) == index if state.table.num_rows else np.zeros(0, bool)
            given_back.append(
                RestoredState(state.name, state.table.filter(pa.array(mine, pa.bool_())), state.meta, state.piece)
            )
        operator.restore(given_back)
        operators.append(operator)
    return operators


@settings(max_examples=40, deadline=None)
@given(
    st.lists(ROW, min_size=1, max_size=40),
    st.lists(st.integers(1, 39), max_size=6),
    st.booleans(),
    st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3),
    st.sampled_from([0, 500, 4_000]),
)
def test_any_way_through_a_window_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    data: list[tuple[Any, ...]],
    cuts: list[int],
    partial: bool,
    workers: list[int],
    memory_bytes: int,
) -> None:
    """Combined or not, restored at another parallelism after each batch, with runs on local disk or not."""
    simple = _through([data], partial=False, workers=[], backend=StateBackend())
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    batches = [data[a:b] for a, b in pairwise(edges)]
    folder = tmp_path_factory.mktemp("spill")

    def scratch(name: str) -> Path:
        made = folder / f"{name}-{len(list(folder.iterdir()))}"
        made.mkdir()
        return made

    backend = StateBackend("rocksdb", memory_bytes, scratch) if memory_bytes else StateBackend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill_module, "BLOCK_ROWS", 4)
        patch.setattr(runs_module, "PENDING_ROWS", 8)
        patch.setattr(runs_module, "PIECE_BYTES", 64)
        found = _through(batches, partial=partial, workers=workers, backend=backend)
    assert found == simple


def _through(
    batches: list[list[tuple[Any, ...]]],
    *,
    partial: bool,
    workers: list[int],
    backend: StateBackend,
) -> dict[Any, Any]:
    out = Collected()
    arriving = [_batch(data) for data in batches]
    if partial:
        combine = LocalCombine(keys=("k",), spec=tumbling("10us"), aggregates=AGGREGATES, event_time="t")
        arriving = outputs(combine, arriving)
    count = workers[0] if workers else 1
    operators = [opened(_factory(partial=partial), i, count, out, backend)[0] for i in range(count)]
    for at, batch in enumerate(arriving):
        owners = _owners(batch, count)
        for index, operator in enumerate(operators):
            operator.process(batch.filter(pa.array(owners == index)), 0)
        if workers:
            states = [frozen(operator, pieces=at % 2 == 0) for operator in operators]
            for operator in operators:
                operator.close()
            count = workers[at % len(workers)]
            operators = _restored(states, count, out, partial=partial, backend=backend)
    for operator in operators:
        operator.on_watermark(MAX_WATERMARK)
        operator.close()
    found: dict[Any, Any] = {}
    for row in rows(out.batches.get(MAIN, [])):
        key = (row["k"], row["window_start"])
        assert key not in found, "W3"
        spread: Any = row["variance"]
        found[key] = row | {"variance": None if spread is None else round(spread, 6)}
    return found


def _events(count: int) -> pa.Table:
    rng = np.random.default_rng(4)
    return pa.table(
        {
            "k": rng.integers(0, 7, count),
            "t": pa.array(rng.permutation(count) * 1_000, pa.timestamp("us")),
            "v": rng.integers(-50, 50, count),
            "s": pa.array(rng.choice(["a", "b", "c", "dd"], count)),
        }
    )


@pytest.mark.parametrize(("parallelism", "batch_rows"), [(1, 10_000), (2, 97)])
def test_whole_flows_equal_duckdb(parallelism: int, batch_rows: int) -> None:
    """Columns that only a condition or an order reads come through the push-down of columns, too."""
    events = _events(2_000)
    stream = rf.from_arrow(events.append_column("unused", events["v"]), event_time="t", max_delay="1h")
    result = (
        stream.key_by("k")
        .window(rf.tumbling("500ms"))
        .agg(
            spread=rf.variance("v"),
            distinct=rf.count_distinct("v"),
            some=rf.count(where=col("s") == "a"),
            total=rf.sum("v", where=col("s") != "a"),
            latest=rf.arg_max("s", "t"),
            listed=rf.collect("v", max=1_000),
            middle=rf.median("v", where=col("v") > 10),
            about=rf.approx_count_distinct("t"),
            range=rf.aggregate(Range(), "v"),
        )
    )
    config = rf.JobConfig(batch_rows=batch_rows)
    found = rf.Flow("f", result.collect()).run(local=True, parallelism=parallelism, config=config).table()
    with duckdb.connect() as db:
        db.register("events", events)
        expected = db.execute(
            """select k, time_bucket(interval 500 milliseconds, t, timestamp '1970-01-01') w, var_samp(v),
            count(distinct v), count(*) filter (s = 'a'), (sum(v) filter (s <> 'a'))::bigint, arg_max(s, t),
            list(v order by t), quantile_cont(v, 0.5) filter (v > 10), count(distinct t), max(v) - min(v)
            from events group by all"""
        ).fetchall()
    assert found.num_rows == len(expected)
    actual = {(row["k"], row["window_start"]): row for row in found.to_pylist()}
    for k, start, spread, distinct, some, total, latest, listed, middle, about, reach in expected:
        row = actual[k, start]
        assert row["spread"] == pytest.approx(spread)
        assert (row["distinct"], row["some"], row["total"]) == (distinct, some, total)
        assert (row["latest"], row["listed"], row["range"]) == (latest, listed, reach)
        assert row["middle"] == (None if middle is None else pytest.approx(middle, rel=0.01))
        assert row["about"] == pytest.approx(about, rel=0.05, abs=1)


@pytest.mark.parametrize("column", ["v", "s"])
def test_a_combined_row_is_never_too_large_for_a_channel(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many different values of one key in one batch would be one row, larger than a channel takes."""
    rows, ints = 60_000, pa.array(range(60_000))
    strings = pa.array([f"a longer text, number {i}" for i in range(rows)])
    zeros = pa.array(np.zeros(rows, np.int64))
    events = pa.table({"k": zeros, "t": zeros.cast(pa.timestamp("us")), "v": ints, "s": strings})
    windows = rf.from_arrow(events, event_time="t", max_delay="0s").key_by("k").window(rf.tumbling("1s"))
    flow = rf.Flow("f", windows.agg(n=rf.count_distinct(column), m=rf.median("v")).collect())
    config = rf.JobConfig(inflight_bytes=262_144)
    (row,) = flow.run(local=True, parallelism=2, config=config).table().to_pylist()
    assert row["n"] == rows
    assert row["m"] == pytest.approx((rows - 1) / 2, rel=0.01)
    monkeypatch.setattr(Combiner, "ROW_BYTES", 1 << 40)
    with pytest.raises(rf.JobFailedError, match="larger than half the credit"):
        flow.run(local=True, parallelism=2, config=config)


def test_a_failing_aggregate_of_the_user_names_the_step() -> None:
    class Failing(Range):
        def merge(self, accumulators: pa.StructArray, groups: Int64Array, n: int) -> pa.StructArray:
            if n > 1:
                raise ValueError("no such luck")
            return super().merge(accumulators, groups, n)

    windows = rf.from_arrow(_events(50), event_time="t", max_delay="1h").key_by("k").window(rf.tumbling("1s"))
    flow = rf.Flow("f", windows.agg(name="odd", out=rf.aggregate(Failing(), "v")).collect())
    with pytest.raises(rf.JobFailedError, match=r"odd.*'out'.*Failing.merge raised ValueError: no such luck"):
        flow.run(local=True)
