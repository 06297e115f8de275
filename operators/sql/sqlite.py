"""SQLite as the target of a write-ahead log, by ADBC."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from rayflow.errors import ConfigError, ConnectorError, DataError, PlanError
from rayflow.operators.sql.embedded import EmbeddedSession, EmbeddedTable, text
from rayflow.operators.sql.names import quoted
from rayflow.operators.sql.target import TargetSession, TransactionalTarget

BUSY_TIMEOUT_MS: Final = 10_000
_DATA: Final = ("INTEGRITY", "INVALID_DATA", "INVALID_ARGUMENT")


@dataclass(frozen=True, slots=True)
class SqliteTarget(TransactionalTarget):
    table: EmbeddedTable

    @property
    def title(self) -> str:
        return self.table.title

    def connect(self, where: str) -> TargetSession:
        return SqliteSession(self.table, where)

    def check_schema(self, schema: pa.Schema, where: str) -> None:
        for field in schema:
            if pa.types.is_nested(field.type) or pa.types.is_duration(field.type):
                raise PlanError(
                    f"{where} cannot write column {field.name!r} of type {field.type} to SQLite; select what is in it, "
                    "or cast it to a string"
                )


class SqliteSession(EmbeddedSession):
    def __init__(self, table: EmbeddedTable, where: str) -> None:
        super().__init__(table, where)
        try:
            import adbc_driver_sqlite.dbapi as dbapi
        except ImportError as error:
            raise ConfigError("write_sqlite needs ADBC: pip install 'rayflow[sqlite]'") from error
        with self._errors():
            self._connection = dbapi.connect(table.path, autocommit=True)
        self._run(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        self._run("PRAGMA synchronous = FULL")

    def _run(self, statement: str) -> list[tuple[Any, ...]]:
        with self._errors(), self._connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def begin(self) -> None:
        self._run("BEGIN IMMEDIATE")

    def _load(self, rows: pa.Table) -> None:
        with self._errors(), self._connection.cursor() as cursor:
            cursor.adbc_ingest(self._table.name, _plain(rows), mode="append")

    def _stage(self, rows: pa.Table, name: str) -> None:
        with self._errors(), self._connection.cursor() as cursor:
            cursor.adbc_ingest(name, _plain(rows), mode="create", temporary=True)

    def _unstage(self, name: str) -> None:
        self._run(f"DROP TABLE temp.{quoted(name)}")

    def _columns(self) -> list[str]:
        return [str(name) for (name,) in self._run(f"SELECT name FROM pragma_table_info({text(self._table.name)})")]

    def _column_type(self, kind: pa.DataType) -> str:
        t = pa.types
        if t.is_integer(kind) or t.is_boolean(kind):
            return "INTEGER"
        if t.is_floating(kind):
            return "REAL"
        if t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind) or t.is_binary_view(kind):
            return "BLOB"
        return "TEXT"

    def rollback(self) -> None:
        with contextlib.suppress(Exception):
            self._run("ROLLBACK")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            said = " ".join(str(error).split())
            begin = f"{self._where} cannot write to table {self._table.title}"
            status = getattr(getattr(error, "status_code", None), "name", "")
            if "locked" in said or "busy" in said or "disk" in said:
                raise ConnectorError(f"{begin} for now: {said}") from error
            if status in _DATA or "constraint failed" in said:
                raise DataError(f"{begin}: {said}") from error
            raise ConfigError(f"{begin}: {said}; mend the file or the step") from error


def _plain(rows: pa.Table) -> pa.Table:
    """SQLite has four types; decimals and times are kept exactly, as texts."""
    columns = [
        c.cast(pa.string()) if pa.types.is_decimal(c.type) or pa.types.is_time(c.type) else c for c in rows.columns
    ]
    return pa.Table.from_arrays(columns, names=rows.column_names)
