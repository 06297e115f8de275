"""Starting from savepoints, and all that is refused before anything starts or changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.core.manifest import Manifest
from rayflow.errors import StorageError
from rayflow.storage import savepoint_copy
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root
from tests.restoring import flows
from tests.restoring.stopping import files_below, manifest_in, newest, rewrite, run, savepoint_of


@pytest.fixture(autouse=True)
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state here is small, and what is to be lost must lie in a file."""
    monkeypatch.setattr(savepoint_copy, "INLINE_BYTES_MAX", 100)


@pytest.fixture
def savepoint(tmp_path: Path) -> Path:
    """Of flow ``totals``, stopped in the middle at parallelism 2."""
    run(flows.totals(), tmp_path / "taken", rounds=15, config=flows.CONFIG)
    savepoint_of(tmp_path / "taken", "totals", tmp_path / "savepoint")
    shutil.rmtree(tmp_path / "taken")
    return tmp_path / "savepoint"


def totals_of(result: rf.JobResult) -> dict[int, int]:
    return {key: total for key, (_, total) in flows.last_of(result.table("rows")).items()}


EXACT = {key: flows.total(key) for key in range(flows.KEYS)}


def test_a_job_in_memory_starts_from_a_savepoint(savepoint: Path) -> None:
    result = run(flows.totals(), None, parallelism=3, start=str(savepoint), config=flows.CONFIG)
    assert totals_of(result) == EXACT
    assert result.metrics["rows_in"] < flows.ROWS, "the rest only"


def test_what_is_in_the_directory_is_superseded_and_stays_until_retention(savepoint: Path, tmp_path: Path) -> None:
    """Another life of the job has gone further, on other data: its state must not come back."""
    other = flows.totals(rows=7 * flows.KEYS)
    run(other, tmp_path / "dir", rounds=12, config=flows.CONFIG)
    before = newest(tmp_path / "dir", "totals").checkpoint
    result = run(flows.totals(), tmp_path / "dir", parallelism=4, start=str(savepoint), config=flows.CONFIG)
    assert totals_of(result) == EXACT
    assert result.checkpoint is not None
    assert result.checkpoint > before
    again = run(flows.totals(), tmp_path / "dir", config=flows.CONFIG)
    assert (again.status, totals_of(again)) == ("finished", EXACT)


def test_the_id_of_the_import_is_above_that_of_the_savepoint(savepoint: Path, tmp_path: Path) -> None:
    """Sinks name their output by checkpoints: a new directory must not give the old names again (C4)."""
    taken = manifest_in(savepoint).checkpoint
    result = run(flows.totals(), tmp_path / "dir", rounds=1, start=str(savepoint), config=flows.CONFIG)
    assert result.checkpoint is not None
    assert result.checkpoint > taken + 1


def test_parquet_goes_on_in_the_same_folder_exactly_once(tmp_path: Path) -> None:
    flow = rf.Flow("files", flows.source().select("v").write_parquet(str(tmp_path / "out")))
    run(flow, tmp_path / "a", rounds=6, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "files", tmp_path / "savepoint")
    part = pq.read_table(tmp_path / "out").num_rows
    assert 0 < part < flows.ROWS
    assert any(sub.committables for sub in manifest_in(tmp_path / "savepoint").subtasks), "they travel with it"
    run(flow, tmp_path / "b", parallelism=3, start=url, config=flows.CONFIG)
    assert sorted(pq.read_table(tmp_path / "out")["v"].to_pylist()) == list(range(flows.ROWS))


def test_output_that_was_prepared_and_not_committed_is_committed_by_the_start(tmp_path: Path) -> None:
    """The job dies between the manifest and the commit: what the savepoint names is committed, not aborted (S1)."""
    out = tmp_path / "out"
    flow = rf.Flow("files", flows.source().select("v").write_parquet(str(out)))
    run(flow, tmp_path / "a", rounds=6, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "files", tmp_path / "savepoint")
    # As if no subtask had committed the last checkpoint: its files are pending again.
    for committable in (c.payload for sub in manifest_in(tmp_path / "savepoint").subtasks for c in sub.committables):
        (out / "_rayflow").mkdir(exist_ok=True)
        (out / committable["final"]).rename(out / "_rayflow" / committable["pending"])
    run(flow, tmp_path / "b", start=url, config=flows.CONFIG)
    assert sorted(pq.read_table(out)["v"].to_pylist()) == list(range(flows.ROWS))


