"""P4 on Iceberg, with a catalog in SQLite and with a real REST catalog: a table holds exactly the checkpointed set."""

from __future__ import annotations

import datetime as dt
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import load_catalog
from pyiceberg.exceptions import CommitFailedException

import rayflow as rf
from rayflow.errors import JobFailedError
from rayflow.operators.base import CommitterContext
from rayflow.operators.iceberg import table as tables
from rayflow.operators.iceberg.files import IcebergOperator, _TableFiles
from rayflow.operators.iceberg.sink import IcebergCommitter, IcebergSink
from rayflow.operators.iceberg.table import KeepingIO
from rayflow.operators.sinks.files import Rolling
from tests.faulty_sinks import Fault, FaultySink, SmallJob
from tests.kafka_server import free_port
from tests.operators.helpers import context
from tests.servers import Seaweed

N = 160
DATA = pa.table({"k": [i % 7 for i in range(N)], "v": pa.array(range(N), pa.int64())})
LADDER = (1, 3, 2)


class Job(SmallJob):
    data = DATA
    batch_rows = 10
    interval = "2ms"

    def __init__(self, folder: Path, catalog: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        lake = {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/some lake"}
        self.catalog = dict(catalog or lake)
        self.name = f"lake.rows_{uuid.uuid4().hex}"

    def sink(self, **more: Any) -> IcebergSink:
        return IcebergSink(self.name, catalog=self.catalog, **more)

    def its_sink(self) -> Any:
        return self.sink()

    def others(self) -> Any:
        """The catalog, as another program has it."""
        catalog = load_catalog("default", **self.catalog)
        catalog.create_namespace_if_not_exists("lake")
        return catalog

    def table(self) -> Any:
        return self.others().load_table(self.name)

    def values(self) -> list[int]:
        if not self.others().table_exists(self.name):
            return []
        return sorted(self.table().scan().to_arrow().column("v").to_pylist())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture(scope="module")
def rest_catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real REST catalog and S3-compatible storage: those of SeaweedFS."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = Seaweed(tmp_path_factory.mktemp("lake"), f"-s3.port.iceberg={port}", "-tableBucket=icetables")
    properties = {
        "type": "rest",
        "uri": url,
        "warehouse": "s3://icetables",
        "credential": f"{server.s3.key}:{server.s3.secret}",
        "oauth2-server-uri": f"{url}/v1/oauth/tokens",
        "s3.endpoint": server.s3.endpoint_url,
        "s3.access-key-id": server.s3.key,
        "s3.secret-access-key": server.s3.secret,
        "s3.region": "us-east-1",
    }
    try:
        server.start()
        deadline = time.monotonic() + 60.0
        while True:
            try:
                load_catalog("default", **properties).list_namespaces()
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # the server offers nothing to wait on but an answer
        yield properties
    finally:
        server.kill()


@pytest.fixture
def rest_job(tmp_path: Path, rest_catalog: dict[str, str]) -> Job:
    return Job(tmp_path, rest_catalog)


def test_a_checkpoint_is_one_snapshot_that_names_it_and_the_table_knows_the_newest(job: Job) -> None:
    job.run(stream=job.failing(80))
    assert (job.folder / "failed").exists()
    assert job.values() == list(range(N))
    table = job.table()
    told = [int(snapshot.summary["rayflow.checkpoint"]) for snapshot in table.snapshots()]
    assert len(told) > 1
    assert told == sorted(set(told)), "each checkpoint once, in their order"
    marks = {key: value for key, value in table.properties.items() if key.startswith("rayflow.")}
    assert list(marks.values()) == [str(told[-1])]
    assert "commit.retry.num-retries" not in table.properties, "others go on as they do"


@pytest.mark.parametrize("fault", ["in prepare", "before commit", "after commit"])
@pytest.mark.parametrize("where", ["job", "rest_job"])
def test_rows_come_once_wherever_the_sink_is_struck(where: str, fault: Fault, request: pytest.FixtureRequest) -> None:
    job: Job = request.getfixturevalue(where)
    job.run(FaultySink(job.sink(), fault, str(job.folder / "struck")))
    assert (job.folder / "struck").exists()
    assert job.values() == list(range(N))


def test_rows_come_once_with_another_parallelism_after_each_failure(job: Job) -> None:
    grown: list[int] = [0]
    for at, parallelism in enumerate(LADDER):
        with pytest.raises(JobFailedError):
            job.run(
                stream=job.failing(40, name=f"failed-{at}", batch_rows=4),
                parallelism=parallelism,
                restart=rf.Restart.none(),
                interval="1ms",
            )
        seen = job.values()
        assert Counter(seen) == Counter(set(seen)), "nothing is there twice at any time"
        grown.append(len(seen))
    assert len(set(grown)) > 2, "more than one run has committed something before it failed"
    job.run()
    assert job.values() == list(range(N))


def test_partitions_of_any_text_are_read_back(job: Job) -> None:
    texts = ["a b/c", "../up", "100%", "", None, "ü=ö", "x" * 60]
    data = pa.table({"p": texts * 10, "v": range(70)})
    catalog = job.others()
    table = catalog.create_table(job.name, data.schema, properties={"write.metadata.metrics.default": "none"})
    with table.update_spec() as spec:
        spec.add_identity("p")
    rf.Flow("job", rf.from_arrow(data).write(job.sink(partition_by="p"))).run(local=True, progress=False)
    back = job.table().scan().to_arrow().sort_by("v")
    assert back.column("v").to_pylist() == list(range(70))
    assert back.column("p").to_pylist() == texts * 10
    for text in texts:
        rows = job.table().scan(row_filter="p is null" if text is None else f"p = '{text}'")
        assert len(list(rows.plan_files())) == 1, "one file has such rows, and its partition says so"
        assert rows.to_arrow().num_rows == 10


def test_types_are_those_of_the_table(job: Job) -> None:
    at = dt.datetime(2026, 3, 29, 1, 30, tzinfo=dt.UTC)
    data = pa.table(
        {
            "i": pa.array([5, None, -3], pa.int16()),
            "t": pa.array(["b", "a", None]).dictionary_encode(),
            "at": pa.array([at, None, at], pa.timestamp("ms", "Europe/Berlin")),
            "d": pa.array([dt.date(2026, 1, 1)] * 3),
            "time": pa.array([1, None, 2], pa.time32("ms")),
            "decimal": pa.array([1, None, 2], pa.decimal128(20, 3)),
            "small": pa.array([1, None, 2], pa.decimal128(5, 2)),
            "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
            "bytes": pa.array([b"\xff" * 40, None, b""], pa.large_binary()),
            "flag": pa.array([True, None, False]),
            "f": pa.array([float("nan"), None, 1.5], pa.float32()),
            "local": pa.array([1, None, 2], pa.timestamp("s")),
            "deep": pa.array([[{"a": ["x"]}], None, []], pa.list_(pa.struct([("a", pa.list_(pa.string()))]))),
            "l": pa.array([[1], None, [2, 3]]),
            "s": pa.array([{"a": 1}, None, {"a": 2}], pa.struct([("a", pa.int64())])),
        }
    )
    stream = rf.from_arrow(data).write_iceberg(job.name, catalog=job.catalog, partition_by="d")  # made with a partition
    flow = rf.Flow("job", stream)
    flow.run(local=True, progress=False)
    flow.run(local=True, progress=False)  # appended: another run, without checkpoints to go on from
    back = job.table().scan().to_arrow()
    assert back.num_rows == 6
    assert back.column("at").to_pylist().count(at) == 4
    assert (back.schema.field("i").type, back.schema.field("at").type) == (pa.int32(), pa.timestamp("us", "UTC"))
    assert back.column("l").to_pylist().count(None) == 2
    assert [field.name for field in job.table().spec().fields] == ["d"]
    with job.table().update_schema() as change:
        change.rename_column("i", "renamed")
    assert job.table().scan().to_arrow().column("renamed").to_pylist().count(5) == 2, "columns are known by their ids"


@pytest.mark.parametrize(
    ("column", "kind"), [("u", pa.uint32()), ("n", pa.timestamp("ns")), ("z", pa.null()), ("h", pa.float16())]
)
def test_types_that_a_table_cannot_hold_are_refused_while_building(column: str, kind: pa.DataType, job: Job) -> None:
    data = pa.table({column: pa.array([], kind)})
    with pytest.raises(rf.PlanError, match=rf"write_iceberg cannot hold column '{column}' of type"):
        rf.Flow("job", rf.from_arrow(data).write(job.sink())).run(local=True)


@pytest.mark.parametrize(
    ("table", "catalog", "message"),
    [
        ("rows", {"type": "sql"}, 'must be "namespace.table"'),
        ("lake.rows", {}, "must say what catalog it is"),
        ("lake.rows", {"type": "in-memory"}, "cannot be in memory"),
    ],
)
def test_what_says_no_table_is_refused_while_building(table: str, catalog: dict[str, str], message: str) -> None:
    with pytest.raises(rf.ConfigError, match=message):
        IcebergSink(table, catalog=catalog)


def test_another_table_is_refused_before_a_checkpoint_holds_rows_for_it(job: Job) -> None:
    job.others().create_table(job.name, pa.schema([("k", pa.int64()), ("other", pa.string())]))
    with pytest.raises(JobFailedError, match=r"cannot append to the Iceberg table .*column 'other' is missing"):
        job.run()
    assert not any((job.folder / "chk").rglob("manifest.json"))


def test_another_partitioning_is_refused(job: Job) -> None:
    with job.others().create_table(job.name, DATA.schema).update_spec() as spec:
        spec.add_field("k", "bucket[4]")
    with pytest.raises(JobFailedError, match=r"it is partitioned by \['bucket\[4\]\(k\)'\], got partition_by=\['k'\]"):
        job.run(job.sink(partition_by="k"))


def test_a_null_for_a_column_that_has_none_is_refused_before_a_checkpoint_holds_it(job: Job) -> None:
    job.others().create_table(job.name, pa.schema([pa.field("v", pa.int64(), nullable=False)]))
    with pytest.raises(JobFailedError, match="cannot write to the Iceberg table"):
        job.run(stream=rf.from_arrow(pa.table({"v": pa.array([1, None])})), restart=rf.Restart.none())
    assert job.values() == []


def test_a_table_with_rows_is_refused_when_asked_for(job: Job) -> None:
    table = job.others().create_table(job.name, DATA.schema)
    job.run(job.sink(mode="error"), stream=rf.from_arrow(DATA.slice(0, 0)))
    table.append(DATA)
    other = Job(job.folder / "another run")
    other.catalog, other.name = job.catalog, job.name
    with pytest.raises(JobFailedError, match="is an Iceberg table with rows already"):
        other.run(job.sink(mode="error"))


def test_others_may_write_to_the_table_meanwhile(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the table and the commit: the first is refused, and the next one finds its files due."""
    check = IcebergCommitter._check_files
    interfered: list[bool] = []

    def interferes(self: IcebergCommitter, table: Any, due: Any) -> None:
        check(self, table, due)
        if not interfered:
            interfered.append(True)
            job.table().append(pa.table({"k": [0], "v": [-1]}))

    monkeypatch.setattr(IcebergCommitter, "_check_files", interferes)
    job.run(restart=rf.Restart.none())
    assert job.values() == [-1, *range(N)]


def test_snapshots_may_expire(job: Job) -> None:
    """All but the newest, which is another writer's: then only the property tells what has been committed."""
    job.run()
    committer, named = _prepared(job)
    committer.commit(named)
    job.table().append(pa.table({"k": [0], "v": [-1]}))
    table = job.table()
    ours = [s.snapshot_id for s in table.snapshots() if s.snapshot_id != table.current_snapshot().snapshot_id]
    table.maintenance.expire_snapshots().by_ids(ours).commit()
    assert len(job.table().snapshots()) == 1
    committer.commit(named)
    assert job.values() == [-1, 0, *range(N)]


def test_a_prepared_file_that_is_gone_ends_the_job_and_it_says_so(job: Job) -> None:
    class Removed(FaultySink):
        def strike(self) -> None:
            named = {Path(found.file.file_path).name for found in job.table().scan().plan_files()}
            for file in (job.folder / "some lake").rglob("part-*.parquet"):
                if file.name not in named:
                    file.unlink()

    with pytest.raises(JobFailedError, match=r"was prepared for a complete checkpoint .* orphan files"):
        job.run(Removed(job.sink(), "before commit", ""))


def test_rows_for_a_table_that_was_dropped_end_the_job(job: Job) -> None:
    class Dropped(FaultySink):
        def strike(self) -> None:
            job.others().drop_table(job.name)
            job.others().create_table(job.name, DATA.schema, location=f"file://{job.folder}/elsewhere")

    with pytest.raises(JobFailedError, match=r"were prepared for a complete checkpoint of the Iceberg table"):
        job.run(Dropped(job.sink(), "before commit", ""))


@pytest.mark.parametrize("where", ["job", "rest_job"])
def test_the_commit_of_one_who_does_not_know_that_it_was_replaced_is_refused_by_the_catalog(
    where: str, request: pytest.FixtureRequest
) -> None:
    """Both have looked at the table before either of them commits."""
    job: Job = request.getfixturevalue(where)
    job.run()
    committer, named = _prepared(job)
    stale = committer._table.open()
    committer.commit(named)
    rows, snapshots = job.values(), len(job.table().snapshots())
    assert rows == [0, *range(N)]
    assert not committer._commit(stale, named), "the snapshot that it would follow is not the newest"
    committer.commit(named)
    assert (job.values(), len(job.table().snapshots())) == (rows, snapshots)


@pytest.mark.parametrize("where", ["job", "rest_job"])
def test_the_first_commits_of_two_to_an_empty_table_are_told_apart(where: str, request: pytest.FixtureRequest) -> None:
    """There is no snapshot yet that they could follow."""
    job: Job = request.getfixturevalue(where)
    committer, named = _prepared(job)
    stale = committer._table.open()
    committer.commit(named)
    assert not committer._commit(stale, named)
    assert job.values() == [0]


def test_files_and_property_are_there_together_or_not_at_all(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiceberg sends both in one request, which is struck before and behind what it does."""
    committer, named = _prepared(job)
    catalog = committer._table.catalog()
    sent, commit = [], type(catalog).commit_table

    def struck(self: Any, table: Any, requirements: Any, updates: Any) -> Any:
        sent.append([update.action for update in updates])
        if len(sent) == 1:
            raise OSError("before")
        commit(self, table, requirements, updates)
        raise OSError("behind")

    monkeypatch.setattr(type(catalog), "commit_table", struck)
    with pytest.raises(rf.ConnectorError, match="before"):
        committer.commit(named)
    assert (job.values(), committer.mark(named[0]) in job.table().properties) == ([], False)
    with pytest.raises(rf.ConnectorError, match="behind"):
        committer.commit(named)
    assert {"add-snapshot", "set-snapshot-ref", "set-properties"} <= set(sent[-1])
    committer.commit(named)
    assert len(sent) == 2, "the table knows of it, so nothing more is sent"
    assert job.values() == [0]


def test_a_run_that_begins_with_a_savepoint_finds_what_the_first_has_committed(job: Job) -> None:
    committer, named = _prepared(job)
    committer.commit(named)
    second = job.sink().committer()
    second.open(CommitterContext("job", "another", "op", "step", 1))
    second.recover(named, fresh=False)
    assert job.values() == [0]


def _sends_again(monkeypatch: pytest.MonkeyPatch, catalog: Any) -> None:
    """A client of a catalog that repeats a request whose answer was lost: what has been done is refused."""
    commit = type(catalog).commit_table

    def twice(self: Any, table: Any, requirements: Any, updates: Any) -> Any:
        commit(self, table, requirements, updates)
        return commit(self, table, requirements, updates)

    monkeypatch.setattr(type(catalog), "commit_table", twice)


def test_a_commit_that_was_done_and_is_called_refused_leaves_the_table_whole(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer, named = _prepared(job)
    _sends_again(monkeypatch, committer._table.catalog())
    committer.commit(named)
    assert job.values() == [0]
    assert len(job.table().snapshots()) == 1


def test_old_metadata_are_deleted_where_the_table_is_set_up_so(job: Job) -> None:
    properties = {"write.metadata.delete-after-commit.enabled": "true", "write.metadata.previous-versions-max": "1"}
    job.others().create_table(job.name, DATA.schema, properties=properties)
    job.run()
    assert len(job.table().snapshots()) > 2
    assert len(list((job.folder / "some lake").rglob("*.metadata.json"))) == 2


def _prepared(job: Job) -> tuple[IcebergCommitter, list[Any]]:
    """A committer, and the committable of a file with one row that no checkpoint of a job has named."""
    committer = job.sink().committer()
    committer.open(CommitterContext("job", "run", "op", "step", 1))
    operator = IcebergOperator(job.sink()._table(), "zstd", Rolling(), ())
    operator.open(context(), None)  # type: ignore[arg-type]
    operator.process(DATA.slice(0, 1).to_batches()[0], 0)
    frozen = operator.snapshot(7)  # type: ignore[arg-type]
    assert frozen is not None
    assert frozen.prepare is not None
    made = list(frozen.prepare())
    operator.close()
    return committer, made


# -------------------------------------------------------------------------------------------- broken variants are seen


def test_broken_variant_that_leaves_trying_again_to_pyiceberg_commits_twice(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_RETRIES", "not.known.to.pyiceberg")
    job.run()
    committer, named = _prepared(job)
    stale = committer._table.open()
    committer.commit(named)
    assert committer._commit(stale, named)
    assert job.values() == [0, 0, *range(N)]


def test_broken_variant_that_lets_manifests_be_deleted_loses_the_table(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeepingIO, "delete", lambda self, location: self._io.delete(location))
    committer, named = _prepared(job)
    _sends_again(monkeypatch, committer._table.catalog())
    committer.commit(named)
    with pytest.raises(FileNotFoundError):
        job.values()


def test_broken_variant_that_does_not_ask_the_table_writes_twice(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IcebergCommitter, "mark", lambda self, committable: f"never-{uuid.uuid4()}-asked")
    job.run(FaultySink(job.sink(), "after commit", str(job.folder / "struck")))
    assert len(job.values()) > N


def test_broken_variant_that_forgets_what_is_named_loses_rows(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IcebergCommitter, "recover", lambda self, committables, fresh: None)
    job.run(FaultySink(job.sink(), "before commit", str(job.folder / "struck")))
    assert set(job.values()) < set(range(N))


def test_broken_variant_that_commits_before_the_manifest_writes_twice(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A committer of each subtask that commits in the pre-commit, which a failure behind it repeats."""
    prepare = _TableFiles.prepare

    def early(self: Any, path: str, final: str, rows: int) -> Any:
        made = prepare(self, path, final, rows)
        while True:
            try:
                job.table().add_files([made["path"]])
                return made
            except CommitFailedException:
                continue

    monkeypatch.setattr(_TableFiles, "prepare", early)
    monkeypatch.setattr(IcebergCommitter, "_commit", lambda self, table, committables: True)
    job.run(FaultySink(job.sink(), "in prepare", str(job.folder / "struck")))
    assert len(job.values()) > N
