from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayflow.core.manifest import Json
from rayflow.errors import DataError, StorageError
from rayflow.operators.base import SinkFactory
from rayflow.operators.sinks import s3
from rayflow.operators.sinks.parquet import ParquetSink
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.operators.sources.paths import open_fs
from tests.operators.sinks.contract import SinkContract, batch, committer, prepared, started
from tests.operators.sources.contract import read_all
from tests.servers import S3Server


@pytest.fixture(params=["moto_server", "s3_server"])
def server(request: pytest.FixtureRequest) -> S3Server:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, S3Server)
    return found


@pytest.fixture
def options(server: S3Server) -> dict[str, Any]:
    # moto answers 500, not NoSuchUpload, when an aborted upload is completed; retrying that takes seconds.
    return {**server.storage_options, "config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.fixture
def url(server: S3Server) -> str:
    return f"{server.bucket()}/deep/out"


class TestContract(SinkContract):
    @pytest.fixture
    def factory(self, url: str, options: dict[str, Any]) -> SinkFactory:
        self.url, self.bucket = url, s3.Bucket(url, options)
        self.fs, _ = open_fs(url, options)
        return ParquetSink(url, storage_options=options)

    def visible(self) -> list[int]:
        values: list[int] = []
        for name in self.names():
            with self.fs.open(f"{self.url}/{name}") as file:
                values += pq.read_table(file)["x"].to_pylist()
        return sorted(values)

    def names(self) -> list[str]:
        return sorted(path.rpartition("/")[2] for path in self.fs.find(self.bucket.name))

    def leftovers(self) -> Sequence[object]:
        return self.bucket.uploads()

    def lose(self, committable: Json) -> None:
        self.bucket.abort(committable["key"], committable["upload_id"])


def test_an_upload_of_several_parts(url: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 1024 * 1024)
    sink = ParquetSink(url, storage_options=options, compression="none")
    operator = started(sink)
    table = pa.table({"x": pa.array(range(1_500_000))})
    for piece in table.to_batches(max_chunksize=100_000):
        operator.process(piece, 0)
    (found,) = prepared(operator, 1)
    assert len(found["parts"]) > 2
    committer(sink).commit([found])
    assert read_all(ParquetSource(url, storage_options=options)).equals(table)


def test_commit_never_overwrites_an_object_that_is_not_ours(url: str, options: dict[str, Any]) -> None:
    sink = ParquetSink(url, storage_options=options)
    operator = started(sink)
    operator.process(batch(1), 0)
    (found,) = prepared(operator, 1)
    fs, _ = open_fs(url, options)
    fs.pipe_file(f"{found['bucket']}/{found['key']}", b"m" * found["nbytes"])
    with pytest.raises(StorageError, match="not ours"):
        committer(sink).commit([found])
    assert fs.cat_file(f"{found['bucket']}/{found['key']}")[:1] == b"m"


def test_an_answer_that_was_lost_is_not_a_lost_commit(url: str, options: dict[str, Any]) -> None:
    """The server completed the upload, but the client saw an error; or it did not, and the upload is still open."""
    operator = started(ParquetSink(url, storage_options=options))
    operator.process(batch(1), 0)
    found = prepared(operator, 1)
    done = False

    class Flaky(s3.Bucket):
        def call(self, method: str, **arguments: Any) -> Any:
            if method != "complete_multipart_upload":
                return s3.Bucket.call(self, method, **arguments)
            if done:
                s3.Bucket.call(self, method, **arguments)
            raise StorageError("timeout")

    with pytest.raises(StorageError, match="timeout"):
        s3.S3Committer(Flaky(url, options), (".parquet",), True).commit(found)
    done = True
    s3.S3Committer(Flaky(url, options), (".parquet",), True).commit(found)
    assert read_all(ParquetSource(url, storage_options=options))["x"].to_pylist() == [1]


def test_recovery_leaves_other_prefixes_alone(url: str, options: dict[str, Any]) -> None:
    other = s3.Bucket(f"{url}-of-others", options)
    other.call("create_multipart_upload", Key=other.key("part-1"))
    committer(ParquetSink(url, storage_options=options)).recover([], fresh=True)
    assert len(other.uploads()) == 1


def test_more_leftovers_than_one_listing_shows(url: str, options: dict[str, Any]) -> None:
    bucket = s3.Bucket(url, options)
    for i in range(3):
        bucket.call("create_multipart_upload", Key=bucket.key(f"part-{i}"))

    class Short(s3.Bucket):
        def call(self, method: str, **arguments: Any) -> Any:
            extra = {"MaxUploads": 1} if method == "list_multipart_uploads" else {}
            return s3.Bucket.call(self, method, **arguments, **extra)

    s3.S3Committer(Short(url, options), (".parquet",), True).recover([], fresh=True)
    assert bucket.uploads() == []


def test_output_of_another_run_on_a_later_page(url: str, options: dict[str, Any]) -> None:
    bucket = s3.Bucket(url, options)
    for name in ("a.txt", "b.txt", "c.parquet", "deeper/d.txt"):
        bucket.call("put_object", Key=bucket.key(name), Body=b"x")

    class Short(s3.Bucket):
        def call(self, method: str, **arguments: Any) -> Any:
            extra = {"MaxKeys": 1} if method == "list_objects_v2" else {}
            return s3.Bucket.call(self, method, **arguments, **extra)

    assert sorted(Short(url, options).objects()) == [bucket.key(name) for name in ("a.txt", "b.txt", "c.parquet")]
    with pytest.raises(DataError, match=r"another run \(such as c.parquet"):
        s3.S3Committer(Short(url, options), (".parquet",), True).recover([], fresh=True)


def test_spool_is_removed(url: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    operator = started(ParquetSink(url, storage_options=options))
    operator.process(batch(1), 0)
    prepared(operator, 1)
    (spool,) = tmp_path.iterdir()
    assert list(spool.iterdir()) == []
    operator.process(batch(2), 0)
    operator.close()
    assert list(tmp_path.iterdir()) == []


def test_no_bucket_and_wrong_endpoint(options: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match="no bucket 'nosuch'"):
        committer(ParquetSink("s3://nosuch/x", storage_options=options)).recover([], fresh=True)
    dead = {**options, "endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(StorageError, match="storage_options"):
        committer(ParquetSink("s3://nosuch/x", storage_options=dead)).recover([], fresh=True)
