"""The log-structured store of runs: nothing lost, bounded, and never changed under a snapshot."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayflow.operators.runs as runs_module
from rayflow.operators.runs import Run, RunStore

Rows = list[tuple[int, int, int]]


def _merge(table: pa.Table, start: int | None) -> pa.Table:
    if start is not None:
        assert set(table.column("s").cast(pa.int64()).to_pylist()) == {start}
    merged = pa.TableGroupBy(table, ["s", "k"], use_threads=False).aggregate([("v", "sum")])
    return pa.table({"s": merged.column("s"), "k": merged.column("k"), "v": merged.column("v_sum")})


def _run(rows: Rows) -> Run:
    starts = [s for s, _, _ in rows]
    table = pa.table(
        {
            "s": pa.array(starts, pa.timestamp("us")),
            "k": [k for _, k, _ in rows],
            "v": [v for _, _, v in rows],
        }
    )
    return Run(table, min(starts), max(starts), merged=False)


def _sums(tables: list[pa.Table]) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    for table in tables:
        starts = table.column("s").cast(pa.int64()).to_pylist()
        for s, k, v in zip(starts, table.column("k").to_pylist(), table.column("v").to_pylist(), strict=True):
            found[(s, k)] = found.get((s, k), 0) + v
    return found


ROW = st.tuples(st.integers(-3, 6), st.integers(0, 3), st.integers(-5, 5))
STEP = st.one_of(st.lists(ROW, min_size=1, max_size=8), st.integers(-4, 7))


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=30), st.sampled_from([(1, 1, 2), (6, 3, 2), (12, 4, 3), (1000, 100, 4)]))
def test_like_a_dictionary(steps: list[Rows | int], bounds: tuple[int, int, int]) -> None:
    """Against a dict of sums, with bounds so small that every path of merging and splitting is taken."""
    with pytest.MonkeyPatch.context() as patch:
        for name, bound in zip(("PENDING_ROWS", "SMALL_ROWS", "SMALL_RUNS"), bounds, strict=True):
            patch.setattr(runs_module, name, bound)
        store, model = RunStore(_merge, "s"), dict[tuple[int, int], int]()
        for step in steps:
            if isinstance(step, int):
                due = store.take(step)
                closed = {key: v for key, v in model.items() if key[0] <= step}
                model = {key: v for key, v in model.items() if key[0] > step}
                if due is None:
                    assert closed == {}
                    continue
                assert _sums([due.table]) == closed
                assert due.rows == len(closed), "one row a key and window"
                starts = due.table.column("s").cast(pa.int64()).to_pylist()
                assert starts == sorted(starts)
            else:
                store.append(_run(step))
                for s, k, v in step:
                    model[(s, k)] = model.get((s, k), 0) + v
            assert _sums([run.table for run in store.runs()]) == model
            assert store.low == min((s for s, _ in model), default=None)
            for run in store.runs():
                seen = run.table.column("s").cast(pa.int64()).to_pylist()
                assert (min(seen), max(seen)) == (run.low, run.high)


def test_the_number_of_runs_and_rows_is_bounded() -> None:
    store = RunStore(_merge, "s")
    rng = np.random.default_rng(0)
    for _ in range(2_000):
        store.append(_run([(0, int(k), 1) for k in rng.integers(0, 50, 20)]))
        assert len(store.runs()) <= runs_module.SMALL_RUNS + store.rows // runs_module.SMALL_ROWS + 2
    assert store.rows < 3 * 50 + runs_module.SMALL_RUNS * 50
    assert sum(_sums([run.table for run in store.runs()]).values()) == 40_000


def test_what_was_taken_out_by_reference_does_not_change() -> None:
    store = RunStore(_merge, "s")
    store.append(_run([(0, 1, 1), (5, 1, 1)]))
    frozen = store.runs()
    before = _sums([run.table for run in frozen])
    for _ in range(200):
        store.append(_run([(0, 1, 1)]))
    store.take(0)
    assert _sums([run.table for run in frozen]) == before


def test_a_closed_window_gives_its_memory_back() -> None:
    """A slice keeps the buffers of the whole run; it is copied once less than half is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "PENDING_ROWS", 1)
        store = RunStore(_merge, "s")
        store.append(_run([(s, k, 1) for s in range(10) for k in range(100)]))
    for last in range(9):
        store.take(last)
        (run,) = store.runs()
        used = run.table.get_total_buffer_size()
        assert used <= 2 * run.rows * 24 + 1024, (last, used, run.rows)
