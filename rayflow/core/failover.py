"""From a failure to the next launch, and the first launch, which is the same path.

    fail --> RESTARTING --delay--> RECOVERING --Recovered--> DEPLOYING --all Ready--> RecoverSinks
         --SinksRecovered--> Launch to all --all Running--> RUNNING

The attempt is raised, and the survivors are reset in place, at once: they stop producing while the delay runs (C6 voids
all they had said). The dead are replaced when the delay is over, so that a process that dies at its start cannot spin.
A further failure on the way begins anew with the next attempt. Storage is read again every time.

R1  one manifest restores all subtasks, and nothing is launched before the sinks agree with that manifest.
R2  the split pools begin with the splits and positions of the manifest.
C4  ids and attempts go on counting.
C8  `LoadLatest` and `RecoverSinks` are asked one at a time: an answer under way is waited for, never overtaken, so that
    the clean-up for an old attempt cannot touch what a newer one has prepared.
"""

from __future__ import annotations

from enum import Enum

from rayflow.core.checkpointing import Checkpointing
from rayflow.core.events import LoadLatest, Recovered, RecoverSinks
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest
from rayflow.core.messages import FailureCause, Launch
from rayflow.core.restore import mismatch, seen_of, splits_of, states_for
from rayflow.core.roster import Heard, Roster, SubtaskState
from rayflow.core.splits import SplitPool
from rayflow.core.timeline import (
    ATTEMPT_BEGINS,
    LAUNCHED,
    RESET,
    RESTART_DELAYED,
    SINKS_RECOVERED,
    STORAGE_READ,
    Outbox,
)
from rayflow.core.topology import Topology


class LoadState(Enum):
    NEEDED = "needed"
    ASKED = "asked"
    READ = "read"


