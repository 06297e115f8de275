"""Runs on local disk: the same results in bounded memory, files that go away, and a disk that is full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rayflow.operators.aggregates as rf
import rayflow.operators.runs as runs_module
import rayflow.operators.spill as spill_module
from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import StorageError
from rayflow.operators.base import MAIN, Collected, Operator, StateBackend
from rayflow.operators.spill import Ordered, Part, RowOrder, Spill, stretches
from rayflow.operators.windows import WindowAggregate, WindowOperator, tumbling
from tests.operators.helpers import frozen, opened, rows

ORDER = RowOrder("s", ("k",))


def _table(places: list[tuple[int, int]]) -> pa.Table:
    return pa.table({"s": pa.array([s for s, _ in places], pa.timestamp("us")), "k": [k for _, k in places]})


def _scratch(folder: Path, name: str) -> Path:
    made = folder / f"{name}-{len(list(folder.iterdir()))}"
    made.mkdir()
    return made


def _backend(folder: Path, memory_bytes: int) -> StateBackend:
    return StateBackend("rocksdb", memory_bytes, lambda name: _scratch(folder, name))


PLACES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=40, unique=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(PLACES, min_size=1, max_size=4), st.integers(1, 600), st.integers(1, 9))
def test_stretches_hold_every_row_once_and_cut_between_keys(
    runs: list[list[tuple[int, int]]], bytes_max: int, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill_module, "BLOCK_ROWS", block)
        ordered = [Ordered.of(_table(run), ORDER) for run in runs]
        found = list(stretches([Part(o, 0, o.table.num_rows) for o in ordered], bytes_max))
    places = [ORDER.places(table) for table in found]
    assert sorted(p for stretch in places for p in stretch) == sorted(
        p for run in runs for p in ORDER.places(_table(run))
    )
    for one, other in pairwise(places):
        assert max(one) < min(other), "a key and window is in one stretch only"
    for stretch in places:
        assert len(stretch) * 16 <= max(bytes_max, 0) + 2 * 16 * block * len(runs), "bounded"


@given(PLACES, st.integers(1, 5), st.tuples(st.integers(-1, 6), st.integers(0, 2**64 - 1)))
def test_find_is_a_lower_bound(run: list[tuple[int, int]], block: int, place: tuple[int, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill_module, "BLOCK_ROWS", block)
        ordered = Ordered.of(_table(run), ORDER)
        there = ORDER.places(ordered.table)
        for wanted in (*there, place):
            assert ordered.find(wanted) == sum(p < wanted for p in there)


def _factory(**options: Any) -> WindowAggregate:
    aggregates = {"n": rf.count(), "total": rf.sum("v"), "hi": rf.max("name"), "first": rf.first("v")}
    return WindowAggregate(keys=("k",), spec=tumbling("10us"), aggregates=aggregates, event_time="t", **options)


def _batch(data: list[tuple[int, int, int]]) -> pa.RecordBatch:
    return pa.record_batch(
        {
            "k": pa.array([k for k, _, _ in data], pa.int64()),
            "t": pa.array([t for _, t, _ in data], pa.timestamp("us", "UTC")),
            "v": pa.array([v for _, _, v in data], pa.int64()),
            "name": pa.array([None if v % 7 == 0 else f"n{v}" for _, _, v in data], pa.string()),
        }
    )


ROW = st.tuples(st.integers(0, 12), st.integers(0, 60), st.integers(-9, 9))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.lists(ROW, min_size=1, max_size=20), st.integers(0, 50), st.booleans()), max_size=10),
    st.sampled_from([200, 2_000, 8_000]),
    st.booleans(),
)
def test_spilling_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[list[tuple[int, int, int]], int, bool]],
    memory_bytes: int,
    from_savepoint: bool,
) -> None:
    folder = tmp_path_factory.mktemp("spill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill_module, "BLOCK_ROWS", 4)
        patch.setattr(runs_module, "PENDING_ROWS", 16)
        patch.setattr(runs_module, "PIECE_BYTES", 64)
        results = []
        for backend in (StateBackend(), _backend(folder, memory_bytes)):
            operator, out = opened(_factory(), backend=backend)
            for data, watermark, restore in steps:
                operator.process(_batch(data), 0)
                operator.on_watermark(watermark)
                if restore:
                    operator = _restored(operator, out, backend, pieces=not from_savepoint)
            operator.on_watermark(MAX_WATERMARK)
            found = rows(out.batches.get(MAIN, []))
            starts = [row["window_start"] for row in found]
            assert starts == sorted(starts, key=str)
            results.append(sorted(found, key=str))
            operator.close()
        assert results[0] == results[1]
        assert not list(folder.rglob("*.arrow")), "nothing is left behind"


def _restored(operator: Operator, out: Collected, backend: StateBackend, *, pieces: bool) -> Operator:
    states = frozen(operator, pieces=pieces)
    operator.close()
    again, _ = opened(_factory(), out=out, backend=backend)
    again.restore(states)
    return again


@pytest.fixture
def spilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[WindowOperator, Collected, Path]]:
    """An operator with 200,000 keys in two windows, which has room for a tenth of that."""
    monkeypatch.setattr(spill_module, "BLOCK_ROWS", 256)
    operator, out = opened(_factory(), backend=_backend(tmp_path, 2_000_000))
    assert isinstance(operator, WindowOperator)
    _fill(operator)
    yield operator, out, tmp_path
    operator.close()


def _fill(operator: Operator) -> None:
    keys = np.random.default_rng(0).permutation(200_000)
    for part in np.array_split(keys, 20):
        times = pa.array(part % 20).cast(pa.timestamp("us", "UTC"))
        names = pc.cast(pa.array(part), pa.string())
        operator.process(pa.record_batch({"k": part, "t": times, "v": part, "name": names}), 0)


def _memory_bytes(operator: WindowOperator) -> int:
    assert operator._runs is not None
    return sum(run.memory_bytes for run in operator._runs.runs())


def test_memory_is_bounded_and_files_go_with_their_windows(spilled: tuple[WindowOperator, Collected, Path]) -> None:
    operator, out, folder = spilled
    on_disk = sum(file.stat().st_size for file in folder.rglob("*.arrow"))
    assert on_disk > 10_000_000
    assert _memory_bytes(operator) <= 2_000_000 // 4
    operator.on_watermark(10)
    first = out.table()
    assert first is not None
    assert first.num_rows == 100_000
    operator.on_watermark(20)
    assert not list(folder.rglob("*.arrow"))
    table = out.table()
    assert table is not None
    assert sorted(table.column("total").to_pylist()) == list(range(200_000))
    assert max(b.num_rows for b in out.batches[MAIN]) < 50_000, "fired in stretches"


def test_what_a_checkpoint_holds_outlives_its_file(spilled: tuple[WindowOperator, Collected, Path]) -> None:
    operator, _, folder = spilled
    states = frozen(operator)
    ids = {state.piece for state in states if state.piece}
    late = frozen(operator)
    assert {state.piece for state in late if state.piece} == ids, "uploaded once"
    held = operator.snapshot(1)  # type: ignore[arg-type]
    operator.on_watermark(20)
    assert not list(folder.rglob("*.arrow"))
    assert sum(t.num_rows for piece in held.tables[0].pieces for t in piece.batches) >= 190_000
    again, out = opened(_factory(), backend=_backend(folder, 2_000_000))
    again.restore(states)
    assert isinstance(again, WindowOperator)
    assert _memory_bytes(again) <= 2_000_000 // 4
    assert {state.piece for state in frozen(again) if state.piece} >= ids, "moving a run to disk does not rename it"
    again.on_watermark(20)
    assert sum(b.num_rows for b in out.batches[MAIN]) == 200_000


@pytest.mark.parametrize("call", ["add", "finish"])
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    operator, _ = opened(_factory(), backend=_backend(tmp_path, 2_000_000))
    monkeypatch.setattr(spill_module._Writer, call, full)
    with pytest.raises(
        StorageError, match=rf"'under test' subtask 0/1 .*{tmp_path}.*No space left.*local_dir"
    ) as caught:
        _fill(operator)
    assert "checkpoint is whole" in str(caught.value)
    assert not list(tmp_path.rglob("*.arrow")), "half a file does not stay"
    operator.close()


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """/dev/full takes nothing."""
    (tmp_path / "run-000001.arrow").symlink_to("/dev/full")
    spill = Spill(lambda name: tmp_path, 1_000, ORDER, "step 's' subtask 0/1")
    with pytest.raises(StorageError, match="No space left"):
        spill.write_one(ORDER.arrange(_table([(s, k) for s in range(10) for k in range(5_000)])))
