"""``Stream.write_postgres``, ``write_sqlite``, ``write_duckdb`` and ``for_each_batch``: from options to a sink."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

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
    from rayflow.stream import Sink, Stream

Create = Literal["if_missing"] | None


def write_postgres(
    stream: Stream,
    table: str,
    *,
    url: str,
    key: str | Sequence[str] | None = None,
    guarantee: PostgresGuarantee | None = None,
    schema: str = "public",
    create: Create = "if_missing",
    batch_rows: int = FLUSH_ROWS,
    name: str | None = None,
) -> Sink:
    keys = _keys(key)
    target = PostgresTable(table, url, schema=schema, key=keys, create=create)
    sink = PostgresSink(target, how=guarantee or ("upsert" if keys else "wal"), flush=Flush(rows=batch_rows))
    return _checked(stream, "write_postgres", sink, f"{target.title}, {sink.how}", name)


def write_sqlite(
    stream: Stream,
    table: str,
    *,
    path: str | os.PathLike[str],
    key: str | Sequence[str] | None = None,
    create: Create = "if_missing",
    name: str | None = None,
) -> Sink:
    return _embedded(stream, "write_sqlite", SqliteTarget, table, path, key, create, name)


def write_duckdb(
    stream: Stream,
    table: str,
    *,
    path: str | os.PathLike[str],
    key: str | Sequence[str] | None = None,
    create: Create = "if_missing",
    name: str | None = None,
) -> Sink:
    return _embedded(stream, "write_duckdb", DuckDBTarget, table, path, key, create, name)


def for_each_batch(stream: Stream, fn: BatchFunction, *, name: str | None = None) -> Sink:
    if not callable(fn):
        raise PlanError(f"for_each_batch needs a function fn(checkpoint, subtask, table), got {fn!r}")
    return stream._sink("for_each_batch", FunctionSink(fn), detail=getattr(fn, "__name__", ""), name=name)


def _embedded(
    stream: Stream,
    label: str,
    target: Callable[[EmbeddedTable], TransactionalTarget],
    table: str,
    path: str | os.PathLike[str],
    key: str | Sequence[str] | None,
    create: Create,
    name: str | None,
) -> Sink:
    quoted(table)
    file = os.fspath(path)
    if "://" in file or file == ":memory:":
        raise ConfigError(f"{label}(path) must be a local file, got {file!r}")
    keys = _keys(key)
    made = target(EmbeddedTable(table, os.path.abspath(file), key=keys, create=create))
    return _checked(stream, label, WriteAheadSink(made, key=keys), made.title, name)


def _keys(key: str | Sequence[str] | None) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key or ())


def _checked(stream: Stream, label: str, sink: Any, detail: str, name: str | None) -> Sink:
    made = stream._sink(label, sink, detail=detail, name=name)
    made.node.schema(look=False)
    return made
