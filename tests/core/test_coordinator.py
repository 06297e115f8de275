"""The life of a job: first launch, splits, end, stop, cancel; and every message that comes late, twice or from afar."""

from __future__ import annotations

from typing import Any

import pytest

from rayflow.core.coordinator import CoordinatorSettings
from rayflow.core.events import (
    CancelRequested,
    CheckpointRequested,
    CleanUp,
    JobCleaned,
    JobEnded,
    JobState,
    LoadLatest,
    ManifestWritten,
    RecoverSinks,
    Reported,
    SendCommand,
    SinksRecovered,
    StartSubtask,
    StopSubtask,
    SubtaskDied,
    Tick,
)
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import StateHandle, SubtaskSnapshot
from rayflow.core.messages import (
    Assign,
    CheckpointKind,
    Committed,
    Complete,
    FailureCause,
    Heartbeat,
    InputEnded,
    Launch,
    Ready,
    ReportEnvelope,
    Reset,
    Running,
    Shutdown,
    SplitRequest,
    Trigger,
)
from rayflow.core.roster import Heard, SubtaskState
from rayflow.core.timeline import JOB_ENDED, LAUNCHED, RESET, RUNNING, SINKS_RECOVERED, STORAGE_READ
from rayflow.errors import ProtocolError
from tests.core.desk import (
    ALL,
    LAST,
    MIDDLE_0,
    MIDDLE_1,
    SETTINGS,
    SOURCE_0,
    SOURCE_1,
    SOURCES,
    Desk,
    commands,
    manifest_of,
    others,
    running_desk,
)
from tests.core.fakes import some_splits


def test_first_launch_step_by_step() -> None:
    desk = Desk()
    assert desk.start() == [LoadLatest()]
    actions = desk.recovered()
    assert actions == [a for s in ALL for a in (StartSubtask(s, 1), SendCommand(Attempt(1), s, 0, Reset()))]
    assert desk.state() is JobState.DEPLOYING
    for subtask in ALL[:-1]:
        assert desk.report(subtask, Ready(f"at {subtask}")) == []
    assert desk.report(LAST, Ready("at last", 7, "node")) == [RecoverSinks(Attempt(1), None)]
    launched = desk.tell(SinksRecovered(Attempt(1)))
    assert others(launched) == []
    assert commands(launched, Launch) == {
        SOURCE_0: Launch({MIDDLE_0: "at middle[0]", MIDDLE_1: "at middle[1]"}),
        SOURCE_1: Launch({MIDDLE_0: "at middle[0]", MIDDLE_1: "at middle[1]"}),
        MIDDLE_0: Launch({LAST: "at last"}),
        MIDDLE_1: Launch({LAST: "at last"}),
        LAST: Launch({}),
    }
    assert desk.all_report(Running()) == []
    assert desk.state() is JobState.RUNNING
    assert desk.machine.subtasks[LAST].pid == 7
    assert [n for n in desk.notes if n != "attempt begins"] == [STORAGE_READ, RESET, SINKS_RECOVERED, LAUNCHED, RUNNING]


def test_start_twice_is_refused() -> None:
    desk = Desk()
    desk.start()
    with pytest.raises(ProtocolError, match="started twice"):
        desk.start()


def test_attempts_and_ids_go_on_where_storage_says() -> None:
    """C4, C6."""
    desk = Desk()
    desk.start()
    desk.to_running(manifest_of(41, attempt=7))
    assert desk.machine.attempt == 8
    assert desk.machine.last_completed == 41
    actions = desk.wait(10.0)
    assert commands(actions, Trigger) == {s: Trigger(CheckpointId(42), CheckpointKind.PERIODIC) for s in SOURCES}