def test_a_savepoint_survives_retention_and_the_sweep_of_its_job(tmp_path: Path) -> None:
    run(flows.totals(), tmp_path / "a", rounds=8, config=flows.CONFIG)
    inside = tmp_path / "a" / "totals" / "savepoints" / "mine"
    url = savepoint_of(tmp_path / "a", "totals", inside)
    before = files_below(inside)
    result = run(flows.totals(), tmp_path / "a", start=url, config=flows.CONFIG)  # ends with retention and the sweep
    assert totals_of(result) == EXACT
    assert files_below(inside) == before
    assert totals_of(run(flows.totals(), tmp_path / "b", start=url, config=flows.CONFIG)) == EXACT


def test_a_checkpoint_of_another_directory_can_be_started_from(tmp_path: Path) -> None:
    run(flows.totals(), tmp_path / "a", rounds=12, config=flows.CONFIG)
    checkpoint = newest(tmp_path / "a", "totals").checkpoint
    folder = tmp_path / "a" / "totals" / f"chk-{checkpoint:08d}"
    before = files_below(tmp_path / "a")
    result = run(flows.totals(), tmp_path / "b", parallelism=3, start=str(folder), config=flows.CONFIG)
    assert totals_of(result) == EXACT
    assert files_below(tmp_path / "a") == before


def test_a_checkpoint_of_the_own_directory_is_gone_back_to(tmp_path: Path) -> None:
    run(flows.totals(), tmp_path / "a", rounds=12, config=flows.CONFIG)
    checkpoint = newest(tmp_path / "a", "totals").checkpoint
    folder = tmp_path / "a" / "totals" / f"chk-{checkpoint:08d}"
    further = run(flows.totals(), tmp_path / "a", rounds=2, config=flows.CONFIG)
    assert (further.checkpoint or 0) > checkpoint
    result = run(flows.totals(), tmp_path / "a", start=str(folder), config=flows.CONFIG)
    assert totals_of(result) == EXACT


def test_a_running_job_on_the_directory_is_fenced_by_a_start(savepoint: Path, tmp_path: Path) -> None:
    store = ObjectStore(job_root(str(tmp_path / "dir"), "totals"))
    first = CheckpointStore(store, "totals")
    first.claim()
    run(flows.totals(), tmp_path / "dir", start=str(savepoint), config=flows.CONFIG)
    with pytest.raises(rf.FencedError):
        first.check_owner()


def test_a_directory_that_cannot_be_read_can_still_be_started_on(savepoint: Path, tmp_path: Path) -> None:
    """A savepoint is what one goes back to when the checkpoints are broken."""
    run(flows.totals(), tmp_path / "dir", rounds=8, config=flows.CONFIG)
    checkpoint = newest(tmp_path / "dir", "totals").checkpoint
    torn = tmp_path / "dir" / "totals" / f"chk-{checkpoint:08d}" / "manifest.json"
    torn.write_bytes(torn.read_bytes()[:-100])
    result = run(flows.totals(), tmp_path / "dir", start=str(savepoint), config=flows.CONFIG)
    assert totals_of(result) == EXACT


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(
    savepoint: Path,
    tmp_path: Path,
    message: str,
    *,
    flow: rf.Flow | None = None,
    error: type[Exception] = rf.ConfigError,
) -> None:
    """One sentence, nothing started, nothing changed."""
    before = files_below(tmp_path)
    with pytest.raises(error, match=message) as caught:
        run(flow or flows.totals(), tmp_path / "dir", start=str(savepoint), config=flows.CONFIG)
    assert "\n" not in str(caught.value)
    assert files_below(tmp_path) == before


