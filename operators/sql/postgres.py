"""One table of a PostgreSQL server: connections, what stands there, and rows into it by binary COPY (ADBC).

Connections commit by themselves; transactions are opened by ``BEGIN``, so that a connection that waits holds none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Final, Literal

import pyarrow as pa

from rayflow.errors import ConfigError, ConnectorError
from rayflow.operators.sources.schemas import describe
from rayflow.operators.sql.keys import check_key, last_by_key
from rayflow.operators.sql.names import listed, literal, quoted, with_patience
from rayflow.operators.sql.postgres_errors import Place, not_connected, translated
from rayflow.operators.sql.postgres_types import check_types, column_type, fitted, takes

LOCK_TIMEOUT_S: Final = 30
_STAGE: Final = "_rayflow_stage"


def driver() -> Any:
    try:
        import adbc_driver_postgresql.dbapi as dbapi
    except ImportError as error:
        raise ConfigError("write_postgres needs ADBC: pip install 'rayflow[postgres]'") from error
    return dbapi


@dataclass(frozen=True, slots=True)
class PostgresTable:
    """A table by name; immutable and picklable. ``url`` is for libpq: ``postgresql://user:password@host:5432/db``."""

    name: str
    url: str = field(repr=False)
    _: KW_ONLY
    schema: str = "public"
    key: tuple[str, ...] = ()
    create: Literal["if_missing"] | None = "if_missing"

    @property
    def sql(self) -> str:
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    @property
    def title(self) -> str:
        return f"{self.schema}.{self.name}"

    def connect(self, where: str) -> Connection:
        """Raises `ConfigError` for wrong credentials, `ConnectorError` when the server does not answer."""
        place = Place(where, self.title, self.url)
        try:
            raw = driver().connect(with_patience(self.url), autocommit=True)
        except ConfigError:
            raise
        except Exception as error:
            raise not_connected(error, place) from None  # the cause may hold the password
        connection = Connection(raw, place)
        try:
            connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
        except BaseException:
            connection.close()
            raise
        return connection

    # ------------------------------------------------------------------------------------------------ what stands there

    def columns(self, connection: Connection) -> Mapping[str, str]:
        """Types (``pg_type.typname``) by column; empty when there is no such table."""
        rows = connection.execute(
            "SELECT a.attname::text, t.typname::text FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = $1 AND c.relname = $2 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            (self.schema, self.name),
        )
        return {str(name): str(kind) for name, kind in rows}

    def ensure(self, connection: Connection, schema: pa.Schema | None) -> Mapping[str, str]:
        """The columns of the table, which is made if that is wanted and the columns of the rows are known.

        Raises `ConfigError` when it is missing and must not be made, or does not take rows of ``schema``.
        """
        where = connection.place.where
        if schema is not None:
            check_types(schema, where)
        found = self.columns(connection)
        if not found and self.create is None:
            raise ConfigError(
                f"{where} expects a table {self.title}, which is not there; create it, or leave out create=None"
            )
        if not found and schema is not None:
            self._make(connection, schema)
            found = self.columns(connection)
        if found and schema is not None:
            self._check(connection, schema, found)
        return found

    def _make(self, connection: Connection, schema: pa.Schema) -> None:
        self._check_key(schema.names, connection.place.where)
        parts = [f"{quoted(f.name)} {column_type(f.type)}" for f in schema]
        if self.key:
            parts.append(f"PRIMARY KEY ({listed(self.key)})")
        connection.create(f"CREATE TABLE IF NOT EXISTS {self.sql} ({', '.join(parts)})")

    def _check(self, connection: Connection, schema: pa.Schema, found: Mapping[str, str]) -> None:
        where = connection.place.where
        self._check_key(schema.names, where)
        there = ", ".join(f"{name}: {kind}" for name, kind in found.items())
        for each in schema:
            if each.name not in found:
                problem = f"it has no column {each.name!r}"
            elif not takes(each.type, found[each.name]):
                problem = f"column {each.name!r} is {found[each.name]}, which does not take {each.type}"
            else:
                continue
            raise ConfigError(
                f"{where} cannot write to table {self.title}: {problem}; expected {{{there}}}, got {describe(schema)}; "
                "select, rename or cast columns before the sink"
            )
        if self.key and not self._has_unique_index(connection):
            raise ConfigError(
                f"{where} upserts into table {self.title} by ({', '.join(self.key)}), which has no primary key or "
                "unique index on exactly these columns; create one"
            )

    def _check_key(self, names: Sequence[str], where: str) -> None:
        for name in self.key:
            if name not in names:
                raise ConfigError(f"{where} has the key column {name!r}, but the rows have only {', '.join(names)}")

    def _has_unique_index(self, connection: Connection) -> bool:
        rows = connection.execute(
            "SELECT string_agg(a.attname::text, E'\\n' ORDER BY a.attname::text) FROM pg_index i JOIN pg_attribute a "
            "ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey) WHERE i.indisunique AND i.indpred IS NULL "
            "AND i.indexprs IS NULL AND i.indrelid = to_regclass($1) GROUP BY i.indexrelid",
            (self.sql,),
        )
        return sorted(self.key) in [sorted(str(names).split("\n")) for (names,) in rows]

    # ------------------------------------------------------------------------------------------------------------- rows

    def validate(self, table: pa.Table, columns: Mapping[str, str], where: str) -> None:
        """Raises `DataError` for a value that is known not to fit, without asking the server."""
        if self.key:
            check_key(table, self.key, where)
        fitted(table, columns, where)

    def append(self, connection: Connection, table: pa.Table, columns: Mapping[str, str]) -> None:
        """Add the rows, within the transaction that is open, if one is."""
        rows = fitted(table, columns, connection.place.where)
        connection.ingest(rows, self.name, schema=self.schema)

    def upsert(self, connection: Connection, table: pa.Table, columns: Mapping[str, str]) -> None:
        """Insert or replace by key within the open transaction; the last row of a key is the one that counts."""
        rows = fitted(last_by_key(table, self.key, connection.place.where), columns, connection.place.where)
        names = listed(rows.column_names)
        connection.execute(
            f"CREATE TEMP TABLE {quoted(_STAGE)} ON COMMIT DROP AS SELECT {names} FROM {self.sql} WITH NO DATA"
        )
        connection.ingest(rows, _STAGE, schema=None)
        others = [name for name in rows.column_names if name not in self.key]
        change = ", ".join(f"{quoted(name)} = EXCLUDED.{quoted(name)}" for name in others)
        connection.execute(
            f"INSERT INTO {self.sql} ({names}) SELECT {names} FROM pg_temp.{quoted(_STAGE)} "
            f"ON CONFLICT ({listed(self.key)}) DO {f'UPDATE SET {change}' if change else 'NOTHING'}"
        )
        connection.execute(f"DROP TABLE pg_temp.{quoted(_STAGE)}")

    def write(self, connection: Connection, table: pa.Table, columns: Mapping[str, str]) -> None:
        (self.upsert if self.key else self.append)(connection, table, columns)


