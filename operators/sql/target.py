"""Where rows of a write-ahead log go: anything with transactions.

A `TransactionalTarget` needs two things: rows can be added in a transaction, and marks can be added and looked up in
it. Then "rows once" follows: rows and mark become visible together, and a commit that finds its mark does nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import pyarrow as pa

from rayflow.operators.sql.marks import Known, Mark

RowCheck = Callable[[pa.Table], None]
"""Raises `DataError` for rows that the target will not take."""


class TargetSession(ABC):
    """A connection, used by one thread. Everything after `begin` is one transaction until `commit` or `rollback`.

    Raises `ConnectorError` when the target cannot be reached for now, `ConfigError` for what only the user can mend,
    `DataError` for rows that it will not take.
    """

    @abstractmethod
    def ensure(self, schema: pa.Schema | None) -> None:
        """The table and that of the marks, made if need be; outside of a transaction. ``schema`` None: not known yet,
        then only what is there is looked at."""

    @abstractmethod
    def known(self, marks: Sequence[Mark]) -> Known: ...

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def write(self, rows: pa.Table) -> None:
        """Add (or, with a key, insert or replace) the rows, in their order."""

    @abstractmethod
    def record(self, marks: Sequence[Mark]) -> None:
        """Fails for a mark that is there."""

    @abstractmethod
    def commit(self) -> None: ...

    @abstractmethod
    def rollback(self) -> None:
        """Never raises; also called when nothing was begun."""

    @abstractmethod
    def prune(self, job: str, run_id: str, operator: str, newest: int) -> None:
        """Forget marks of this operator that lie more than `KEPT_CHECKPOINTS` before ``newest``."""

    @abstractmethod
    def close(self) -> None: ...


class TransactionalTarget(ABC):
    """Immutable and picklable."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What to call it in messages."""

    @abstractmethod
    def connect(self, where: str) -> TargetSession:
        """``where``: the step, for messages."""

    def row_check(self, schema: pa.Schema, where: str) -> RowCheck | None:
        """Where subtasks may connect too: looks at the table (as `TargetSession.ensure`) and gives what finds rows that
        do not fit before they are promised."""
        return None

    def check_schema(self, schema: pa.Schema, where: str) -> None:
        """Raises `PlanError` for columns that the target has no type for."""
