"""Whole jobs on a real S3-compatible server that is killed under them, and on a bucket that goes and comes back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import s3fs

import rayflow as rf
from rayflow.core.manifest import Json
from rayflow.core.timeline import CHECKPOINT_ABORTED, CHECKPOINT_COMPLETED, DETECTED, RESTART_DELAYED
from rayflow.errors import CommitLostError, JobFailedError, StorageError
from rayflow.flow import run_local
from rayflow.operators.base import Committer, CommitterContext, Staging
from rayflow.operators.sinks.files import FileSinkOperator
from rayflow.operators.sinks.parquet import ParquetSink
from rayflow.operators.sources.paths import open_fs
from rayflow.operators.sql.staging import StagedFiles
from rayflow.runtime.inprocess import World
from rayflow.runtime.results import JobResult
from rayflow.runtime.stores import Start
from rayflow.storage import remote
from rayflow.storage.catalog import CheckpointReader
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import job_root
from rayflow.storage.savepoint_copy import write_savepoint
from rayflow.storage.snapshots import SnapshotStore
from rayflow.stream import Stream, StreamEnd
from tests.servers import S3Server, Seaweed

pytestmark = pytest.mark.slow

N = 1_200
KEYS = 7
AWKWARD = "a b/50%/ü+#1&x=2?v=3/%20"
NO_PATIENCE = {"config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A server that tests kill and start again."""
    server = Seaweed(tmp_path_factory.mktemp("mortal"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def quick_to_despair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a server that is known to be away."""
    monkeypatch.setattr(remote, "RETRY_DELAYS_S", (0.0,))
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)


@dataclass
class Rows:
    """The input; counts the rows that went by."""

    seen: int = 0

    def stream(self) -> Stream:
        data = pa.table({"k": [i % KEYS for i in range(N)], "v": pa.array(range(N), pa.int64())})

        def count(batch: pa.RecordBatch) -> pa.RecordBatch:
            self.seen += batch.num_rows
            return batch

        return rf.from_arrow(data, batch_rows=20, splits=2).map_batches(count, schema=data.schema)


def run(
    end: StreamEnd,
    url: str,
    options: dict[str, Any],
    *,
    on_round: Callable[[World], None] | None = None,
    tolerable: int = 3,
    start: Start = "latest",
    interval: str = "4ms",
) -> JobResult:
    config = rf.JobConfig(restart=rf.Restart.fixed(delay="1ms", max_attempts=50))
    checkpoints = rf.CheckpointConfig(url, interval=interval, tolerable_failures=tolerable, storage_options=options)
    return run_local(rf.Flow("jöb", end).plan(parallelism=2, config=config), config, checkpoints,
                     start=start, on_round=on_round)  # fmt: skip


def told(world: World, what: str) -> list[str]:
    return [entry.detail for entry in world.coordinator.machine.timeline if entry.what == what]


def values(url: str, options: dict[str, Any]) -> list[int]:
    """All that a reader of the output sees."""
    fs, path = open_fs(url, {**options, "skip_instance_cache": True})
    return sorted(ds.dataset(path, filesystem=fs).to_table()["v"].to_pylist())


def sums(result: JobResult) -> dict[int, int]:
    """The last sum that came for each key: they only grow."""
    found: dict[int, int] = {}
    for row in result.table().to_pylist():
        found[row["k"]] = max(found.get(row["k"], 0), row["v"])
    return found


# ---------------------------------------------------------------------------------------------------- the server dies


def test_the_server_dies_and_comes_back_while_the_job_goes_on(mortal: Seaweed) -> None:
    """Checkpoints abort and say why; rows flow; nothing restarts; what is counted is right."""
    rows, died_at, back = Rows(), [0], [False]

    def look(world: World) -> None:
        if not died_at[0] and len(told(world, CHECKPOINT_COMPLETED)) >= 3:
            mortal.kill()
            died_at[0] = rows.seen
        elif died_at[0] and not back[0] and told(world, CHECKPOINT_ABORTED) and rows.seen >= died_at[0] + 100:
            mortal.start()
            back[0] = True

    end = rows.stream().key_by("k").agg(v=rf.sum("v")).collect()
    result = run(end, f"{mortal.s3.bucket()}/chk", mortal.s3.storage_options, on_round=look, tolerable=10_000)
    assert back[0]
    assert 0 < died_at[0] < N
    assert result.restarts == 0
    assert sums(result) == {k: sum(range(k, N, KEYS)) for k in range(KEYS)}
    aborted = [entry.detail for entry in result.timeline if entry.what == CHECKPOINT_ABORTED]
    assert all("cannot be reached" in detail and "nothing committed is lost" in detail for detail in aborted)


@dataclass
class Fatal:
    """A Parquet sink whose second commit kills the server: before it has done anything, or just when it is done."""

    inner: ParquetSink
    server: Seaweed
    when: str
    commits: list[int] = field(default_factory=list)
    stateful = False

    def build(self) -> FileSinkOperator:
        return self.inner.build()

    def committer(self) -> Committer:
        return _Fatal(self, self.inner.committer())


class _Fatal(Committer):
    def __init__(self, owner: Fatal, inner: Committer) -> None:
        self._owner, self._inner = owner, inner

    def open(self, ctx: CommitterContext) -> None:
        self._inner.open(ctx)

    def commit(self, committables: Sequence[Json]) -> None:
        if not committables:
            return
        self._owner.commits.append(len(committables))
        if len(self._owner.commits) != 2:
            return self._inner.commit(committables)
        if self._owner.when == "after":
            self._inner.commit(committables)
        self._owner.server.kill()
        if self._owner.when == "before":
            self._inner.commit(committables)
        raise StorageError("the answer of the server was lost")

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self._inner.recover(committables, fresh=fresh)

    def finish(self) -> None:
        self._inner.finish()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_server_dies_at_a_commit(when: str, mortal: Seaweed) -> None:
    """The checkpoint behind it is complete; with the server back it is whole, and what it names is committed."""
    bucket, back = mortal.s3.bucket(), [False]
    options = {**mortal.s3.storage_options, **NO_PATIENCE}
    sink = Fatal(ParquetSink(f"{bucket}/out", manifest=True, storage_options=options), mortal, when)

    def look(world: World) -> None:
        if not back[0] and len(told(world, RESTART_DELAYED)) >= 3:  # it has tried to restore without a server too
            mortal.start()
            back[0] = True

    rows = Rows()
    result = run(rows.stream().write(sink), f"{bucket}/chk", options, on_round=look)
    assert back[0]
    assert result.restarts >= 2
    assert values(f"{bucket}/out", options) == list(range(N))
    assert rows.seen < 2 * N, "it went on instead of beginning anew"
    reader = CheckpointReader(ObjectStore(job_root(f"{bucket}/chk", "jöb"), options), "jöb")
    assert all(reader.verify(info.checkpoint) == [] for info in reader.list())


# --------------------------------------------------------------------------------------------------- the bucket is gone


class Bucket:
    """A bucket of moto that vanishes with all that is in it, and comes back as it was."""

    def __init__(self, server: S3Server) -> None:
        from moto.s3.models import s3_backends

        self.url = server.bucket()
        self._name = self.url.removeprefix("s3://")
        backends = (backend for regions in s3_backends.values() for backend in regions.values())
        self._buckets = next(backend.buckets for backend in backends if self._name in backend.buckets)
        self._accounts = s3_backends.bucket_accounts
        self._kept: Any = None

    def vanish(self) -> None:
        self._kept = self._buckets.pop(self._name), self._accounts.pop(self._name)

    def come_back(self) -> None:
        self._buckets[self._name], self._accounts[self._name] = self._kept


@pytest.mark.parametrize("kind", ["files", "rows kept beside the checkpoints"])
def test_a_bucket_goes_and_comes_back(kind: str, moto_server: S3Server, tmp_path: Path) -> None:
    """The job says so, tries again, and ends with every row once: output, checkpoints and all were in it."""
    bucket, options = Bucket(moto_server), {**moto_server.storage_options, **NO_PATIENCE}
    gone, back, causes = [False], [False], list[str]()

    def look(world: World) -> None:
        if not gone[0] and len(told(world, CHECKPOINT_COMPLETED)) >= 3:
            bucket.vanish()
            gone[0] = True
        elif gone[0] and not back[0] and len(told(world, RESTART_DELAYED)) >= 3:
            causes.extend(told(world, DETECTED))
            bucket.come_back()
            back[0] = True

    stream = Rows().stream()
    if kind == "files":
        end = stream.write_parquet(f"{bucket.url}/out", storage_options=options)
    else:
        end = stream.write_sqlite("t", path=str(tmp_path / "t.db"))
    result = run(end, f"{bucket.url}/chk", options, on_round=look)
    assert back[0]
    assert result.restarts >= 2
    assert any("bucket does not exist" in cause or "no bucket" in cause for cause in causes), causes
    if kind == "files":
        assert values(f"{bucket.url}/out", options) == list(range(N))
    else:
        with sqlite3.connect(tmp_path / "t.db") as database:
            assert sorted(v for (v,) in database.execute("SELECT v FROM t")) == list(range(N))


def test_rows_in_a_bucket_that_is_gone_are_not_given_up(moto_server: S3Server) -> None:
    """A file that is gone is a lost commit, which ends the job; this is not."""
    bucket, options = Bucket(moto_server), moto_server.storage_options
    staged = StagedFiles(f"{bucket.url}/staging/op", Staging(f"{bucket.url}/staging", options))
    kept = staged.put(pa.table({"v": [1]}))
    bucket.vanish()
    with pytest.raises(StorageError, match="bucket"):
        staged.get(*kept)
    with pytest.raises(StorageError, match="bucket"):
        staged.names()
    bucket.come_back()
    assert staged.get(*kept)["v"].to_pylist() == [1]
    staged.remove(staged.names())
    with pytest.raises(CommitLostError):
        staged.get(*kept)


# ------------------------------------------------------------------------------------------- names of every kind


def test_prefixes_of_every_kind(s3_server: S3Server, tmp_path: Path) -> None:
    """For checkpoints, output, rows kept beside the checkpoints, and savepoints; each is found again."""
    bucket, options = s3_server.bucket(), s3_server.storage_options
    url, out = f"{bucket}/{AWKWARD}/chk", f"{bucket}/{AWKWARD}/out"
    run(Rows().stream().write_parquet(out, storage_options=options), url, options, interval="20ms")
    assert values(out, options) == list(range(N))
    client = s3_server.client()
    found = client.list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    client.close()
    assert all(item["Key"].startswith(f"{AWKWARD}/") for item in found), "nothing was cut off or decoded"

    store = ObjectStore(job_root(url, "jöb"), options)
    reader = CheckpointReader(store, "jöb")
    manifest = reader.newest()
    assert manifest is not None
    assert reader.verify(manifest.checkpoint) == []
    savepoint = f"{bucket}/{AWKWARD}/save point"
    write_savepoint(manifest, SnapshotStore(store, manifest.max_parallelism), savepoint, options)
    again = f"{bucket}/{AWKWARD}/again"
    rows = Rows()
    run(rows.stream().write_parquet(f"{out} 2", storage_options=options), again, options, start=savepoint)
    assert rows.seen == 0, "all had been read before the savepoint"

    run(
        Rows().stream().write_sqlite("t", path=str(tmp_path / "t.db")),
        f"{bucket}/{AWKWARD}/staged",
        options,
        interval="20ms",
    )
    with sqlite3.connect(tmp_path / "t.db") as database:
        assert sorted(v for (v,) in database.execute("SELECT v FROM t")) == list(range(N))


# --------------------------------------------------------------------------------------------------------- credentials


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()  # clients of file sinks, made with other credentials
    return monkeypatch


def few(url: str, options: dict[str, Any]) -> None:
    end = rf.from_arrow(pa.table({"v": [1, 2]})).write_parquet(f"{url}/out", storage_options=options)
    run(end, f"{url}/chk", options)


@pytest.mark.parametrize("where", ["environment", "file", "profile", "options"])
def test_credentials_from_the_usual_places(
    where: str, s3_server: S3Server, no_credentials: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket, options = s3_server.bucket(), {"endpoint_url": s3_server.endpoint_url}
    if where == "environment":
        no_credentials.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
        no_credentials.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
        no_credentials.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
        options = {}
    elif where in ("file", "profile"):
        name = "default" if where == "file" else "mine"
        keys = f"aws_access_key_id = {s3_server.key}\naws_secret_access_key = {s3_server.secret}\n"
        (tmp_path / "credentials").write_text(f"[{name}]\n{keys}")
        no_credentials.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        options |= {} if where == "file" else {"profile": "mine"}
    else:
        options = s3_server.storage_options
    few(bucket, options)
    assert values(f"{bucket}/out", options) == [1, 2]


@pytest.mark.parametrize("wrong", ["key", "secret"])
@pytest.mark.parametrize("what", ["checkpoints", "output"])
def test_wrong_credentials_end_the_job_at_once(what: str, wrong: str, s3_server: S3Server, tmp_path: Path) -> None:
    bucket, bad = s3_server.bucket(), {**s3_server.storage_options, wrong: "not mine at all"}
    chk, out = (bad, s3_server.storage_options) if what == "checkpoints" else (s3_server.storage_options, bad)
    rows = Rows()
    end = rows.stream().write_parquet(f"{bucket}/out", storage_options=out)
    with pytest.raises((StorageError, JobFailedError), match=r"credentials|permission") as caught:
        run(end, f"{bucket}/chk", chk)
    assert "not mine at all" not in str(caught.value)
    assert rows.seen == 0, "found before anything was read"
    assert len(ObjectStore(bucket, s3_server.storage_options).list("out")) == 0
