"""Two-phase commit: the rows of a checkpoint are a prepared transaction of the server (``PREPARE TRANSACTION``).

Each subtask has one for each checkpoint, named by the mark, which is also a row that the transaction writes to
``rayflow_commits``. When the name is gone at the commit, that row tells whether it was committed before or is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, ConfigError, ConnectorError
from rayflow.operators.base import Committer
from rayflow.operators.sql.marks import Mark, newest_of, prefix_of, prune_due
from rayflow.operators.sql.names import literal
from rayflow.operators.sql.postgres import Connection, PostgresTable
from rayflow.operators.sql.postgres_errors import BUSY, UNDEFINED_OBJECT
from rayflow.operators.sql.postgres_marks import PostgresMarks
from rayflow.operators.sql.segments import Flush, Segment, SegmentSinkOperator

_IDLE_CONNECTIONS_MAX: Final = 2


class TwoPhaseOperator(SegmentSinkOperator):
    """A transaction of its own for every interval; connections are used again once theirs is prepared."""

    def __init__(self, table: PostgresTable, flush: Flush) -> None:
        super().__init__(flush)
        self._table = table
        self._columns: Mapping[str, str] = {}
        self._idle: list[Connection] = []

    @property
    def marks(self) -> PostgresMarks:
        return PostgresMarks(self._table.schema)

    def append(self, connection: Connection, rows: pa.Table) -> None:
        self._table.append(connection, rows, self._columns)

    def begin(self) -> Connection:
        """A connection with an open transaction; one that has waited may have died meanwhile."""
        while True:  # the loop thread and the uploader both take from here
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            try:
                connection.execute("BEGIN")
            except ConnectorError:
                connection.close()
            else:
                return connection
        connection = self._table.connect(str(self.ctx))
        connection.execute("BEGIN")
        return connection

    def give_back(self, connection: Connection) -> None:
        if self._closed or connection.broken or len(self._idle) >= _IDLE_CONNECTIONS_MAX:
            connection.close()
        else:
            self._idle.append(connection)

    def _begin(self, schema: pa.Schema) -> None:
        connection = self._table.connect(str(self.ctx))
        try:
            self._columns = self._table.ensure(connection, schema)
        finally:
            self.give_back(connection)

    def _segment(self) -> Segment:
        return _Transaction(self)

    def _disconnect(self) -> None:
        while self._idle:
            self._idle.pop().close()


class _Transaction(Segment):
    """An open transaction, begun with the first rows."""

    def __init__(self, operator: TwoPhaseOperator) -> None:
        self._operator = operator
        self._connection: Connection | None = None
        self._rows = 0
        self._lost = False

    def write(self, rows: pa.Table) -> None:
        if self._connection is None:
            self._connection = self._operator.begin()
        self._lost = True  # until this has worked: half a piece cannot be taken back
        self._operator.append(self._connection, rows)
        self._rows += rows.num_rows
        self._lost = False

    def seal(self, mark: Mark) -> Json | None:
        assert self._connection is not None
        connection = self._connection
        self._lost = True
        self._operator.marks.record(connection, [mark])
        connection.execute(f"PREPARE TRANSACTION {literal(mark.id)}")
        self._lost = False
        self._connection = None
        self._operator.give_back(connection)
        return {**mark.to_json(), "rows": self._rows}

    def lost(self) -> bool:
        return self._lost

    def abandon(self) -> None:
        if self._connection is not None:
            self._connection.close()  # the server rolls back what is open
            self._connection = None


class TwoPhaseCommitter(Committer):
    """``COMMIT PREPARED``; in recovery ``ROLLBACK PREPARED`` for what no checkpoint names, of any parallelism."""

    def __init__(self, table: PostgresTable, schema: pa.Schema | None) -> None:
        self._table = table
        self._schema = schema
        self._marks = PostgresMarks(table.schema)
        self._newest = 0

    def commit(self, committables: Sequence[Json]) -> None:
        if not committables:
            return
        connection = self._table.connect(str(self.ctx))
        try:
            self._commit_all(connection, committables)
        finally:
            connection.close()

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        connection = self._table.connect(str(self.ctx))
        try:
            self._check_setting(connection)
            self._marks.ensure(connection)
            self._table.ensure(connection, self._schema)
            self._commit_all(connection, committables)
            self._roll_back_leftovers(connection, of_all_runs=fresh)
        finally:
            connection.close()

    def finish(self) -> None:
        connection = self._table.connect(str(self.ctx))
        try:
            self._roll_back_leftovers(connection, of_all_runs=False)
        finally:
            connection.close()

    def _commit_all(self, connection: Connection, committables: Sequence[Json]) -> None:
        marks = [Mark.from_json(each) for each in committables]
        for mark, each in zip(marks, committables, strict=True):
            self._commit(connection, mark, int(each["rows"]))
        newest = newest_of(marks)
        if prune_due(self._newest, newest):
            self._marks.prune(connection, self.ctx.job, self.ctx.run_id, self.ctx.operator, newest)
        self._newest = newest

    def _commit(self, connection: Connection, mark: Mark, rows: int) -> None:
        try:
            connection.execute(f"COMMIT PREPARED {literal(mark.id)}")
        except ConfigError as error:
            if connection.state == BUSY:
                raise ConnectorError(f"{self.ctx}: {error}; another process ends it, it is tried again") from error
            if connection.state != UNDEFINED_OBJECT:
                raise
            if not self._marks.known(connection, [mark]).has(mark):
                raise CommitLostError(
                    f"{self.ctx} had prepared {rows} rows for checkpoint {mark.checkpoint} as transaction {mark.id!r}, "
                    f"but the server has rolled it back: they are neither prepared nor in {self._table.title}; go back "
                    "to an earlier checkpoint, with the rows after it removed from the table"
                ) from error

    def _roll_back_leftovers(self, connection: Connection, *, of_all_runs: bool) -> None:
        prefix = prefix_of(self.ctx.job, None if of_all_runs else self.ctx.run_id, self.ctx.operator)
        found = connection.execute(
            "SELECT gid::text FROM pg_prepared_xacts WHERE database = current_database() AND starts_with(gid, $1)",
            (prefix,),
        )
        for (gid,) in found:
            try:
                connection.execute(f"ROLLBACK PREPARED {literal(str(gid))}")
            except ConfigError as error:
                if connection.state == BUSY:
                    raise ConnectorError(f"{self.ctx}: {error}; another process ends it, it is tried again") from error
                if connection.state != UNDEFINED_OBJECT:  # somebody else was quicker
                    raise

    def _check_setting(self, connection: Connection) -> None:
        ((value,),) = connection.execute("SELECT current_setting('max_prepared_transactions')")
        needed = 2 * self.ctx.parallelism
        if int(value) < needed:
            raise ConfigError(
                f"{self.ctx} commits in two phases with {self.ctx.parallelism} subtasks and needs "
                f"max_prepared_transactions >= {needed}, but the server has {value}; set it (ALTER SYSTEM SET "
                f'max_prepared_transactions = {max(needed, 64)}, then restart the server) or use guarantee="wal"'
            )