def test_state_goes_to_whom_it_concerns_and_splits_to_the_pool() -> None:
    """R1, R2, K3: from parallelism 1 and 3 to 2."""
    keyed = tuple(StateHandle("count", i, 3, "runs", 1, keyed=True) for i in range(3))
    plain = tuple(StateHandle("read", i, 3, "offsets", 1, keyed=False) for i in range(3))
    begun, pending = some_splits(3)[:1], some_splits(3)[1:]
    manifest = manifest_of(
        3,
        subtasks=(
            SubtaskSnapshot(SOURCE_0, states=plain, splits=begun),
            SubtaskSnapshot(MIDDLE_0, states=keyed),
        ),
        pending_splits=pending,
    )
    desk = Desk()
    desk.start()
    desk.recovered(manifest)
    desk.all_report(Ready("x"))
    launch = commands(desk.tell(SinksRecovered(Attempt(2))), Launch)
    states = {s: [h.subtask for h in c.states] for s, c in launch.items() if isinstance(c, Launch)}
    # 16 groups: [0, 6) [6, 11) [11, 16) become [0, 8) [8, 16)
    assert states == {SOURCE_0: [0, 2], SOURCE_1: [1], MIDDLE_0: [0, 1], MIDDLE_1: [1, 2], LAST: []}
    assert all(isinstance(c, Launch) and c.restored_from == 3 for c in launch.values())
    desk.all_report(Running())
    assigned = [commands(desk.report(s, SplitRequest()), Assign)[s] for s in (SOURCE_0, SOURCE_0, SOURCE_1)]
    assert assigned == [Assign((begun[0],), False), Assign((pending[0],), False), Assign((pending[1],), True)]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"max_parallelism": 32}, "max_parallelism=32"),
        ({"pending_splits": (some_splits(1)[0].__class__("gone", "s", 0, {}),)}, "source 'gone'"),
        (
            {"subtasks": (SubtaskSnapshot(LAST, states=(StateHandle("gone", 0, 1, "x", 0, keyed=False),)),)},
            "operator 'gone'",
        ),
        (
            {"subtasks": (SubtaskSnapshot(LAST, states=(StateHandle("write", 0, 1, "x", 0, keyed=True),)),)},
            "not keyed",
        ),
    ],
)
def test_a_manifest_of_another_flow_ends_the_job_by_name(change: dict[str, Any], word: str) -> None:
    desk = Desk()
    desk.start()
    ended = desk.recovered(manifest_of(3, **change))[-1]
    assert isinstance(ended, JobEnded)
    assert ended.outcome is JobState.FAILED
    assert ended.cause is not None
    assert word in ended.cause.message


# ------------------------------------------------------------------------------------------------------------ splits


def test_splits_are_handed_out_one_a_request_until_no_more() -> None:
    desk = running_desk(splits=2)
    s0, s1 = some_splits(2)
    assert commands(desk.report(SOURCE_1, SplitRequest()), Assign) == {SOURCE_1: Assign((s0,), False)}
    assert commands(desk.report(SOURCE_0, SplitRequest()), Assign) == {SOURCE_0: Assign((s1,), True)}
    assert commands(desk.report(SOURCE_1, SplitRequest()), Assign) == {SOURCE_1: Assign((), True)}


def test_a_split_request_from_where_there_is_no_source_is_unknown() -> None:
    desk = running_desk()
    assert desk.report(MIDDLE_0, SplitRequest()) == []
    assert desk.heard("SplitRequest", Heard.UNKNOWN) == 1


# --------------------------------------------------------------------------------------------------------------- end


def test_end_of_input_final_checkpoint_commit_clean_up_end() -> None:
    desk = running_desk()
    actions = desk.all_ended()
    final = CheckpointId(1)
    assert commands(actions, Trigger) == {s: Trigger(final, CheckpointKind.FINAL) for s in ALL}
    assert commands(desk.complete(1), Complete) == {s: Complete(final) for s in ALL}
    assert desk.state() is JobState.RUNNING
    for subtask in ALL[:-1]:
        assert desk.report(subtask, Committed(final)) == []
    assert desk.report(LAST, Committed(final)) == [CleanUp(JobState.FINISHED, manifest_complete=True)]
    assert desk.state() is JobState.CLEANING
    actions = desk.tell(JobCleaned())
    assert set(commands(actions, Shutdown)) == set(ALL)
    assert [a.subtask for a in actions if isinstance(a, StopSubtask)] == ALL
    assert actions[-1] == JobEnded(JobState.FINISHED)
    assert desk.notes[-1] == JOB_ENDED
    assert desk.machine.next_deadline() is None


def test_a_pending_checkpoint_ends_before_the_final_one_begins() -> None:
    """P5; and A6: who reports the end while a checkpoint is pending is triggered by itself, sources were already."""
    desk = running_desk()
    desk.wait(10.0)
    pending = Trigger(CheckpointId(1), CheckpointKind.PERIODIC)
    assert desk.report(SOURCE_0, InputEnded()) == []
    assert desk.report(SOURCE_1, InputEnded()) == []
    assert commands(desk.report(MIDDLE_0, InputEnded()), Trigger) == {MIDDLE_0: pending}
    desk.ack(MIDDLE_1, 1)
    assert desk.report(MIDDLE_1, InputEnded()) == []  # has acknowledged: nothing to trigger
    assert commands(desk.report(LAST, InputEnded()), Trigger) == {LAST: pending}
    desk.acknowledge(1, but=MIDDLE_1)
    actions = desk.tell(ManifestWritten(CheckpointId(1)))
    assert commands(actions, Complete) == {s: Complete(CheckpointId(1)) for s in ALL}
    assert commands(actions, Trigger) == {s: Trigger(CheckpointId(2), CheckpointKind.FINAL) for s in ALL}


