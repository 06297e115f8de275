"""Operators and committers of SQL sinks under test, outside of a job."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.operators.base import Collected, Committer, CommitterContext, SinkFactory, SinkOperator, Staging
from rayflow.operators.sql.postgres import PostgresTable
from rayflow.operators.sql.segments import Flush
from rayflow.operators.sql.sinks import PostgresGuarantee, PostgresSink
from tests.operators.sinks.contract import batch
from tests.operators.sources.contract import context
from tests.postgres_server import PostgresServer


def postgres_sink(
    server: PostgresServer,
    schema: str,
    how: PostgresGuarantee,
    *,
    key: tuple[str, ...] = (),
    table: str = "t",
    create: bool = True,
    batch_rows: int = 1_000,
) -> PostgresSink:
    made = PostgresTable(table, server.url, schema=schema, key=key, create="if_missing" if create else None)
    return PostgresSink(made, how=how, flush=Flush(rows=batch_rows))


def started(
    factory: SinkFactory, subtask: int = 0, *, parallelism: int = 2, attempt: int = 1, run: str = "run",
    staging: Path | None = None,
) -> SinkOperator:  # fmt: skip
    operator = factory.build()
    assert isinstance(operator, SinkOperator)
    ctx = context(subtask, parallelism=parallelism, attempt=attempt, run_id=run)
    operator.open(dataclasses.replace(ctx, staging=None if staging is None else Staging(str(staging))), Collected())
    return operator


def opened(
    factory: SinkFactory, *, parallelism: int = 2, run: str = "run", job: str = "job", staging: Path | None = None
) -> Committer:
    committer = factory.committer()
    assert committer is not None
    where = None if staging is None else Staging(str(staging))
    committer.open(CommitterContext(job, run, "op", "step", parallelism, where))
    return committer


def prepared(operator: SinkOperator, checkpoint: int) -> list[Json]:
    frozen = operator.snapshot(CheckpointId(checkpoint))
    return list(frozen.prepare()) if frozen is not None and frozen.prepare is not None else []


def interval(operator: SinkOperator, checkpoint: int, *values: int) -> list[Json]:
    """Rows with these values, and what the operator prepares of them."""
    operator.process(batch(*values), 0)
    return prepared(operator, checkpoint)