class Failover:
    """Everything between the end of one attempt and the launch of the next. Driven by `CoordinatorMachine`."""

    def __init__(
        self,
        topology: Topology,
        roster: Roster,
        pools: dict[str, SplitPool],
        checkpointing: Checkpointing,
        out: Outbox,
    ) -> None:
        self._topology = topology
        self._roster = roster
        self._pools = pools
        self._checkpointing = checkpointing
        self._out = out
        self.restart_at = float("-inf")
        self.load = LoadState.NEEDED
        self.sinks_asked: Attempt | None = None  # a RecoverSinks whose answer is awaited
        self.sinks_recovered: Attempt | None = None
        self.all_ready: Attempt | None = None
        self.launched: Attempt | None = None
        self.void: set[CheckpointId] = set()  # undecided when an older manifest was restored: must never be durable
        self._asked_unresolved: tuple[CheckpointId, ...] = ()
        self._recovered: Recovered | None = None

    @property
    def manifest(self) -> Manifest | None:
        """What the present attempt is restored from."""
        return None if self._recovered is None else self._recovered.manifest

    def begin(self, reason: str, delay_s: float, now: float) -> None:
        """The attempt is over: raise its number, reset the survivors, wait."""
        self._checkpointing.abandon(reason, now)
        if self._roster.attempt:
            self._begin_attempt(Attempt(self._roster.attempt + 1), now)
        for pool in self._pools.values():
            pool.restore(())
        self.restart_at = max(self.restart_at, now + delay_s)
        if self.load is LoadState.READ:
            self.load = LoadState.NEEDED  # an answer under way is as good as a new one: nothing was written since
            self._recovered = None
        if self.restart_at > now:
            self._note(RESTART_DELAYED, f"{self.restart_at - now:.3f} s", now)

    def _begin_attempt(self, attempt: Attempt, now: float) -> None:
        self._roster.begin_attempt(attempt, now)
        self._note(ATTEMPT_BEGINS, str(attempt), now)

    # ------------------------------------------------------------------------------------------------------- RECOVERING

    def read_storage(self, now: float) -> None:
        """The delay is over: replace the dead (once the first attempt has a number) and read storage."""
        if self._roster.attempt:
            self._roster.start_missing(now)
        if self.load is LoadState.NEEDED:
            self.load = LoadState.ASKED
            self._asked_unresolved = self._unresolved()
            self._out.put(LoadLatest(self._asked_unresolved))

    def _unresolved(self) -> tuple[CheckpointId, ...]:
        return tuple(sorted(self._checkpointing.unresolved))

    def recovered(self, event: Recovered) -> Heard:
        if self.load is not LoadState.ASKED:
            return Heard.DUPLICATE
        self.load = LoadState.READ
        self._recovered = event
        return Heard.ACCEPTED

    def recovery_failed(self) -> Heard:
        if self.load is not LoadState.ASKED:
            return Heard.DUPLICATE
        self.load = LoadState.NEEDED
        return Heard.ACCEPTED

    def refusal(self) -> FailureCause | None:
        """Why what storage answered must not be restored; None when it may be (or nothing was read yet)."""
        if self._recovered is None:
            return None
        manifest, last = self._recovered.manifest, self._checkpointing.last_completed
        newest = None if manifest is None else manifest.checkpoint
        if last is not None and (newest is None or newest < last):
            return FailureCause(
                f"storage offers checkpoint {newest}, but checkpoint {last} is complete and its output committed; "
                "going on from the older one would write that output twice: bring the manifest back",
                kind="StaleManifest",
                position=f"checkpoint {last}",
            )
        if newest is not None and newest in self.void:
            return lost_commit(newest)
        if manifest is not None:
            reason = mismatch(manifest, self._topology)
            if reason is not None:
                return FailureCause(reason, kind="StateMismatch", fatal=True)
        return None

    def deploy(self, now: float) -> None:
        """Storage was read: number the attempt, start what is missing, fill the pools (rules R1, R2, C4)."""
        recovered = self._recovered
        assert recovered is not None
        last = None if recovered.manifest is None else recovered.manifest.checkpoint
        self.void.update(n for n in self._asked_unresolved if last is None or n > last)
        self._checkpointing.recovered(last, recovered.next_checkpoint)
        detail = "nothing to restore" if last is None else f"checkpoint {last}"
        self._note(STORAGE_READ, detail, now)
        wanted = max(recovered.next_attempt, Attempt(1))
        if wanted > self._roster.attempt:
            self._begin_attempt(wanted, now)
        self._roster.start_missing(now)
        begun = splits_of(recovered.manifest)
        for name, pool in self._pools.items():
            pool.restore((s for s in begun if s.source == name), seen_of(recovered.manifest, name))
            pool.add(s for s in recovered.discovered if s.source == name)
            if name not in self._topology.discovering:
                pool.close()

    # -------------------------------------------------------------------------------------------------------- DEPLOYING

    def advance(self, now: float) -> None:
        """Go as far as what has been answered allows."""
        attempt = self._roster.attempt
        if self.all_ready != attempt and self._roster.all_in(SubtaskState.READY):
            self.all_ready = attempt
            self._note(RESET, f"attempt {attempt}", now)
        if self.all_ready == attempt and self.sinks_recovered != attempt and self.sinks_asked is None:
            self.sinks_asked = attempt
            self._out.put(RecoverSinks(attempt, self.manifest))
        if self._may_launch(attempt) and self.launched != attempt:
            self._launch(attempt, now)

    def _may_launch(self, attempt: Attempt) -> bool:
        return self.all_ready == attempt and self.sinks_recovered == attempt

    def sinks_answered(self, attempt: Attempt, now: float, *, recovered: bool) -> Heard:
        if self.sinks_asked != attempt:
            return Heard.DUPLICATE if self.sinks_recovered == attempt else Heard.UNKNOWN
        self.sinks_asked = None
        if attempt != self._roster.attempt:
            return Heard.STALE  # the next one may be asked now
        if recovered:
            self.sinks_recovered = attempt
            self._note(SINKS_RECOVERED, f"attempt {attempt}", now)
        return Heard.ACCEPTED

    def _launch(self, attempt: Attempt, now: float) -> None:
        self.launched = attempt
        states = states_for(self.manifest, self._topology)
        restored_from = None if self.manifest is None else self.manifest.checkpoint
        run_id = "" if self._recovered is None else self._recovered.run_id
        for member in self._roster:
            member.state = SubtaskState.LAUNCHING
            member.last_seen = now
            addresses = self._addresses(member.subtask)
            self._roster.send(member.subtask, Launch(addresses, states[member.subtask], restored_from, run_id))
        self._note(LAUNCHED, f"attempt {attempt}", now)

    def _addresses(self, subtask: SubtaskId) -> dict[SubtaskId, str]:
        """Those it sends to, and no others: all to all would grow with the square of the job."""
        targets = (channel.target for channel in self._topology.outputs_of(subtask))
        return {target: self._roster.members[target].address for target in targets}

    def _note(self, what: str, detail: str, now: float) -> None:
        self._out.note(what, detail, attempt=self._roster.attempt, now=now)

    def check_invariants(self, *, running: bool) -> None:
        attempt = self._roster.attempt
        assert self.sinks_asked is None or self.sinks_asked <= attempt
        assert (self.load is LoadState.READ) == (self._recovered is not None)
        if self.launched == attempt and attempt:
            assert self.sinks_recovered == attempt, "R1: launched before the sinks were recovered"
            manifest = self.manifest
            assert manifest is None or manifest.checkpoint not in self.void, "C5: restored from a void manifest"
        if running:
            assert self.launched == attempt, "running without a launch"
            assert self._roster.all_run, "running without all subtasks"


def lost_commit(checkpoint: CheckpointId) -> FailureCause:
    """What `Failover.void` forbids has happened; fatal."""
    return FailureCause(
        f"the manifest of checkpoint {checkpoint} became durable after the job had recovered from an older one, and "
        "what it names is gone: storage must decide such a write before it answers LoadLatest (rule C5); go on from "
        "the newest checkpoint before it",
        kind="LostCommit",
        fatal=True,
    )


def fenced_by_another(checkpoint: CheckpointId, reason: str) -> FailureCause:
    return FailureCause(
        f"fenced: another coordinator owns the checkpoint directory, checkpoint {checkpoint} was refused ({reason}); "
        "this run has stopped and touched nothing, let the other one go on or stop it first (rule C8)",
        kind="Fenced",
        fatal=True,
    )
