"""`rf.read_checkpoint` and the difference of two: on directories of real runs and on pieces written by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.checkpoint import Checkpoint, read_checkpoint
from rayflow.core.manifest import FORMAT_VERSION, Manifest, SplitState, encode
from rayflow.difference import diff
from rayflow.errors import ConfigError, CorruptCheckpointError
from rayflow.operators.base import DELETED, EXPIRES
from rayflow.partition import hash_columns, key_groups
from tests.written import GROUPS, JOB, frozen, write_checkpoint

ROWS = 4_000


def run(url: Path, name: str = "windows") -> pa.Table:
    """Windows that never close, so that the last checkpoint holds them; their input."""
    rng = np.random.default_rng(3)
    rows = pa.table(
        {
            "at": pa.array(np.arange(ROWS) * 1_000_000, pa.timestamp("us")),
            "k": pa.array(rng.integers(0, 50, ROWS)),
            "v": pa.array(rng.integers(0, 9, ROWS)),
        }
    )
    stream = rf.from_arrow(rows, batch_rows=100).with_event_time("at", max_delay="0s")
    counted = stream.key_by("k").window(rf.tumbling("1h")).agg(n=rf.count())
    rf.Flow(name, counted.collect()).run(
        local=True, parallelism=2, checkpoints=rf.CheckpointConfig(str(url), interval="3ms", retain=50)
    )
    return rows


def by_hand(folder: Path, checkpoint: int = 1, **changes: Any) -> Manifest:
    """Keyed state of two subtasks in three pieces each, with deletions; a map with a subkey; a split."""
    keys = np.arange(1000)
    groups = key_groups(hash_columns([pa.array(keys)]), GROUPS)
    subtasks = []
    for index in (0, 1):
        own = pa.array(keys[(groups * 2 // GROUPS) == index])
        first = pa.table({"k": own, "v": own, DELETED: pa.nulls(len(own), pa.bool_())})
        second = pa.table({"k": own.slice(0, 100), "v": pa.array([changes.get("v", -1)] * 100, pa.int64())})
        gone = pa.table({"k": own.slice(50, 10), "v": pa.nulls(10, pa.int64()), DELETED: [True] * 10})
        entries = pa.table({"k": own.take([0, 0]), "item": ["a", "b"], "n": [1, 2]})
        subtasks.append(
            {
                "agg-1": frozen("values", [first, second, gone]),
                "process-1": frozen("items", [entries], ("k",), "item"),
            }
        )
    return write_checkpoint(folder, checkpoint, subtasks, [SplitState("from_arrow-1", "0", 0, {}, {"row": 7})])


def expected() -> dict[int, int]:
    """What `by_hand` holds."""
    result: dict[int, int] = {}
    keys = np.arange(1000)
    groups = key_groups(hash_columns([pa.array(keys)]), GROUPS)
    for index in (0, 1):
        own = keys[(groups * 2 // GROUPS) == index].tolist()
        result |= {k: -1 if i < 100 else k for i, k in enumerate(own) if not 50 <= i < 60}
    return result


def test_a_real_run_is_read_by_step_and_state(tmp_path: Path) -> None:
    rows = run(tmp_path)
    for url in (tmp_path, tmp_path / "windows"):
        assert read_checkpoint(str(url)).manifest.kind == "final"
    infos = sorted((tmp_path / "windows").glob("chk-*"))
    seen = 0
    for folder in infos:
        checkpoint = read_checkpoint(str(folder))
        assert checkpoint.url == str(tmp_path / "windows")
        steps = [step for step in checkpoint.steps() if step.startswith("window")]
        for step in steps:
            for state in {"windows"} & set(checkpoint.states(step)):
                table = checkpoint.table(step, state)
                assert table.schema.equals(checkpoint.schema(step, state))
                info = checkpoint.info(step, state)
                assert info.keys.key_columns == ("k",)
                assert table.num_rows == info.rows
                seen += table.num_rows
    assert seen > 0
    assert {split.source for cp in map(read_checkpoint, map(str, infos)) for split in cp.splits} <= {"from_arrow-1"}
    assert rows.num_rows == ROWS


def test_pieces_are_merged_over_all_subtasks_and_tombstones_are_gone(tmp_path: Path) -> None:
    by_hand(tmp_path)
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.steps() == ["agg-1", "process-1"]
    assert checkpoint.states("agg-1") == ["values"]
    table = checkpoint.table("agg-1", "values")
    assert table.schema.equals(pa.schema([("k", pa.int64()), ("v", pa.int64())]))
    assert checkpoint.schema("agg-1", "values").equals(table.schema)
    assert dict(zip(table["k"].to_pylist(), table["v"].to_pylist(), strict=True)) == expected()
    assert table.num_rows == len(expected())
    info = checkpoint.info("agg-1", "values")
    assert (info.pieces, info.subtasks, info.mode, info.format) == (6, 2, "upsert", "arrow")
    assert [split.position for split in checkpoint.splits] == [{"row": 7}]


def test_rows_of_one_key_with_different_subkeys_stay_apart(tmp_path: Path) -> None:
    by_hand(tmp_path)
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.info("process-1", "items").keys.identity == ("k", "item")
    assert checkpoint.table("process-1", "items").num_rows == 4


def test_key_groups_give_exactly_the_keys_of_these_groups(tmp_path: Path) -> None:
    by_hand(tmp_path)
    checkpoint = read_checkpoint(str(tmp_path))
    parts = [checkpoint.table("agg-1", "values", key_groups=range(a, a + 5)) for a in range(0, GROUPS, 5)]
    for index, part in enumerate(parts):
        groups = key_groups(hash_columns([part["k"]]), GROUPS)
        assert set(groups.tolist()) <= set(range(5 * index, 5 * index + 5))
    together = pa.concat_tables(parts)
    assert dict(zip(together["k"].to_pylist(), together["v"].to_pylist(), strict=True)) == expected()


def test_rows_outside_the_groups_of_a_handle_are_not_state(tmp_path: Path) -> None:
    """After a rescale two subtasks name one file, each with its own groups."""
    manifest = by_hand(tmp_path)
    part = manifest.subtasks[0]
    clipped = tuple(replace(h, groups=(0, 3)) for h in part.states)
    (tmp_path / "chk-00000001" / "manifest.json").write_bytes(
        encode(replace(manifest, subtasks=(replace(part, states=clipped), manifest.subtasks[1])))
    )
    table = read_checkpoint(str(tmp_path)).table("agg-1", "values")
    groups = key_groups(hash_columns([table["k"]]), GROUPS)
    assert set(groups.tolist()) == {0, 1, 2, *range(8, 16)}


def test_a_savepoint_is_read_wherever_it_is_and_one_that_was_imported_too(tmp_path: Path) -> None:
    manifest = by_hand(tmp_path / "job")
    saved = tmp_path / "saved"
    shutil.copytree(tmp_path / "job", saved / "files")

    def moved(handle: Any, prefix: str, root: str | None) -> Any:
        file = handle.file and replace(handle.file, path=prefix + handle.file.path, root=root)
        return replace(handle, file=file)

    for folder, prefix, root in ((saved, "files/", None), (tmp_path / "other/chk-00000009", "", str(saved / "files"))):
        folder.mkdir(parents=True, exist_ok=True)
        parts = tuple(
            replace(part, states=tuple(moved(h, prefix, root) for h in part.states)) for part in manifest.subtasks
        )
        number = 9 if root else 1
        text = encode(replace(manifest, job="other", subtasks=parts, checkpoint=number, kind="savepoint"))  # type: ignore[arg-type]
        (folder / "manifest.json").write_bytes(text)
    moved_to = tmp_path / "elsewhere"
    shutil.copytree(saved, moved_to)
    for url in (saved, moved_to, tmp_path / "other", tmp_path / "other/chk-00000009"):
        table = read_checkpoint(str(url)).table("agg-1", "values")
        assert dict(zip(table["k"].to_pylist(), table["v"].to_pylist(), strict=True)) == expected(), url


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_is_not_there_is_told_with_what_is(tmp_path: Path) -> None:
    by_hand(tmp_path / "one", 7)
    checkpoint = read_checkpoint(str(tmp_path / "one"), 7)
    with pytest.raises(ConfigError, match=f"job '{JOB}'.* has no step 'ag-1'; did you mean 'agg-1'"):
        checkpoint.table("ag-1", "values")
    with pytest.raises(ConfigError, match="has no state of step 'agg-1' 'xyz'; there are 'values'"):
        checkpoint.schema("agg-1", "xyz")
    with pytest.raises(ConfigError, match="holds no checkpoint 8; there are 7"):
        read_checkpoint(str(tmp_path / "one"), 8)
    with pytest.raises(ConfigError, match="number of a checkpoint or 'latest', got 'newest'"):
        read_checkpoint(str(tmp_path / "one"), "newest")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="holds checkpoint 7, asked for was 8"):
        read_checkpoint(str(tmp_path / "one/chk-00000007"), 8)
    by_hand(tmp_path / "two")
    with pytest.raises(ConfigError, match="checkpoints of 2 jobs; name one: .*/(one|two), .*/(one|two)"):
        read_checkpoint(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptCheckpointError, match="holds no checkpoints"):
        read_checkpoint(str(tmp_path / "empty"))


def test_a_newer_format_version_is_refused(tmp_path: Path) -> None:
    manifest = by_hand(tmp_path)
    path = tmp_path / "chk-00000001" / "manifest.json"
    newer = FORMAT_VERSION + 1
    path.write_bytes(encode(replace(manifest, version=newer)))
    for url in (tmp_path, path.parent):
        with pytest.raises(CorruptCheckpointError, match=f"format version {newer}.*upgrade rayflow"):
            read_checkpoint(str(url))


def test_a_flipped_manifest_is_refused(tmp_path: Path) -> None:
    by_hand(tmp_path)
    path = tmp_path / "chk-00000001" / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"periodic"', b'"periodid"'))
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
def test_a_damaged_state_file_is_named_and_others_can_still_be_read(tmp_path: Path, damage: str) -> None:
    manifest = by_hand(tmp_path)
    handle = next(h for part in manifest.subtasks for h in part.states if h.file is not None)
    assert handle.file is not None
    path = tmp_path / handle.file.path
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        # In the body of the first record batch.
        data[
            (handle.section.offset if handle.section else 0) + handle.blocks[1].offset + handle.blocks[1].nbytes - 9
        ] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 3])
    checkpoint = read_checkpoint(str(tmp_path))
    with pytest.raises(CorruptCheckpointError, match=f"{handle.file.path}.*use an earlier checkpoint"):
        checkpoint.table(handle.operator, handle.name)
    other = "process-1" if handle.operator == "agg-1" else "agg-1"
    assert checkpoint.table(other, checkpoint.states(other)[0]).num_rows


def test_a_copy_of_a_checkpoint_folder_alone_is_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "job")
    shutil.copytree(tmp_path / "job/chk-00000001", tmp_path / "copy")
    with pytest.raises(CorruptCheckpointError, match="is a copy of the folder of checkpoint 1"):
        read_checkpoint(str(tmp_path / "copy"))


# ---------------------------------------------------------------------------------------------------------- differences


def pair(tmp_path: Path, before: pa.Table, after: pa.Table, *subkeys: str) -> tuple[Checkpoint, Checkpoint]:
    for number, table in ((1, before), (2, after)):
        write_checkpoint(tmp_path, number, [{"agg-1": frozen("values", [table], ("k",), *subkeys)}])
    return read_checkpoint(str(tmp_path), 1), read_checkpoint(str(tmp_path), 2)


def test_diff_tells_added_removed_and_changed_rows_by_key(tmp_path: Path) -> None:
    nan = float("nan")
    before = pa.table({"k": [1, 2, 3, None], "v": [1.0, nan, None, 4.0], "l": [[1], [2], None, [4]]})
    after = pa.table({"k": [2, 3, 5, None], "v": [nan, 0.5, 9.0, 4.0], "l": [[2], None, [9], [4, 4]]})
    (found,) = diff(*pair(tmp_path, before, after))
    assert (found.added, found.removed, found.changed, found.same, found.by_key) == (1, 1, 2, 1, True)
    rows = {row["k"]: row for row in found.rows.to_pylist()}
    assert {k: row["change"] for k, row in rows.items()} == {1: "removed", 3: "changed", 5: "added", None: "changed"}
    assert rows[1]["before"] == {"v": 1.0, "l": [1]}
    assert rows[1]["after"] is None
    assert rows[3]["before"] == {"v": None, "l": None}
    assert rows[3]["after"] == {"v": 0.5, "l": None}
    assert rows[5]["before"] is None
    assert str(found) == "agg-1.values: 1 added, 1 removed, 2 changed, 1 the same"


def test_diff_after_a_migration_and_with_times_to_live(tmp_path: Path) -> None:
    before = pa.table({"k": pa.array([1, 2], pa.int32()), "v": pa.array([1, 2], pa.int8()), EXPIRES: [5, 5]})
    after = pa.table({"k": pa.array([1, 2], pa.int64()), "v": pa.array([1, 3], pa.int64()), EXPIRES: [9, 9]})
    (found,) = diff(*pair(tmp_path, before, after))
    assert (found.added, found.removed, found.changed, found.same) == (0, 0, 1, 1)
    assert found.rows.to_pylist() == [{"k": 2, "change": "changed", "before": {"v": 2}, "after": {"v": 3}}]


def test_diff_of_a_state_without_unique_keys_counts_rows(tmp_path: Path) -> None:
    from rayflow.operators.base import FrozenState, FrozenTable

    for number, values in ((1, [1, 1, 2, None]), (2, [1, 3, 3, None])):
        table = FrozenTable("rows", (pa.table({"v": pa.array(values, pa.int64())}),))
        write_checkpoint(tmp_path, number, [{"collect-1": FrozenState((table,))}])
    (found,) = diff(read_checkpoint(str(tmp_path), 1), read_checkpoint(str(tmp_path), 2))
    assert (found.added, found.removed, found.same, found.by_key) == (2, 2, 2, False)
    rows = {(row["v"], row["change"]): row["times"] for row in found.rows.to_pylist()}
    assert rows == {(1, "removed"): 1, (2, "removed"): 1, (3, "added"): 2}


def test_diff_of_a_state_that_only_one_has(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, [{}])
    write_checkpoint(tmp_path, 2, [{"agg-1": frozen("values", [pa.table({"k": [1, 2], "v": [1, 2]})])}])
    old, new = read_checkpoint(str(tmp_path), 1), read_checkpoint(str(tmp_path), 2)
    assert [(d.added, d.removed) for d in diff(old, new)] == [(2, 0)]
    assert [(d.added, d.removed) for d in diff(new, old)] == [(0, 2)]
    assert diff(old, new, step="other") == []


# -------------------------------------------------------------------------------------------------------------- rocksdb


def sums(url: Path, state: str) -> Checkpoint:
    rows = pa.table({"k": pa.array(np.arange(2_000) % 300), "v": pa.array(np.arange(2_000))})
    flow = rf.Flow("sums", rf.from_arrow(rows, batch_rows=100).key_by("k").agg(total=rf.sum("v")).collect())
    config = rf.JobConfig(state=state)  # type: ignore[arg-type]
    flow.run(local=True, parallelism=2, config=config, checkpoints=rf.CheckpointConfig(str(url), interval="1h"))
    return read_checkpoint(str(url))


def test_state_on_local_disk_looks_like_any_other(tmp_path: Path) -> None:
    fs, rocks = sums(tmp_path / "fs", "fs"), sums(tmp_path / "rocks", "rocksdb")
    step = next(step for step in fs.steps() if step.startswith("agg"))
    (state,) = fs.states(step)
    assert rocks.states(step) == [state]
    assert (fs.info(step, state).format, rocks.info(step, state).format) == ("arrow", "rocksdb")
    assert rocks.info(step, state).keys == fs.info(step, state).keys
    assert rocks.schema(step, state).equals(fs.schema(step, state))
    assert rocks.table(step, state).num_rows == 300
    assert rocks.table(step, state).sort_by("k").equals(fs.table(step, state).sort_by("k"))
    (found,) = [d for d in diff(fs, rocks) if d.step == step]
    assert (found.same, found.added, found.removed, found.changed) == (300, 0, 0, 0)


def test_key_groups_of_state_on_local_disk(tmp_path: Path) -> None:
    rocks = sums(tmp_path, "rocksdb")
    step = next(step for step in rocks.steps() if step.startswith("agg"))
    (state,) = rocks.states(step)
    part = rocks.table(step, state, key_groups=range(10, 70))
    groups = key_groups(hash_columns([rocks.table(step, state)["k"]]), 128)
    assert part.num_rows == int(((groups >= 10) & (groups < 70)).sum())


def test_a_damaged_file_of_state_on_local_disk_is_named(tmp_path: Path) -> None:
    rocks = sums(tmp_path, "rocksdb")
    step = next(step for step in rocks.steps() if step.startswith("agg"))
    path = next((tmp_path / "sums" / "shared").glob("*.sst"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=f"{path.name}.*checksum"):
        rocks.table(step, rocks.states(step)[0])
