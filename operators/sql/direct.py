"""Rows that are visible as soon as they are written: upserts, which replace themselves, and plain appends.

Everything before a barrier is written when its checkpoint is acknowledged; what has been written beyond the newest
complete checkpoint is written again after a failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import ConnectorError
from rayflow.operators.base import Committer
from rayflow.operators.sql.marks import Mark
from rayflow.operators.sql.postgres import Connection, PostgresTable
from rayflow.operators.sql.segments import Flush, Segment, SegmentSinkOperator

_TRIES: Final = 3
_DEADLOCK: Final = ("40P01", "40001")


class DirectOperator(SegmentSinkOperator):
    """One connection, used in turns by the loop and by the uploader, in the order of the rows."""

    ordered: ClassVar[bool] = True

    def __init__(self, table: PostgresTable, flush: Flush) -> None:
        super().__init__(flush)
        self._table = table
        self._connection: Connection | None = None
        self._columns: Mapping[str, str] = {}

    def write(self, rows: pa.Table) -> None:
        for left in reversed(range(_TRIES)):
            connection = self._connected()
            try:
                with connection.transaction():
                    self._table.write(connection, rows, self._columns)
                return
            except ConnectorError:
                # Two writers of the same keys in different orders: the server has rolled one of them back.
                if not left or connection.state not in _DEADLOCK:
                    raise

    def _begin(self, schema: pa.Schema) -> None:
        with self._lock:
            self._columns = self._table.ensure(self._connected(), schema)

    def _segment(self) -> Segment:
        return _DirectSegment(self)

    def _connected(self) -> Connection:
        if self._connection is not None and self._connection.broken:
            self._connection.close()
            self._connection = None
        if self._connection is None:
            self._connection = self._table.connect(str(self.ctx))
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class _DirectSegment(Segment):
    def __init__(self, operator: DirectOperator) -> None:
        self._operator = operator

    def write(self, rows: pa.Table) -> None:
        self._operator.write(rows)

    def seal(self, mark: Mark) -> Json | None:
        return None


class TableCommitter(Committer):
    """Nothing is to be committed; at the start it says what is wrong with the table."""

    def __init__(self, table: PostgresTable, schema: pa.Schema | None) -> None:
        self._table = table
        self._schema = schema

    def commit(self, committables: Sequence[Json]) -> None:
        pass

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        connection = self._table.connect(str(self.ctx))
        try:
            self._table.ensure(connection, self._schema)
        finally:
            connection.close()
