from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, ConfigError, PlanError, StorageError
from rayflow.operators.base import OperatorContext, SinkFactory
from rayflow.operators.sinks import files
from rayflow.operators.sinks.files import FileSinkOperator, Rolling
from rayflow.operators.sinks.local import LocalTarget
from rayflow.operators.sinks.parquet import ParquetFormat, ParquetSink
from tests.operators.sinks.contract import SinkContract, batch, committer, prepared, started


def read(folder: Path) -> pa.Table:
    """As any reader of a folder does: files that begin with an underscore or a dot are not seen."""
    return pq.read_table(folder)


class TestContract(SinkContract):
    out: Path

    @pytest.fixture
    def factory(self, tmp_path: Path) -> SinkFactory:
        self.out = tmp_path / "deep" / "out"
        return ParquetSink(self.out)

    def visible(self) -> list[int]:
        return sorted(read(self.out)["x"].to_pylist())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("[!_]*"))

    def leftovers(self) -> Sequence[object]:
        return list(self.out.glob("_*"))

    def lose(self, committable: Json) -> None:
        (self.out / "_rayflow" / committable["pending"]).unlink()


@dataclass(frozen=True, slots=True)
class Direct(LocalTarget):
    """Broken on purpose: writes where readers look."""

    def new_path(self, ctx: OperatorContext, seq: int, suffix: str) -> str:
        os.makedirs(self.folder, exist_ok=True)
        return os.path.join(self.folder, f"{ctx.attempt}-{ctx.subtask}-{seq}{suffix}")


class DirectSink(ParquetSink):
    def build(self) -> FileSinkOperator:
        return FileSinkOperator(ParquetFormat(), Direct(str(self.path)), Rolling(), unique_names=False)


def test_the_contract_catches_a_sink_that_writes_to_the_output(tmp_path: Path) -> None:
    check = TestContract()
    check.out = tmp_path
    with pytest.raises(AssertionError):
        check.test_nothing_is_visible_before_the_commit(DirectSink(tmp_path))


def test_rows_and_types_come_back(tmp_path: Path) -> None:
    table = pa.table(
        {
            "i": pa.array([1, None, 3], pa.int32()),
            "t": pa.array([1, 2, None], pa.timestamp("us", "UTC")),
            "d": pa.array(["a", "b", "a"]).dictionary_encode(),
            "l": [[1], [], None],
        }
    )
    operator = started(ParquetSink(tmp_path))
    operator.process(table.to_batches()[0], 0)
    committer(ParquetSink(tmp_path)).commit(prepared(operator, 1))
    found = read(tmp_path)
    assert found.to_pylist() == table.to_pylist()
    assert found.schema.field("t").type == pa.timestamp("us", "UTC")


def test_small_batches_share_a_row_group(tmp_path: Path) -> None:
    operator = started(ParquetSink(tmp_path))
    for i in range(100):
        operator.process(batch(i), 0)
    (found,) = prepared(operator, 1)
    committer(ParquetSink(tmp_path)).commit([found])
    assert found["rows"] == 100
    assert found["nbytes"] == (tmp_path / found["final"]).stat().st_size
    assert pq.ParquetFile(tmp_path / found["final"]).num_row_groups == 1


def test_files_roll_at_a_number_of_rows(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, max_file_rows=4)
    operator = started(sink)
    operator.process(batch(*range(10)), 0)
    operator.process(batch(*range(10, 15)), 0)
    found = prepared(operator, 3)
    assert [f["rows"] for f in found] == [4, 4, 4, 3]
    assert [f["final"][-12:] for f in found] == [f"{i:04d}.parquet" for i in range(4)]
    committer(sink).commit(found)
    assert sorted(read(tmp_path)["x"].to_pylist()) == list(range(15))


def test_files_roll_at_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FLUSH_ROWS", 100)
    operator = started(ParquetSink(tmp_path, max_file_bytes=4_000, compression="none"))
    for i in range(20):
        operator.process(batch(*range(100 * i, 100 * i + 100)), 0)
    found = prepared(operator, 1)
    assert len(found) > 3
    assert all(f["nbytes"] < 12_000 for f in found)
    assert sum(f["rows"] for f in found) == 2_000


def test_no_rows_leave_an_empty_folder(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "out")
    committer(sink).recover([], fresh=True)
    assert prepared(started(sink), 1) == []
    committer(sink).finish()
    assert list((tmp_path / "out").iterdir()) == []


def test_append_adds_to_another_run_without_touching_it(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, mode="append")
    for i, run in enumerate(("a", "b")):
        committer(sink).recover([], fresh=True)
        operator = started(sink, run_id=run)
        operator.process(batch(i), 0)
        committer(sink).commit(prepared(operator, 1))
    assert sorted(p.name for p in tmp_path.glob("*.parquet")) == [
        "part-00000-00000001-0000-a.parquet",
        "part-00000-00000001-0000-b.parquet",
    ]
    assert sorted(read(tmp_path)["x"].to_pylist()) == [0, 1]


