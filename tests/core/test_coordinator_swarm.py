"""Thousands of random schedules of faults; one seed is one run. And proof that the check can fail: broken machines.

To replay a seed: ``Cluster(seed, faults=ALL_FAULTS).run()``.
"""

from __future__ import annotations

from collections import Counter

import pytest

from rayflow.core.checkpoint import PendingCheckpoint
from rayflow.core.checkpointing import Checkpointing
from rayflow.core.coordinator import CoordinatorMachine, CoordinatorSettings
from rayflow.core.events import CheckpointRequested, JobState, ManifestWritten
from rayflow.core.failover import Failover
from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.manifest import SplitState
from rayflow.core.messages import CheckpointKind, Complete, ReportEnvelope
from rayflow.core.restart import RestartSpec
from rayflow.core.roster import Heard
from rayflow.errors import ProtocolError
from tests.core.fakes import ALL_FAULTS, Faults, small_topology
from tests.core.harness import Cluster
from tests.core.watch import Violation

SEEDS = 1000


def test_a_perfect_cluster_finishes_without_a_restart() -> None:
    for seed in range(50):
        cluster = Cluster(seed)
        assert cluster.run().outcome is JobState.FINISHED, f"seed {seed}"
        cluster.check_output()
        assert cluster.machine.restarts == 0
        assert set(cluster.machine.heard) <= {(name, Heard.ACCEPTED) for name, _ in cluster.machine.heard}


def test_any_schedule_of_faults_gives_the_output_of_the_run_without_faults() -> None:
    """R3, with every step checked by `Watch` and `check_invariants`."""
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        cluster = Cluster(seed, faults=ALL_FAULTS)
        try:
            ended = cluster.run()
            assert ended.outcome in (JobState.FINISHED, JobState.STOPPED), ended
            cluster.check_output()
        except Exception as error:
            raise AssertionError(f"replay with Cluster({seed}, faults=ALL_FAULTS).run()") from error
        machine = cluster.machine
        seen["stopped"] += ended.outcome is JobState.STOPPED
        seen["restarts"] += machine.restarts
        seen["restored"] += any(e.what == "storage read" and "checkpoint" in e.detail for e in machine.timeline)
        seen["aborted"] += machine.counts.aborted
        seen["void"] += bool(cluster.storage.void)
        for (_, heard), count in machine.heard.items():
            seen[heard.value] += count
    # The schedules must reach what they are meant to test.
    for name in ("stopped", "restarts", "restored", "aborted", "void", "stale", "duplicate", "held"):
        assert seen[name] >= 20, (name, seen)


@pytest.mark.parametrize(("sources", "middles", "sinks"), [(1, 1, 1), (4, 1, 2), (1, 5, 1)])
def test_other_shapes(sources: int, middles: int, sinks: int) -> None:
    for seed in range(100):
        cluster = Cluster(seed, faults=ALL_FAULTS, topology=small_topology(sources, middles, sinks))
        assert cluster.run().outcome in (JobState.FINISHED, JobState.STOPPED), f"seed {seed}"
        cluster.check_output()


def test_no_splits_at_all_and_no_periodic_checkpoints() -> None:
    """P5: with no interval the final checkpoint happens all the same, and all rows arrive."""
    settings = CoordinatorSettings(interval_s=None, timeout_s=20.0, hang_timeout_s=30.0)
    for splits in (0, 1, 7):
        for seed in range(30):
            cluster = Cluster(seed, faults=Faults(kills=2, disorder=True), splits=splits, settings=settings)
            assert cluster.run().outcome is JobState.FINISHED, f"seed {seed}"
            cluster.check_output()


def test_a_job_under_constant_requests_still_ends() -> None:
    for seed in range(30):
        cluster = Cluster(seed, faults=Faults(disorder=True))
        cluster.perform(cluster.machine.start(0.0))
        for step in range(20_000):
            if cluster.outcome is not None:
                break
            if step % 10 == 0:
                cluster.tell(CheckpointRequested(CheckpointKind.SAVEPOINT))
            cluster.step()
        assert cluster.outcome is not None
        assert cluster.outcome.outcome is JobState.FINISHED
        cluster.check_output()


# ------------------------------------------------------------------------------------------------------ broken machines


class CommitsEarly(Checkpointing):
    """C2: notifies when all have acknowledged, before the manifest is durable."""

    def _write(self, p: PendingCheckpoint, now: float) -> None:
        super()._write(p, now)
        self._roster.send_all(Complete(p.checkpoint))


