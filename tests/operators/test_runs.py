"""The log-structured store of runs: nothing lost, bounded, and never changed under a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rayflow.operators.runs as runs_module
import rayflow.operators.spill as spill_module
from rayflow.operators.runs import Run, RunStore
from rayflow.operators.spill import RowOrder, Spill

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


def _open(store: RunStore) -> dict[tuple[int, int], int]:
    """What is in the open windows."""
    tables = [run.table for run in store.runs()]
    floors = [run.closed for run in store.runs()]
    found: dict[tuple[int, int], int] = {}
    for table, floor in zip(tables, floors, strict=True):
        for (s, k), v in _sums([table]).items():
            if floor is None or s > floor:
                found[(s, k)] = found.get((s, k), 0) + v
    return found


def _cross(patch: pytest.MonkeyPatch, pending: int, small: int, many: int, piece_bytes: int = 0) -> None:
    """Bounds so small that every path of merging, splitting and spilling is taken."""
    bounds = {"PENDING_ROWS": pending, "SMALL_ROWS": small, "SMALL_RUNS": many, "PIECE_BYTES": piece_bytes}
    for name, bound in bounds.items():
        patch.setattr(runs_module, name, bound)
    patch.setattr(spill_module, "BLOCK_ROWS", 3)


def _store(folder: Path | None, memory_bytes: int = 400) -> RunStore:
    return RunStore(_merge, "s", None if folder is None else _spill(folder, memory_bytes))


def _spill(folder: Path, memory_bytes: int) -> Spill:
    def scratch(name: str) -> Path:
        made = folder / f"{name}-{len(list(folder.iterdir()))}"
        made.mkdir()
        return made

    return Spill(scratch, memory_bytes, RowOrder("s", ("k",)), "step 'under test' subtask 0/1")


def _taken(store: RunStore, last_start: int) -> list[pa.Table]:
    tables = list(store.take(last_start))
    starts = [s for table in tables for s in table.column("s").cast(pa.int64()).to_pylist()]
    assert starts == sorted(starts)
    assert sum(table.num_rows for table in tables) == len(_sums(tables)), "one row a key and window"
    return tables


def _again(store: RunStore, into: RunStore, closed: int | None) -> RunStore:
    """What a restore gives: every piece under its name, rows in another order, and the small ones as one."""
    frozen = store.freeze()
    for piece in frozen.pieces:
        table = pa.concat_tables(piece.batches)
        table = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
        base, merged = piece.id in frozen.base, piece.id in frozen.merged
        into.restore(table, piece=piece.id, base=base, merged=merged, closed=closed)
    if frozen.small:
        into.restore(pa.concat_tables(frozen.small), closed=closed)
    return into


ROW = st.tuples(st.integers(-3, 6), st.integers(0, 3), st.integers(-5, 5))
STEP = st.one_of(st.lists(ROW, min_size=1, max_size=8), st.integers(-4, 7), st.sampled_from(["restore"]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(STEP, max_size=30),
    st.sampled_from([(1, 1, 2), (6, 3, 2), (12, 4, 3), (1000, 100, 4)]),
    st.booleans(),
    st.sampled_from([0, 100]),
)
def test_like_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[Rows | int | str],
    bounds: tuple[int, int, int],
    spilling: bool,
    piece_bytes: int,
) -> None:
    """Against a dict of sums, restored now and then, on disk or not."""
    folder = tmp_path_factory.mktemp("spill") if spilling else None
    with pytest.MonkeyPatch.context() as patch:
        _cross(patch, *bounds, piece_bytes=piece_bytes)
        store, model = _store(folder), dict[tuple[int, int], int]()
        watermark: int | None = None
        for step in steps:
            if step == "restore":
                store = _again(store, _store(folder), watermark)
            elif isinstance(step, int):
                closed = {key: v for key, v in model.items() if key[0] <= step}
                model = {key: v for key, v in model.items() if key[0] > step}
                assert _sums(_taken(store, step)) == closed
                watermark = step if watermark is None else max(step, watermark)
            elif isinstance(step, list):
                on_time = [row for row in step if watermark is None or row[0] > watermark]
                if on_time:
                    store.append(_run(on_time))
                for s, k, v in on_time:
                    model[(s, k)] = model.get((s, k), 0) + v
            assert _open(store) == model
            assert store.low == min((s for s, _ in model), default=None)
            assert store.rows == sum(run.table.num_rows - run.dead for run in store.runs())
            for run in store.runs():
                seen = [s for s, _ in _sums([run.table]) if run.closed is None or s > run.closed]
                assert (min(seen), max(seen)) == (run.low, run.high)
                assert 2 * run.dead <= run.table.num_rows, "mostly dead rows are let go"
        store.close()
        if folder is not None:
            live = [run.disk for run in store.runs()]
            assert live == []


def test_the_number_of_runs_and_rows_is_bounded() -> None:
    store = _store(None)
    rng = np.random.default_rng(0)
    for _ in range(2_000):
        store.append(_run([(0, int(k), 1) for k in rng.integers(0, 50, 20)]))
        assert len(store.runs()) <= runs_module.SMALL_RUNS + store.rows // runs_module.SMALL_ROWS + 2
    assert store.rows < 3 * 50 + runs_module.SMALL_RUNS * 50
    assert sum(_open(store).values()) == 40_000


def test_what_was_frozen_does_not_change() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "PIECE_BYTES", 0)
        store = _store(None)
        store.append(_run([(0, 1, 1), (5, 1, 1)]))
        frozen = store.freeze()
        before = _sums([t for piece in frozen.pieces for t in piece.batches])
        for _ in range(200):
            store.append(_run([(0, 1, 1)]))
        _taken(store, 0)
        assert _sums([t for piece in frozen.pieces for t in piece.batches]) == before == {(0, 1): 1, (5, 1): 1}
        assert frozen.small == ()


def test_a_closed_window_gives_its_memory_back() -> None:
    """Dead rows are kept with the others of their run; the others are copied once they are less than half."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "PENDING_ROWS", 1)
        store = _store(None)
        store.append(_run([(s, k, 1) for s in range(10) for k in range(100)]))
    for last in range(9):
        _taken(store, last)
        (run,) = store.runs()
        used = run.table.get_total_buffer_size()
        assert used <= 2 * run.rows * 24 + 1024, (last, used, run.rows)


