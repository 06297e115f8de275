"""P4 on Delta Lake, locally and on a real S3-compatible server: a table holds exactly the checkpointed set."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

import rayflow as rf
from rayflow.errors import JobFailedError
from rayflow.operators.base import CommitterContext
from rayflow.operators.delta import files
from rayflow.operators.delta.files import DeltaOperator
from rayflow.operators.delta.sink import DeltaCommitter, DeltaSink
from rayflow.operators.sinks.files import Rolling
from tests.faulty_sinks import Fault, FaultySink, SmallJob
from tests.operators.helpers import context
from tests.servers import S3Server

N = 400
DATA = pa.table({"k": [i % 7 for i in range(N)], "v": pa.array(range(N), pa.int64())})
LADDER = (1, 2, 3, 5, 2, 3, 1)


class Job(SmallJob):
    data = DATA

    def __init__(self, folder: Path, url: str = "", options: dict[str, Any] | None = None) -> None:
        super().__init__(folder)
        self.url = url or str(folder / "table")
        self.options = options or {}

    def sink(self, **more: Any) -> DeltaSink:
        return DeltaSink(self.url, storage_options=self.options, **more)

    def its_sink(self) -> Any:
        return self.sink()

    def table(self) -> Any:
        return DeltaTable(self.url, storage_options=self.sink().committer()._table.log_options())

    def values(self) -> list[int]:
        found = self.sink().committer()._table.open()
        return [] if found is None else sorted(found.to_pyarrow_table().column("v").to_pylist())


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.fixture
def s3_job(tmp_path: Path, s3_server: S3Server) -> Job:
    return Job(tmp_path, f"{s3_server.bucket()}/some table", s3_server.storage_options)


def test_a_checkpoint_is_one_commit_that_names_it(job: Job) -> None:
    job.run(stream=job.failing(200))
    assert (job.folder / "failed").exists()
    assert job.values() == list(range(N))
    commits = [h for h in job.table().history() if "rayflow.checkpoint" in h]
    checkpoints = [int(h["rayflow.checkpoint"]) for h in commits]
    assert len(commits) > 1
    assert sorted(set(checkpoints), reverse=True) == checkpoints, "each checkpoint once, in their order"
    assert not (job.folder / "table" / "_rayflow").exists()


@pytest.mark.parametrize("fault", ["in prepare", "before commit", "after commit"])
@pytest.mark.parametrize("where", ["job", "s3_job"])
def test_rows_come_once_wherever_the_sink_is_struck(where: str, fault: Fault, request: pytest.FixtureRequest) -> None:
    job: Job = request.getfixturevalue(where)
    job.run(FaultySink(job.sink(), fault, str(job.folder / "struck")))
    assert (job.folder / "struck").exists()
    assert job.values() == list(range(N))


def test_rows_come_once_with_another_parallelism_after_each_failure(job: Job) -> None:
    for at, parallelism in enumerate(LADDER):
        with pytest.raises(JobFailedError):
            job.run(
                stream=job.failing(100, name=f"failed-{at}"),
                parallelism=parallelism,
                restart=rf.Restart.none(),
                interval="1ms",
            )
        seen = job.values()
        assert Counter(seen) == Counter(set(seen)), "nothing is there twice at any time"
    assert len(seen) > N // 4, "every run has to go on from the one before"
    job.run()
    assert job.values() == list(range(N))


def test_partitions_of_any_text_are_read_back(job: Job) -> None:
    texts = ["a b/c", "../up", "100%", "", None, "ü=ö"]
    data = pa.table({"p": texts * 10, "v": range(60)})
    rf.Flow("job", rf.from_arrow(data).write_delta(job.url, partition_by="p")).run(local=True, progress=False)
    back = job.table().to_pyarrow_table().select(["p", "v"]).sort_by("v")
    assert back.column("v").to_pylist() == list(range(60))
    assert back.column("p").to_pylist() == [t or None for t in texts * 10], "a table has no empty text as a partition"
    adds = [json.loads(line)["add"] for log in (Path(job.url) / "_delta_log").glob("*.json")
            for line in log.read_text().splitlines() if "add" in json.loads(line)]  # fmt: skip
    assert sum(json.loads(a["stats"])["numRecords"] for a in adds) == 60
    assert all((Path(job.url) / a["path"]).resolve().is_relative_to(job.folder / "table") for a in adds)


def test_types_are_those_of_the_table_and_statistics_are_right(job: Job) -> None:
    zone = pa.timestamp("ms", "Europe/Berlin")
    at = dt.datetime(2026, 3, 29, 1, 30, tzinfo=dt.UTC)
    data = pa.table(
        {
            "i": pa.array([5, None, -3], pa.int32()),
            "t": pa.array(["b", "a", None]).dictionary_encode(),
            "at": pa.array([at, None, at], zone),
            "d": pa.array([dt.date(2026, 1, 1)] * 3),
            "s": pa.array([{"a": 1}, None, {"a": 2}], pa.struct([("a", pa.int64())])),
        }
    )
    flow = rf.Flow("job", rf.from_arrow(data).write_delta(job.url))
    flow.run(local=True, progress=False)
    flow.run(local=True, progress=False)  # appended: another run, without checkpoints to go on from
    back = job.table().to_pyarrow_table()
    assert back.num_rows == 6
    assert back.schema.field("at").type == pa.timestamp("us", "UTC")
    assert back.column("at").to_pylist().count(at) == 4
    (add, *_) = pa.table(job.table().get_add_actions(flatten=True)).to_pylist()
    assert (add["num_records"], add["min.i"], add["max.i"], add["null_count.i"]) == (3, -3, 5, 1)
    assert (add["min.t"], add["max.t"]) == ("a", "b")
    with duckdb.connect() as db:
        db.register("rows", back)
        assert db.sql("SELECT sum(i), count(s.a) FROM rows").fetchall() == [(4, 4)]


@pytest.mark.parametrize(
    ("column", "kind"),
    [("u", pa.uint32()), ("n", pa.timestamp("ns")), ("z", pa.null()), ("t", pa.time64("us")), ("h", pa.float16())],
)
def test_types_that_a_table_cannot_hold_are_refused_while_building(column: str, kind: pa.DataType, job: Job) -> None:
    data = pa.table({column: pa.array([], kind)})
    with pytest.raises(rf.PlanError, match=rf"write_delta cannot hold column '{column}' of type"):
        rf.Flow("job", rf.from_arrow(data).write_delta(job.url)).run(local=True)


def test_another_table_is_refused_before_a_checkpoint_holds_rows_for_it(job: Job) -> None:
    write_deltalake(job.url, pa.table({"k": [1], "other": ["x"]}))
    with pytest.raises(JobFailedError, match=r"cannot append to the Delta table .*column 'other' is missing"):
        job.run()
    assert not any((job.folder / "chk").rglob("manifest.json"))


def test_another_partitioning_is_refused(job: Job) -> None:
    write_deltalake(job.url, DATA, partition_by=["k"])
    with pytest.raises(JobFailedError, match=r"it is partitioned by \['k'\], got partition_by=\[\]"):
        job.run()


def test_a_table_that_is_there_is_refused_when_asked_for(job: Job) -> None:
    write_deltalake(job.url, DATA.slice(0, 0))
    with pytest.raises(JobFailedError, match="is a Delta table already"):
        job.run(job.sink(mode="error"))


def test_others_may_write_to_the_table_meanwhile(job: Job) -> None:
    write_deltalake(job.url, DATA.slice(0, 1))

    class Interferes(FaultySink):
        def strike(self) -> None:
            write_deltalake(job.url, pa.table({"k": [0], "v": [-1]}), mode="append")

    job.run(Interferes(job.sink(), "before commit", ""))
    found = [v for v in job.values() if v >= 0]
    assert found == [0, *range(N)]


def test_a_prepared_file_that_is_gone_ends_the_job_and_it_says_so(job: Job) -> None:
    class Vacuumed(FaultySink):
        def strike(self) -> None:
            named = {Path(uri).name for uri in job.table().file_uris()}
            for file in Path(job.url).glob("part-*.parquet"):
                if file.name not in named:
                    file.unlink()

    with pytest.raises(JobFailedError, match=r"was prepared for a complete checkpoint .* VACUUM"):
        job.run(Vacuumed(job.sink(), "before commit", ""))


def test_the_commit_of_one_who_does_not_know_that_it_was_replaced_is_refused_by_the_log(job: Job) -> None:
    """Both have looked at the table before either of them commits."""
    job.run(restart=rf.Restart.none())
    version = job.table().version()
    committer = job.sink().committer()
    committer.open(CommitterContext("job", "run", "op", "step", 1))
    stale = committer._table.open()
    named = _prepared(job, committer)
    committer.commit(named)
    assert not committer._commit(stale, named), "the log has this application transaction already"
    committer.commit(named)
    assert job.table().version() == version + 1


def test_a_run_that_begins_with_a_savepoint_finds_what_the_first_has_committed(job: Job) -> None:
    """Merged meanwhile, so that naming the same files again would bring their rows back."""
    first = job.sink().committer()
    first.open(CommitterContext("job", context().run_id, "op", "step", 1))
    named = _prepared(job, first, 7) + _prepared(job, first, 8)
    first.commit(named)
    job.table().optimize.compact()
    assert job.values() == [0, 0]
    second = job.sink().committer()
    second.open(CommitterContext("job", "another", "op", "step", 1))
    second.recover(named, fresh=False)
    assert job.values() == [0, 0]


def test_a_step_with_a_long_name_can_write(job: Job) -> None:
    operator = DeltaOperator(job.sink().committer()._table, "snappy", Rolling(), ())
    operator.open(replace(context(), operator="long/" * 100), None)  # type: ignore[arg-type]
    operator.process(DATA.slice(0, 1).to_batches()[0], 0)
    frozen = operator.snapshot(7)  # type: ignore[arg-type]
    assert frozen is not None
    assert frozen.prepare is not None
    assert len(frozen.prepare()) == 1
    operator.close()


def _prepared(job: Job, committer: DeltaCommitter, checkpoint: int = 7) -> list[Any]:
    """The committable of a file with one row that no checkpoint of a job has named."""
    operator = DeltaOperator(committer._table, "snappy", Rolling(), ())
    operator.open(context(), None)  # type: ignore[arg-type]
    operator.process(DATA.slice(0, 1).to_batches()[0], 0)
    frozen = operator.snapshot(checkpoint)  # type: ignore[arg-type]
    assert frozen is not None
    assert frozen.prepare is not None
    made = list(frozen.prepare())
    operator.close()
    return made


# -------------------------------------------------------------------------------------------- broken variants are seen


def test_broken_variant_that_does_not_ask_the_log_writes_twice(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Delta log names a file once, so the files are given other names: as if prepared again."""
    commit = DeltaCommitter._commit

    def forgetful(self: DeltaCommitter, table: Any, committables: Any) -> bool:
        again = []
        for c in committables:
            name = f"again-{self.commits}-{c['path']}"  # type: ignore[attr-defined]
            shutil.copy(Path(job.url) / c["path"], Path(job.url) / name)
            again.append({**c, "path": name, "checkpoint": c["checkpoint"] + 1_000_000 + self.commits})  # type: ignore[attr-defined]
        type(self).commits += 1  # type: ignore[attr-defined]
        return commit(self, table, again)

    monkeypatch.setattr(DeltaCommitter, "commits", 0, raising=False)
    monkeypatch.setattr(DeltaCommitter, "_commit", forgetful)
    job.run(FaultySink(job.sink(), "after commit", str(job.folder / "struck")))
    assert len(job.values()) > N


def test_broken_variant_that_forgets_what_is_named_loses_rows(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeltaCommitter, "recover", lambda self, committables, fresh: None)
    job.run(FaultySink(job.sink(), "before commit", str(job.folder / "struck")))
    assert set(job.values()) < set(range(N))


def test_broken_variant_that_commits_before_the_manifest_writes_twice(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A committer of each subtask that commits in the pre-commit, which a failure behind it repeats."""
    prepare = files._LocalFiles.prepare

    def early(self: Any, path: str, final: str, rows: int) -> Any:
        made = prepare(self, path, final, rows)
        write_deltalake(job.url, pq.read_table(Path(job.url) / final), mode="append")
        return made

    monkeypatch.setattr(files._LocalFiles, "prepare", early)
    monkeypatch.setattr(DeltaCommitter, "_commit", lambda self, table, committables: True)
    job.run(FaultySink(job.sink(), "in prepare", str(job.folder / "struck")))
    assert len(job.values()) > N
