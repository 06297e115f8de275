"""PROOFS P3 and a ladder of parallelisms: keyed state through savepoints, at any parallelism, exactly (K1, K3, R1)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core import restore
from rayflow.core.keygroups import owner_of
from rayflow.core.manifest import StateHandle
from rayflow.partition import hash_columns, key_groups
from tests.restoring import flows
from tests.restoring.stopping import files_below, manifest_in, newest, run, savepoint_of


def expected(parallelism: int, groups: int = flows.GROUPS) -> dict[int, tuple[int, int]]:
    """Key -> (the subtask that owns it, the sum of its rows)."""
    keys = pa.array(range(flows.KEYS), pa.int64())
    of = key_groups(hash_columns([keys]), groups).tolist()
    return {key: (owner_of(of[key], parallelism, groups), flows.total(key)) for key in range(flows.KEYS)}


@pytest.mark.parametrize("parallelism", [2, 4])
def test_without_a_savepoint_every_subtask_sums_its_own_keys(parallelism: int) -> None:
    result = run(flows.totals(), None, parallelism=parallelism, config=flows.CONFIG)
    assert flows.last_of(result.table()) == expected(parallelism)


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 2), (1, 13), (13, 1)])
def test_sums_by_key_come_from_the_owner_before_and_after_a_savepoint(before: int, after: int, tmp_path: Path) -> None:
    """P3: 42 keys, 13 key groups."""
    first = run(flows.totals(), tmp_path / "a", parallelism=before, rounds=25, config=flows.CONFIG)
    assert first.status == "stopped"
    half = flows.last_of(first.table())
    owners = expected(before)
    assert half
    assert all(owners[key][0] == subtask for key, (subtask, _) in half.items())
    url = savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    shutil.rmtree(tmp_path / "a")  # it stands by itself
    result = run(flows.totals(), tmp_path / "b", parallelism=after, start=url, config=flows.CONFIG)
    assert result.status == "finished"
    assert flows.last_of(result.table()) == expected(after)


def test_a_ladder_of_parallelisms_through_savepoints_that_are_moved(tmp_path: Path) -> None:
    start = "latest"
    for step, parallelism in enumerate([1, 2, 3, 5, 2, 4]):
        result = run(
            flows.totals(), tmp_path / f"{step}", parallelism=parallelism, rounds=9, start=start, config=flows.CONFIG
        )
        assert result.status == "stopped", "there must be rows left for the next step"
        url = savepoint_of(tmp_path / f"{step}", "totals", tmp_path / "here")
        moved = tmp_path / f"moved-{step}"
        shutil.move(url, moved)
        start = str(moved)
    result = run(flows.totals(), tmp_path / "last", parallelism=3, start=start, config=flows.CONFIG)
    assert flows.last_of(result.table()) == expected(3)


def test_the_checkpoints_after_a_start_stand_without_the_savepoint(tmp_path: Path) -> None:
    """Nothing with a root is named by a checkpoint that is taken later, so the savepoint can go."""
    run(flows.totals(), tmp_path / "a", rounds=12, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    before = files_below(tmp_path / "savepoint")
    run(flows.totals(), tmp_path / "b", parallelism=4, rounds=12, start=url, config=flows.CONFIG)
    assert files_below(tmp_path / "savepoint") == before, "a savepoint is only read"
    assert all(file.root is None for file in newest(tmp_path / "b", "totals").files())
    shutil.rmtree(url)
    result = run(flows.totals(), tmp_path / "b", parallelism=2, config=flows.CONFIG)
    assert flows.last_of(result.table()) == expected(2)


_FAILURES: list[int] = []


class FailsOnce(flows.Totals):
    """Raises in the middle of its first batch, as often as `_FAILURES` has entries."""

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        super().process_batch(batch, ctx)
        if _FAILURES:
            _FAILURES.pop()
            raise RuntimeError("as told")


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_a_crash_right_after_the_start_goes_back_to_the_savepoint(before: int, after: int, tmp_path: Path) -> None:
    """P3 with a crash in between, when there is nothing yet but what was imported."""
    run(flows.totals(), tmp_path / "a", parallelism=before, rounds=20, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    _FAILURES[:] = [1]
    result = run(flows.totals(FailsOnce), tmp_path / "b", parallelism=after, start=url, config=flows.CONFIG)
    assert result.restarts == 1
    assert flows.last_of(result.table()) == expected(after)


def test_state_given_to_the_wrong_subtask_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: as if state were not dealt out anew."""
    run(flows.totals(), tmp_path / "a", parallelism=2, rounds=20, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")

    def same_index(handle: StateHandle, parallelism: int, max_parallelism: int) -> list[int]:
        return [handle.subtask % parallelism]

    monkeypatch.setattr(restore, "_receivers", same_index)
    result = run(flows.totals(), tmp_path / "b", parallelism=4, start=url, config=flows.CONFIG)
    assert flows.last_of(result.table()) != expected(4)


@pytest.mark.parametrize("groups", [5, 64])
def test_a_rebucketed_savepoint_has_the_same_rows_under_other_owners(groups: int, tmp_path: Path) -> None:
    run(flows.totals(), tmp_path / "a", parallelism=4, rounds=20, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    source = files_below(tmp_path / "savepoint")
    config = rf.JobConfig(max_parallelism=groups, batch_rows=64)
    with pytest.raises(rf.ConfigError, match=rf"13 key groups.*rayflow rebucket {url} TARGET"):
        run(flows.totals(), tmp_path / "b", parallelism=3, start=url, config=config)
    other = rf.rebucket(url, str(tmp_path / "other"), groups)
    assert files_below(tmp_path / "savepoint") == source
    manifest = manifest_in(tmp_path / "other")
    for handle in (h for s in manifest.subtasks for h in s.states if h.keyed and h.group_rows):
        present = np.array([group for group, _ in handle.group_rows])
        assert handle.groups is not None
        assert handle.groups[0] <= present.min()
        assert present.max() < handle.groups[1] <= groups
    result = run(flows.totals(), tmp_path / "b", parallelism=3, start=other, config=config)
    assert flows.last_of(result.table()) == expected(3, groups)


def test_rebucketing_is_refused_in_one_sentence(tmp_path: Path) -> None:
    run(flows.totals(), tmp_path / "a", parallelism=4, rounds=10, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    with pytest.raises(rf.ConfigError, match="parallelism 4 of step .* more than max_parallelism=3"):
        rf.rebucket(url, str(tmp_path / "other"), 3)
    with pytest.raises(rf.ConfigError, match="between 1 and 32768, got 0"):
        rf.rebucket(url, str(tmp_path / "other"), 0)
    with pytest.raises(rf.ConfigError, match="is not empty"):
        rf.rebucket(url, url, 20)
    assert not (tmp_path / "other").exists()
