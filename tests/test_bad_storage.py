"""Checkpoint places without access, full disks, flipped bytes, two runs on one directory: nothing committed is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.events import JobState
from rayflow.errors import CorruptCheckpointError, JobFailedError, StorageError
from rayflow.flow import new_submission
from rayflow.operators.sinks import parquet
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.coordinator_loop import settings_of
from rayflow.runtime.inprocess import World
from rayflow.runtime.local import LocalDriver
from rayflow.runtime.stores import open_stores
from rayflow.storage import local, remote
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.faults import flipped
from rayflow.stream import Stream
from tests.faulty_jobs import BATCH, ROWS, N, Place, one_sentence, place, rows
from tests.servers import S3Server

__all__ = ["place"]

Switch = list[bool]


def breaks_at(row: int, broken: Switch) -> Stream:
    """The input, through a function that raises at ``row`` while the switch is on."""

    def function(batch: pa.RecordBatch) -> pa.RecordBatch:
        if broken[0] and batch["v"][0].as_py() >= row:
            raise ConnectionError("the model is gone")
        return batch

    return rows().map_batches(function, schema=ROWS.schema, name="mine")


# -------------------------------------------------------------------------------------------- no way to the checkpoints


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def refused_at_once(place: Place, config: rf.CheckpointConfig, *said: str) -> None:
    """The job does not begin: no output folder, no attempt, a sentence within seconds."""
    read: list[int] = []

    def reads(batch: pa.RecordBatch) -> pa.RecordBatch:
        read.append(1)
        return batch

    stream = rows().map_batches(reads)
    began = time.monotonic()
    with pytest.raises(StorageError) as caught:
        place.run(stream, checkpoints=config)
    assert time.monotonic() - began < 30
    one_sentence(caught.value, *said)
    assert not read
    assert not place.out.exists()


def test_checkpoints_without_credentials(place: Place, moto_server: S3Server, no_credentials: None) -> None:
    options = {"endpoint_url": moto_server.endpoint_url}
    config = rf.CheckpointConfig(f"{moto_server.bucket()}/chk", storage_options=options)
    refused_at_once(place, config, "no credentials", "AWS_ACCESS_KEY_ID", "storage_options", config.url)


def test_checkpoints_in_no_bucket(place: Place, moto_server: S3Server) -> None:
    config = rf.CheckpointConfig("s3://no-such-bucket/chk", storage_options=moto_server.storage_options)
    refused_at_once(place, config, "bucket does not exist", config.url)


def test_checkpoints_at_a_server_that_does_not_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0,))
    options = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:1"}
    config = rf.CheckpointConfig("s3://bucket/chk", storage_options=options)
    refused_at_once(place, config, "cannot be reached", "endpoint_url", config.url)


def test_output_without_credentials(place: Place, moto_server: S3Server, no_credentials: None) -> None:
    url = f"{moto_server.bucket()}/out"
    sink = rows().write_parquet(url, storage_options={"endpoint_url": moto_server.endpoint_url})
    with pytest.raises(JobFailedError) as caught:
        rf.Flow("job", sink).run(local=True, checkpoints=place.checkpoints)
    one_sentence(caught.value, url, "credentials", "storage_options", "nothing committed is lost")


def test_an_output_folder_that_cannot_be_one(place: Place) -> None:
    place.out.write_text("a file")
    place.fails(rows(), "'.*/out'", "output folder", "exists")
    place.out.unlink()
    place.run(rows())
    assert place.committed() == list(range(N))


def test_a_checkpoint_folder_that_cannot_be_one(place: Place) -> None:
    (place.folder / "chk").write_text("a file")
    place.fails(rows(), "a part of the path is a file", "choose another", str(place.folder / "chk"))
    assert not place.out.exists()


def test_a_checkpoint_folder_that_cannot_be_written_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing works, so it shows when the coordinator claims the directory; it must not try for ever."""

    def denied(folder: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    monkeypatch.setattr(local, "_make_folder", denied)
    place.fails(rows(), "cannot write", "permission denied", str(place.folder / "chk"))
    monkeypatch.undo()
    place.run(rows())
    assert place.committed() == list(range(N))


# ----------------------------------------------------------------------------------------------------- the disk is full


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_checkpoints(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints fail, then the job fails over, and at last it ends; what it had committed stays."""
    written = local._write_synced

    def fills(path: str, data: bytes) -> None:
        if len(place.files()) >= 5:
            full()
        written(path, data)

    monkeypatch.setattr(local, "_write_synced", fills)

    def mend() -> Stream:
        monkeypatch.undo()
        return rows()

    place.fails_then_mended(
        rows(),
        mend,
        "cannot write '.*manifest",
        "disk full",
        "free space",
        "nothing committed is lost",
        str(place.folder),
    )


def test_a_disk_that_is_full_for_output(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills(path: str) -> None:
        if len(place.files()) >= 5:
            full()

    sync = parquet._ParquetWriter.finish

    def finish(self: parquet._ParquetWriter) -> None:
        fills("")
        sync(self)

    monkeypatch.setattr(parquet._ParquetWriter, "finish", finish)

    def mend() -> Stream:
        monkeypatch.undo()
        return rows()

    place.fails_then_mended(
        rows(),
        mend,
        "4 checkpoints failed in a row",
        "cannot write its output",
        "No space left",
        "nothing committed is lost",
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A real file system of 3 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("what", ["chk", "out"])
def test_a_real_small_disk(what: str, tmp_path: Path, small_disk: Path | None) -> None:
    """The same on a disk that is full indeed. Without the right to mount one, the two tests above must do: all that can
    be said then is that the error they raise is the one that the system raises."""
    if small_disk is None:
        with pytest.raises(OSError, match="No space") as caught, open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")
        assert caught.value.errno == errno.ENOSPC
        return
    ballast, broken, place = small_disk / "ballast", [True], Place(tmp_path)
    (tmp_path / what).symlink_to(small_disk / what)
    (small_disk / what).mkdir()

    def fill_up(batch: pa.RecordBatch) -> pa.RecordBatch:
        if broken[0] and batch["v"][0].as_py() >= 200 and not ballast.exists():
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return batch

    stream = rows().map_batches(fill_up, schema=ROWS.schema)

    def mend() -> Stream:
        broken[0] = False
        ballast.unlink()
        return stream

    place.fails_then_mended(stream, mend, "[Nn]o space left", "nothing committed is lost")


# -------------------------------------------------------------------------------------------------------- flipped bytes


def broken_off(place: Place, broken: Switch) -> Stream:
    """A job with keyed state in files that was broken off in the middle; `windows` of its stream give 7 rows."""
    stream = rf.from_arrow(
        ROWS.append_column("t", pa.array([i * 1000 for i in range(N)], pa.timestamp("us"))),
        batch_rows=BATCH,
        event_time="t",
    )

    def function(batch: pa.RecordBatch) -> pa.RecordBatch:
        if broken[0] and batch["v"][0].as_py() >= 300:
            raise ConnectionError("the model is gone")
        return batch

    found = stream.map_batches(function, schema=stream.schema).key_by("k").window(rf.tumbling("1s")).agg(v=rf.sum("v"))
    place.fails(found, "ConnectionError", config=rf.JobConfig(restart=rf.Restart.none()))
    return found


def sums() -> list[int]:
    return sorted(sum(v for v in range(N) if v % 7 == k) for k in range(7))


def flip(path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(flipped(data))
    return data


def newest_manifest(place: Place) -> tuple[Path, list[Path]]:
    return (found := sorted((place.folder / "chk").rglob("manifest.json")))[-1], found


def test_a_flipped_byte_in_a_manifest(place: Place) -> None:
    broken = [True]
    stream = broken_off(place, broken)
    broken[0] = False
    path, all_of_them = newest_manifest(place)
    assert len(all_of_them) == 2
    good = flip(path)
    before = place.storage()
    previous = int(all_of_them[0].parent.name.removeprefix("chk-"))
    place.fails(stream, str(path.relative_to(place.folder / "chk" / "job")), f"checkpoint {previous}: name it to go on")
    assert place.storage() == before
    assert place.files() == {}
    path.write_bytes(good)
    place.run(stream)
    assert place.committed() == sums()


@pytest.mark.parametrize("go_on", ["mended", "from the one before"])
def test_a_flipped_byte_in_a_state_file(go_on: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [True]
    with monkeypatch.context() as patch:
        patch.setattr("rayflow.storage.snapshots.SnapshotStore.__init__.__defaults__", (0,))  # no state inline
        stream = broken_off(place, broken)
    broken[0] = False
    manifest, all_of_them = newest_manifest(place)
    path = min(manifest.parent.glob("*.arrows"))
    good = flip(path)
    before = place.storage()
    previous = int(all_of_them[0].parent.name.removeprefix("chk-"))
    name = str(path.relative_to(place.folder / "chk" / "job"))
    error = place.fails(
        stream, f"state file {name}", "checksum", f"checkpoint {previous}: name it to go on", "step 'window"
    )
    assert isinstance(error.__cause__, CorruptCheckpointError)
    assert place.storage() == before, "a corrupt checkpoint is left as it is, with the one before it"
    if go_on == "mended":
        path.write_bytes(good)
        place.run(stream)
    else:
        place.run(stream, start=previous)
    assert place.committed() == sums()


def test_a_checkpoint_to_go_back_to_must_be_there(place: Place) -> None:
    broken = [True]
    stream = broken_off(place, broken)
    with pytest.raises(CorruptCheckpointError) as caught:
        place.run(stream, start=99)
    one_sentence(caught.value, "chk-00000099/manifest.json", "missing")


# ---------------------------------------------------------------------------------------------- two runs, one directory


def world_of(place: Place, stream: Stream) -> World:
    config, checkpoints = rf.JobConfig(), place.checkpoints
    plan = rf.Flow("job", stream.write_parquet(str(place.out))).plan(config=config)
    store, snapshots, _ = open_stores(plan, config, checkpoints, start="latest")
    spec = JobSpec(plan, config, True, new_submission(), heartbeat_s=None)
    return World(plan, spec, settings_of(config, checkpoints), checkpoints=store, snapshots=snapshots, retain=2)


class Overtaken(BaseException):
    """Stops a driver in the middle, with its world as it is."""


def stop_when(condition: Callable[[World], bool]) -> Callable[[World], None]:
    def look(world: World) -> None:
        if condition(world):
            raise Overtaken

    return look


@pytest.mark.parametrize("files", [0, 2, 5])
def test_a_second_run_on_the_same_directory_fences_the_first(files: int, place: Place) -> None:
    """The first has committed ``files`` files and lives when the second begins; the second is in the middle of its work
    when the first goes on."""
    first, second = world_of(place, rows()), world_of(place, rows())
    with pytest.raises(Overtaken):
        LocalDriver(first, on_round=stop_when(lambda w: bool(w.slots) and len(place.files()) >= files)).run()
    with pytest.raises(Overtaken):
        LocalDriver(second, on_round=stop_when(lambda w: len(place.files()) >= files + 2)).run()
    seen = place.files()
    resume(first)
    assert first.coordinator.outcome.state is JobState.FAILED
    cause = first.coordinator.outcome.cause
    assert cause is not None
    assert cause.fatal
    one_sentence(StorageError(cause.message), "fenced|later run", "job 'job'|checkpoint directory", "C8", "stop")
    assert place.files() == seen, "the one that was fenced has touched the output"
    resume(second)
    assert second.coordinator.outcome.state is JobState.FINISHED
    assert place.committed() == list(range(N))


def test_without_the_fence_both_runs_would_end_well_and_rows_be_there_twice(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken variant of the test above: nobody looks whether there is a later coordinator."""
    monkeypatch.setattr(CheckpointStore, "_check_not_fenced", lambda self: None)
    first, second = world_of(place, rows()), world_of(place, rows())
    with pytest.raises(Overtaken):
        LocalDriver(first, on_round=stop_when(lambda w: len(place.files()) >= 2)).run()
    with pytest.raises(Overtaken):
        LocalDriver(second, on_round=stop_when(lambda w: len(place.files()) >= 4)).run()
    resume(first)
    resume(second)
    finished = [w.coordinator.outcome.state is JobState.FINISHED for w in (first, second)]
    assert all(finished) or place.committed() != list(range(N))


def resume(world: World) -> None:
    """Drive a world that was begun to its end."""
    driver = LocalDriver(world)
    world.coordinator.start = lambda: None  # type: ignore[method-assign]
    driver.run()