def test_a_savepoint_of_another_flow_needs_a_word(savepoint: Path, tmp_path: Path) -> None:
    stream = flows.source().key_by("k").process(flows.Totals, name="totals").collect(name="rows")
    other = rf.Flow("other", stream)
    refused(savepoint, tmp_path, "taken of flow 'totals', this one is 'other'; .*allow_other_flow=True", flow=other)
    result = other.run(local=True, start=str(savepoint), allow_other_flow=True, config=flows.CONFIG)
    assert totals_of(result) == EXACT


def test_a_newer_format_version_is_refused(savepoint: Path, tmp_path: Path) -> None:
    rewrite(savepoint, version=4)
    refused(savepoint, tmp_path, "format version 4, .*upgrade rayflow", error=rf.CorruptCheckpointError)


def test_a_missing_file_and_one_of_another_size_are_found_before_anything_starts(
    savepoint: Path, tmp_path: Path
) -> None:
    file = next(p for p in sorted(savepoint.rglob("*.arrow")))
    whole = file.read_bytes()
    name = file.relative_to(savepoint)
    file.write_bytes(whole[:-1])
    refused(savepoint, tmp_path, f"{name} of .* has {len(whole) - 1} bytes", error=rf.CorruptCheckpointError)
    file.unlink()
    refused(savepoint, tmp_path, f"{name} of .* is missing", error=rf.CorruptCheckpointError)


def test_a_flipped_bit_fails_the_job_and_is_named(savepoint: Path, tmp_path: Path) -> None:
    for handle in (h for sub in manifest_in(savepoint).subtasks for h in sub.states if len(h.blocks) > 1):
        assert handle.file is not None
        data = bytearray((savepoint / handle.file.path).read_bytes())
        data[handle.blocks[-1].offset + handle.blocks[-1].nbytes // 2] ^= 1
        (savepoint / handle.file.path).write_bytes(data)
    with pytest.raises(rf.JobFailedError, match=r"state/.*\.arrow .* has checksum"):
        run(flows.totals(), tmp_path / "dir", start=str(savepoint), config=flows.CONFIG)


def test_a_torn_manifest_is_refused(savepoint: Path, tmp_path: Path) -> None:
    manifest = savepoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"rows": 0', b'"rows": 1', 1))
    refused(savepoint, tmp_path, "manifest .* has checksum", error=rf.CorruptCheckpointError)


def test_folders_that_are_no_savepoint_are_told_apart(savepoint: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tmp_path, "nothing is not a savepoint: there is nothing")
    refused(tmp_path, tmp_path, "is not a savepoint but holds 1 of them .*savepoint")
    (savepoint / "manifest.json").unlink()
    refused(savepoint, tmp_path, r"holds \d+ files but no manifest.json; .* interrupted")
    run(flows.totals(), tmp_path / "a", rounds=12, config=flows.CONFIG)
    refused(tmp_path / "a" / "totals", tmp_path, "directory of a job, with .*name the one to start from: .*/chk-0")
    refused(tmp_path / "a", tmp_path, r"is not a savepoint but holds \d+ of them .*/totals/chk-0")


def test_a_copied_folder_of_a_checkpoint_is_no_savepoint(tmp_path: Path) -> None:
    run(flows.totals(), tmp_path / "a", rounds=40, config=flows.CONFIG)
    checkpoint = newest(tmp_path / "a", "totals").checkpoint
    shutil.copytree(tmp_path / "a" / "totals" / f"chk-{checkpoint:08d}", tmp_path / "copy")
    refused(tmp_path / "copy", tmp_path, "copy of a checkpoint's folder", error=rf.CorruptCheckpointError)


# ------------------------------------------------------------------------------------------------------------- writing


def test_an_interrupted_copy_leaves_no_savepoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(flows.totals(), tmp_path / "a", rounds=12, config=flows.CONFIG)
    written: list[str] = []
    put = ObjectStore.put

    def full(self: ObjectStore, path: str, data: bytes) -> None:
        if written and path.startswith("state/"):
            raise StorageError("the disk is full")
        if path.startswith("state/"):
            written.append(path)
        put(self, path, data)

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "put", full)
        with pytest.raises(StorageError, match="full"):
            savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    assert written
    assert not list((tmp_path / "savepoint").rglob("*.*")), "what was copied is removed"
    savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")  # the place can be used again