def test_subtasks_that_ended_earlier_are_triggered_with_the_sources() -> None:
    desk = running_desk()
    desk.report(MIDDLE_0, InputEnded())
    assert set(commands(desk.wait(10.0), Trigger)) == {SOURCE_0, SOURCE_1, MIDDLE_0}


def test_a_final_checkpoint_that_fails_is_tried_again_after_a_pause() -> None:
    desk = running_desk(CoordinatorSettings(timeout_s=60.0, hang_timeout_s=1000.0))
    desk.all_ended()
    desk.wait(60.0)  # its timeout
    assert desk.machine.pending is None
    assert desk.machine.next_deadline() == pytest.approx(desk.now + 1.0)
    assert commands(desk.wait(1.0), Trigger) == {s: Trigger(CheckpointId(2), CheckpointKind.FINAL) for s in ALL}


def test_a_clean_up_that_fails_fails_the_job() -> None:
    desk = running_desk()
    desk.all_ended()
    desk.complete(1)
    desk.all_committed(1)
    cause = FailureCause("no space")
    assert desk.tell(JobCleaned(cause))[-1] == JobEnded(JobState.FAILED, cause)


# ------------------------------------------------------------------------------------------ savepoint, stop, cancel


def test_requests_wait_for_the_pending_checkpoint() -> None:
    desk = running_desk()
    desk.wait(10.0)
    assert desk.tell(CheckpointRequested(CheckpointKind.SAVEPOINT)) == []
    assert desk.tell(CheckpointRequested(CheckpointKind.SAVEPOINT)) == []
    assert desk.heard("CheckpointRequested", Heard.DUPLICATE) == 1
    actions = desk.complete(1)
    assert commands(actions, Trigger) == {s: Trigger(CheckpointId(2), CheckpointKind.SAVEPOINT) for s in SOURCES}


def test_a_final_checkpoint_cannot_be_requested() -> None:
    desk = running_desk()
    assert desk.tell(CheckpointRequested(CheckpointKind.FINAL)) == []
    assert desk.heard("CheckpointRequested", Heard.UNKNOWN) == 1


def test_stop_with_a_savepoint() -> None:
    desk = running_desk()
    actions = desk.tell(CheckpointRequested(CheckpointKind.STOP))
    assert commands(actions, Trigger) == {s: Trigger(CheckpointId(1), CheckpointKind.STOP) for s in SOURCES}
    desk.complete(1)
    assert desk.wait(20.0) == []  # no periodic one begins any more
    assert desk.all_committed(1) == [CleanUp(JobState.STOPPED, manifest_complete=True)]
    assert desk.tell(JobCleaned())[-1] == JobEnded(JobState.STOPPED)


def test_a_stop_survives_its_failure_and_a_failover() -> None:
    desk = running_desk()
    desk.tell(CheckpointRequested(CheckpointKind.STOP))
    desk.tell(SubtaskDied(LAST, 1, "killed"))
    desk.recovered()
    actions = desk.ready_to_running()
    assert commands(actions, Trigger) == {s: Trigger(CheckpointId(2), CheckpointKind.STOP) for s in SOURCES}


def test_a_request_before_the_job_runs_is_kept() -> None:
    desk = Desk()
    desk.start()
    desk.tell(CheckpointRequested(CheckpointKind.SAVEPOINT))
    actions = desk.to_running()
    assert commands(actions, Trigger) == {s: Trigger(CheckpointId(1), CheckpointKind.SAVEPOINT) for s in SOURCES}


@pytest.mark.parametrize("stage", ["recovering", "deploying", "running", "pending", "restarting"])
def test_cancel_at_any_state(stage: str) -> None:
    desk = Desk()
    desk.start()
    if stage != "recovering":
        desk.recovered()
    if stage in ("running", "pending", "restarting"):
        desk.ready_to_running()
    if stage == "pending":
        desk.wait(10.0)
    if stage == "restarting":
        desk.tell(SubtaskDied(LAST, 1, "killed"))
        desk.tell(SubtaskDied(SOURCE_0, 1, "killed"))
    actions = desk.tell(CancelRequested())
    assert actions[-1] == CleanUp(JobState.CANCELLED, manifest_complete=False)
    assert len(commands(actions, Shutdown)) == (0 if stage == "recovering" else 5)
    assert desk.tell(CancelRequested()) == []
    assert desk.heard("CancelRequested", Heard.STALE) == 1
    desk.wait(1000.0)
    assert desk.tell(JobCleaned()) == [JobEnded(JobState.CANCELLED)]