# ------------------------------------------------------------------------------------------------------- incremental


def _ids(store: RunStore) -> set[str]:
    return {piece.id for piece in store.freeze().pieces}


def test_a_run_is_the_same_piece_until_it_is_merged_or_copied() -> None:
    with pytest.MonkeyPatch.context() as patch:
        _cross(patch, pending=1_000, small=1, many=4)
        store = _store(None)
        for n in range(4):
            store.append(_run([(s, n * 10 + k, 1) for s in range(4) for k in range(10)]))
        first = _ids(store)
        assert len(first) == 4
        assert _ids(store) == first, "nothing came, nothing is new"
        store.append(_run([(3, 100, 1)]))
        assert _ids(store) > first
        assert len(_ids(store)) == 5, "what came is new, and nothing else"
        _taken(store, 1)
        assert first < _ids(store), "half of every run is dead: it stays what it was"
        _taken(store, 2)
        assert not first & _ids(store), "three quarters are dead: copied"


def test_restored_pieces_keep_their_names_and_their_dead_rows_stay_dead() -> None:
    with pytest.MonkeyPatch.context() as patch:
        _cross(patch, pending=30, small=1, many=4)
        store = _store(None)
        store.append(_run([(s, k, 1) for s in range(4) for k in range(10)]))  # becomes the base
        store.append(_run([(s, 0, 1) for s in range(4)]))
        _taken(store, 0)
        again = _again(store, _store(None), closed=0)
        assert _ids(again) == _ids(store)
        assert _open(again) == _open(store)
        assert again.low == 1
        for last in range(1, 4):
            assert _sums(_taken(again, last)) == _sums(_taken(store, last))
        reopened = _again(_again(store, _store(None), closed=None), _store(None), closed=None)
        assert reopened.low is None


def test_restoring_does_not_merge_anew() -> None:
    """A base is a base again, so the first checkpoint after a restart writes little."""
    with pytest.MonkeyPatch.context() as patch:
        _cross(patch, pending=30, small=1, many=4)
        store = _store(None)
        store.append(_run([(0, k, 1) for k in range(100)]))
        store.append(_run([(0, k, 1) for k in range(60)]))
        names = _ids(store)
        for _ in range(3):
            store = _again(store, _store(None), closed=None)
            assert _ids(store) == names


class _ReopensDeadRows(RunStore):
    """Broken: takes the rows of a piece as they are."""

    def restore(self, table: pa.Table, **options: Any) -> None:
        super().restore(table, **{**options, "closed": None})


class _TakesAllForMerged(RunStore):
    """Broken: says of every run that keys are unique in it."""

    def restore(self, table: pa.Table, **options: Any) -> None:
        super().restore(table, **{**options, "merged": True})


@pytest.mark.parametrize(("kind", "right"), [(RunStore, True), (_ReopensDeadRows, False), (_TakesAllForMerged, False)])
def test_stores_that_restore_wrongly_are_caught(kind: type[RunStore], right: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _cross(patch, pending=1_000, small=1, many=4)
        store = _store(None)
        store.append(_run([(s, k, 1) for s in range(4) for k in range(3)] * 2))
        _taken(store, 0)
        again = _again(store, kind(_merge, "s"), closed=0)
        found = list(again.take(3))
        rows = sum(table.num_rows for table in found)
        assert (_sums(found) == {(s, k): 2 for s in range(1, 4) for k in range(3)} and rows == 9) == right
