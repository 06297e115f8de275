"""P4, a sink holds exactly the checkpointed set: whole jobs in this process against a real PostgreSQL server.

A job is made to fail where it hurts (behind a checkpoint, in the pre-commit, between pre-commit and commit, behind a
commit that nobody heard of), with the server killed, and with another parallelism after every failure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.manifest import Json
from rayflow.errors import ConnectorError, GuaranteeWarning, JobFailedError
from rayflow.operators.base import Committer
from rayflow.operators.sql.marks import Mark
from rayflow.operators.sql.names import literal
from rayflow.operators.sql.postgres import Connection, PostgresTable
from rayflow.operators.sql.segments import Flush
from rayflow.operators.sql.sinks import PostgresGuarantee, PostgresSink
from rayflow.operators.sql.two_phase import TwoPhaseCommitter
from rayflow.operators.sql.write_ahead import WriteAheadCommitter
from tests.faulty_sinks import Fault, FaultyCommitter, FaultySink, SmallJob
from tests.postgres_server import PostgresServer

N = 400
DATA = pa.table({"k": [i % 50 for i in range(N)], "v": pa.array(range(N), pa.int64())})
EXACT: list[PostgresGuarantee] = ["two_phase", "wal"]
LADDER = (1, 2, 3, 5, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------------ the jobs


class Job(SmallJob):
    data = DATA

    def __init__(self, server: PostgresServer, folder: Path) -> None:
        super().__init__(folder)
        self.server = server
        self.schema = server.schema()

    def sink(self, how: PostgresGuarantee, *key: str, batch_rows: int = 1_000) -> PostgresSink:
        table = PostgresTable("t", self.server.url, schema=self.schema, key=key)
        return PostgresSink(table, how=how, flush=Flush(rows=batch_rows))

    def values(self) -> list[int]:
        return sorted(v for (v,) in self.server.rows(self.schema, "t", "v"))

    def leftovers(self) -> list[object]:
        """All that is of the sink and is not output."""
        staged = [p for p in (self.folder / "chk").rglob("staging/**/*") if p.is_file()]
        return [*self.server.prepared(), *staged]


@pytest.fixture
def job(postgres: PostgresServer, tmp_path: Path) -> Job:
    return Job(postgres, tmp_path)


@pytest.mark.parametrize("how", EXACT)
def test_rows_come_once_through_a_failure_behind_checkpoints(how: PostgresGuarantee, job: Job) -> None:
    job.run(job.sink(how), stream=job.failing(200))
    assert (job.folder / "failed").exists()
    assert job.values() == list(range(N))
    assert job.leftovers() == []


@pytest.mark.parametrize("fault", ["in prepare", "before commit", "after commit"])
@pytest.mark.parametrize("how", EXACT)
def test_rows_come_once_wherever_the_sink_is_struck(how: PostgresGuarantee, fault: Fault, job: Job) -> None:
    job.run(FaultySink(job.sink(how), fault, str(job.folder / "struck")))
    assert (job.folder / "struck").exists()
    assert job.values() == list(range(N))
    assert job.leftovers() == []


@pytest.mark.parametrize("how", EXACT)
def test_rows_come_once_with_another_parallelism_after_each_failure(how: PostgresGuarantee, job: Job) -> None:
    """What a larger parallelism has left behind is found by a smaller one."""
    for at, parallelism in enumerate(LADDER):
        with pytest.raises(JobFailedError):
            job.run(
                job.sink(how),
                stream=job.failing(100, name=f"failed-{at}"),
                parallelism=parallelism,
                restart=rf.Restart.none(),
                interval="1ms",
            )
        seen = job.values()
        assert Counter(seen) == Counter(set(seen)), "nothing is there twice at any time"
    assert len(seen) > N // 4, "every run has to go on from the one before"
    job.run(job.sink(how))
    assert job.values() == list(range(N))
    assert job.leftovers() == []


def test_before_the_first_checkpoint_with_less_parallelism(job: Job) -> None:
    """The run without a checkpoint has left prepared transactions of five subtasks; one subtask begins anew."""
    sink = FaultySink(job.sink("two_phase"), "in prepare", str(job.folder / "struck"))
    with pytest.raises(JobFailedError):
        job.run(sink, parallelism=5, restart=rf.Restart.none())
    assert job.leftovers() != []
    job.run(job.sink("two_phase"), parallelism=1)
    assert job.values() == list(range(N))
    assert job.leftovers() == []


def test_a_transaction_that_somebody_rolled_back_ends_the_job_and_it_says_so(job: Job) -> None:
    class RolledBack(FaultyCommitter):
        def commit(self, committables: Sequence[Json]) -> None:
            self._commits += 1
            if self._commits == 3:
                for each in committables:
                    job.server.execute(f"ROLLBACK PREPARED {literal(Mark.from_json(each).id)}")
            self._inner.commit(committables)

    @dataclass(frozen=True)
    class Sink(FaultySink):
        def committer(self) -> Committer:
            return RolledBack(self.inner.committer(), self)

    with pytest.raises(JobFailedError, match=r"had prepared \d+ rows for checkpoint \d+ .* rolled it back"):
        job.run(Sink(job.sink("two_phase"), "before commit", ""))


# -------------------------------------------------------------------------------------------- broken variants are seen


def test_broken_variant_that_commits_early_writes_twice(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = Connection.execute

    def early(self: Connection, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        return execute(self, "COMMIT" if statement.startswith("PREPARE") else statement, parameters)

    monkeypatch.setattr(Connection, "execute", early)
    job.run(FaultySink(job.sink("two_phase"), "in prepare", str(job.folder / "struck")))
    assert len(job.values()) > N


def test_broken_variant_that_leaves_transactions_behind_is_seen(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TwoPhaseCommitter, "_roll_back_leftovers", lambda self, connection, of_all_runs: None)
        job.run(FaultySink(job.sink("two_phase"), "in prepare", str(job.folder / "struck")))
    assert job.leftovers() != []
    for gid in job.server.prepared():
        job.server.execute(f"ROLLBACK PREPARED {literal(gid)}")


@pytest.mark.parametrize("how", EXACT)
def test_broken_variant_that_forgets_what_is_named_loses_rows(
    how: PostgresGuarantee, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most once."""
    kind = TwoPhaseCommitter if how == "two_phase" else WriteAheadCommitter
    recover = kind.recover
    monkeypatch.setattr(kind, "recover", lambda self, committables, fresh: recover(self, [], fresh=fresh))
    job.run(FaultySink(job.sink(how), "before commit", str(job.folder / "struck")))
    found = job.values()
    assert set(found) < set(range(N))
    assert len(found) == len(set(found))