@pytest.mark.parametrize("links", [True, False])
def test_commit_never_overwrites_a_file_that_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    sink = ParquetSink(tmp_path)
    operator = started(sink)
    operator.process(batch(1), 0)
    (found,) = prepared(operator, 1)
    (tmp_path / found["final"]).write_text("mine")
    with pytest.raises(StorageError, match="not ours"):
        committer(sink).commit([found])
    with pytest.raises(StorageError, match="not ours"):
        committer(sink).recover([found], fresh=False)
    assert (tmp_path / found["final"]).read_text() == "mine"
    (tmp_path / found["final"]).unlink()
    committer(sink).commit([found])
    assert read(tmp_path)["x"].to_pylist() == [1]


def no_links(source: str, target: str) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_crash_between_link_and_unlink(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path)
    operator = started(sink)
    operator.process(batch(1), 0)
    (found,) = prepared(operator, 1)
    os.link(tmp_path / "_rayflow" / found["pending"], tmp_path / found["final"])
    committer(sink).recover([found], fresh=False)
    assert read(tmp_path)["x"].to_pylist() == [1]
    assert not (tmp_path / "_rayflow").exists()


def truncate_pending(out: Path, found: Json) -> None:
    os.truncate(out / "_rayflow" / found["pending"], 5)


def replace_final(out: Path, found: Json) -> None:
    (out / "_rayflow" / found["pending"]).unlink()
    (out / found["final"]).write_text("something else")


@pytest.mark.parametrize("damage", [truncate_pending, replace_final])
def test_damaged_prepared_output_is_lost(tmp_path: Path, damage: Callable[[Path, Json], None]) -> None:
    sink = ParquetSink(tmp_path)
    operator = started(sink)
    operator.process(batch(1), 0)
    (found,) = prepared(operator, 1)
    damage(tmp_path, found)
    with pytest.raises(CommitLostError, match="restore the file"):
        committer(sink).commit([found])


@pytest.mark.parametrize("in_process", [True, False])
def test_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: bool) -> None:
    """/dev/full answers every write with the real ENOSPC."""
    if in_process:
        monkeypatch.setattr(files, "FLUSH_ROWS", 1)
    (tmp_path / "_rayflow").mkdir()
    (tmp_path / "_rayflow" / "run-1-0-0.parquet").symlink_to("/dev/full")
    operator = started(ParquetSink(tmp_path, compression="none"))
    big = pa.record_batch({"x": pa.array(range(500_000))})
    with pytest.raises(StorageError, match=r"step 'step' subtask 0/2 cannot write its output: .*No space left"):  # noqa: PT012
        operator.process(big.slice(0, 400_000 if in_process else 100_000), 0)
        prepared(operator, 1)
    if not in_process:
        with pytest.raises(StorageError, match="No space left"):
            prepared(operator, 2)  # the rows are not forgotten: it goes on failing
    operator.close()


def test_failed_prepare_is_tried_again_with_the_next_checkpoint(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "out")
    operator = started(sink)
    operator.process(batch(1), 0)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(StorageError):
        prepared(operator, 1)
    (tmp_path / "out" / "_rayflow").mkdir(parents=True)
    operator.process(batch(2), 0)
    found = prepared(operator, 2)
    committer(sink).commit(found)
    assert [f["final"] for f in found] == ["part-00000-00000001-0000.parquet", "part-00000-00000002-0000.parquet"]
    assert sorted(read(tmp_path / "out")["x"].to_pylist()) == [1, 2]


def test_snapshot_shows_no_later_rows_and_closes_nothing(tmp_path: Path) -> None:
    operator = started(ParquetSink(tmp_path))
    operator.process(batch(1), 0)
    frozen = operator.snapshot(CheckpointId(1))
    operator.process(batch(2), 0)
    assert frozen is not None
    assert frozen.prepare is not None
    assert list((tmp_path / "_rayflow").iterdir()) == []  # the uploader, not the loop, writes the file
    (found,) = frozen.prepare()
    assert found["rows"] == 1


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(StorageError, match="out"):
        committer(ParquetSink(tmp_path / "out")).recover([], fresh=True)


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="mode"):
        ParquetSink("out", mode="overwrite")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="compression"):
        ParquetSink("out", compression="zippy")
    with pytest.raises(ConfigError, match="max_file_rows"):
        ParquetSink("out", max_file_rows=0)
    with pytest.raises(PlanError, match="s3://"):
        ParquetSink("gs://bucket/out")
