"""Runs of joins on local disk: the same results whatever the bound, memory that is bounded, files that go away."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.core.ids import MAX_WATERMARK
from rayflow.errors import StorageError
from rayflow.operators.base import Collected, Operator, StateBackend
from rayflow.operators.joins import buffer as buffer_module
from rayflow.operators.joins.buffer import Buffer
from rayflow.operators.joins.files import MappedFile, RowFiles, hash_ranges
from rayflow.operators.joins.kernels import SortedRows, sort_rows
from rayflow.operators.windows import Tumbling
from tests.operators.helpers import frozen, opened
from tests.operators.joins import harness, test_asof, test_interval, test_window_join
from tests.operators.joins.harness import CASES, EVENTFUL, Case
from tests.operators.joins.test_state import FACTORIES, ROWS, _batch, _interval

ROCKS: Any = "rocksdb"


def _backend(folder: Path, memory_bytes: int) -> StateBackend:
    return StateBackend(ROCKS, memory_bytes, lambda name: Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder)))


def _files(folder: Path) -> int:
    return len(list(folder.glob("*/*")))


@contextmanager
def _on_disk(memory_bytes: int) -> Iterator[Path]:
    """Joins of the harness keep their runs in files; small ones are large enough to be pruned and to be pieces."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        backend = _backend(Path(folder), memory_bytes)
        patch.setattr(harness, "opened", partial(opened, backend=backend))
        for bound, value in (("PRUNE_ROWS", 1), ("PIECE_BYTES", 0), ("SMALL_RUN_BYTES", 100), ("FAN_IN", 2)):
            patch.setattr(buffer_module, bound, value)
        yield Path(folder)


@settings(max_examples=40, deadline=None)
@given(case=CASES, memory_bytes=st.sampled_from([1, 400, 4_000]), what=st.integers(0, 3))
def test_equals_duckdb_from_disk(case: Case, memory_bytes: int, what: int) -> None:
    with _on_disk(memory_bytes):
        if what == 0:
            test_interval.check(case, "full", (-10, 4))
        elif what == 1:
            test_interval.check(case, "left", None)
        elif what == 2:
            test_window_join.check(case, "full", Tumbling(16))
        else:
            test_asof.check(case, "left", None)


def test_rows_that_are_left_out_of_a_file_show(monkeypatch: Any) -> None:
    whole = RowFiles.write

    def all_but_the_last(self: RowFiles, rows: SortedRows) -> tuple[SortedRows, MappedFile]:
        kept, file = whole(self, rows)
        return kept.take(np.arange(len(rows)) < max(1, len(rows) - 1)), file

    monkeypatch.setattr(RowFiles, "write", all_but_the_last)
    with _on_disk(1), pytest.raises(AssertionError):
        test_interval.check(Case(EVENTFUL.left, EVENTFUL.right, 6, [0, 1], [1], pieces=True), "full", (-10, 4))


