"""`rayflow checkpoints explain` and `gc`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rayflow.cli.explaining import sentences
from rayflow.cli.main import main
from rayflow.core.manifest import SnapshotStats
from tests.test_read_checkpoint import by_hand


def rayflow(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["checkpoints", *(str(a) for a in arguments)])


def answer(*arguments: str | Path) -> Any:
    result = rayflow(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("stats", "words"),
    [
        ({"start_delay_s": 3.0}, "barriers queue behind rows"),
        ({"alignment_s": 3.0}, "waited for its other inputs"),
        ({"sync_s": 3.0}, "stood still to freeze"),
        ({"async_s": 3.0, "uploaded_bytes": 6_000_000}, "wrote 6 MB to storage at 2 MB/s"),
    ],
)
def test_explain_blames_the_longest_phase_of_the_slowest_subtask(
    tmp_path: Path, stats: dict[str, Any], words: str
) -> None:
    manifest = by_hand(tmp_path)
    first, second = manifest.subtasks
    slow = replace(second, stats=SnapshotStats(nbytes=10_000_000, rows=10, **stats))
    told = sentences(replace(manifest, subtasks=(first, slow)))
    assert "the slowest subtask was chain[1] with 3 s" in told[1]
    assert words in told[2]
    # Twice the mean is what two subtasks can always come to.
    assert not any("state is uneven" in sentence for sentence in told)
    third = replace(first, subtask=replace(first.subtask, index=2))
    assert any("state is uneven" in s for s in sentences(replace(manifest, subtasks=(first, slow, third))))


def test_explain_of_a_directory_tells_of_the_newest_and_of_unfinished_ones(tmp_path: Path) -> None:
    by_hand(tmp_path, 3)
    (tmp_path / "chk-00000004").mkdir()
    (tmp_path / "chk-00000004" / "chain-0.arrows").write_bytes(b"x")
    found = answer("explain", tmp_path)
    assert found["checkpoint"] == 3
    assert found["sentences"][0].startswith(
        "checkpoint 3 of job 'by hand' (periodic, attempt 1) is complete: 2 subtasks"
    )
    assert "checkpoint 4 has 1 files and no manifest" in found["sentences"][-1]
    assert "1 splits of sources were being read" in rayflow("explain", tmp_path, "3").stdout


def test_gc_lists_and_with_delete_removes_what_no_checkpoint_names(tmp_path: Path) -> None:
    by_hand(tmp_path, 3)
    by_hand(tmp_path, 5)
    whole = files(tmp_path)
    left = [
        "chk-00000004/chain-0.arrows",
        "shared/00000002-agg-1-0.values-0.arrow",
        "shared/00000004-agg-1-0.x-0.arrow",
    ]
    newer = ["chk-00000006/chain-0.arrows", "shared/00000006-agg-1-0.values-0.arrow"]
    for path in left + newer:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"12345")
    (dry,) = answer("gc", tmp_path)
    assert sorted(file["path"] for file in dry["files"]) == sorted(left)
    assert {file["nbytes"] for file in dry["files"]} == {5}
    assert files(tmp_path) == whole | set(left) | set(newer)
    assert "3 files, 15 B, not needed; add --delete" in rayflow("gc", tmp_path).stdout
    assert "3 files, 15 B, deleted" in rayflow("gc", tmp_path, "--delete").stdout
    assert files(tmp_path) == whole | set(newer)
    assert "nothing to delete" in rayflow("gc", tmp_path, "--delete").stdout
    assert rayflow("verify", tmp_path).exit_code == 0


def test_gc_keep_drops_older_checkpoints_and_never_the_newest(tmp_path: Path) -> None:
    by_hand(tmp_path, 3)
    by_hand(tmp_path, 5)
    assert rayflow("gc", tmp_path, "--keep", "1", "--delete").exit_code == 0
    assert not any(path.startswith(("chk-00000003", "shared/00000003")) for path in files(tmp_path))
    assert rayflow("verify", tmp_path).exit_code == 0
    assert rayflow("gc", tmp_path, "--keep", "0").exit_code == 2


def test_gc_with_a_manifest_that_cannot_be_read_deletes_nothing(tmp_path: Path) -> None:
    by_hand(tmp_path, 3)
    by_hand(tmp_path, 5)
    (tmp_path / "chk-00000004").mkdir()
    (tmp_path / "chk-00000004" / "chain-0.arrows").write_bytes(b"x")
    (tmp_path / "chk-00000003" / "manifest.json").write_bytes(b"{")
    before = files(tmp_path)
    result = rayflow("gc", tmp_path, "--keep", "1", "--delete")
    assert result.exit_code == 1
    assert "Nothing is deleted, because that manifest may name anything" in result.stderr
    assert files(tmp_path) == before
