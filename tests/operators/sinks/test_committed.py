"""The record of what each checkpoint committed, beside a local output; on S3 see test_partitioned_s3.py."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rayflow.errors import CommitLostError, DataError
from rayflow.operators.sinks.committed import FOLDER, committed_files
from rayflow.operators.sinks.parquet import ParquetSink
from tests.operators.sinks.contract import batch, committer, prepared, started


def read(out: Path) -> list[int]:
    files = committed_files(str(out))
    tables = [pq.read_table(file.url) for file in files]
    assert [table.num_rows for table in tables] == [file.rows for file in files]
    assert [Path(file.url).stat().st_size for file in files] == [file.nbytes for file in files]
    return sorted(x for table in tables for x in table["x"].to_pylist())


def test_a_reader_of_the_records_sees_what_was_committed_and_nothing_else(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, manifest=True, max_file_rows=2)
    assert committed_files(str(tmp_path)) == []
    operators = [started(sink, subtask) for subtask in range(2)]
    for n in (1, 2):
        for i, operator in enumerate(operators):
            operator.process(batch(*range(10 * n + 5 * i, 10 * n + 5 * i + 3)), 0)
            committer(sink).commit(prepared(operator, n))
    (tmp_path / "part-foreign.parquet").write_bytes((tmp_path / "part-00000-00000001-0000.parquet").read_bytes())
    assert read(tmp_path) == [10, 11, 12, 15, 16, 17, 20, 21, 22, 25, 26, 27]
    assert [(f.checkpoint, f.subtask, f.rows) for f in committed_files(str(tmp_path))][:3] == [
        (1, 0, 2),
        (1, 0, 1),
        (1, 1, 2),
    ]
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert names == [f"0000000{n}-0000{i}.json" for n in (1, 2) for i in (0, 1)]
    assert pq.read_table(tmp_path).num_rows == 14, "readers of the folder do not take the records for data"


def test_a_record_comes_behind_its_files_and_again_with_the_same_bytes(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, manifest=True)
    operator = started(sink)
    operator.process(batch(1), 0)
    aborted = prepared(operator, 1)
    operator.process(batch(2), 0)
    found = [*aborted, *prepared(operator, 2)]
    assert committed_files(str(tmp_path)) == []
    pending = tmp_path / "_rayflow" / found[1]["pending"]
    hidden = pending.rename(tmp_path / "hidden")
    with pytest.raises(CommitLostError):
        committer(sink).commit(found)
    assert committed_files(str(tmp_path)) == [], "of a commit that broke off nothing is recorded"
    hidden.rename(pending)
    committer(sink).commit(found)
    before = {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()}
    committer(sink).recover(found, fresh=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == before
    assert read(tmp_path) == [1, 2]


def test_records_of_another_run_are_refused_and_of_appended_runs_kept_apart(tmp_path: Path) -> None:
    for run in ("a", "b"):
        sink = ParquetSink(tmp_path, manifest=True, mode="append")
        committer(sink).recover([], fresh=True)
        operator = started(sink, run_id=run)
        operator.process(batch(1), 0)
        committer(sink).commit(prepared(operator, 1))
    assert read(tmp_path) == [1, 1]
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    with pytest.raises(DataError, match=f"such as {FOLDER}/"):
        committer(ParquetSink(tmp_path, manifest=True)).recover([], fresh=True)


def test_a_record_that_is_none(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "1.json").write_text('{"files": [{}]}')
    with pytest.raises(DataError, match=r"1.json is not a record of committed files"):
        committed_files(str(tmp_path))