# --------------------------------------------------------------------------------------------------- weaker guarantees


@pytest.mark.filterwarnings("ignore::rayflow.errors.GuaranteeWarning")
def test_at_least_once_has_all_rows_and_some_twice(job: Job) -> None:
    with pytest.warns(GuaranteeWarning, match="at least once and not exactly-once: sink 'write' writes rows again"):
        job.run(job.sink("at_least_once", batch_rows=1), stream=job.failing(200))
    assert set(job.values()) == set(range(N))
    assert len(job.values()) > N


@pytest.mark.parametrize("how", ["upsert", "wal"])
def test_totals_by_key_equal_those_of_duckdb(how: PostgresGuarantee, job: Job) -> None:
    totals = job.failing(200).key_by("k").agg(n=rf.count(), total=rf.sum("v"))
    sink = job.sink(how, "k")
    rf.Flow("job", totals.write(sink)).run(
        parallelism=2,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(job.folder / "chk"), interval="4ms", min_pause="0s"),
        config=rf.JobConfig(restart=rf.Restart.fixed(delay="0s")),
    )
    with duckdb.connect() as db:
        db.register("data", DATA)
        expected = db.sql("SELECT k, count(*), sum(v)::bigint FROM data GROUP BY k").fetchall()
    assert sorted(job.server.rows(job.schema, "t", "k, n, total")) == sorted(expected)


