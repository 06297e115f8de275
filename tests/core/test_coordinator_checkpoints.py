"""Trigger, acknowledge, write, notify, abort: one checkpoint at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayflow.core.events import (
    CheckpointRequested,
    DiscardCheckpoint,
    JobEnded,
    JobState,
    ManifestFailed,
    ManifestWritten,
    Retain,
    StopSubtask,
    SubtaskDied,
    WriteManifest,
)
from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.manifest import SubtaskSnapshot
from rayflow.core.messages import (
    Abort,
    Acknowledge,
    Assign,
    CheckpointKind,
    Complete,
    Decline,
    Heartbeat,
    SplitRequest,
    Trigger,
)
from rayflow.core.roster import Heard
from tests.core.desk import ALL, LAST, SETTINGS, SOURCE_0, SOURCES, Desk, commands, others, running_desk
from tests.core.fakes import some_splits

ONE, TWO = CheckpointId(1), CheckpointId(2)
PATIENT = replace(SETTINGS, hang_timeout_s=10_000.0)


def pending_desk() -> Desk:
    desk = running_desk(PATIENT)
    desk.wait(10.0)
    assert desk.machine.pending is not None
    return desk


def test_from_trigger_to_completion() -> None:
    """C1, C2."""
    desk = running_desk()
    assert desk.machine.next_deadline() == 10.0
    assert desk.wait(9.9) == []
    actions = desk.wait(0.1)
    assert commands(actions, Trigger) == {s: Trigger(ONE, CheckpointKind.PERIODIC) for s in SOURCES}
    assert desk.acknowledge(1, but=LAST) == []
    snapshots = tuple(SubtaskSnapshot(s) for s in ALL)
    assert desk.ack(LAST, 1) == [WriteManifest(ONE, CheckpointKind.PERIODIC, Attempt(1), snapshots, some_splits(4))]
    actions = desk.tell(ManifestWritten(ONE))
    assert commands(actions, Complete) == {s: Complete(ONE) for s in ALL}
    assert others(actions) == [Retain(ONE)]
    assert desk.machine.last_completed == 1
    assert (desk.machine.counts.triggered, desk.machine.counts.completed) == (1, 1)


def test_the_order_of_acknowledgements_does_not_change_the_manifest() -> None:
    desk = pending_desk()
    for subtask in reversed(ALL[1:]):
        desk.ack(subtask, 1)
    (write,) = desk.ack(ALL[0], 1)
    assert isinstance(write, WriteManifest)
    assert [s.subtask for s in write.snapshots] == ALL


def test_the_interval_counts_from_the_start_of_the_previous_one() -> None:
    desk = pending_desk()
    desk.now = 13.0
    desk.complete(1)
    assert desk.machine.next_deadline() == 20.0


def test_the_pause_counts_from_the_end_of_the_previous_one() -> None:
    desk = running_desk(replace(PATIENT, min_pause_s=9.0))
    desk.wait(10.0)
    desk.now = 13.0
    desk.complete(1)
    assert desk.machine.next_deadline() == 22.0


def test_one_at_a_time() -> None:
    desk = pending_desk()
    assert desk.wait(15.0) == []
    assert desk.tell(CheckpointRequested(CheckpointKind.PERIODIC)) == []


def test_the_pool_is_as_it_was_at_the_trigger() -> None:
    """R1: a split assigned after the trigger stands in the pool's snapshot."""
    desk = running_desk(PATIENT)
    s0, s1, s2, s3 = some_splits(4)
    assert commands(desk.report(SOURCE_0, SplitRequest()), Assign) == {SOURCE_0: Assign((s0,), False)}
    desk.wait(10.0)
    assert commands(desk.report(SOURCE_0, SplitRequest()), Assign) == {SOURCE_0: Assign((s1,), False)}
    write = desk.acknowledge(1)[-1]
    assert isinstance(write, WriteManifest)
    assert write.pending_splits == (s1, s2, s3)


def test_acknowledgements_late_repeated_foreign() -> None:
    desk = pending_desk()
    desk.ack(LAST, 1)
    assert desk.ack(LAST, 1) == []
    assert desk.heard("Acknowledge", Heard.DUPLICATE) == 1
    assert desk.ack(LAST, 7) == []
    assert desk.report(LAST, Acknowledge(ONE, SubtaskSnapshot(SOURCE_0))) == []
    assert desk.heard("Acknowledge", Heard.UNKNOWN) == 2
    desk.complete(1)
    assert desk.ack(LAST, 1) == []
    assert desk.heard("Acknowledge", Heard.STALE) == 1


def test_a_decline_aborts_and_discards() -> None:
    desk = pending_desk()
    actions = desk.report(LAST, Decline(ONE, "disk full"))
    assert commands(actions, Abort) == {s: Abort(ONE) for s in ALL}
    assert others(actions) == [DiscardCheckpoint(ONE)]
    assert desk.report(SOURCE_0, Decline(ONE, "me too")) == []
    assert desk.heard("Decline", Heard.STALE) == 1
    assert commands(desk.wait(10.0), Trigger) == {s: Trigger(TWO, CheckpointKind.PERIODIC) for s in SOURCES}