def test_a_savepoint_is_never_written_over_anything(savepoint: Path, tmp_path: Path) -> None:
    run(flows.totals(), tmp_path / "a", rounds=5, config=flows.CONFIG)
    before = files_below(savepoint)
    with pytest.raises(rf.ConfigError, match="is not empty"):
        savepoint_of(tmp_path / "a", "totals", savepoint)
    assert files_below(savepoint) == before


def test_state_is_cut_into_stretches_that_say_which_groups_are_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(savepoint_copy, "STRETCH_BYTES", 600)
    run(flows.totals(), tmp_path / "a", rounds=15, config=flows.CONFIG)
    taken = newest(tmp_path / "a", "totals")
    url = savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    manifest = manifest_in(tmp_path / "savepoint")
    handles = [h for sub in manifest.subtasks for h in sub.states if h.operator == "totals" and h.name == "values"]
    assert len(handles) > 4
    assert sorted(g for h in handles for g in range(*(h.groups or ()))) == list(range(flows.GROUPS))
    assert keys_in(manifest) == keys_in(taken)
    assert all(file.path.startswith("state/") and file.root is None for file in manifest.files())
    assert totals_of(run(flows.totals(), tmp_path / "b", parallelism=5, start=url, config=flows.CONFIG)) == EXACT


def keys_in(manifest: Manifest) -> int:
    """Rows of ``values`` after merging, by the index of groups: each key has its own row."""
    groups = {g for sub in manifest.subtasks for h in sub.states if h.name == "values" for g, _ in h.group_rows}
    return len(groups)


def test_a_savepoint_has_one_row_a_key_and_is_read_by_pyarrow_alone(tmp_path: Path) -> None:
    import pyarrow.ipc

    run(flows.totals(), tmp_path / "a", rounds=30, config=flows.CONFIG)
    savepoint_of(tmp_path / "a", "totals", tmp_path / "savepoint")
    body = json.loads((tmp_path / "savepoint" / "manifest.json").read_text())
    rows = []
    for state in (s for sub in body["subtasks"] for s in sub["states"] if s["operator"] == "totals" and s["file"]):
        with pyarrow.ipc.open_file(str(tmp_path / "savepoint" / state["file"]["path"])) as reader:
            rows += reader.read_all().to_pylist()
    import base64

    for state in (s for sub in body["subtasks"] for s in sub["states"] if s["operator"] == "totals" and s["inline"]):
        with pyarrow.ipc.open_file(base64.b64decode(state["inline"])) as reader:
            rows += reader.read_all().to_pylist()
    values = [row for row in rows if "total" in row]
    assert len(values) == len({row["k"] for row in values})
    assert not any("__deleted" in row for row in values)


def test_committables_of_a_sink_that_is_gone_are_not_forgotten(tmp_path: Path) -> None:
    flow = rf.Flow("files", flows.source().select("v").write_parquet(str(tmp_path / "out"), name="old"))
    run(flow, tmp_path / "a", rounds=6, config=flows.CONFIG)
    url = savepoint_of(tmp_path / "a", "files", tmp_path / "savepoint")
    other = rf.Flow("files", flows.source().select("v").write_parquet(str(tmp_path / "out2"), name="new"))
    refused(Path(url), tmp_path, "output to be committed by sink 'old', which this flow does not have", flow=other)
    run(other, tmp_path / "b", start=url, allow_dropped=("old",), config=flows.CONFIG)


def test_an_imported_manifest_names_no_piece_again(savepoint: Path) -> None:
    from rayflow.storage.savepoints import open_savepoint

    found = open_savepoint(str(savepoint))
    with_pieces = replace(
        found,
        manifest=replace(
            found.manifest,
            subtasks=tuple(
                replace(sub, states=tuple(replace(h, piece="p") for h in sub.states)) for sub in found.manifest.subtasks
            ),
        ),
    )
    assert {h.piece for sub in with_pieces.to_import().subtasks for h in sub.states} == {""}