def test_a_function_gets_all_rows_and_may_get_them_again(tmp_path: Path) -> None:
    calls: list[tuple[int, int, list[int]]] = []

    def deliver(checkpoint: int, subtask: int, table: pa.Table) -> None:
        calls.append((checkpoint, subtask, table.column("v").to_pylist()))
        if len(calls) == 3:
            raise ConnectorError("the mail server is away")

    flow = rf.Flow("job", rf.from_arrow(DATA, batch_rows=20).rebalance().for_each_batch(deliver))
    with pytest.warns(GuaranteeWarning, match="sink 'for_each_batch' writes rows again"):
        flow.run(
            parallelism=2,
            local=True,
            progress=False,
            checkpoints=rf.CheckpointConfig(str(tmp_path / "chk"), interval="4ms", min_pause="0s"),
            config=rf.JobConfig(restart=rf.Restart.fixed(delay="0s")),
        )
    assert sum(len(values) for _, _, values in calls) > N, "the third call is repeated"
    once = {(checkpoint, subtask): values for checkpoint, subtask, values in calls}
    assert sorted(v for values in once.values() for v in values) == list(range(N))
    assert list((tmp_path / "chk").rglob("staging/**/*.arrow")) == []


@pytest.mark.parametrize("write", ["write_sqlite", "write_duckdb"])
def test_files_of_databases_come_out_exact(write: str, tmp_path: Path, postgres: PostgresServer) -> None:
    job = Job(postgres, tmp_path)
    path = str(tmp_path / "db")
    sink = getattr(job.failing(200).rebalance(), write)("t", path=path)
    rf.Flow("job", sink).run(
        parallelism=2,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "chk"), interval="4ms", min_pause="0s"),
        config=rf.JobConfig(restart=rf.Restart.fixed(delay="0s")),
    )
    assert (tmp_path / "failed").exists()
    read: Callable[..., Any] = duckdb.connect
    if write == "write_sqlite":
        import sqlite3

        read = sqlite3.connect
    connection = read(path)
    found = sorted(v for (v,) in connection.execute("SELECT v FROM t").fetchall())
    connection.close()
    assert found == list(range(N))


# ------------------------------------------------------------------------------------------------------ the server dies


class Away:
    """For `map_batches`: takes the server away when it has seen so many rows, the first time."""

    server: PostgresServer | None = None

    def __init__(self, after: int) -> None:
        self._left = after

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self._left -= batch.num_rows
        if self._left < 0 and Away.server is not None:
            server, Away.server = Away.server, None
            server.kill()
        return batch


@pytest.mark.parametrize(("how", "key"), [("two_phase", ()), ("wal", ()), ("upsert", ("v",))])
def test_a_server_that_is_killed_and_comes_back_is_waited_for(
    how: PostgresGuarantee, key: tuple[str, ...], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With transactions prepared. It comes back when it has been asked for four times in vain."""
    connect, refused = PostgresTable.connect, []

    def counted(self: PostgresTable, where: str) -> Connection:
        try:
            return connect(self, where)
        except ConnectorError:
            refused.append(where)
            if len(refused) == 4:
                job.server.start()
            raise

    monkeypatch.setattr(PostgresTable, "connect", counted)
    monkeypatch.setattr(Away, "server", job.server)
    stream = rf.from_arrow(DATA, batch_rows=20).map_batches(Away, fn_constructor_args=(200,), schema=DATA.schema)
    job.run(job.sink(how, *key), stream=stream)
    assert len(refused) >= 4
    assert job.values() == list(range(N))
    assert job.leftovers() == []


def test_what_is_wrong_is_told_before_anything_runs(job: Job) -> None:
    job.server.execute(f"CREATE TABLE {job.schema}.t (k int8, w int8)")
    with pytest.raises((JobFailedError, rf.ConfigError), match=r"no column 'v'; expected \{k: int8, w: int8\}"):
        job.run(job.sink("two_phase"))
    with pytest.raises(rf.PlanError, match=r"test_sql_flows.py:\d+.*key column 'nope'"):
        rf.from_arrow(DATA).write_postgres("t", url=job.server.url, key="nope")
    with pytest.raises(rf.ConfigError, match="must be a local file"):
        rf.from_arrow(DATA).write_duckdb("t", path="s3://bucket/db")
    with pytest.raises(rf.PlanError, match="needs a function"):
        rf.from_arrow(DATA).for_each_batch(None)  # type: ignore[arg-type]
