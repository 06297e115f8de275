"""PROOFS P4 on files: after any fault and at any parallelism the output holds each row once, on disk and on S3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import rayflow as rf
from rayflow.core.manifest import Json
from rayflow.errors import StorageError
from rayflow.operators.base import Collected, Committer, CommitterContext, SinkFactory, SinkOperator
from rayflow.operators.sinks.files import FileSinkOperator
from rayflow.operators.sinks.output import FileSink
from rayflow.operators.sinks.parquet import ParquetSink
from rayflow.operators.sinks.s3 import Bucket
from rayflow.operators.sinks.text import CsvSink, JsonSink
from rayflow.operators.sources.csv_files import CsvSource
from rayflow.operators.sources.json_files import JsonSource
from rayflow.operators.sources.paths import open_fs
from tests.failing import FailsOnce
from tests.operators.sinks.contract import prepared
from tests.operators.sources.contract import context, read_all
from tests.restoring.flows import CONFIG
from tests.restoring.stopping import run, savepoint_of
from tests.servers import S3Server

BEFORE, AFTER = "before", "after"
ROWS = 1_200


@dataclass(frozen=True)
class Faulty:
    """A sink whose commit number ``at`` fails: before it has done anything, or when all is done and nobody knows."""

    sink: FileSink
    folder: Path
    at: int
    when: str
    wrap: Callable[[Committer], Committer] = lambda committer: committer
    stateful = False

    def build(self) -> FileSinkOperator:
        return self.sink.build()

    def committer(self) -> Committer:
        return _Faulty(self, self.wrap(self.sink.committer()))


class _Faulty(Committer):
    def __init__(self, owner: Faulty, inner: Committer) -> None:
        self._owner, self._inner = owner, inner

    def open(self, ctx: CommitterContext) -> None:
        self._inner.open(ctx)

    def commit(self, committables: Sequence[Json]) -> None:
        if not committables:
            return
        owner = self._owner
        number = len(list(owner.folder.glob("commit-*")))
        (owner.folder / f"commit-{number}").touch()
        if number == owner.at and owner.when == BEFORE:
            raise StorageError("the storage is gone for a moment")
        self._inner.commit(committables)
        if number == owner.at and owner.when == AFTER:
            raise StorageError("the answer of the storage was lost")

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self._inner.recover(committables, fresh=fresh)

    def finish(self) -> None:
        self._inner.finish()


class Forgetful(Committer):
    """Broken on purpose: after a failure it does not commit what the checkpoint names. At most once."""

    def __init__(self, inner: Committer) -> None:
        self._inner = inner

    def commit(self, committables: Sequence[Json]) -> None:
        self._inner.commit(committables)

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self._inner.recover([], fresh=fresh)


@dataclass(frozen=True)
class Eager:
    """Broken on purpose: what is written is visible at once, whatever becomes of its checkpoint. At least once."""

    sink: FileSink
    stateful = False

    def build(self) -> SinkOperator:
        return _Eager(self.sink)

    def committer(self) -> Committer:
        return self.sink.committer()


class _Eager(SinkOperator):
    def __init__(self, sink: FileSink) -> None:
        self._sink, self._inner = sink, sink.build()
        self._batches = 0

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if self._batches == 0:
            self._inner.open(self.ctx, self.out)
        self._batches += 1
        self._inner.process(batch, input_index)
        self._sink.committer().commit(prepared(self._inner, 1_000 * self.ctx.attempt + self._batches))


@dataclass(frozen=True)
class Output:
    """One kind of files in one place."""

    sink: FileSink
    read: Callable[[], list[int]]
    leftovers: Callable[[], Sequence[object]]


def _listed(url: str, options: dict[str, Any] | None = None) -> list[int]:
    """Of the files that the records of checkpoints name, and of all that a reader of the folder sees: the same."""
    fs, path = open_fs(url, options or {})
    everything = ds.dataset(path, filesystem=fs, partitioning="hive").to_table()
    named = [open_fs(f.url, options or {})[1] for f in rf.committed_files(url, storage_options=options)]
    assert len(named) == len(set(named))
    listed = ds.dataset(named, filesystem=fs, partitioning="hive", partition_base_dir=path).to_table()
    assert sorted(listed["v"].to_pylist()) == sorted(everything["v"].to_pylist())
    assert sum(f.rows for f in rf.committed_files(url, storage_options=options)) == everything.num_rows
    assert all(p == v % 3 for p, v in zip(everything["p"].to_pylist(), everything["v"].to_pylist(), strict=True))
    return sorted(everything["v"].to_pylist())


@pytest.fixture(params=["parquet", "csv", "json", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    out = str(tmp_path / "out")

    def pending() -> list[Path]:
        return list((tmp_path / "out").glob("_rayflow/*"))

    match request.param:
        case "parquet":
            sink: FileSink = ParquetSink(out, partition_by=["p"], manifest=True)
            return Output(sink, lambda: _listed(out), pending)
        case "csv":
            sink = CsvSink(out, max_file_rows=50, compression="gzip")
            return Output(sink, lambda: sorted(read_all(CsvSource(out))["v"].to_pylist()), pending)
        case "json":
            sink = JsonSink(out, compression="gzip")
            return Output(sink, lambda: sorted(read_all(JsonSource(out))["v"].to_pylist()), pending)
    server = request.getfixturevalue("s3_server")
    assert isinstance(server, S3Server)
    url, options = f"{server.bucket()}/out", server.storage_options
    sink = ParquetSink(url, partition_by=["p"], manifest=True, storage_options=options)
    bucket = Bucket(url, options)
    return Output(sink, lambda: _listed(url, options), lambda: [*bucket.uploads(), *bucket.uploads("p=")])


def flow(sink: SinkFactory, folder: Path, *, fails_after: int | None = None) -> rf.Flow:
    data = pa.table({"v": pa.array(range(ROWS), pa.int64()), "p": pa.array([v % 3 for v in range(ROWS)], pa.int64())})
    stream = rf.from_arrow(data, splits=4, batch_rows=20)
    if fails_after is not None:
        stream = stream.map_batches(FailsOnce(str(folder / "failed"), fails_after))
    return rf.Flow("totals", stream.write(sink, name="sink"))


@pytest.mark.parametrize("when", [BEFORE, AFTER])
def test_a_commit_that_fails_half_way_is_made_good(output: Output, tmp_path: Path, when: str) -> None:
    run(flow(Faulty(output.sink, tmp_path, 1, when), tmp_path), tmp_path / "chk", config=CONFIG)
    assert len(list(tmp_path.glob("commit-*"))) > 2
    assert output.read() == list(range(ROWS))
    assert not output.leftovers()


def test_up_and_down_the_ladder_with_failures(output: Output, tmp_path: Path) -> None:
    start = "latest"
    for step, parallelism in enumerate([1, 2, 1, 3]):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        made = flow(Faulty(output.sink, folder, 1, AFTER if step % 2 else BEFORE), folder, fails_after=60)
        rounds = None if step == 3 else 9
        result = run(made, folder / "chk", parallelism=parallelism, rounds=rounds, start=start, config=CONFIG)
        if step < 3:
            assert result.status == "stopped", "there must be rows left for the next step"
            start = savepoint_of(folder / "chk", "totals", tmp_path / f"savepoint-{step}")
    assert len(list(tmp_path.glob("*/failed"))) >= 2, "the steps did not go through failures"
    assert output.read() == list(range(ROWS))
    assert not output.leftovers()


def test_a_job_that_is_started_again_removes_what_it_had_left_prepared(output: Output, tmp_path: Path) -> None:
    sink = output.sink
    assert run(flow(sink, tmp_path), tmp_path / "chk", rounds=12, config=CONFIG).status == "stopped"
    before = output.read()
    stray = sink.build()
    stray.open(context(0, parallelism=2, attempt=9), Collected())
    stray.process(pa.record_batch({"v": [0], "p": [0]}), 0)
    prepared(stray, 99)
    stray.close()
    assert output.leftovers()
    run(flow(sink, tmp_path), tmp_path / "chk", config=CONFIG)
    assert set(before) <= set(output.read())
    assert output.read() == list(range(ROWS))
    assert not output.leftovers()


def test_broken_a_sink_that_forgets_loses_rows(tmp_path: Path) -> None:
    sink = JsonSink(tmp_path / "out")
    run(flow(Faulty(sink, tmp_path, 1, BEFORE, Forgetful), tmp_path), tmp_path / "chk", config=CONFIG)
    found = sorted(read_all(JsonSource(tmp_path / "out"))["v"].to_pylist())
    assert len(found) == len(set(found))
    assert set(found) < set(range(ROWS)), "at most once must lose rows here, or the tests above say nothing"


def test_broken_an_eager_sink_shows_rows_twice(tmp_path: Path) -> None:
    sink = JsonSink(tmp_path / "out", mode="append")
    run(flow(Eager(sink), tmp_path, fails_after=200), tmp_path / "chk", config=CONFIG)
    found = read_all(JsonSource(tmp_path / "out"))["v"].to_pylist()
    assert set(found) == set(range(ROWS))
    assert len(found) > ROWS, "at least once must show duplicates here, or the tests above say nothing"
