"""The coordinator's loop: what storage and sinks raise comes back as the right event, and nothing waits in the loop."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from rayflow.config import CheckpointConfig, JobConfig, Restart
from rayflow.core.coordinator import CoordinatorSettings
from rayflow.core.events import (
    CancelRequested,
    CleanUp,
    CoordinatorAction,
    CoordinatorEvent,
    DiscardCheckpoint,
    JobCleaned,
    JobEnded,
    JobState,
    LoadLatest,
    ManifestFailed,
    ManifestWritten,
    Note,
    Recovered,
    RecoverSinks,
    RecoveryFailed,
    Retain,
    SendCommand,
    SinksFailed,
    SinksRecovered,
    StartSubtask,
    StopSubtask,
    WriteManifest,
)
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Committable, SnapshotStats, StateHandle, SubtaskSnapshot
from rayflow.core.messages import CheckpointKind, CommandEnvelope, FailureCause, Reset
from rayflow.errors import CorruptCheckpointError, DataError, StorageError
from rayflow.runtime.coordinator_loop import CoordinatorRuntime, settings_of
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.failures import storage_error
from rayflow.storage.faults import Fault, FaultyStore
from rayflow.storage.store import MemoryStore
from tests.runtime.rig import MID, OUT, Rig

SUBTASKS = (SubtaskId("src", 0), SubtaskId("src", 1), MID, OUT)


class FakeHost:
    def __init__(self) -> None:
        self.time = 0.0
        self.calls: list[tuple[Any, ...]] = []
        self.sent: list[CommandEnvelope] = []
        self.tasks: deque[Callable[[], CoordinatorEvent | None]] = deque()

    def now(self) -> float:
        return self.time

    def wall_time(self) -> float:
        return 1_700_000_000.0

    def start_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        self.calls.append(("start", subtask, incarnation))

    def stop_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        self.calls.append(("stop", subtask, incarnation))

    def send(self, envelope: CommandEnvelope) -> None:
        self.sent.append(envelope)

    def background(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        self.tasks.append(task)

    def look(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        self.tasks.append(task)


class Desk:
    """A coordinator on a store in memory that fails when told: ``faults`` maps a part of a path to what is raised."""

    runtime_type: type[CoordinatorRuntime] = CoordinatorRuntime

    def __init__(self, store: MemoryStore | None = None, *, memory_bound: int | None = None) -> None:
        self.rig = Rig(splits={"a": [[1]], "b": [[2]]})
        self.host = FakeHost()
        self.memory = store or MemoryStore()
        self.faults: dict[str, Exception | Fault] = {}
        self.runtime = self.runtime_type(
            self.rig.spec.plan,
            CoordinatorSettings(),
            store=CheckpointStore(FaultyStore(self.memory, self._script), "job"),
            retain=2,
            host=self.host,
            memory_bound=memory_bound,
        )

    def _script(self, method: str, path: str) -> Fault | None:
        for part, fault in self.faults.items():
            if part in f"{method} {path}":
                if isinstance(fault, Exception):
                    raise fault
                return fault
        return None

    def perform(self, action: CoordinatorAction) -> CoordinatorEvent | None:
        """Perform it and run the one background task that it makes."""
        self.host.tasks.clear()
        self.runtime._perform([action])
        (task,) = self.host.tasks
        return task()

    def recovered(self) -> Recovered:
        event = self.perform(LoadLatest())
        assert isinstance(event, Recovered), event
        return event

    def write(self, checkpoint: int, *snapshots: SubtaskSnapshot) -> CoordinatorEvent | None:
        return self.perform(write(checkpoint, *snapshots))


def write(checkpoint: int, *snapshots: SubtaskSnapshot) -> WriteManifest:
    snapshots = snapshots or tuple(SubtaskSnapshot(s) for s in SUBTASKS)
    return WriteManifest(CheckpointId(checkpoint), CheckpointKind.PERIODIC, Attempt(10_000), snapshots, ())


def with_cause(error: StorageError, cause: Exception) -> StorageError:
    error.__cause__ = cause
    return error


# -------------------------------------------------------------------------------------------------------------- actions


def test_starting_reads_storage_in_the_background() -> None:
    desk = Desk()
    desk.runtime.start()
    assert len(desk.host.tasks) == 1
    assert desk.memory.list() == []
    desk.runtime.handle(desk.host.tasks.popleft()())  # type: ignore[arg-type]
    assert [c[0] for c in desk.host.calls] == ["start"] * 4
    assert desk.runtime.machine.state is JobState.DEPLOYING


def test_actions_on_processes_go_to_the_host() -> None:
    desk = Desk()
    actions: Sequence[CoordinatorAction] = [
        StartSubtask(MID, 1),
        SendCommand(Attempt(1), MID, 0, Reset()),
        StopSubtask(MID, 1),
        Note("something", "for people"),
    ]
    desk.runtime._perform(actions)
    assert desk.host.calls == [("start", MID, 1), ("stop", MID, 1)]
    assert desk.host.sent == [CommandEnvelope(Attempt(1), MID, 0, Reset())]


def test_an_ended_coordinator_hears_nothing_and_has_no_deadline() -> None:
    desk = Desk()
    desk.runtime.start()
    desk.runtime._perform([JobEnded(JobState.FAILED, FailureCause("it broke"))])
    assert desk.runtime.ended
    assert desk.runtime.outcome.cause == FailureCause("it broke")
    assert desk.runtime.next_deadline() is None
    desk.host.tasks.clear()
    desk.runtime.handle(CancelRequested())
    assert not desk.host.tasks


# ------------------------------------------------------------------------------------------------------------- recovery


def test_a_fresh_directory_is_claimed_once_and_its_splits_are_discovered_once() -> None:
    desk = Desk()
    first = desk.recovered()
    assert first.manifest is None
    assert [(s.source, s.split_id, s.order) for s in first.discovered] == [("src", "a", 0), ("src", "b", 1)]
    second = desk.recovered()
    assert second.discovered == first.discovered
    assert second.next_attempt > first.next_attempt, "C6"
    assert len([p for p, _ in desk.memory.list("coordinators/") if "claim" in p]) == 1


def test_a_later_coordinator_goes_on_from_the_newest_manifest() -> None:
    desk = Desk()
    desk.recovered()
    desk.write(1)
    later = Desk(desk.memory)
    found = later.recovered()
    assert found.manifest is not None
    assert found.manifest.checkpoint == 1
    assert found.discovered == ()
    assert found.next_checkpoint > 1, "C4"
    assert later.runtime.outcome.manifest == found.manifest


def failed_recovery(desk: Desk) -> FailureCause:
    event = desk.perform(LoadLatest())
    assert isinstance(event, RecoveryFailed), event
    return event.cause


def test_storage_that_fails_for_a_moment_is_tried_again() -> None:
    desk = Desk()
    desk.faults["list"] = with_cause(StorageError("cannot list: not reached"), ConnectionError("reset"))
    assert not failed_recovery(desk).fatal
    desk.faults["list"] = StorageError("nobody knows why")
    assert not failed_recovery(desk).fatal
    desk.faults.clear()
    desk.recovered()


def test_a_place_that_can_never_be_claimed_ends_the_job_and_one_that_was_used_is_waited_for() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    error = with_cause(storage_error("write", "/data/chk", "claim", full), full)
    desk = Desk()
    desk.faults["put_if_absent"] = error
    cause = failed_recovery(desk)
    assert cause.fatal
    assert "disk full" in cause.message
    desk = Desk()
    desk.recovered()
    desk.faults["list"] = error
    assert not failed_recovery(desk).fatal


def test_a_source_that_cannot_be_discovered_and_a_corrupt_manifest_end_the_job() -> None:
    desk = Desk()
    desk.recovered()
    desk.write(1)
    desk.memory.put("chk-00000001/manifest.json", b"{")
    cause = failed_recovery(Desk(desk.memory))
    assert cause.fatal
    assert cause.kind == CorruptCheckpointError.__name__
    missing = Desk()

    def gone(source: str) -> tuple[Any, ...]:
        raise DataError("no such file: 'x.csv'")

    missing.runtime._splits_of = gone  # type: ignore[method-assign]
    cause = failed_recovery(missing)
    assert cause.fatal
    assert cause.message == "recovery: no such file: 'x.csv'"


def test_a_fenced_coordinator_does_not_recover() -> None:
    desk = Desk()
    desk.recovered()
    Desk(desk.memory).recovered()
    cause = failed_recovery(desk)
    assert cause.fatal
    assert "later run" in cause.message
    assert "\n" not in cause.message


# ---------------------------------------------------------------------------------------------------------------- sinks


def recover_sinks(desk: Desk, manifest: Any = None) -> CoordinatorEvent | None:
    return desk.perform(RecoverSinks(Attempt(7), manifest))


def test_sinks_are_recovered_with_what_the_manifest_names() -> None:
    desk = Desk()
    desk.recovered()
    assert recover_sinks(desk) == SinksRecovered(Attempt(7))
    desk.write(
        1, *(SubtaskSnapshot(s) for s in SUBTASKS[:3]), SubtaskSnapshot(OUT, (), (), (Committable("sink", "f1"),))
    )
    assert recover_sinks(desk, desk.runtime.outcome.manifest) == SinksRecovered(Attempt(7))
    assert desk.rig.committer.calls == [["recover"], ["recover", "f1"]]


@pytest.mark.parametrize(("error", "fatal"), [(DataError("other output"), True), (StorageError("not now"), False)])
def test_sinks_that_cannot_recover(error: Exception, fatal: bool) -> None:
    desk = Desk()
    desk.recovered()

    def recover(committables: Sequence[Any], *, fresh: bool) -> None:
        raise error

    desk.rig.committer.recover = recover  # type: ignore[method-assign]
    event = recover_sinks(desk)
    assert isinstance(event, SinksFailed)
    assert event.attempt == 7
    assert event.cause.fatal is fatal
    assert str(error) in event.cause.message


def test_a_place_for_output_that_never_could_be_used_ends_the_job_and_one_that_was_is_waited_for() -> None:
    denied = PermissionError(errno.EACCES, "Permission denied")

    def recover(committables: Sequence[Any], *, fresh: bool) -> None:
        raise StorageError("cannot use '/out'") from denied

    desk = Desk()
    desk.recovered()
    desk.write(1)
    desk.rig.committer.recover = recover  # type: ignore[method-assign]
    first, later = recover_sinks(desk), recover_sinks(desk, desk.runtime.outcome.manifest)
    assert isinstance(first, SinksFailed)
    assert isinstance(later, SinksFailed)
    assert (first.cause.fatal, later.cause.fatal) == (True, False)


def test_a_fenced_coordinator_leaves_the_sinks_alone() -> None:
    desk = Desk()
    desk.recovered()
    Desk(desk.memory).recovered()
    event = recover_sinks(desk)
    assert isinstance(event, SinksFailed)
    assert event.cause.fatal
    assert desk.rig.committer.calls == []


# ------------------------------------------------------------------------------------------------------------ manifests


def test_a_manifest_is_durable_before_anybody_is_told() -> None:
    desk = Desk()
    desk.recovered()
    desk.host.tasks.clear()
    desk.runtime._perform([write(1)])
    assert desk.runtime.outcome.manifest is None
    assert not desk.memory.exists("chk-00000001/manifest.json")
    assert desk.host.tasks.popleft()() == ManifestWritten(CheckpointId(1))
    assert desk.memory.exists("chk-00000001/manifest.json")
    assert getattr(desk.runtime.outcome.manifest, "created_at", None) == 1_700_000_000.0


class TellsFirst(CoordinatorRuntime):
    """Broken on purpose (rule C2): says that a manifest is written, and then writes it."""

    def _write_manifest(self, action: WriteManifest) -> Callable[[], CoordinatorEvent]:
        super()._write_manifest(action)
        return lambda: ManifestWritten(action.checkpoint)


def test_a_coordinator_that_tells_first_is_caught() -> None:
    class Broken(Desk):
        runtime_type = TellsFirst

    desk = Broken()
    desk.recovered()
    assert desk.write(1) == ManifestWritten(CheckpointId(1))
    assert not desk.memory.exists("chk-00000001/manifest.json")


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.FAIL_AFTER])
def test_a_write_that_fails_is_told_with_its_reason(fault: Fault) -> None:
    desk = Desk()
    desk.recovered()
    desk.faults["manifest.json"] = fault
    event = desk.write(1)
    assert isinstance(event, ManifestFailed)
    assert (event.checkpoint, event.fenced, event.fatal) == (1, False, None)
    assert event.reason.startswith("StorageError: ")
    assert desk.runtime.outcome.manifest is None


def test_a_fenced_coordinator_is_told_so() -> None:
    desk = Desk()
    desk.recovered()
    Desk(desk.memory).recovered()
    event = desk.write(1)
    assert isinstance(event, ManifestFailed)
    assert event.fenced
    assert desk.runtime.outcome.manifest is None


def inline(nbytes: int) -> SubtaskSnapshot:
    handle = StateHandle("mid-op", 0, 1, "x", 1, False, inline="x" * nbytes)
    return SubtaskSnapshot(
        MID, (handle,), (), (), SnapshotStats(sync_s=0.25, async_s=0.5, alignment_s=0.125, nbytes=nbytes)
    )


def test_state_in_memory_has_a_bound_and_passing_it_ends_the_job() -> None:
    desk = Desk(memory_bound=1000)
    desk.recovered()
    others = [SubtaskSnapshot(s) for s in SUBTASKS if s != MID]
    assert isinstance(desk.write(1, inline(1000), *others), ManifestWritten)
    event = desk.write(2, inline(1001), *others)
    assert isinstance(event, ManifestFailed)
    assert event.fatal is not None
    assert event.fatal.fatal
    assert "this checkpoint has 1,001" in event.fatal.message
    assert "CheckpointConfig(url)" in event.fatal.message
    assert not desk.memory.exists("chk-00000002/manifest.json")
    unbound = Desk()
    unbound.recovered()
    assert isinstance(unbound.write(1, inline(10**6), *others), ManifestWritten)


def test_checkpoints_are_counted_with_what_they_cost() -> None:
    desk = Desk()
    desk.recovered()
    desk.write(1, inline(10))
    desk.write(2, replace(inline(5), stats=SnapshotStats(sync_s=2.0, nbytes=5)))
    assert desk.runtime.checkpoint_figures == {
        "checkpoints": 2.0,
        "checkpoint_bytes": 15.0,
        "checkpoint_sync_s_max": 2.0,
        "checkpoint_async_s_max": 0.5,
        "checkpoint_alignment_s_max": 0.125,
    }


# ------------------------------------------------------------------------------------------------------------- clean-up


@pytest.mark.parametrize("action", [DiscardCheckpoint(CheckpointId(9)), Retain(CheckpointId(1))])
def test_garbage_that_cannot_be_deleted_fails_nothing(action: CoordinatorAction) -> None:
    desk = Desk()
    desk.recovered()
    desk.write(1)
    desk.faults |= {"delete": StorageError("not now"), "list": StorageError("not now")}
    assert desk.perform(action) is None


def test_a_discarded_checkpoint_and_those_beyond_the_retained_ones_are_deleted() -> None:
    desk = Desk()
    desk.recovered()
    desk.memory.put("chk-00000009/x.arrow", b"state")
    desk.perform(DiscardCheckpoint(CheckpointId(9)))
    for n in (1, 2, 3):
        desk.write(n)
    desk.perform(Retain(CheckpointId(3)))
    assert [p for p, _ in desk.memory.list("chk-")] == ["chk-00000002/manifest.json", "chk-00000003/manifest.json"]


@pytest.mark.parametrize(
    ("outcome", "complete", "finishes", "sweeps"),
    [
        (JobState.FINISHED, True, True, True),
        (JobState.STOPPED, True, False, True),
        (JobState.CANCELLED, False, False, False),
    ],
)
def test_cleaning_up(outcome: JobState, complete: bool, finishes: bool, sweeps: bool) -> None:
    desk = Desk()
    desk.recovered()
    desk.write(1)
    desk.memory.put("chk-00000007/x.arrow", b"left over")
    finished: list[int] = []
    desk.rig.committer.finish = lambda: finished.append(1)  # type: ignore[method-assign]
    assert desk.perform(CleanUp(outcome, manifest_complete=complete)) == JobCleaned()
    assert bool(finished) is finishes
    assert desk.memory.exists("chk-00000007/x.arrow") is not sweeps


def test_a_clean_up_that_fails_says_so() -> None:
    desk = Desk()
    desk.recovered()
    desk.faults["list"] = StorageError("cannot list")
    event = desk.perform(CleanUp(JobState.FINISHED, manifest_complete=True))
    assert isinstance(event, JobCleaned)
    assert event.cause is not None
    assert event.cause.message == "clean-up: cannot list"


# -------------------------------------------------------------------------------------------- a corrupt state, an offer


def test_a_corrupt_state_comes_with_the_checkpoint_before_it() -> None:
    desk = Desk()
    desk.recovered()
    desk.write(1)
    desk.write(2)
    cause = FailureCause("state file x is torn", kind=CorruptCheckpointError.__name__, fatal=True)
    later = Desk(desk.memory)
    later.recovered()
    later.runtime._perform([JobEnded(JobState.FAILED, cause)])
    told = later.runtime.outcome.cause
    assert told is not None
    assert told.message.startswith("state file x is torn. The last whole one before it is checkpoint 1: name it")
    again = Desk(desk.memory)
    again.recovered()
    again.runtime._perform([JobEnded(JobState.FAILED, told)])
    assert again.runtime.outcome.cause == told, "once is enough"
    blind = Desk(desk.memory)
    blind.recovered()
    blind.faults["list"] = StorageError("cannot list")
    blind.runtime._perform([JobEnded(JobState.FAILED, cause)])
    assert blind.runtime.outcome.cause == cause


# ------------------------------------------------------------------------------------------------------------- settings


def test_settings_are_the_plain_numbers_of_the_configuration() -> None:
    config = JobConfig(restart=Restart.fixed(delay="3s", max_attempts=5), hang_timeout="7s")
    found = settings_of(
        config, CheckpointConfig("x", interval="2s", timeout="1m", min_pause="1s", tolerable_failures=9)
    )
    assert (found.interval_s, found.timeout_s, found.min_pause_s, found.tolerable_failures) == (2.0, 60.0, 1.0, 9)
    assert (found.hang_timeout_s, found.restart.strategy, found.restart.initial_s) == (7.0, "fixed", 3.0)
    assert found.restart.max_attempts == 5
    assert settings_of(config, None).interval_s is None, "without a place only the final checkpoint is taken"
