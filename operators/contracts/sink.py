"""A sink: an operator that prepares output, and a committer that makes it visible."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from rayflow.core.manifest import Json
from rayflow.operators.contracts.operator import Operator, OperatorFactory, Staging

Guarantee = Literal["exactly_once", "idempotent", "at_least_once"]
"""What a sink makes of a job with exactly-once checkpoints. ``exactly_once``: each row is visible once (two-phase
commit, write-ahead log). ``idempotent``: rows may be written again after a failure, and replace themselves (upsert by
key). ``at_least_once``: rows may be there twice."""


@dataclass(frozen=True, slots=True)
class CommitterContext:
    """For whom a committer works; the same in the coordinator and in all subtasks, after restarts too."""

    job: str
    run_id: str
    """Of the job's life on its checkpoint directory; another one when it begins anew in an empty one."""
    operator: str
    step: str
    parallelism: int
    """Of the sink, now; earlier attempts may have had another."""
    staging: Staging | None = None
    """None without a checkpoint directory."""

    def __str__(self) -> str:
        return f"step {self.step!r}"


class Committer(ABC):
    """Makes prepared output visible. Used on the coordinator side for recovery and in subtasks on completion."""

    whole: ClassVar[bool] = False
    """One commit a checkpoint: the coordinator commits what all subtasks prepared, together, and no subtask commits."""
    ctx: CommitterContext

    def open(self, ctx: CommitterContext) -> None:
        """Called once, before anything else."""
        self.ctx = ctx

    @abstractmethod
    def commit(self, committables: Sequence[Json]) -> None:
        """Make them visible; a no-op for those already committed (rule S1).

        Raises `CommitLostError` when what was prepared is gone and the result is not there either.
        """

    @abstractmethod
    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        """Commit these, then abort everything prepared by earlier attempts that is not among them.

        No subtask of the job runs meanwhile. ``fresh``: there is no checkpoint, so nothing is to be committed, and
        output of another run in the target must be refused with `DataError` (rule R3: never mix two runs).
        """

    def finish(self) -> None:
        """The job is over and everything is committed: leave nothing behind but the output."""


class SinkOperator(Operator):
    """The end of a chain. `snapshot` closes what was written since the last barrier and returns a `FrozenState` whose
    ``prepare`` makes it durable and returns its committables.

    Committables of checkpoints that were aborted are kept by the subtask loop and committed with the next complete one;
    the operator itself hands out each committable once."""


class SinkFactory(OperatorFactory, Protocol):
    def committer(self) -> Committer | None:
        """None for a sink that needs no commit (print)."""

    # Optional: ``guarantee: Guarantee``, "exactly_once" where it is missing.
