"""Databases in one file, SQLite and DuckDB: one process at a time writes, and that is the coordinator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final, Literal

import pyarrow as pa

from rayflow.errors import ConfigError
from rayflow.operators.sources.schemas import describe
from rayflow.operators.sql.keys import last_by_key
from rayflow.operators.sql.marks import KEPT_CHECKPOINTS, MARKS_TABLE, Known, Mark
from rayflow.operators.sql.names import listed, quoted
from rayflow.operators.sql.target import TargetSession

_STAGE: Final = "_rayflow_stage"


@dataclass(frozen=True, slots=True)
class EmbeddedTable:
    """A table in a database file."""

    name: str
    path: str
    _: KW_ONLY
    key: tuple[str, ...] = ()
    create: Literal["if_missing"] | None = "if_missing"

    @property
    def title(self) -> str:
        return f"{self.name!r} in {self.path!r}"


def text(value: str) -> str:
    """A constant; neither database knows backslashes in it."""
    return "'" + value.replace("'", "''") + "'"


def texts(values: Iterable[str]) -> str:
    return ", ".join(map(text, values))


class EmbeddedSession(TargetSession):
    """The SQL that both understand. ``_run`` and ``_load`` raise our errors."""

    def __init__(self, table: EmbeddedTable, where: str) -> None:
        self._table = table
        self._where = where

    @abstractmethod
    def _run(self, statement: str) -> list[tuple[Any, ...]]: ...

    @abstractmethod
    def _load(self, rows: pa.Table) -> None:
        """Put the rows into the table."""

    @abstractmethod
    def _stage(self, rows: pa.Table, name: str) -> None:
        """Make a temporary table or view of the rows."""

    @abstractmethod
    def _unstage(self, name: str) -> None: ...

    @abstractmethod
    def _columns(self) -> list[str]:
        """Of the table; [] when it is not there."""

    @abstractmethod
    def _column_type(self, kind: pa.DataType) -> str: ...

    def ensure(self, schema: pa.Schema | None) -> None:
        self._run(
            f"CREATE TABLE IF NOT EXISTS {quoted(MARKS_TABLE)} (id TEXT PRIMARY KEY, job TEXT NOT NULL, "
            "run_id TEXT NOT NULL, operator TEXT NOT NULL, subtask INTEGER NOT NULL, checkpoint BIGINT NOT NULL)"
        )
        table, found = self._table, self._columns()
        if not found and table.create is None:
            raise ConfigError(
                f"{self._where} expects a table {table.title}, which is not there; create it, or leave out create=None"
            )
        if schema is None:
            return
        missing = [name for name in table.key if name not in schema.names]
        if missing:
            raise ConfigError(f"{self._where} has the key column {missing[0]!r}, but the rows are {describe(schema)}")
        if not found:
            parts = [f"{quoted(f.name)} {self._column_type(f.type)}" for f in schema]
            parts += [f"PRIMARY KEY ({listed(table.key)})"] if table.key else []
            self._run(f"CREATE TABLE IF NOT EXISTS {quoted(table.name)} ({', '.join(parts)})")
            return
        unknown = [name for name in schema.names if name not in found]
        if unknown:
            raise ConfigError(
                f"{self._where} cannot write to table {table.title}: it has no column {unknown[0]!r}; expected "
                f"{', '.join(found)}, got {describe(schema)}; select or rename columns before the sink"
            )

    def known(self, marks: Sequence[Mark]) -> Known:
        found = self._run(
            f"SELECT id FROM {quoted(MARKS_TABLE)} WHERE id IN ({texts(m.id for m in marks) or text('')})"
        )
        newest = {}
        for job, run_id, operator in {(m.job, m.run_id, m.operator) for m in marks}:
            ((highest,),) = self._run(
                f"SELECT max(checkpoint) FROM {quoted(MARKS_TABLE)} WHERE job = {text(job)} "
                f"AND run_id = {text(run_id)} AND operator = {text(operator)}"
            )
            newest[job, run_id, operator] = -1 if highest is None else int(highest)
        return Known(frozenset(str(i) for (i,) in found), newest)

    def begin(self) -> None:
        self._run("BEGIN")

    def write(self, rows: pa.Table) -> None:
        table = self._table
        if not table.key:
            self._load(rows)
            return
        rows = last_by_key(rows, table.key, self._where)
        names, key = listed(rows.column_names), listed(table.key)
        change = ", ".join(f"{quoted(n)} = excluded.{quoted(n)}" for n in rows.column_names if n not in table.key)
        self._stage(rows, _STAGE)
        # "WHERE true": without it SQLite takes ON CONFLICT for the condition of a join.
        self._run(
            f"INSERT INTO {quoted(table.name)} ({names}) SELECT {names} FROM {quoted(_STAGE)} WHERE true "
            f"ON CONFLICT ({key}) DO {f'UPDATE SET {change}' if change else 'NOTHING'}"
        )
        self._unstage(_STAGE)

    def record(self, marks: Sequence[Mark]) -> None:
        rows = ", ".join(f"({texts((m.id, m.job, m.run_id, m.operator))}, {m.subtask}, {m.checkpoint})" for m in marks)
        self._run(f"INSERT INTO {quoted(MARKS_TABLE)} (id, job, run_id, operator, subtask, checkpoint) VALUES {rows}")

    def commit(self) -> None:
        self._run("COMMIT")

    def prune(self, job: str, run_id: str, operator: str, newest: int) -> None:
        self._run(
            f"DELETE FROM {quoted(MARKS_TABLE)} WHERE job = {text(job)} AND run_id = {text(run_id)} "
            f"AND operator = {text(operator)} AND checkpoint < {newest - KEPT_CHECKPOINTS}"
        )
