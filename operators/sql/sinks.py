"""The sinks that the builder makes: immutable, picklable, told the columns of their rows when the job is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Literal, get_args

import pyarrow as pa

from rayflow.errors import ConfigError, PlanError
from rayflow.operators.base import Committer, Guarantee, SinkOperator
from rayflow.operators.sql.direct import DirectOperator, TableCommitter
from rayflow.operators.sql.function import BatchFunction, FunctionCommitter
from rayflow.operators.sql.names import quoted
from rayflow.operators.sql.postgres import PostgresTable, driver
from rayflow.operators.sql.postgres_target import PostgresTarget
from rayflow.operators.sql.postgres_types import check_types
from rayflow.operators.sql.segments import Flush
from rayflow.operators.sql.target import TransactionalTarget
from rayflow.operators.sql.two_phase import TwoPhaseCommitter, TwoPhaseOperator
from rayflow.operators.sql.write_ahead import StagingOperator, WriteAheadCommitter

PostgresGuarantee = Literal["upsert", "two_phase", "wal", "at_least_once"]


@dataclass(frozen=True, slots=True)
class PostgresSink:
    """Rows into a table of PostgreSQL; see `Stream.write_postgres`."""

    table: PostgresTable
    _: KW_ONLY
    how: PostgresGuarantee
    flush: Flush = field(default_factory=Flush)
    schema: pa.Schema | None = None

    def __post_init__(self) -> None:
        table, how = self.table, self.how
        if how not in get_args(PostgresGuarantee):
            raise ConfigError(f"write_postgres(guarantee) must be one of {get_args(PostgresGuarantee)}, got {how!r}")
        quoted(table.name), quoted(table.schema)
        if how == "upsert" and not table.key:
            raise ConfigError('write_postgres(guarantee="upsert") needs key=[columns] to know which row to replace')
        if table.key and how in ("two_phase", "at_least_once"):
            why = ": prepared transactions that replace one row wait for each other" if how == "two_phase" else ""
            raise ConfigError(f'write_postgres(key) goes with guarantee="upsert" or "wal", got {how!r}{why}')
        if len(set(table.key)) != len(table.key):
            raise ConfigError(f"write_postgres(key) names a column twice: {', '.join(table.key)}")
        if table.create not in ("if_missing", None):
            raise ConfigError(f'write_postgres(create) must be "if_missing" or None, got {table.create!r}')
        if self.flush.rows < 1 or self.flush.nbytes < 1:
            raise ConfigError(f"write_postgres needs at least one row in a batch, got {self.flush.rows}")
        driver()

    @property
    def stateful(self) -> bool:
        return False

    @property
    def guarantee(self) -> Guarantee:
        if self.how == "upsert":
            return "idempotent"
        return "at_least_once" if self.how == "at_least_once" else "exactly_once"

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is not None:
            check_types(schema, "write_postgres")
            _check_key(self.table.key, schema, "write_postgres")
        return schema

    def with_input_schemas(self, schemas: Sequence[pa.Schema | None]) -> PostgresSink:
        return replace(self, schema=schemas[0])

    def build(self) -> SinkOperator:
        if self.how == "two_phase":
            return TwoPhaseOperator(self.table, self.flush)
        if self.how == "wal":
            return StagingOperator(PostgresTarget(self.table), self.flush)
        return DirectOperator(self.table, self.flush)

    def committer(self) -> Committer:
        if self.how == "two_phase":
            return TwoPhaseCommitter(self.table, self.schema)
        if self.how == "wal":
            return WriteAheadCommitter(PostgresTarget(self.table), self.schema)
        return TableCommitter(self.table, self.schema)


@dataclass(frozen=True, slots=True)
class WriteAheadSink:
    """Rows into any `TransactionalTarget`, each once, a checkpoint at a time."""

    target: TransactionalTarget
    _: KW_ONLY
    key: tuple[str, ...] = ()
    flush: Flush = field(default_factory=Flush)
    schema: pa.Schema | None = None
    guarantee: Guarantee = "exactly_once"

    @property
    def stateful(self) -> bool:
        return False

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        if schema is not None:
            self.target.check_schema(schema, "the sink")
            _check_key(self.key, schema, "the sink")
        return schema

    def with_input_schemas(self, schemas: Sequence[pa.Schema | None]) -> WriteAheadSink:
        return replace(self, schema=schemas[0])

    def build(self) -> SinkOperator:
        return StagingOperator(self.target, self.flush)

    def committer(self) -> Committer:
        return WriteAheadCommitter(self.target, self.schema)


@dataclass(frozen=True, slots=True)
class FunctionSink:
    """Rows of complete checkpoints for a function; see `Stream.for_each_batch`."""

    fn: BatchFunction
    _: KW_ONLY
    flush: Flush = field(default_factory=Flush)
    guarantee: Guarantee = "at_least_once"

    @property
    def stateful(self) -> bool:
        return False

    def build(self) -> SinkOperator:
        return StagingOperator(None, self.flush)

    def committer(self) -> Committer:
        return FunctionCommitter(self.fn)


def _check_key(key: Sequence[str], schema: pa.Schema, step: str) -> None:
    for name in key:
        if name not in schema.names:
            raise PlanError(f"{step} has the key column {name!r}, but the rows have only {', '.join(schema.names)}")
