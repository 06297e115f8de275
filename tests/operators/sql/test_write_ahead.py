"""Rows kept beside the checkpoints: in the target once, a checkpoint at a time, wherever a commit is interrupted (S1).

The same tests for every `TransactionalTarget`: PostgreSQL, SQLite, DuckDB.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from rayflow.core.ids import CheckpointId
from rayflow.errors import CommitLostError, ConfigError, ConnectorError, DataError, PlanError
from rayflow.operators.base import Committer
from rayflow.operators.sql.duckdb_file import DuckDBSession, DuckDBTarget
from rayflow.operators.sql.embedded import EmbeddedTable
from rayflow.operators.sql.marks import Mark
from rayflow.operators.sql.postgres import PostgresTable
from rayflow.operators.sql.postgres_target import PostgresSession, PostgresTarget
from rayflow.operators.sql.sinks import WriteAheadSink
from rayflow.operators.sql.sqlite import SqliteSession, SqliteTarget
from rayflow.operators.sql.staging import StagedFiles
from rayflow.operators.sql.target import TargetSession, TransactionalTarget
from tests.operators.sinks.contract import batch
from tests.operators.sql.helpers import interval, opened, prepared, started
from tests.postgres_server import PostgresServer


class Rig:
    """One target in a folder of its own."""

    session: type[TargetSession]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.staging = folder / "staging"

    def target(self, *key: str, create: bool = True) -> TransactionalTarget:
        raise NotImplementedError

    def read(self, query: str) -> list[tuple[object, ...]]:
        raise NotImplementedError

    def sink(self, *key: str) -> WriteAheadSink:
        return WriteAheadSink(self.target(*key), key=key)

    def committer(self, *key: str) -> Committer:
        return opened(self.sink(*key), staging=self.staging)

    def visible(self) -> list[object]:
        return [x for (x,) in self.read("SELECT x FROM t ORDER BY x")]

    def staged(self) -> list[Path]:
        return sorted(self.staging.rglob("*.*"))


class PostgresRig(Rig):
    session = PostgresSession

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        super().__init__(folder)
        self._server = server
        self._schema = server.schema()

    def target(self, *key: str, create: bool = True) -> TransactionalTarget:
        table = PostgresTable(
            "t", self._server.url, schema=self._schema, key=key, create="if_missing" if create else None
        )
        return PostgresTarget(table)

    def read(self, query: str) -> list[tuple[object, ...]]:
        return self._server.execute(query.replace("FROM ", f"FROM {self._schema}."))


class SqliteRig(Rig):
    session = SqliteSession

    def target(self, *key: str, create: bool = True) -> TransactionalTarget:
        made = EmbeddedTable("t", str(self.folder / "db"), key=key, create="if_missing" if create else None)
        return SqliteTarget(made)

    def read(self, query: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect(self.folder / "db")
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()


class DuckDBRig(Rig):
    session = DuckDBSession

    def target(self, *key: str, create: bool = True) -> TransactionalTarget:
        made = EmbeddedTable("t", str(self.folder / "db"), key=key, create="if_missing" if create else None)
        return DuckDBTarget(made)

    def read(self, query: str) -> list[tuple[object, ...]]:
        with duckdb.connect(str(self.folder / "db")) as connection:
            found: list[tuple[object, ...]] = connection.sql(query).fetchall()
            return found


@pytest.fixture(params=["postgres", "sqlite", "duckdb"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    match request.param:
        case "postgres":
            made: Rig = PostgresRig(tmp_path, request.getfixturevalue("postgres"))
        case "sqlite":
            made = SqliteRig(tmp_path)
        case _:
            made = DuckDBRig(tmp_path)
    return made


def test_rows_of_all_subtasks_come_with_one_commit_and_once(rig: Rig) -> None:
    committer = rig.committer()
    committer.recover([], fresh=True)
    operators = [started(rig.sink(), subtask, staging=rig.staging) for subtask in range(2)]
    found = [each for i, o in enumerate(operators) for each in interval(o, 1, 10 * i, 10 * i + 1)]
    assert len(rig.staged()) == 2
    for _ in range(2):
        committer.commit(found)
        assert rig.visible() == [0, 1, 10, 11]
        assert rig.staged() == []
    rig.committer().recover(found, fresh=False)
    committer.commit([each for i, o in enumerate(operators) for each in interval(o, 2, 20 + i)])
    assert rig.visible() == [0, 1, 10, 11, 20, 21]
    assert rig.read("SELECT count(*) FROM rayflow_commits") == [(4,)]


class Crash(Exception):
    pass


@pytest.mark.parametrize("step", ["write", "record", "commit"])
@pytest.mark.parametrize("after", [False, True])
def test_a_commit_that_is_interrupted_anywhere_is_repeated_without_harm(
    rig: Rig, step: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = rig.session
    operator = started(rig.sink(), staging=rig.staging)
    found = [*interval(operator, 1, 1, 2), *interval(operator, 2, 3)]
    original = getattr(session, step)

    def crash(self: TargetSession, *arguments: object) -> None:
        if after:
            original(self, *arguments)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(session, step, crash)
        with pytest.raises(Crash):
            rig.committer().commit(found)
    assert rig.visible() == ([1, 2, 3] if step == "commit" and after else [])
    assert len(rig.staged()) == 2
    rig.committer().recover(found, fresh=False)
    assert rig.visible() == [1, 2, 3]
    assert rig.staged() == []


def test_broken_variant_without_the_record_writes_twice(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.session, "record", lambda self, marks: None)
    monkeypatch.setattr(StagedFiles, "remove", lambda self, names: None)
    found = interval(started(rig.sink(), staging=rig.staging), 1, 1)
    for _ in range(2):
        rig.committer().commit(found)
    assert rig.visible() == [1, 1]


def test_recovery_removes_what_no_checkpoint_names(rig: Rig) -> None:
    operator = started(rig.sink(), staging=rig.staging)
    first = interval(operator, 1, 1)
    interval(operator, 2, 2)
    operator.close()
    rig.committer().recover(first, fresh=False)
    assert rig.visible() == [1]
    assert rig.staged() == []


def test_lost_rows_are_named(rig: Rig) -> None:
    found = interval(started(rig.sink(), staging=rig.staging), 1, 1)
    rig.committer().recover([], fresh=True)
    with pytest.raises(CommitLostError, match="held rows of a complete checkpoint, but is gone"):
        rig.committer().commit(found)


def test_a_torn_file_is_named(rig: Rig) -> None:
    found = interval(started(rig.sink(), staging=rig.staging), 1, 1)
    (path,) = rig.staged()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CommitLostError, match=r"in \d+ bytes, but has \d+"):
        rig.committer().commit(found)


def test_a_flipped_byte_of_a_row_is_named(rig: Rig) -> None:
    """Arrow itself would read it as another value."""
    operator = started(rig.sink(), staging=rig.staging)
    operator.process(pa.record_batch({"x": [1], "s": ["a text that lz4 keeps as it is"]}), 0)
    found = prepared(operator, 1)
    (path,) = rig.staged()
    content = path.read_bytes()
    assert content.count(b"keeps") == 1
    path.write_bytes(content.replace(b"keeps", b"kfeps"))
    with pytest.raises(CommitLostError, match="its content has changed since"):
        rig.committer().commit(found)


@pytest.mark.parametrize("step", ["known", "begin"])
def test_a_commit_that_another_makes_at_the_same_moment_is_done(
    rig: Rig, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that does not know that it was replaced commits between our look and our transaction."""
    found = interval(started(rig.sink(), staging=rig.staging), 1, 1)
    session, other = rig.session, rig.committer()
    original = getattr(session, step)

    def overtaken(self: TargetSession, *arguments: object) -> object:
        monkeypatch.setattr(session, step, original)
        answer = original(self, *arguments) if step == "known" else None
        other.commit(found)  # and removes the files
        return answer if step == "known" else original(self, *arguments)

    monkeypatch.setattr(session, step, overtaken)
    rig.committer().commit(found)
    assert rig.visible() == [1]