class ReusesIds(Checkpointing):
    """C4: an aborted checkpoint's id is used again."""

    def _abort(self, reason: str, now: float, *, tell: bool = True, discard: bool = True) -> None:
        if self.pending is not None:
            self.next_id = self.pending.checkpoint
        super()._abort(reason, now, tell=tell, discard=discard)


class ForgetsThePool(Checkpointing):
    """R1: splits that nobody had are not in the manifest."""

    def _pool_snapshot(self) -> tuple[SplitState, ...]:
        return ()


class LooksIntoThePoolLate(Checkpointing):
    """R1: the pool is read when the manifest is written, not at the trigger."""

    def _write(self, p: PendingCheckpoint, now: float) -> None:
        p.pending_splits = self._pool_snapshot()
        super()._write(p, now)


class DiscardsAlways(Checkpointing):
    """C5: deletes files that a manifest may name."""

    def _may_discard(self, begun_writing: bool) -> bool:
        return True


class Overlaps(Checkpointing):
    """Begins a checkpoint while another is pending."""

    def next_due(self) -> tuple[CheckpointKind, float] | None:
        p, self.pending = self.pending, None
        due = super().next_due()
        self.pending = p
        return due

    def _trigger(self, kind: CheckpointKind, now: float) -> None:
        self.pending = None
        super()._trigger(kind, now)


class FinishesWithoutFinal(Checkpointing):
    """The tail of the input is never committed."""

    def over(self) -> CheckpointKind | None:
        return CheckpointKind.FINAL if self._roster.all_ended and self.pending is None else super().over()


class TakesDurabilityOnTrust(Checkpointing):
    """C2: a failed write counts as written."""

    def manifest_failed(self, checkpoint: CheckpointId, reason: str, now: float) -> Heard:
        return self.manifest_written(checkpoint, now)


class LaunchesBeforeSinks(Failover):
    """R1: does not wait for the sinks."""

    def _may_launch(self, attempt: Attempt) -> bool:
        return self.all_ready == attempt


class LeavesWritesUndecided(Failover):
    """C5: a manifest may become durable after the job went on from an older one."""

    def _unresolved(self) -> tuple[CheckpointId, ...]:
        return ()

    def deploy(self, now: float) -> None:
        super().deploy(now)
        self.void.clear()


class HearsTheDead(CoordinatorMachine):
    """C6: reports of another attempt count."""

    def _reported(self, envelope: ReportEnvelope, now: float) -> Heard:
        if envelope.attempt != self.attempt:
            return self._reports.handle(self._roster.members[envelope.subtask], envelope.report, now)
        return super()._reported(envelope, now)


def machine_with(part: type[Checkpointing | Failover]) -> type[CoordinatorMachine]:
    name = "failover_type" if issubclass(part, Failover) else "checkpointing_type"
    return type(part.__name__, (CoordinatorMachine,), {name: part})


STORM = Faults(kills=5, declines=2, write_failures=2, late_writes=4, disorder=True)


@pytest.mark.parametrize(
    "broken",
    [
        *map(
            machine_with,
            [
                CommitsEarly,
                ReusesIds,
                ForgetsThePool,
                LooksIntoThePoolLate,
                DiscardsAlways,
                Overlaps,
                FinishesWithoutFinal,
                TakesDurabilityOnTrust,
                LaunchesBeforeSinks,
                LeavesWritesUndecided,
            ],
        ),
        HearsTheDead,
    ],
    ids=lambda machine: machine.__name__,
)
def test_a_broken_machine_is_caught(broken: type[CoordinatorMachine]) -> None:
    settings = CoordinatorSettings(interval_s=0.2, timeout_s=20.0, hang_timeout_s=30.0, restart=RestartSpec())
    for seed in range(1000):
        cluster = Cluster(seed, machine=broken, faults=STORM, splits=8, settings=settings)
        try:
            cluster.run()
            cluster.check_output()
        except (AssertionError, ProtocolError):
            return
    raise AssertionError(f"{broken.__name__} passed 1000 seeds")


def test_the_watch_alone_sees_a_commit_before_the_manifest() -> None:
    """The oracle outside the machine does not lean on the machine's own assertions."""
    cluster = Cluster(1, machine=machine_with(CommitsEarly))
    with pytest.raises(Violation, match="C2"):
        cluster.run()
    assert not any(isinstance(e, ManifestWritten) for e in cluster.to_machine)
