"""`rf.compact_files`: killed at any step it leaves each row once, and the job's own commits still hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from rayflow import compaction
from rayflow.compaction import Compacted, compact_files
from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, ConfigError, DataError, StorageError
from rayflow.operators.sinks.committed import FOLDER, committed_files
from rayflow.operators.sinks.parquet import ParquetSink
from rayflow.operators.sources.paths import open_fs
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.store import PutOutcome
from tests.operators.sinks.contract import batch, committer, prepared, started
from tests.servers import S3Server

CHECKPOINTS = 6


def written(out: Any, **options: Any) -> tuple[ParquetSink, list[Json]]:
    """Six checkpoints of six rows in two folders; the committables of the last one."""
    sink = ParquetSink(out, partition_by=["p"], manifest=True, **options)
    operator = started(sink)
    found: list[Json] = []
    for n in range(CHECKPOINTS):
        x = pa.array(range(6 * n, 6 * n + 6), pa.int64())
        operator.process(pa.record_batch({"x": x, "p": pa.array([f"/{v % 2}" for v in x.to_pylist()])}), 0)
        found = prepared(operator, n + 1)
        committer(sink).commit(found)
    operator.close()
    return sink, found


def seen(out: Any, options: dict[str, Any] | None = None, *, listed: bool) -> list[int]:
    fs, path = open_fs(str(out), options or {})
    names: Any = path
    if listed:
        names = [open_fs(f.url, options or {})[1] for f in committed_files(str(out), storage_options=options)]
    table = ds.dataset(names, filesystem=fs, partitioning="hive", partition_base_dir=path).to_table()
    assert table["p"].to_pylist() == [f"/{x % 2}" for x in table["x"].to_pylist()]
    return sorted(table["x"].to_pylist())


ALL = list(range(6 * CHECKPOINTS))


def test_small_files_become_one_a_folder_and_the_job_goes_on(tmp_path: Path) -> None:
    sink, last = written(tmp_path)
    assert compact_files(str(tmp_path)) == Compacted(merged=12, written=2, removed=0)
    assert sorted(path.parent.name for path in tmp_path.glob("p=*/*")) == ["p=%2F0", "p=%2F1"]
    assert seen(tmp_path, listed=True) == seen(tmp_path, listed=False) == ALL
    committer(sink).recover(last, fresh=False)
    committer(sink).commit(last)
    assert seen(tmp_path, listed=True) == seen(tmp_path, listed=False) == ALL
    operator = started(sink, attempt=2)
    operator.process(pa.record_batch({"x": [36], "p": ["/0"]}), 0)
    committer(sink).commit(prepared(operator, 99))
    assert compact_files(str(tmp_path)) == Compacted(merged=2, written=1, removed=0)
    assert compact_files(str(tmp_path)) == Compacted(0, 0, 0)
    assert seen(tmp_path, listed=True) == seen(tmp_path, listed=False) == [*ALL, 36]
    assert max(f.checkpoint for f in committed_files(str(tmp_path))) == 99


def test_broken_a_sink_that_does_not_know_the_record_takes_merged_files_for_lost(tmp_path: Path) -> None:
    _, last = written(tmp_path)
    compact_files(str(tmp_path))
    with pytest.raises(CommitLostError):
        committer(ParquetSink(tmp_path, partition_by=["p"])).recover(last, fresh=False)


def test_files_grow_to_about_the_target(tmp_path: Path) -> None:
    written(tmp_path)
    size = max(file.nbytes for file in committed_files(str(tmp_path)))
    compact_files(str(tmp_path), target_bytes=3 * size)
    assert [file.rows for file in committed_files(str(tmp_path))] == [9] * 4
    assert seen(tmp_path, listed=False) == ALL


class Killed(BaseException):
    pass


class Dying(ObjectStore):
    """Ends the process, so to speak, before change number ``at``."""

    at = 0

    def _change(self) -> None:
        Dying.at -= 1
        if Dying.at == -1:
            raise Killed

    def put(self, path: str, data: bytes) -> None:
        self._change()
        super().put(path, data)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        self._change()
        return super().put_if_absent(path, data)

    def delete(self, path: str) -> None:
        self._change()
        super().delete(path)


@pytest.mark.parametrize("at", range(16))
def test_killed_at_any_step(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen changes: two groups of a file, a record and six deletions."""
    sink, last = written(tmp_path)
    monkeypatch.setattr(compaction, "ObjectStore", Dying)
    Dying.at = at
    with pytest.raises(Killed):
        compact_files(str(tmp_path))
    assert seen(tmp_path, listed=True) == ALL, "who reads by the records is never wrong"
    committer(sink).recover(last, fresh=False)
    assert seen(tmp_path, listed=True) == ALL
    compact_files(str(tmp_path))
    assert seen(tmp_path, listed=True) == seen(tmp_path, listed=False) == ALL
    assert len(list(tmp_path.glob("p=*/*"))) == 2


class Meanwhile(ObjectStore):
    """Another compaction, a whole one, just before this one records its first file."""

    done = False

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        if not Meanwhile.done:
            Meanwhile.done = True
            compact_files(self.url)
        return super().put_if_absent(path, data)


def test_of_two_at_once_one_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(compaction, "ObjectStore", Meanwhile)
    Meanwhile.done = False
    with pytest.raises(StorageError, match="another compaction is at work"):
        compact_files(str(tmp_path))
    assert seen(tmp_path, listed=True) == seen(tmp_path, listed=False) == ALL
    assert len(list((tmp_path / FOLDER).glob("merge-*"))) == 3, "the inner one used up the number of the outer file"


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="written with manifest=True"):
        compact_files(str(tmp_path))
    with pytest.raises(ConfigError, match="target_bytes"):
        compact_files(str(tmp_path), target_bytes=0)
    sink = ParquetSink(tmp_path, manifest=True)
    operator = started(sink)
    for n in (1, 2):
        operator.process(batch(n), 0)
        committer(sink).commit(prepared(operator, n))
    next(tmp_path.glob("part-*2-0000.parquet")).unlink()
    with pytest.raises(DataError, match=r"part-00000-00000002-0000.parquet was committed, but is not in"):
        compact_files(str(tmp_path))
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_on_s3(s3_server: S3Server) -> None:
    url, options = f"{s3_server.bucket()}/deep/out", s3_server.storage_options
    sink, last = written(url, storage_options=options)
    assert compact_files(url, storage_options=options) == Compacted(12, 2, 0)
    committer(sink).recover(last, fresh=False)
    committer(sink).commit(last)
    assert seen(url, options, listed=True) == seen(url, options, listed=False) == ALL
    assert len(committed_files(url, storage_options=options)) == 2
