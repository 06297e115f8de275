"""PostgreSQL as the target of a write-ahead log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from rayflow.operators.sql.marks import Known, Mark
from rayflow.operators.sql.postgres import Connection, PostgresTable
from rayflow.operators.sql.postgres_marks import PostgresMarks
from rayflow.operators.sql.postgres_types import check_types
from rayflow.operators.sql.target import RowCheck, TargetSession, TransactionalTarget


@dataclass(frozen=True, slots=True)
class PostgresTarget(TransactionalTarget):
    table: PostgresTable

    @property
    def title(self) -> str:
        return self.table.title

    def connect(self, where: str) -> TargetSession:
        return PostgresSession(self.table, self.table.connect(where))

    def check_schema(self, schema: pa.Schema, where: str) -> None:
        check_types(schema, where)

    def row_check(self, schema: pa.Schema, where: str) -> RowCheck:
        connection = self.table.connect(where)
        try:
            columns = self.table.ensure(connection, schema)
        finally:
            connection.close()
        return lambda rows: self.table.validate(rows, columns, where)


class PostgresSession(TargetSession):
    def __init__(self, table: PostgresTable, connection: Connection) -> None:
        self._table = table
        self._connection = connection
        self._marks = PostgresMarks(table.schema)
        self._columns: Mapping[str, str] = {}

    def ensure(self, schema: pa.Schema | None) -> None:
        self._marks.ensure(self._connection)
        self._columns = self._table.ensure(self._connection, schema)

    def known(self, marks: Sequence[Mark]) -> Known:
        return self._marks.known(self._connection, marks)

    def begin(self) -> None:
        self._connection.execute("BEGIN")

    def write(self, rows: pa.Table) -> None:
        self._table.write(self._connection, rows, self._columns)

    def record(self, marks: Sequence[Mark]) -> None:
        self._marks.record(self._connection, marks)

    def commit(self) -> None:
        self._connection.execute("COMMIT")

    def rollback(self) -> None:
        self._connection.rollback()

    def prune(self, job: str, run_id: str, operator: str, newest: int) -> None:
        self._marks.prune(self._connection, job, run_id, operator, newest)

    def close(self) -> None:
        self._connection.close()
