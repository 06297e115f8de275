"""`rayflow checkpoints` on directories made by real (local) runs, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

import rayflow as rf
from rayflow.cli.main import main

ROWS = 20_000  # enough that the state does not fit in the manifest and goes to a file


def checkpointed(url: Path, name: str) -> None:
    rows = pa.table({"k": pa.array(range(ROWS), pa.int64())})
    stream = rf.from_arrow(rows, batch_rows=1_000)
    rf.Flow(name, stream.collect()).run(local=True, checkpoints=rf.CheckpointConfig(str(url), interval="3ms", retain=3))


@pytest.fixture
def url(tmp_path: Path) -> Path:
    checkpointed(tmp_path / "all", "one job")
    return tmp_path / "all"


def rayflow(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["checkpoints", *(str(a) for a in arguments)])


def ids(url: Path) -> list[int]:
    result = rayflow("list", url, "--json")
    assert result.exit_code == 0, result.output
    return [c["checkpoint"] for c in json.loads(result.stdout)[0]["checkpoints"]]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x01
    path.write_bytes(data)


def state_file(url: Path, checkpoint: int) -> Path:
    """A state file that the manifest of ``checkpoint`` names."""
    job = url / "one%20job"
    shown = rayflow("show", job, str(checkpoint), "--json")
    assert shown.exit_code == 0, shown.output
    files = [s["file"]["path"] for part in json.loads(shown.stdout)["subtasks"] for s in part["states"] if s["file"]]
    assert files
    return job / str(files[0])


def test_list_of_a_root_names_its_jobs_and_of_a_job_the_job_alone(url: Path) -> None:
    checkpointed(url, "other")
    both = json.loads(rayflow("list", url, "--json").stdout)
    assert [entry["job"] for entry in both] == ["one job", "other"]
    one = json.loads(rayflow("list", url / "one%20job", "--json").stdout)
    assert [entry["job"] for entry in one] == ["one job"]
    assert one[0]["checkpoints"] == both[0]["checkpoints"]
    assert len(one[0]["checkpoints"]) == 3
    kinds = [c["kind"] for c in one[0]["checkpoints"]]
    assert kinds == ["final", "periodic", "periodic"]
    assert "one job" in rayflow("list", url).stdout


def test_show_prints_subtasks_states_and_sizes(url: Path) -> None:
    result = rayflow("show", url)
    assert result.exit_code == 0, result.output
    assert f"checkpoint {ids(url)[0]} of job 'one job': final" in result.stdout
    assert "from_arrow-1[0]" in result.stdout
    assert "collect-1.rows" in result.stdout
    assert f"{ROWS:,}" in result.stdout


def test_show_of_a_periodic_checkpoint_prints_the_position_in_the_split(url: Path) -> None:
    middle = ids(url)[2]
    shown = json.loads(rayflow("show", url, str(middle), "--json").stdout)
    assert shown["checkpoint"] == middle
    text = rayflow("show", url, str(middle))
    assert text.exit_code == 0, text.output
    (split,) = [s for part in shown["subtasks"] for s in part["splits"]]
    assert str(split["position"]) in text.stdout


def test_show_of_what_is_not_there(url: Path) -> None:
    missing = rayflow("show", url, "999")
    assert missing.exit_code == 1
    assert "chk-00000999/manifest.json" in missing.stderr
    assert rayflow("show", url, "newest").exit_code == 2
    checkpointed(url, "other")
    several = rayflow("show", url)
    assert several.exit_code == 2
    assert "holds 2 jobs; name one" in several.stderr


def test_verify_of_whole_checkpoints(url: Path) -> None:
    result = rayflow("verify", url)
    assert result.exit_code == 0, result.output
    assert "3 checkpoints, all whole" in result.stdout
    assert json.loads(rayflow("verify", url, "--json").stdout)["ok"] is True


def test_verify_names_a_state_file_with_one_flipped_bit(url: Path) -> None:
    broken = state_file(url, ids(url)[0])
    flip(broken, broken.stat().st_size // 2)
    result = rayflow("verify", url)
    assert result.exit_code == 1
    assert str(broken.relative_to(url / "one%20job")) in result.stdout
    assert "cannot be restored" in result.stdout
    found = json.loads(rayflow("verify", url, "--json").stdout)
    assert found["ok"] is False
    assert [c["checkpoint"] for c in found["checkpoints"] if c["problems"]] == [ids(url)[0]]


def test_verify_names_a_missing_and_a_short_state_file(url: Path) -> None:
    newest, older, _ = ids(url)
    short, missing = state_file(url, newest), state_file(url, older)
    short.write_bytes(short.read_bytes()[:-1])
    missing.unlink()
    result = rayflow("verify", url)
    assert result.exit_code == 1
    for path in (short, missing):
        assert str(path.relative_to(url / "one%20job")) in result.stdout
    assert "2 of 3 checkpoints cannot be restored" in result.stdout


def test_a_flipped_manifest_is_named_by_list_show_and_verify(url: Path) -> None:
    newest = ids(url)[0]
    manifest = url / "one%20job" / f"chk-{newest:08d}" / "manifest.json"
    flip(manifest, manifest.read_bytes().index(b'"final"') + 2)
    name = f"chk-{newest:08d}/manifest.json"
    assert name in rayflow("list", url).stdout
    shown = rayflow("show", url)
    assert shown.exit_code == 1
    assert name in shown.stderr
    assert "Traceback" not in shown.output
    verified = rayflow("verify", url)
    assert verified.exit_code == 1
    assert name in verified.stdout
    assert "1 of 3 checkpoints cannot be restored" in verified.stdout


def test_a_torn_manifest_is_named(url: Path) -> None:
    newest = ids(url)[0]
    manifest = url / "one%20job" / f"chk-{newest:08d}" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100])
    assert rayflow("verify", url).exit_code == 1
    assert "is not whole" in rayflow("verify", url).stdout


def test_a_renamed_job_folder_is_still_understood(url: Path) -> None:
    (url / "one%20job").rename(url / "moved")
    found = json.loads(rayflow("list", url, "--json").stdout)
    assert [entry["job"] for entry in found] == ["one job"]
    assert rayflow("verify", url / "moved").exit_code == 0


@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_a_folder_without_checkpoints_and_an_unknown_storage(tmp_path: Path, command: str) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    for target in (tmp_path, tmp_path / "absent"):
        result = rayflow(command, target)
        assert result.exit_code == 1
        assert "holds no checkpoints" in result.stderr
    assert rayflow(command, "ftp://somewhere/else").exit_code == 1


def test_looking_changes_nothing(url: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(url.rglob("*")) if p.is_file()}

    before = everything()
    for command in ("list", "show", "verify"):
        rayflow(command, url)
    assert everything() == before