def test_a_decline_of_who_has_acknowledged_changes_nothing() -> None:
    desk = pending_desk()
    desk.ack(LAST, 1)
    assert desk.report(LAST, Decline(ONE, "?")) == []
    assert desk.heard("Decline", Heard.DUPLICATE) == 1
    assert desk.report(LAST, Decline(TWO, "?")) == []
    assert desk.heard("Decline", Heard.UNKNOWN) == 1


def test_a_timeout_aborts_and_names_who_is_missing() -> None:
    desk = pending_desk()
    desk.acknowledge(1, but=LAST)
    assert desk.machine.next_deadline() == 70.0
    actions = desk.wait(60.0)
    assert others(actions) == [DiscardCheckpoint(ONE)]
    assert set(commands(actions, Abort)) == set(ALL)
    (entry,) = [e for e in desk.machine.timeline if e.what == "checkpoint aborted"]
    assert "last[0]" in entry.detail
    assert "60 s" in entry.detail


def test_files_stay_when_the_outcome_of_the_write_is_unknown() -> None:
    """C5: the manifest may become durable yet."""
    desk = pending_desk()
    desk.acknowledge(1)
    actions = desk.tell(ManifestFailed(ONE, "timed out"))
    assert commands(actions, Abort) == {s: Abort(ONE) for s in ALL}
    assert others(actions) == []
    assert desk.tell(ManifestFailed(ONE, "again")) == []
    assert desk.tell(ManifestWritten(ONE)) == []  # late: never notified
    assert desk.heard("ManifestFailed", Heard.STALE) == 1
    assert desk.heard("ManifestWritten", Heard.STALE) == 1
    assert desk.machine.last_completed is None


def test_a_write_that_hangs_times_out_and_keeps_the_files() -> None:
    desk = pending_desk()
    desk.now = 50.0
    desk.acknowledge(1)
    assert desk.machine.next_deadline() == 110.0
    actions = desk.wait(60.0)
    assert set(commands(actions, Abort)) == set(ALL)
    assert DiscardCheckpoint(ONE) not in actions


def test_a_manifest_that_was_never_asked_for() -> None:
    desk = pending_desk()
    assert desk.tell(ManifestWritten(ONE)) == []  # still in progress: C2
    assert desk.tell(ManifestWritten(CheckpointId(9))) == []
    assert desk.heard("ManifestWritten", Heard.UNKNOWN) == 1
    assert desk.machine.last_completed is None


def test_failures_in_a_row_beyond_the_tolerable_fail_over() -> None:
    desk = pending_desk()
    desk.report(LAST, Decline(ONE, "x"))
    desk.wait(10.0)
    desk.report(LAST, Decline(TWO, "x"))
    desk.wait(10.0)
    assert desk.machine.attempt == 1
    desk.report(LAST, Decline(CheckpointId(3), "x"))
    assert desk.machine.attempt == 2
    assert desk.state() is JobState.RESTARTING
    assert desk.machine.cause is not None
    assert "3 checkpoints failed in a row, 2 are tolerated" in desk.machine.cause.message


def test_a_completion_forgives_earlier_failures() -> None:
    desk = pending_desk()
    for n in range(1, 8):
        if n % 3:
            desk.report(LAST, Decline(CheckpointId(n), "x"))
        else:
            desk.complete(n)
        desk.wait(10.0)
    assert desk.machine.attempt == 1


@pytest.mark.parametrize("stage", ["writing", "late"])
def test_a_fenced_coordinator_stops_and_touches_nothing(stage: str) -> None:
    """C8: no clean-up, no discard, no politeness."""
    desk = pending_desk()
    desk.acknowledge(1)
    if stage == "late":
        desk.tell(ManifestFailed(ONE, "timed out"))
        desk.wait(10.0)  # checkpoint 2 is pending, and its id may be the other's
    actions = desk.tell(ManifestFailed(ONE, "owner is 2", fenced=True))
    assert [a.subtask for a in actions if isinstance(a, StopSubtask)] == ALL
    assert len(actions) == 6
    ended = actions[-1]
    assert isinstance(ended, JobEnded)
    assert ended.outcome is JobState.FAILED
    assert ended.cause is not None
    assert "fenced" in ended.cause.message


def test_no_checkpoint_begins_while_a_subtask_does_not_run() -> None:
    desk = running_desk(PATIENT)
    desk.tell(SubtaskDied(LAST, 1, "killed"))
    desk.recovered()
    assert commands(desk.wait(50.0), Trigger) == {}
    desk.ready_to_running()
    assert desk.machine.next_deadline() == 60.0


def test_signs_of_life_do_not_disturb() -> None:
    desk = pending_desk()
    assert desk.all_report(Heartbeat()) == []
