"""Each promise of the tables is kept by some line; without it the random programs fail."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayflow.operators.state import cache, columns, index, journal, table
from tests.operators.state.conformance import Program, tiny
from tests.operators.state.test_keyed_programs import long_program

Patch = pytest.MonkeyPatch


def _forgets_removed_keys(patch: Patch) -> None:
    patch.setattr(journal.Journal, "_removed", lambda self, gone: [])


def _tells_of_removed_keys_that_are_back(patch: Patch) -> None:
    def all_of_them(self: Any, gone: Any) -> Any:
        return [pa.concat_arrays(parts) for parts in zip(*gone, strict=True)] if gone else []

    patch.setattr(journal.Journal, "_removed", all_of_them)


def _drops_runs_before_the_lap_is_over(patch: Patch) -> None:
    real = journal.Journal._pass
    patch.setattr(journal.Journal, "_pass", lambda self, count: (real(self, count)[0], True))


def _window_leaves_rows_out(patch: Patch) -> None:
    real = journal.Journal._pass

    def lazy(self: Any, count: int) -> Any:
        slots, ended = real(self, count)
        return slots[1:], ended

    patch.setattr(journal.Journal, "_pass", lazy)


def _merging_runs_forgets_their_removed_keys(patch: Patch) -> None:
    real = journal.Journal._small_runs

    def without(self: Any) -> Any:
        return [journal.Run(run.number, run.piece, run.rows, run.slots, ()) for run in real(self)]

    patch.setattr(journal.Journal, "_small_runs", without)


def _new_rows_are_not_cleared(patch: Patch) -> None:
    patch.setattr(table.StateTable, "empty", lambda self, slots: None)
    patch.setattr(columns.FixedColumn, "clear", lambda self, slots: None)
    patch.setattr(columns.HeapColumn, "clear", lambda self, slots: None)


def _pieces_share_memory_with_the_table(patch: Patch) -> None:
    real = columns.FixedColumn.get

    def shared(self: Any, slots: Any) -> Any:
        if len(slots) and np.array_equal(slots, np.arange(slots[0], slots[0] + len(slots))) and slots[0] >= 0:
            part = slice(int(slots[0]), int(slots[0]) + len(slots))
            return columns.array_of(self.kind, self.data[part], self.valid[part])
        return real(self, slots)

    patch.setattr(columns.FixedColumn, "get", shared)


def _touch_is_forgotten(patch: Patch) -> None:
    patch.setattr(journal.Journal, "touched", lambda self, slots: None)
    patch.setattr(cache.Cache, "touched", lambda self, slots: None)


def _seals_while_slots_are_held(patch: Patch) -> None:
    real = journal.Journal.touched

    def eager(self: Any, slots: Any) -> None:
        real(self, slots)
        self.settle()

    patch.setattr(journal.Journal, "touched", eager)


def _removed_rows_come_back_from_disk(patch: Patch) -> None:
    def at_once(self: Any, slots: Any) -> Any:
        self._dirty[slots] = False
        return slots

    patch.setattr(cache.Cache, "removing", at_once)


def _lets_dirty_rows_go(patch: Patch) -> None:
    patch.setattr(cache.Cache, "flush", lambda self: None)


def _trusts_the_marks_of_hashes(patch: Patch) -> None:
    patch.setattr(index, "_marks", lambda hashes: np.zeros(len(hashes), np.int64))
    patch.setattr(index.KeyIndex, "_same", lambda self, slots, prepared, rows: np.ones(len(slots), np.bool_))


def _expired_rows_are_seen(patch: Patch) -> None:
    patch.setattr(table.StateTable, "_present", lambda self, slots: slots)


def _expired_rows_keep_their_values(patch: Patch) -> None:
    patch.setattr(table.StateTable, "_begin_again", lambda self, slots: self.touch(slots))


BROKEN: list[tuple[str, Callable[[Patch], None]]] = [
    ("fs", _forgets_removed_keys),
    ("fs", _tells_of_removed_keys_that_are_back),
    ("fs", _drops_runs_before_the_lap_is_over),
    ("fs", _window_leaves_rows_out),
    ("fs", _merging_runs_forgets_their_removed_keys),
    ("fs", _new_rows_are_not_cleared),
    ("fs", _pieces_share_memory_with_the_table),
    ("fs", _touch_is_forgotten),
    ("fs", _seals_while_slots_are_held),
    ("fs", _trusts_the_marks_of_hashes),
    ("fs", _expired_rows_are_seen),
    ("fs", _expired_rows_keep_their_values),
    ("fake", _touch_is_forgotten),
    ("fake", _new_rows_are_not_cleared),
    ("fake", _removed_rows_come_back_from_disk),
    ("fake", _lets_dirty_rows_go),
    ("fake", _expired_rows_are_seen),
]


@pytest.mark.parametrize(("kind", "broken"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_table_broken_in_one_place_is_caught(
    kind: str, broken: Callable[[Patch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(monkeypatch)
    broken(monkeypatch)
    assert any(_fails(kind, seed) for seed in range(100, 112))


def _fails(kind: str, seed: int) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            Program(kind, Path(folder)).run(long_program(seed, 150))
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("kind", ["fs", "fake"])
def test_the_same_programs_pass_on_a_table_that_is_not_broken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(monkeypatch)
    assert not any(_fails(kind, seed) for seed in range(100, 103))
