"""Prepared transactions of a real server: visible with their checkpoint, once, and never left behind (rule S1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rayflow.core.ids import CheckpointId
from rayflow.errors import CommitLostError, ConfigError, ConnectorError, RayflowError
from rayflow.operators.sql.marks import KEPT_CHECKPOINTS, Mark
from rayflow.operators.sql.postgres import Connection
from rayflow.operators.sql.postgres_marks import PostgresMarks
from rayflow.operators.sql.sinks import PostgresSink
from tests.operators.sinks.contract import batch
from tests.operators.sql.helpers import interval, opened, postgres_sink, prepared, started
from tests.postgres_server import PostgresServer


class Rig:
    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.schema = server.schema()
        self.sink: PostgresSink = postgres_sink(server, self.schema, "two_phase")
        opened(self.sink).recover([], fresh=True)

    def visible(self) -> list[int]:
        return [x for (x,) in self.server.rows(self.schema, "t", "x")]


@pytest.fixture
def rig(postgres: PostgresServer) -> Iterator[Rig]:
    yield Rig(postgres)
    for gid in postgres.prepared():
        postgres.execute(f"ROLLBACK PREPARED '{gid}'")


def test_rows_are_visible_with_the_commit_and_not_before(rig: Rig) -> None:
    operator = started(rig.sink)
    found = interval(operator, 7, 1, 2, 3)
    assert rig.visible() == []
    assert rig.server.prepared() == ["rayflow:job:op:run:0:7"]
    opened(rig.sink).commit(found)
    assert rig.visible() == [1, 2, 3]
    assert rig.server.prepared() == []
    operator.close()


def test_rows_flushed_before_the_barrier_are_of_the_same_transaction(rig: Rig) -> None:
    operator = started(postgres_sink(rig.server, rig.schema, "two_phase", batch_rows=2))
    operator.process(batch(1, 2, 3), 0)
    found = interval(operator, 1, 4)
    assert rig.visible() == []
    assert len(found) == 1
    opened(rig.sink).commit(found)
    assert rig.visible() == [1, 2, 3, 4]
    operator.close()


def test_committing_again_is_known_by_the_record(rig: Rig) -> None:
    operator = started(rig.sink)
    found = interval(operator, 1, 1, 2)
    for _ in range(3):
        opened(rig.sink).commit(found)
    opened(rig.sink).recover(found, fresh=False)
    assert rig.visible() == [1, 2]
    operator.close()


def test_broken_variant_without_the_record_takes_a_done_commit_for_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PostgresMarks, "record", lambda self, connection, marks: None)
    operator = started(rig.sink)
    found = interval(operator, 1, 1)
    opened(rig.sink).commit(found)
    with pytest.raises(CommitLostError):
        opened(rig.sink).commit(found)
    operator.close()


def test_a_transaction_that_somebody_rolled_back_is_lost_and_named(rig: Rig) -> None:
    operator = started(rig.sink)
    found = interval(operator, 4, 1, 2)
    rig.server.execute("ROLLBACK PREPARED 'rayflow:job:op:run:0:4'")
    with pytest.raises(
        CommitLostError, match=r"step 'step' had prepared 2 rows for checkpoint 4 .*'rayflow:job:op:run:0:4'"
    ):
        opened(rig.sink).commit(found)
    with pytest.raises(CommitLostError, match="go back to an earlier checkpoint"):
        opened(rig.sink).recover(found, fresh=False)
    assert rig.visible() == []
    operator.close()


@pytest.mark.parametrize("what", ["COMMIT", "ROLLBACK"])
def test_a_transaction_that_another_process_is_ending_is_tried_again(
    rig: Rig, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subtask was killed while the server did what it had asked for: no reason to end the job."""
    operator = started(rig.sink)
    found = interval(operator, 4, 1, 2)
    operator.close()
    execute = Connection.execute

    def busy(self: Connection, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        if statement.startswith(f"{what} PREPARED"):
            self.state = "55000"
            raise ConfigError("the prepared transaction is busy")
        return execute(self, statement, parameters)

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "execute", busy)
        with pytest.raises(ConnectorError, match="busy"):
            opened(rig.sink).recover(found if what == "COMMIT" else [], fresh=False)
    opened(rig.sink).recover(found, fresh=False)
    assert rig.visible() == [1, 2]


@pytest.mark.parametrize("fresh", [False, True])
def test_recovery_commits_what_is_named_and_rolls_back_the_rest(rig: Rig, fresh: bool) -> None:
    """Those of a larger parallelism before, too."""
    operators = [started(rig.sink, subtask, parallelism=5) for subtask in range(5)]
    first = [each for i, o in enumerate(operators) for each in interval(o, 1, i)]
    for i, operator in enumerate(operators):
        interval(operator, 2, 10 + i)
        operator.process(batch(20 + i), 0)
        operator.close()
    assert len(rig.server.prepared()) == 10
    opened(rig.sink, parallelism=2).recover([] if fresh else first, fresh=fresh)
    assert rig.visible() == ([] if fresh else [0, 1, 2, 3, 4])
    assert rig.server.prepared() == []