def test_with_a_key_the_last_row_counts(rig: Rig) -> None:
    operator = started(rig.sink("x"), staging=rig.staging)
    rows = pa.record_batch({"x": [1, 2, 1, 3], "s": ["a", "b", "c", "d"]})
    operator.process(rows, 0)
    rig.committer("x").commit(prepared(operator, 1))
    operator.process(pa.record_batch({"x": [3, 4], "s": ["e", "f"]}), 0)
    rig.committer("x").commit(prepared(operator, 2))
    assert rig.read("SELECT x, s FROM t ORDER BY x") == [(1, "c"), (2, "b"), (3, "e"), (4, "f")]


def test_several_files_of_one_checkpoint_keep_their_order(rig: Rig) -> None:
    sink = rig.sink("x")
    operator = started(sink, staging=rig.staging)
    operator._flush = type(operator._flush)(rows=1)  # type: ignore[attr-defined]
    for text in "abc":
        operator.process(pa.record_batch({"x": [1], "s": [text]}), 0)
    assert len(rig.staged()) == 3
    rig.committer("x").commit(prepared(operator, 1))
    assert rig.read("SELECT x, s FROM t") == [(1, "c")]


def test_a_missing_table_is_refused_where_it_must_not_be_made(rig: Rig) -> None:
    sink = WriteAheadSink(rig.target(create=False))
    with pytest.raises(ConfigError, match=r"step 'step' expects a table .*t.*, which is not there"):
        opened(sink, staging=rig.staging).recover([], fresh=True)


