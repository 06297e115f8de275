"""What a target remembers of a commit, so that committing twice is a no-op and a lost commit is told from a done one.

A **mark** names the rows of one subtask of one checkpoint. It is written to the table ``rayflow_commits`` of the target
in the transaction that makes those rows visible: mark there = rows there. Checkpoint ids are never used twice (rule
C4), so marks are not either. Only the newest `KEPT_CHECKPOINTS` of a run are kept: checkpoints are committed in order
(rule C2), so that an older one than those was committed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from rayflow.core.manifest import Json
from rayflow.errors import ProtocolError

MARKS_TABLE: Final = "rayflow_commits"
KEPT_CHECKPOINTS: Final = 1_000
PRUNE_EVERY: Final = 100
"""Marks are removed when so many more checkpoints are complete."""


def word(text: str, most: int) -> str:
    """Without colons, and not longer than that; two different texts never give one word."""
    plain = quote(text, safe="")
    return plain if len(plain) <= most else f"~{hashlib.sha256(text.encode()).hexdigest()[:31]}"


def prefix_of(job: str, run_id: str | None, operator: str) -> str:
    """What the ids of all marks of an operator begin with; ``run_id`` None: those of all runs of the job.

    The run stands last, so that the leftovers of all runs of a job can be found by a prefix.
    """
    base = f"rayflow:{word(job, 48)}:{word(operator, 48)}:"
    return base if run_id is None else f"{base}{word(run_id, 48)}:"


@dataclass(frozen=True, slots=True)
class Mark:
    """The rows of one subtask of one checkpoint; travels in the committable, so that it means the same in another run
    that was started from a savepoint of this one."""

    job: str
    run_id: str
    operator: str
    subtask: int
    checkpoint: int

    @property
    def id(self) -> str:
        """At most 190 bytes: PostgreSQL allows 199 for the name of a prepared transaction."""
        return f"{prefix_of(self.job, self.run_id, self.operator)}{self.subtask}:{self.checkpoint}"

    def to_json(self) -> dict[str, Json]:
        return {
            "job": self.job,
            "run": self.run_id,
            "operator": self.operator,
            "subtask": self.subtask,
            "checkpoint": self.checkpoint,
        }

    @classmethod
    def from_json(cls, value: Json) -> Mark:
        if not isinstance(value, dict):
            raise ProtocolError(f"a committable of a SQL sink must be an object, got {value!r}")
        return cls(
            str(value["job"]),
            str(value["run"]),
            str(value["operator"]),
            int(value["subtask"]),
            int(value["checkpoint"]),
        )


@dataclass(frozen=True, slots=True)
class Known:
    """What a target says of marks: the ids that it has, and the newest checkpoint by (job, run, operator)."""

    ids: frozenset[str]
    newest: dict[tuple[str, str, str], int]

    def has(self, mark: Mark) -> bool:
        newest = self.newest.get((mark.job, mark.run_id, mark.operator), -1)
        return mark.id in self.ids or mark.checkpoint < newest - KEPT_CHECKPOINTS


def prune_due(before: int, after: int) -> bool:
    """Whether marks should be removed when the newest checkpoint has gone from one to the other."""
    return before // PRUNE_EVERY != after // PRUNE_EVERY


def newest_of(marks: Sequence[Mark]) -> int:
    return max((m.checkpoint for m in marks), default=0)
