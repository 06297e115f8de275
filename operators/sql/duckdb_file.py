"""DuckDB as the target of a write-ahead log. While the job runs, others may not have the file open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayflow.errors import ConfigError, ConnectorError, DataError
from rayflow.operators.sql.embedded import EmbeddedSession, EmbeddedTable, text
from rayflow.operators.sql.names import listed, quoted
from rayflow.operators.sql.target import TargetSession, TransactionalTarget


@dataclass(frozen=True, slots=True)
class DuckDBTarget(TransactionalTarget):
    table: EmbeddedTable

    @property
    def title(self) -> str:
        return self.table.title

    def connect(self, where: str) -> TargetSession:
        return DuckDBSession(self.table, where)


class DuckDBSession(EmbeddedSession):
    """The file is open only while something is written, so that it can be read between checkpoints."""

    def __init__(self, table: EmbeddedTable, where: str) -> None:
        super().__init__(table, where)
        try:
            import duckdb
        except ImportError as error:
            raise ConfigError("write_duckdb needs DuckDB: pip install 'rayflow[sql]'") from error
        self._library = duckdb
        with self._errors():
            self._connection = duckdb.connect(table.path)

    def _run(self, statement: str) -> list[tuple[Any, ...]]:
        with self._errors():
            self._connection.execute(statement)
            return list(self._connection.fetchall()) if self._connection.description else []

    def _load(self, rows: pa.Table) -> None:
        names = listed(rows.column_names)
        self._stage(rows, "_rayflow_rows")
        self._run(f"INSERT INTO {quoted(self._table.name)} ({names}) SELECT {names} FROM _rayflow_rows")
        self._unstage("_rayflow_rows")

    def _stage(self, rows: pa.Table, name: str) -> None:
        with self._errors():
            self._connection.register(name, rows)

    def _unstage(self, name: str) -> None:
        with self._errors():
            self._connection.unregister(name)

    def _columns(self) -> list[str]:
        return [
            str(name)
            for (name,) in self._run(
                f"SELECT column_name FROM duckdb_columns() WHERE table_name = {text(self._table.name)} "
                "AND database_name = current_database() AND schema_name = current_schema() ORDER BY column_index"
            )
        ]

    def _column_type(self, kind: pa.DataType) -> str:
        self._stage(pa.table({"x": pa.array([], kind)}), "_rayflow_type")
        ((found,),) = self._run("SELECT column_type FROM (DESCRIBE SELECT x FROM _rayflow_type)")
        self._unstage("_rayflow_type")
        return str(found)

    def rollback(self) -> None:
        with contextlib.suppress(Exception):
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._connection.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        library = self._library
        try:
            yield
        except (library.ConversionException, library.ConstraintException, library.OutOfRangeException) as error:
            raise DataError(f"{self._begin}: {_line(error)}") from error
        except (library.IOException, library.TransactionException) as error:
            raise ConnectorError(f"{self._begin} for now: {_line(error)}") from error
        except library.Error as error:
            raise ConfigError(f"{self._begin}: {_line(error)}; mend the table or the step") from error

    @property
    def _begin(self) -> str:
        return f"{self._where} cannot write to table {self._table.title}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