# ------------------------------------------------------------------------------------- late, repeated, foreign messages


def test_reports_out_of_order_are_held_and_repeated_ones_dropped() -> None:
    desk = running_desk()
    first, second = (
        Reported(ReportEnvelope(Attempt(1), SOURCE_0, n, r)) for n, r in ((2, SplitRequest()), (3, InputEnded()))
    )
    assert desk.tell(second) == []
    assert desk.heard("InputEnded", Heard.HELD) == 1
    assert set(commands(desk.tell(first), Assign)) == {SOURCE_0}
    assert desk.machine.subtasks[SOURCE_0].state is SubtaskState.ENDED
    assert desk.tell(first) == []
    assert desk.heard("SplitRequest", Heard.DUPLICATE) == 1


def test_reports_of_another_attempt_change_nothing() -> None:
    """C6."""
    desk = running_desk()
    for attempt in (0, 2):
        assert desk.report(SOURCE_0, InputEnded(), attempt=attempt) == []
    assert desk.heard("InputEnded", Heard.STALE) == 2
    assert desk.machine.subtasks[SOURCE_0].state is SubtaskState.RUNNING


def test_reports_of_a_subtask_that_never_was() -> None:
    desk = running_desk()
    assert desk.report(SubtaskId("nobody", 0), Heartbeat()) == []
    assert desk.heard("Heartbeat", Heard.UNKNOWN) == 1
    assert desk.tell(SubtaskDied(SubtaskId("nobody", 0), 1, "")) == []
    assert desk.tell(SubtaskDied(LAST, 9, "")) == []
    assert desk.heard("SubtaskDied", Heard.UNKNOWN) == 2


def test_reports_that_do_not_fit_the_state() -> None:
    desk = running_desk()
    desk.report(LAST, Ready("again"))
    desk.report(LAST, Running())
    assert desk.heard("Ready", Heard.UNKNOWN) == 1
    assert desk.heard("Running", Heard.DUPLICATE) == 1
    assert desk.machine.subtasks[LAST].address == "address"


def test_answers_nobody_waits_for() -> None:
    desk = running_desk()
    assert desk.recovered() == []
    assert desk.heard("Recovered", Heard.DUPLICATE) == 1
    assert desk.tell(SinksRecovered(Attempt(1))) == []
    assert desk.heard("SinksRecovered", Heard.DUPLICATE) == 1
    assert desk.tell(SinksRecovered(Attempt(5))) == []
    assert desk.heard("SinksRecovered", Heard.UNKNOWN) == 1
    assert desk.tell(JobCleaned()) == []
    assert desk.heard("JobCleaned", Heard.UNKNOWN) == 1


def test_commits_are_heard_once() -> None:
    desk = running_desk()
    desk.wait(10.0)
    desk.complete(1)
    desk.report(LAST, Committed(CheckpointId(1)))
    desk.report(LAST, Committed(CheckpointId(1)))
    desk.report(LAST, Committed(CheckpointId(2)))
    counts = [desk.heard("Committed", h) for h in (Heard.ACCEPTED, Heard.DUPLICATE, Heard.UNKNOWN)]
    assert counts == [1, 1, 1]


def test_a_job_that_has_ended_hears_nothing() -> None:
    """C3."""
    desk = running_desk()
    desk.tell(CancelRequested())
    desk.tell(JobCleaned())
    for event in (Tick(), SubtaskDied(LAST, 1, ""), ManifestWritten(CheckpointId(1)), JobCleaned(), CancelRequested()):
        assert desk.tell(event) == []
    assert desk.report(LAST, Heartbeat()) == []
    assert desk.heard("Tick", Heard.STALE) == 1


def test_metrics_are_kept() -> None:
    desk = running_desk()
    desk.report(LAST, Heartbeat({"rows": 3.0}))
    assert desk.machine.subtasks[LAST].metrics == {"rows": 3.0}


def test_no_interval_no_deadline_but_hangs() -> None:
    desk = running_desk(CoordinatorSettings(interval_s=None, hang_timeout_s=SETTINGS.hang_timeout_s))
    assert desk.machine.next_deadline() == 30.0
