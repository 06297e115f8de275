"""What goes wrong, and when: every fault is drawn from the seed, and all of them stop after a drawn number.

A process dies by a `Crash` that a port call raises: in the middle of a handler, of a background task or of an operation
of the storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from rayflow.errors import StorageError
from rayflow.storage.faults import Fault


class Crash(BaseException):
    """The process that runs now is gone. Not an `Exception`: no handler of the engine may survive it."""


class Violation(BaseException):
    """A rule of the protocol was broken; the message begins with the number of the rule. Not an `Exception`: the engine
    must not take it for a failure of the storage or the sink and go on."""


@dataclass(slots=True)
class FaultBudget:
    """How much goes wrong in one run."""

    crashes: int = 0
    storage_faults: int = 0
    storage_rate: float = 0.0
    user_errors: int = 0
    target_faults: int = 0
    lost_notices: int = 0
    late_writes: int = 0
    savepoints: int = 0
    """Checkpoints and savepoints that a user asks for; no fault, but as untimely."""
    stops: int = 0
    """How often the job is stopped with a savepoint, or cancelled, and started again at another parallelism."""
    hangs: int = 0
    """Subtasks that go on living and do nothing more, until their silence is noticed."""
    crash_horizon: int = 1500
    """Upper bound of the number of port calls between two crashes; what is drawn is log-uniform below it."""

    @staticmethod
    def draw(rng: Random) -> FaultBudget:
        def some(chance: float, most: int) -> int:
            return rng.randint(1, most) if rng.random() < chance else 0

        return FaultBudget(
            crashes=some(0.8, 6),
            storage_faults=some(0.5, 8),
            storage_rate=rng.choice((0.02, 0.1, 0.4)),
            user_errors=some(0.2, 3),
            target_faults=some(0.3, 4),
            lost_notices=some(0.3, 4),
            late_writes=some(0.25, 2),
            savepoints=some(0.2, 3),
            stops=some(0.25, 2),
            hangs=some(0.15, 2),
            crash_horizon=rng.choice((60, 400, 2500)),
        )


class Faults:
    """Asked at every port; draws what happens there."""

    def __init__(self, rng: Random, budget: FaultBudget) -> None:
        self.rng = rng
        self.budget = budget
        self.calm = False
        """While set, only crashes happen: the job is cleaning up, and what fails there is told to the user."""
        self._until_crash = self._next_crash()
        self.happened: dict[str, int] = {}

    def _next_crash(self) -> int:
        if self.budget.crashes <= 0:
            return -1
        return int(self.budget.crash_horizon ** self.rng.random())

    def count(self, what: str) -> None:
        self.happened[what] = self.happened.get(what, 0) + 1

    def port(self) -> None:
        """A port call begins or ends: raise `Crash` if the drawn moment has come."""
        if self._until_crash < 0:
            return
        if self._until_crash > 0:
            self._until_crash -= 1
            return
        self.budget.crashes -= 1
        self._until_crash = self._next_crash()
        self.count("crash")
        raise Crash

    def storage(self, operation: str, path: str) -> Fault | None:
        """The script of a `FaultyStore`. Whatever it does to a write, the writer is told that it failed."""
        budget = self.budget
        if self.calm or budget.storage_faults <= 0 or self.rng.random() >= budget.storage_rate:
            return None
        budget.storage_faults -= 1
        self.count("storage")
        if operation == "put":
            return self.rng.choice((Fault.FAIL, Fault.FAIL_AFTER, Fault.HALF))
        if operation == "put_if_absent":
            # Never torn: stores publish whole objects. A torn manifest is corruption, see test_corruption.py.
            return self.rng.choice((Fault.FAIL, Fault.FAIL_AFTER))
        if operation in ("delete", "delete_prefix"):
            return self.rng.choice((Fault.FAIL, Fault.FAIL_AFTER))
        return Fault.FAIL

    def late_write(self) -> bool:
        """Whether a write that is told to have failed reaches the store later."""
        if self.calm or self.budget.late_writes <= 0 or self.rng.random() >= 0.05:
            return False
        self.budget.late_writes -= 1
        self.count("late write")
        return True

    def user_error(self) -> bool:
        if self.budget.user_errors <= 0 or self.rng.random() >= 0.02:
            return False
        self.budget.user_errors -= 1
        self.count("user error")
        return True

    def target(self) -> str | None:
        """What the target system does to one call: None, ``before`` (it fails) or ``after`` (its answer is lost)."""
        if self.calm or self.budget.target_faults <= 0 or self.rng.random() >= 0.15:
            return None
        self.budget.target_faults -= 1
        self.count("target")
        return self.rng.choice(("before", "after"))

    def lose_notice(self) -> bool:
        if self.budget.lost_notices <= 0 or self.rng.random() >= 0.3:
            return False
        self.budget.lost_notices -= 1
        self.count("lost notice")
        return True


class TargetError(StorageError):
    """The target of the simulated sink cannot be reached now."""
