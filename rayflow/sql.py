"""Streams that end in tables: PostgreSQL, SQLite and DuckDB, and a function for all else. See docs/sql.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rayflow.errors import ConfigError, PlanError
from rayflow.operators.sql.duckdb_file import DuckDBTarget
from rayflow.operators.sql.embedded import EmbeddedTable
from rayflow.operators.sql.function import BatchFunction
from rayflow.operators.sql.names import quoted
from rayflow.operators.sql.postgres import PostgresTable
from rayflow.operators.sql.segments import FLUSH_ROWS, Flush
from rayflow.operators.sql.sinks import FunctionSink, PostgresGuarantee, PostgresSink, WriteAheadSink
from rayflow.operators.sql.sqlite import SqliteTarget
from rayflow.operators.sql.target import TransactionalTarget

if TYPE_CHECKING:
    from rayflow.stream import StreamEnd

Create = Literal["if_missing"] | None
AnyTarget = TypeVar("AnyTarget", bound=TransactionalTarget)


class WritesTables:
    """The part of a `Stream` that writes to databases."""

    def _sink(self, label: str, operator: Any, *, detail: str = "", name: str | None = None) -> StreamEnd:
        raise NotImplementedError

    def write_postgres(
        self,
        table: str,
        *,
        url: str,
        key: str | Sequence[str] | None = None,
        guarantee: PostgresGuarantee | None = None,
        schema: str = "public",
        create: Create = "if_missing",
        batch_rows: int = FLUSH_ROWS,
        name: str | None = None,
    ) -> StreamEnd:
        """Rows into a PostgreSQL table, appended or, with ``key``, inserted or replaced.

        ``guarantee``: ``"upsert"`` (default with a key) writes at once and repeats itself after a failure; ``"wal"``
        (default without) keeps rows beside the checkpoints and writes each checkpoint in one transaction when it is
        complete; ``"two_phase"`` prepares a transaction in each subtask, which the server must allow
        (``max_prepared_transactions``); ``"at_least_once"`` appends at once. A missing table is made from the columns
        of the rows, or with ``create=None`` refused. ``batch_rows``: how many rows go to the server at a time.
        """
        keys = _keys(key)
        target = PostgresTable(table, url, schema=schema, key=keys, create=create)
        sink = PostgresSink(target, how=guarantee or ("upsert" if keys else "wal"), flush=Flush(rows=batch_rows))
        return self._table_sink("write_postgres", sink, f"{target.title}, {sink.how}", name)

    def write_sqlite(
        self,
        table: str,
        *,
        path: str | os.PathLike[str],
        key: str | Sequence[str] | None = None,
        create: Create = "if_missing",
        name: str | None = None,
    ) -> StreamEnd:
        """Exactly-once rows into a table of a SQLite file, a checkpoint at a time; needs a checkpoint directory."""
        target = _embedded("write_sqlite", SqliteTarget, table, path, _keys(key), create)
        return self._table_sink("write_sqlite", WriteAheadSink(target, key=_keys(key)), target.title, name)

    def write_duckdb(
        self,
        table: str,
        *,
        path: str | os.PathLike[str],
        key: str | Sequence[str] | None = None,
        create: Create = "if_missing",
        name: str | None = None,
    ) -> StreamEnd:
        """Exactly-once rows into a table of a DuckDB file, a checkpoint at a time; needs a checkpoint directory."""
        target = _embedded("write_duckdb", DuckDBTarget, table, path, _keys(key), create)
        return self._table_sink("write_duckdb", WriteAheadSink(target, key=_keys(key)), target.title, name)

    def for_each_batch(self, fn: BatchFunction, *, name: str | None = None) -> StreamEnd:
        """``fn(checkpoint, subtask, table)`` with all rows of a subtask once their checkpoint is complete; at least
        once: after a crash it may be called again with the same checkpoint, subtask and rows."""
        if not callable(fn):
            raise PlanError(f"for_each_batch needs a function fn(checkpoint, subtask, table), got {fn!r}")
        return self._sink("for_each_batch", FunctionSink(fn), detail=getattr(fn, "__name__", ""), name=name)

    def _table_sink(self, label: str, operator: Any, detail: str, name: str | None) -> StreamEnd:
        made = self._sink(label, operator, detail=detail, name=name)
        made.node.schema(look=False)
        return made


def _embedded(
    label: str,
    target: Callable[[EmbeddedTable], AnyTarget],
    table: str,
    path: str | os.PathLike[str],
    key: tuple[str, ...],
    create: Create,
) -> AnyTarget:
    quoted(table)
    file = os.fspath(path)
    if "://" in file or file == ":memory:":
        raise ConfigError(f"{label}(path) must be a local file, got {file!r}")
    if create not in ("if_missing", None):
        raise ConfigError(f'{label}(create) must be "if_missing" or None, got {create!r}')
    return target(EmbeddedTable(table, os.path.abspath(file), key=key, create=create))


def _keys(key: str | Sequence[str] | None) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key or ())
