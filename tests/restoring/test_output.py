"""Output of the job that a savepoint was taken of: committed once, and not missed when it has been moved away."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.errors import ConfigError, JobFailedError
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root
from rayflow.storage.savepoint_copy import all_committed, write_savepoint
from rayflow.storage.snapshots import SnapshotStore
from tests.restoring.flows import CONFIG, ROWS, source
from tests.restoring.stopping import newest, run, savepoint_of


def _flow(out: Path) -> rf.Flow:
    rows = source().key_by("k").agg(n=rf.count())  # one for each row in
    return rf.Flow("totals", rows.write_parquet(str(out), name="sink"))


def _rows(out: Path) -> int:
    return sum(pq.read_table(path).num_rows for path in out.glob("*.parquet"))


def _stopped(tmp_path: Path, *, committed: bool) -> str:
    """A job that was stopped half-way, and its savepoint."""
    run(_flow(tmp_path / "out"), tmp_path / "old", rounds=60, config=CONFIG)
    assert 0 < _rows(tmp_path / "out") < ROWS
    manifest = newest(tmp_path / "old", "totals")
    assert any(part.committables for part in manifest.subtasks)
    if not committed:
        return savepoint_of(tmp_path / "old", "totals", tmp_path / "savepoint")
    snapshots = SnapshotStore(ObjectStore(job_root(str(tmp_path / "old"), "totals")), manifest.max_parallelism)
    return write_savepoint(all_committed(manifest), snapshots, str(tmp_path / "savepoint"))


def test_after_a_stop_the_next_job_may_write_elsewhere(tmp_path: Path) -> None:
    url = _stopped(tmp_path, committed=True)
    run(_flow(tmp_path / "other"), tmp_path / "new", start=url, config=CONFIG)
    assert _rows(tmp_path / "out") + _rows(tmp_path / "other") == ROWS


def test_after_a_stop_the_output_may_be_moved_away(tmp_path: Path) -> None:
    url = _stopped(tmp_path, committed=True)
    (tmp_path / "out").rename(tmp_path / "kept")
    run(_flow(tmp_path / "out"), tmp_path / "new", start=url, config=CONFIG)
    assert _rows(tmp_path / "kept") + _rows(tmp_path / "out") == ROWS


def test_output_of_a_job_that_may_not_have_committed_it_must_be_there(tmp_path: Path) -> None:
    """The variant that keeps it is right for a job that goes on, and wrong after a stop."""
    url = _stopped(tmp_path, committed=False)
    with pytest.raises(JobFailedError, match="was prepared in"):
        run(_flow(tmp_path / "other"), tmp_path / "new", start=url, config=CONFIG)
    run(_flow(tmp_path / "out"), tmp_path / "newer", start=url, config=CONFIG)
    assert _rows(tmp_path / "out") == ROWS


def test_a_job_that_went_on_from_a_savepoint_does_not_begin_there_again(tmp_path: Path) -> None:
    """A supervisor that runs the same command again would write all output since the savepoint a second time."""
    url = _stopped(tmp_path, committed=True)
    run(_flow(tmp_path / "out"), tmp_path / "new", start=url, config=CONFIG)
    assert _rows(tmp_path / "out") == ROWS
    with pytest.raises(ConfigError, match='has gone on from there to checkpoint .* pass start="latest"'):
        run(_flow(tmp_path / "out"), tmp_path / "new", start=url, config=CONFIG)
    run(_flow(tmp_path / "out"), tmp_path / "new", start="latest", config=CONFIG)
    assert _rows(tmp_path / "out") == ROWS