def test_a_column_that_is_not_there_is_named(rig: Rig) -> None:
    found = interval(started(rig.sink(), staging=rig.staging), 1, 1)
    rig.committer().commit(found)
    other = WriteAheadSink(rig.target(), schema=pa.schema({"x": pa.int64(), "y": pa.int64()}))
    with pytest.raises(ConfigError, match=r"it has no column 'y'; expected .*x.*s.*, got .x: int64, y: int64"):
        opened(other, staging=rig.staging).recover([], fresh=False)


def test_old_marks_are_forgotten_in_the_target(rig: Rig) -> None:
    operator, committer = started(rig.sink(), staging=rig.staging), rig.committer()
    first = interval(operator, 1, 1)
    committer.commit(first)
    committer.commit(interval(operator, 1_200, 2))
    assert rig.read("SELECT checkpoint FROM rayflow_commits") == [(1_200,)]
    committer.commit(first)
    assert rig.visible() == [1, 2]


def test_without_a_checkpoint_directory_it_says_what_to_do(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="no checkpoint directory; give checkpoints="):
        opened(rig.sink())


def test_text_of_any_kind_comes_back(rig: Rig) -> None:
    texts = ["it's", 'a "b"', "back\\slash", "", "ü\n\t"]
    sink = WriteAheadSink(rig.target())
    committer = opened(sink, staging=rig.staging, job="it's \\ a job", run="r'\\un")
    operator = started(sink, staging=rig.staging)
    operator.process(pa.record_batch({"s": texts}), 0)
    found = prepared(operator, 1)
    mark = Mark("it's \\ a job", "r'\\un", 'op"\\', 0, 1)
    for _ in range(2):
        committer.commit([{**found[0], **mark.to_json()}])
    assert [s for (s,) in rig.read("SELECT s FROM t")] == texts
    assert rig.read("SELECT job, run_id, operator FROM rayflow_commits") == [(mark.job, mark.run_id, mark.operator)]


def test_sqlite_waits_for_a_lock_and_then_for_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayflow.operators.sql.sqlite.BUSY_TIMEOUT_MS", 1)
    rig = SqliteRig(tmp_path)
    found = interval(started(rig.sink(), staging=rig.staging), 1, 1)
    blocker = rig.target().connect("somebody else")
    blocker.begin()
    with pytest.raises(ConnectorError, match="cannot write to table .* for now: .*locked"):
        rig.committer().commit(found)
    blocker.rollback()
    blocker.close()
    rig.committer().commit(found)
    assert rig.visible() == [1]


def test_duckdb_says_what_it_will_not_take(tmp_path: Path) -> None:
    rig = DuckDBRig(tmp_path)
    with duckdb.connect(str(tmp_path / "db")) as db:
        db.execute("CREATE TABLE t (x INTEGER CHECK (x < 5), s TEXT)")
    found = interval(started(rig.sink(), staging=rig.staging), 1, 7)
    with pytest.raises(DataError, match="step 'step' cannot write to table 't' in .*CHECK"):
        rig.committer().commit(found)


def test_sqlite_has_no_type_for_lists() -> None:
    target = SqliteTarget(EmbeddedTable("t", "db"))
    with pytest.raises(PlanError, match="column 'l' of type list.* to SQLite"):
        WriteAheadSink(target).output_schema(pa.schema({"l": pa.list_(pa.int64())}))


def test_a_row_that_cannot_fit_is_found_before_it_is_promised(postgres: PostgresServer, tmp_path: Path) -> None:
    rig = PostgresRig(tmp_path, postgres)
    postgres.execute(f"CREATE TABLE {rig._schema}.t (x int2, s text)")
    operator = started(rig.sink(), staging=rig.staging)
    with pytest.raises(DataError, match=r"step 'step' subtask 0/2 column 'x' .* int2 .*70000"):
        operator.process(batch(70_000), 0)
    assert operator.snapshot(CheckpointId(1)) is None