@pytest.mark.parametrize("kind", FACTORIES)
def test_what_is_in_memory_is_bounded_and_results_are_the_same(kind: str, tmp_path: Path) -> None:
    memory_bytes, plenty = 1 << 20, Collected()
    found = Collected()
    small, _ = opened(FACTORIES[kind], out=found, backend=_backend(tmp_path, memory_bytes))
    large, _ = opened(FACTORIES[kind], out=plenty)
    most = 0
    for start in range(0, 40 * ROWS, ROWS):
        for operator in (small, large):
            operator.process(_batch(start), 0)
            operator.process(_batch(start), 1)
            operator.on_watermark(start // 2)
        most = max(most, _in_memory(small))
    assert most <= memory_bytes // 4
    assert _in_memory(large) > memory_bytes // 4
    assert _files(tmp_path) > 0
    for operator in (small, large):
        operator.on_watermark(MAX_WATERMARK)
    assert _files(tmp_path) == 0, "what has expired is gone"
    assert _sorted(found) == _sorted(plenty)


def _in_memory(operator: Operator) -> int:
    buffers: tuple[Buffer, ...] = operator.buffers  # type: ignore[attr-defined]
    return sum(run.nbytes for buffer in buffers for run in buffer.runs if run.file is None)


def _sorted(out: Collected) -> Any:
    table = out.table()
    assert table is not None
    return table.sort_by([(name, "ascending") for name in table.column_names])


def test_versions_that_are_superseded_are_forgotten_on_disk_too(tmp_path: Path) -> None:
    operator, _ = opened(FACTORIES["asof"], backend=_backend(tmp_path, 1 << 20))
    for start in range(0, 60 * ROWS, ROWS):
        batch = _batch(start)
        operator.process(batch.set_column(0, "k", pa.array(np.arange(ROWS) % 50)), 1)
        operator.on_watermark(start + ROWS)
    assert operator.buffers[1].rows <= 2 * 50 + 65_536 + ROWS  # type: ignore[attr-defined]


def test_a_piece_keeps_its_name_when_it_moves_and_when_it_comes_back(tmp_path: Path) -> None:
    operator, _ = opened(_interval(), backend=_backend(tmp_path, 4 << 20))
    operator.process(_batch(0, 2 * ROWS), 0)
    before = {state.piece for state in frozen(operator) if state.piece}
    assert before
    assert not _files(tmp_path)
    operator.process(_batch(2 * ROWS, 8 * ROWS), 0)  # too large to be merged with, and too much for memory
    assert _files(tmp_path) > 0
    states = frozen(operator)
    assert before < {state.piece for state in states}
    again, _ = opened(_interval(), backend=_backend(tmp_path, 1 << 20))
    again.restore(states)
    assert {state.piece for state in frozen(again)} == {state.piece for state in states}


def test_keys_that_are_no_plain_column_are_found_again(tmp_path: Path) -> None:
    """NaN is one key and zero another, whatever their bits."""
    rows = pa.record_batch({"k": pa.array([float("nan"), -0.0, 0.0, 1.5]), "s": ["x", "y", "y", None]})
    files = RowFiles(lambda _: tmp_path, 1, ["k"], "under test")
    before = sort_rows(rows, ["k"], np.array([3, 2, 1, 0]), ties=True)
    after, file = files.write(before)
    assert str(after.rows.to_pylist()) == str(before.rows.to_pylist())
    assert after.keys[0].view(pa.int64()).equals(before.keys[0].view(pa.int64())), "bit by bit"
    assert before.ties is not None
    for one, other in ((after.hashes, before.hashes), (after.times, before.times), (after.ties, before.ties)):
        assert np.array_equal(one, other)  # type: ignore[arg-type]
    file.release()
    file.drop()
    assert str(after.rows.to_pylist()) == str(before.rows.to_pylist()), "who still has rows may go on reading them"


def test_pruning_makes_no_run_that_is_too_large_in_memory_either(monkeypatch: Any) -> None:
    """A string column has room for 2 GiB only."""
    monkeypatch.setattr(buffer_module, "RUN_BYTES_MAX", 10_000)
    monkeypatch.setattr(buffer_module, "PRUNE_ROWS", 1)
    buffer = Buffer()
    for at in range(40):
        rows = pa.record_batch({"k": np.arange(100), "v": np.full(100, at)})
        buffer.append(sort_rows(rows, ["k"], np.full(100, at)))
    buffer.prune(3)
    assert buffer.rows == 37 * 100
    assert max(run.nbytes for run in buffer.runs) < 15_000


def test_ranges_of_hashes_hold_every_row_once_and_every_key_in_one() -> None:
    runs = [sort_rows(pa.record_batch({"k": np.arange(100) % 23}), ["k"], np.arange(100) + at) for at in range(3)]
    found = hash_ranges(runs, 5)
    assert sum(len(part) for parts in found for part in parts) == 300
    keys = [{k for part in parts for k in part.keys[0].to_pylist()} for parts in found]
    assert sum(map(len, keys)) == 23


def test_a_disk_that_fails_is_named(tmp_path: Path) -> None:
    operator, _ = opened(_interval(), backend=StateBackend(ROCKS, 1, lambda name: tmp_path / "gone" / name))
    with pytest.raises(StorageError, match=r"under test.* cannot write rows of a join to the local folder .*gone"):
        operator.process(_batch(0, 10), 0)
