"""Upserts and appends: visible at once, in order, all of an interval when its checkpoint is acknowledged."""

from __future__ import annotations

import pyarrow as pa
import pytest

from rayflow.core.ids import CheckpointId
from rayflow.errors import ConnectorError, DataError
from rayflow.operators.sql.postgres import PostgresTable
from tests.operators.sinks.contract import batch
from tests.operators.sql.helpers import interval, opened, postgres_sink, prepared, started
from tests.postgres_server import PostgresServer


def rows(**columns: list[object]) -> pa.RecordBatch:
    return pa.record_batch(columns)


def test_the_last_row_of_a_key_wins_within_and_between_batches(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    operator = started(postgres_sink(postgres, schema, "upsert", key=("a", "b"), batch_rows=3))
    operator.process(rows(a=[1, 1, 2], b=["x", "x", "x"], v=[1, 2, 3]), 0)
    assert postgres.rows(schema, "t") == [(1, "x", 2), (2, "x", 3)], "a full batch is visible before the barrier"
    operator.process(rows(a=[1, 1], b=["x", "y"], v=[None, 5]), 0)
    assert prepared(operator, 1) == []
    assert postgres.rows(schema, "t") == [(1, "x", None), (1, "y", 5), (2, "x", 3)]
    operator.close()


def test_rows_of_the_loop_do_not_overtake_those_of_the_uploader(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    operator = started(postgres_sink(postgres, schema, "upsert", key=("k",), batch_rows=2))
    operator.process(rows(k=[1], v=[1]), 0)
    frozen = operator.snapshot(CheckpointId(1))
    operator.process(rows(k=[1, 2], v=[2, 2]), 0)
    assert frozen is not None
    assert frozen.prepare is not None
    assert frozen.prepare() == []
    assert postgres.rows(schema, "t") == [(1, 2), (2, 2)]
    operator.close()


def test_only_keys(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    operator = started(postgres_sink(postgres, schema, "upsert", key=("k",)))
    for checkpoint in (1, 2):
        operator.process(rows(k=[1, 1]), 0)
        prepared(operator, checkpoint)
    assert postgres.rows(schema, "t") == [(1,)]
    operator.close()


def test_a_flush_that_failed_is_tried_again_with_all_its_rows(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    operator = started(postgres_sink(postgres, schema, "at_least_once"))
    assert interval(operator, 1, 1) == []
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    with pytest.raises(ConnectorError, match="step 'step' subtask 0/2 cannot write"):
        interval(operator, 2, 2)
    assert prepared(operator, 3) == []
    assert [x for x, _ in postgres.rows(schema, "t")] == [1, 2]
    operator.close()


def test_a_deadlock_is_tried_again(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends one of two transactions with 40P01; here it is told to."""
    schema = postgres.schema()
    operator = started(postgres_sink(postgres, schema, "upsert", key=("x",)))
    write, times = PostgresTable.write, []

    def once(self: PostgresTable, connection: object, *rest: object) -> None:
        times.append(1)
        if len(times) == 1:
            connection.execute("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40P01'; END $$")  # type: ignore[attr-defined]
        write(self, connection, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PostgresTable, "write", once)
    interval(operator, 1, 1, 2)
    assert [x for x, _ in postgres.rows(schema, "t")] == [1, 2]
    assert len(times) == 2
    operator.close()


def test_rows_may_be_added_to_those_of_another_run(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    sink = postgres_sink(postgres, schema, "at_least_once")
    for run in ("one", "two"):
        opened(sink, run=run).recover([], fresh=True)
        operator = started(sink, run=run)
        interval(operator, 1, 1)
        operator.close()
    assert len(postgres.rows(schema, "t")) == 2


def test_two_schemas_are_refused(postgres: PostgresServer) -> None:
    operator = started(postgres_sink(postgres, postgres.schema(), "at_least_once"))
    operator.process(batch(1), 0)
    with pytest.raises(DataError, match=r"two schemas to one table: column 's' is missing"):
        operator.process(rows(x=[1]), 0)
    operator.close()
    operator.close()
