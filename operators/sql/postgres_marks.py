"""The table ``rayflow_commits`` of a PostgreSQL schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayflow.operators.sql.marks import KEPT_CHECKPOINTS, MARKS_TABLE, Known, Mark
from rayflow.operators.sql.names import literal, quoted
from rayflow.operators.sql.postgres import Connection


@dataclass(frozen=True, slots=True)
class PostgresMarks:
    schema: str

    @property
    def sql(self) -> str:
        return f"{quoted(self.schema)}.{quoted(MARKS_TABLE)}"

    def ensure(self, connection: Connection) -> None:
        """Not within a transaction."""
        if connection.execute("SELECT to_regclass($1)::text", (self.sql,)) != [(None,)]:
            return  # making it may need a right that writing to it does not
        connection.create(
            f"CREATE TABLE IF NOT EXISTS {self.sql} (id text PRIMARY KEY, job text NOT NULL, run_id text NOT NULL, "
            "operator text NOT NULL, subtask integer NOT NULL, checkpoint bigint NOT NULL, "
            "committed_at timestamptz NOT NULL DEFAULT now())"
        )

    def record(self, connection: Connection, marks: Sequence[Mark]) -> None:
        """In the transaction of their rows. A mark that is there already fails it: the rows are there too (S1)."""
        rows = ", ".join(
            f"({literal(m.id)}, {literal(m.job)}, {literal(m.run_id)}, {literal(m.operator)}, {m.subtask}, "
            f"{m.checkpoint})"
            for m in marks
        )
        connection.execute(f"INSERT INTO {self.sql} (id, job, run_id, operator, subtask, checkpoint) VALUES {rows}")

    def known(self, connection: Connection, marks: Sequence[Mark]) -> Known:
        ids = ", ".join(literal(m.id) for m in marks)
        found = connection.execute(f"SELECT id FROM {self.sql} WHERE id IN ({ids})") if marks else []
        newest = {}
        for job, run_id, operator in {(m.job, m.run_id, m.operator) for m in marks}:
            ((highest,),) = connection.execute(
                f"SELECT max(checkpoint) FROM {self.sql} WHERE job = $1 AND run_id = $2 AND operator = $3",
                (job, run_id, operator),
            )
            newest[job, run_id, operator] = -1 if highest is None else int(highest)
        return Known(frozenset(str(i) for (i,) in found), newest)

    def prune(self, connection: Connection, job: str, run_id: str, operator: str, newest: int) -> None:
        """Forget what nobody asks for any more."""
        connection.execute(
            f"DELETE FROM {self.sql} WHERE job = {literal(job)} AND run_id = {literal(run_id)} "
            f"AND operator = {literal(operator)} AND checkpoint < {newest - KEPT_CHECKPOINTS}"
        )