def test_a_fresh_run_rolls_back_what_an_earlier_run_of_the_job_left_and_nothing_else(rig: Rig) -> None:
    operator = started(rig.sink, run="before")
    interval(operator, 1, 1)
    operator.close()
    with_other_job = "rayflow:job2:op:run:0:1"
    rig.server.execute("CREATE TABLE IF NOT EXISTS public.other (x int8)")
    rig.server.execute(f"BEGIN; INSERT INTO public.other VALUES (1); PREPARE TRANSACTION '{with_other_job}'")
    opened(rig.sink, run="other").recover([], fresh=False)
    assert len(rig.server.prepared()) == 2, "a run that goes on leaves other runs alone"
    opened(rig.sink, run="other").recover([], fresh=True)
    assert rig.server.prepared() == [with_other_job]


def test_old_records_are_forgotten_and_still_mean_committed(rig: Rig) -> None:
    operator = started(rig.sink)
    found = interval(operator, 1, 1)
    committer = opened(rig.sink)
    committer.commit(found)
    late = KEPT_CHECKPOINTS + 200
    committer.commit(interval(operator, late, 2))
    assert rig.server.rows(rig.schema, "rayflow_commits", "checkpoint") == [(late,)]
    committer.commit(found)
    assert rig.visible() == [1, 2]
    operator.close()


def test_prepare_takes_no_rows_of_a_later_checkpoint(rig: Rig) -> None:
    operator = started(rig.sink)
    operator.process(batch(1), 0)
    one = operator.snapshot(CheckpointId(1))
    operator.process(batch(2), 0)
    assert one is not None
    assert one.prepare is not None
    opened(rig.sink).commit(one.prepare())
    assert rig.visible() == [1]
    opened(rig.sink).commit(prepared(operator, 2))
    assert rig.visible() == [1, 2]
    assert prepared(operator, 3) == []
    operator.close()


def test_the_barrier_does_not_wait_for_the_uploader(rig: Rig) -> None:
    operator = started(rig.sink)
    operator.process(batch(1), 0)
    with operator._lock:  # type: ignore[attr-defined]
        frozen = operator.snapshot(CheckpointId(1))
    assert frozen is not None
    assert frozen.prepare is not None
    opened(rig.sink).commit(frozen.prepare())
    assert rig.visible() == [1]
    operator.close()


def test_prepared_rows_outlive_a_killed_server(rig: Rig) -> None:
    operator = started(rig.sink)
    found = interval(operator, 1, 1, 2)
    rig.server.kill()
    with pytest.raises(ConnectorError, match="step 'step' cannot reach PostgreSQL"):
        opened(rig.sink).commit(found)
    rig.server.start()
    assert rig.server.prepared() == ["rayflow:job:op:run:0:1"]
    opened(rig.sink).recover(found, fresh=False)
    assert rig.visible() == [1, 2]
    operator.close()


def test_rows_lost_with_a_connection_end_the_attempt(rig: Rig) -> None:
    operator = started(postgres_sink(rig.server, rig.schema, "two_phase", batch_rows=1))
    operator.process(batch(1), 0)
    rig.server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
        "AND backend_xid IS NOT NULL"
    )
    with pytest.raises(ConnectorError, match="step 'step' subtask 0/2"):
        prepared(operator, 1)
    with pytest.raises(ConnectorError):
        operator.process(batch(2), 0)
    with pytest.raises(RayflowError):
        operator.snapshot(CheckpointId(2))
    operator.close()
    assert rig.visible() == []


def test_a_connection_that_died_while_it_waited_is_replaced(rig: Rig) -> None:
    operator = started(rig.sink)
    first = interval(operator, 1, 1)
    rig.server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    opened(rig.sink).commit([*first, *interval(operator, 2, 2)])
    assert rig.visible() == [1, 2]
    operator.close()


def test_a_server_without_prepared_transactions_is_refused_at_the_start(rig: Rig) -> None:
    with pytest.raises(ConfigError, match=r"needs max_prepared_transactions >= 2000, but the server has 100; set it"):
        opened(rig.sink, parallelism=1_000).recover([], fresh=True)


def test_names_of_transactions_are_short_and_tell_jobs_apart() -> None:
    marks = [
        Mark(job, "r" * 32, "operator " * 40, 11, 1_000_000) for job in ("j:1" * 50, "j:2" * 50, "j", "j:", "j%3A")
    ]
    assert all(len(mark.id) < 200 for mark in marks)
    assert len({mark.id for mark in marks}) == len(marks)
    assert all(mark.id.count(":") == 5 for mark in marks)
    assert [Mark.from_json(mark.to_json()) for mark in marks] == marks
