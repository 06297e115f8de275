"""Whole jobs over folders that are watched: files that come while the job runs and while it does not are read once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.events import CheckpointRequested
from rayflow.core.messages import CheckpointKind
from rayflow.errors import JobFailedError
from rayflow.flow import run_local
from rayflow.operators.sources.json_files import JsonSource
from rayflow.operators.sources.paths import open_fs
from rayflow.runtime.inprocess import World
from rayflow.runtime.results import JobResult
from rayflow.stream import Stream
from tests.failing import FailsOnce
from tests.operators.sources.contract import read_all
from tests.operators.sources.test_watching import KINDS, SCHEMA, Kind
from tests.servers import S3Server

FILE_ROWS = 10


class Feed:
    """Puts file after file into a folder as the rows of those before come out, then asks the job to stop."""

    def __init__(self, put: Callable[[int], None], files: Iterable[int], out: Path, *, before: int = 0) -> None:
        self._put, self._files, self._out = put, list(files), out
        self._expected = before

    def __call__(self, world: World) -> None:
        rounds = world.clock.now
        assert rounds < 3_600, f"{len(self.rows())} of {self._expected} rows came out, then no more"
        if len(self.rows()) < self._expected:
            return
        if self._files:
            self._put(self._files.pop(0))
            self._expected += FILE_ROWS
        else:
            world.coordinator.handle(CheckpointRequested(CheckpointKind.STOP))

    def rows(self) -> list[int]:
        if not list(self._out.glob("*.jsonl")):
            return []
        return sorted(read_all(JsonSource(self._out, schema=SCHEMA))["x"].to_pylist())


def flow(source: Stream, folder: Path, *, fails_after: int) -> rf.Flow:
    rows = source.map_batches(FailsOnce(str(folder / "failed"), fails_after), schema=SCHEMA)
    return rf.Flow("watch", rows.write_json(str(folder / "out")))


def run(made: rf.Flow, folder: Path, feed: Feed) -> JobResult:
    checkpoints = rf.CheckpointConfig(str(folder / "chk"), interval="5ms")
    config = rf.JobConfig(restart=rf.Restart.fixed(delay="1ms"))
    return run_local(made.plan(parallelism=2, config=config), config, checkpoints, start="latest", on_round=feed)


def numbers(file: int) -> list[int]:
    return list(range(FILE_ROWS * file, FILE_ROWS * (file + 1)))


def reading(kind: Kind, path: Any, **options: Any) -> Stream:
    read: Any = {".parquet": rf.read_parquet, ".csv": rf.read_csv, ".jsonl": rf.read_json}[kind.suffix]
    made = read(path, schema=SCHEMA, watch="5ms", **options)
    assert isinstance(made, Stream)
    return made


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.suffix)
def test_every_file_is_read_once_through_a_failure_a_stop_and_a_new_start(kind: Kind, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    out.mkdir()

    def put(number: int) -> None:
        kind.put(folder, f"{(number * 7) % 11:02d}", *numbers(number))

    made = flow(reading(kind, folder), tmp_path, fails_after=35)
    first = Feed(put, range(5), out)
    assert run(made, tmp_path, first).status == "stopped"
    assert first.rows() == list(range(50))
    assert (tmp_path / "failed").exists()
    for number in (5, 6):
        put(number)
    second = Feed(put, range(7, 9), out, before=70)
    assert run(made, tmp_path, second).status == "stopped"
    assert second.rows() == list(range(90))


def test_objects_on_s3_are_picked_up_once(tmp_path: Path, s3_server: S3Server) -> None:
    url, kind = f"{s3_server.bucket()}/in", KINDS[0]
    fs, _ = open_fs(url, {**s3_server.storage_options, "skip_instance_cache": True})
    (tmp_path / "out").mkdir()

    def put(number: int) -> None:
        fs.pipe_file(f"{url}/{number % 2}/{number}.parquet", kind.content(*numbers(number)))

    made = flow(reading(kind, url, storage_options=s3_server.storage_options), tmp_path, fails_after=25)
    feed = Feed(put, range(4), tmp_path / "out")
    run(made, tmp_path, feed)
    assert feed.rows() == list(range(40))
    assert (tmp_path / "failed").exists()


@pytest.mark.parametrize("wrong", ["changed", "another schema"])
def test_a_wrong_file_ends_the_job_and_the_mended_one_is_read(wrong: str, tmp_path: Path) -> None:
    folder, out, kind = tmp_path / "in", tmp_path / "out", KINDS[0]
    out.mkdir()
    kind.put(folder, "00", *numbers(0))
    (tmp_path / "failed").touch()
    made = flow(reading(kind, folder), tmp_path, fails_after=0)

    def put(number: int) -> None:
        if wrong == "changed":
            kind.put(folder, "00", *numbers(0), 1)
        else:
            (folder / f"{number:02d}.parquet").write_bytes(kind.encode(pa.table({"other": [1]})))

    with pytest.raises(
        JobFailedError, match=r"source '.*': .*(changed|00.parquet had|another schema than read_parquet)"
    ):
        run(made, tmp_path, Feed(put, [1, 2], out, before=FILE_ROWS))
    kind.put(folder, "00", *numbers(0))
    feed = Feed(lambda number: kind.put(folder, f"{number:02d}", *numbers(number)), [1, 2], out, before=FILE_ROWS)
    if wrong == "another schema":
        kind.put(folder, "01", *numbers(1))
        feed = Feed(lambda number: kind.put(folder, f"{number:02d}", *numbers(number)), [2], out, before=2 * FILE_ROWS)
    run(made, tmp_path, feed)
    assert feed.rows() == list(range(30))