class Connection:
    """A connection that speaks in our errors. Used by one thread at a time."""

    def __init__(self, raw: Any, place: Place) -> None:
        self._raw = raw
        self.place = place
        self.broken = False
        """The server is gone, or may be: nothing more can be done with it."""
        self.state = ""
        """The SQLSTATE of the last error."""

    def execute(self, statement: str, parameters: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
        with self._errors(), self._raw.cursor() as cursor:
            if parameters:
                cursor.execute(statement, parameters)
            else:
                cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []

    def ingest(self, rows: pa.Table, name: str, *, schema: str | None) -> None:
        """Binary COPY into a table, by names of columns; ``schema`` None: a temporary one."""
        with self._errors(rows), self._raw.cursor() as cursor:
            if schema is None:
                cursor.adbc_ingest(name, rows, mode="append", temporary=True)
            else:
                cursor.adbc_ingest(name, rows, mode="append", db_schema_name=schema)

    def create(self, statement: str) -> None:
        """``CREATE ... IF NOT EXISTS``, which fails when another does the same at the same moment."""
        try:
            self.execute(statement)
        except Exception:
            if self.broken:
                raise
            self.execute(statement)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit at the end, roll back on an error."""
        self.execute("BEGIN")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            self.rollback()
            raise

    def rollback(self) -> None:
        if not self.broken:
            with contextlib.suppress(Exception):
                self.execute("ROLLBACK")

    def close(self) -> None:
        self.broken = True
        with contextlib.suppress(Exception):
            self._raw.close()

    @contextlib.contextmanager
    def _errors(self, rows: pa.Table | None = None) -> Iterator[None]:
        if self.broken:
            raise ConnectorError(f"{self.place.where} has lost its connection to PostgreSQL")
        try:
            yield
        except Exception as error:
            self.state = getattr(error, "sqlstate", None) or ""
            told = translated(error, self.place, rows)
            self.broken = isinstance(told, ConnectorError) and (not self.state or self.state.startswith(("08", "57P")))
            raise told from error


__all__ = ["Connection", "PostgresTable", "driver", "literal"]
