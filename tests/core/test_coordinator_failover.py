"""From a failure to the next launch: attempts, survivors, the dead, the hung, and storage that must not surprise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayflow.core.events import (
    DiscardCheckpoint,
    JobEnded,
    JobState,
    LoadLatest,
    ManifestFailed,
    ManifestWritten,
    RecoverSinks,
    RecoveryFailed,
    Reported,
    SendCommand,
    SinksFailed,
    SinksRecovered,
    StartSubtask,
    StopSubtask,
    SubtaskDied,
)
from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.messages import (
    Failed,
    FailureCause,
    Heartbeat,
    Launch,
    Ready,
    ReportEnvelope,
    Reset,
    Running,
    Trigger,
)
from rayflow.core.restart import RestartSpec
from rayflow.core.roster import START_TIMEOUT_S, Heard, SubtaskState
from rayflow.core.timeline import ATTEMPT_BEGINS, DETECTED, LAUNCHED, RESET, RUNNING, SINKS_RECOVERED, STORAGE_READ
from tests.core.desk import ALL, LAST, MIDDLE_0, SETTINGS, SOURCE_0, Desk, commands, manifest_of, others, running_desk

SURVIVORS = ALL[:-1]
ONE = CheckpointId(1)
PATIENT = replace(SETTINGS, hang_timeout_s=10_000.0)


def died(desk: Desk, incarnation: int = 1) -> list[object]:
    return list(desk.tell(SubtaskDied(LAST, incarnation, "killed")))


def test_a_death_resets_the_survivors_in_place_and_replaces_the_dead() -> None:
    desk = running_desk()
    actions = desk.tell(SubtaskDied(LAST, 1, "killed"))
    assert actions == [
        *(SendCommand(Attempt(2), s, 0, Reset()) for s in SURVIVORS),
        StartSubtask(LAST, 2),
        SendCommand(Attempt(2), LAST, 0, Reset()),
        LoadLatest(),
    ]
    assert desk.recovered() == []
    assert desk.all_report(Ready("b")) == [RecoverSinks(Attempt(2), None)]
    launch = commands(desk.tell(SinksRecovered(Attempt(2))), Launch)
    assert set(launch) == set(ALL)
    desk.all_report(Running())
    assert desk.state() is JobState.RUNNING
    assert desk.machine.restarts == 1
    story = desk.notes[desk.notes.index(DETECTED) :]
    assert story == [DETECTED, ATTEMPT_BEGINS, STORAGE_READ, RESET, SINKS_RECOVERED, LAUNCHED, RUNNING]


def test_news_of_an_earlier_process_changes_nothing() -> None:
    desk = running_desk()
    desk.tell(SubtaskDied(LAST, 1, "killed"))
    assert died(desk) == []
    assert desk.heard("SubtaskDied", Heard.STALE) == 1
    assert desk.machine.attempt == 2


def test_a_failed_attempt_is_launched_after_the_delay_and_the_dead_are_started_then() -> None:
    desk = running_desk()
    died(desk)
    desk.recovered()
    actions = died(desk, incarnation=2)  # at once again: no longer for free
    assert actions == [SendCommand(Attempt(3), s, 0, Reset()) for s in SURVIVORS]
    assert desk.state() is JobState.RESTARTING
    assert desk.machine.next_deadline() == 1.0
    assert desk.machine.subtasks[LAST].state is SubtaskState.DEAD
    assert died(desk, incarnation=2) == []
    assert desk.heard("SubtaskDied", Heard.DUPLICATE) == 1
    assert desk.wait(1.0) == [StartSubtask(LAST, 3), SendCommand(Attempt(3), LAST, 0, Reset()), LoadLatest()]


def test_several_deaths_in_one_recovery_cost_no_delay() -> None:
    desk = running_desk()
    for n, subtask in enumerate(ALL):
        actions = desk.tell(SubtaskDied(subtask, 1, "node lost"))
        assert StartSubtask(subtask, 2) in actions
        assert desk.machine.attempt == n + 2
    assert desk.machine.restarts == 1
    desk.recovered()
    desk.ready_to_running()


def test_reports_of_the_old_attempt_do_not_disturb_the_new_one() -> None:
    """C6."""
    desk = running_desk()
    desk.wait(10.0)
    died(desk)
    old = [Reported(ReportEnvelope(Attempt(1), s, 2, Failed(FailureCause("late")))) for s in ALL]
    assert [a for event in old for a in desk.tell(event)] == []
    assert desk.heard("Failed", Heard.STALE) == 5
    assert desk.machine.attempt == 2


def test_a_pending_checkpoint_dies_with_its_attempt_and_its_id_is_not_used_again() -> None:
    """C4."""
    desk = running_desk()
    desk.wait(10.0)
    assert DiscardCheckpoint(ONE) in died(desk)
    desk.recovered()
    desk.ready_to_running()
    triggered = commands(desk.wait(10.0), Trigger)
    assert all(isinstance(c, Trigger) and c.checkpoint == 2 for c in triggered.values())


def test_an_undecided_manifest_write_is_named_to_storage() -> None:
    desk = running_desk(PATIENT)
    desk.wait(10.0)
    desk.acknowledge(1)
    actions = died(desk)
    assert LoadLatest((ONE,)) in actions
    assert DiscardCheckpoint(ONE) not in actions
    # It was durable: restored from, and all is well.
    desk.to_running(manifest_of(1))
    assert desk.machine.last_completed == 1
    desk.wait(1000.0)
    assert LoadLatest() in died(desk, incarnation=2)


def test_a_later_manifest_supersedes_an_undecided_one() -> None:
    desk = running_desk(PATIENT)
    desk.wait(10.0)
    desk.acknowledge(1)
    desk.tell(ManifestFailed(ONE, "timed out"))
    desk.wait(10.0)
    desk.complete(2)
    assert LoadLatest() in died(desk)


@pytest.mark.parametrize("how", ["event", "storage"])
def test_a_manifest_that_becomes_durable_after_the_job_went_on_without_it_is_a_lost_commit(how: str) -> None:
    desk = running_desk(PATIENT)
    desk.wait(10.0)
    desk.acknowledge(1)
    died(desk)
    desk.to_running()  # storage said: nothing there
    if how == "event":
        ended = desk.tell(ManifestWritten(ONE))[-1]
    else:
        desk.wait(1000.0)
        died(desk, incarnation=2)
        ended = desk.recovered(manifest_of(1))[-1]
    assert isinstance(ended, JobEnded)
    assert ended.cause is not None
    assert ended.cause.kind == "LostCommit"


@pytest.mark.parametrize("offered", [None, 1])
def test_storage_that_forgets_a_complete_checkpoint_is_not_believed(offered: int | None) -> None:
    """Going on from an older manifest would write committed output twice."""
    desk = running_desk(PATIENT)
    for n in (1, 2):
        desk.wait(10.0)
        desk.complete(n)
    died(desk)
    for _ in range(2):
        desk.recovered(None if offered is None else manifest_of(offered))
        assert desk.state() is JobState.RESTARTING
        desk.wait(60.0)
    ended = desk.recovered(None if offered is None else manifest_of(offered))[-1]
    assert isinstance(ended, JobEnded)
    assert ended.cause is not None
    assert ended.cause.kind == "StaleManifest"


def test_user_code_that_raises_restarts_after_a_delay_with_every_process_kept() -> None:
    desk = running_desk()
    actions = desk.report(MIDDLE_0, Failed(FailureCause("bad row", kind="ValueError")))
    assert actions == [SendCommand(Attempt(2), s, 0, Reset()) for s in ALL]
    assert desk.wait(1.0) == [LoadLatest()]


def test_the_same_exception_at_the_same_position_three_times_ends_the_job_with_it() -> None:
    desk = running_desk()
    cause = FailureCause("bad row", kind="ValueError", position="s0:7")
    for _ in range(2):
        desk.report(MIDDLE_0, Failed(cause))
        desk.wait(2.0)
        desk.recovered()
        desk.ready_to_running()
    actions = desk.report(MIDDLE_0, Failed(cause))
    assert actions[-1] == JobEnded(JobState.FAILED, cause)
    assert [a.subtask for a in actions if isinstance(a, StopSubtask)] == ALL


@pytest.mark.parametrize("event", ["failed", "sinks", "recovery"])
def test_a_fatal_cause_ends_the_job_at_once_and_cleans_nothing(event: str) -> None:
    cause = FailureCause("the transaction has expired", kind="CommitLostError", fatal=True)
    desk = Desk()
    desk.start()
    if event == "recovery":
        actions = desk.tell(RecoveryFailed(cause))
    elif event == "sinks":
        desk.recovered()
        desk.all_report(Ready("x"))
        actions = desk.tell(SinksFailed(Attempt(1), cause))
    else:
        desk.to_running()
        actions = desk.report(LAST, Failed(cause))
    assert others(actions)[-1] == JobEnded(JobState.FAILED, cause)
    assert all(isinstance(a, StopSubtask) for a in actions[:-1])


def test_storage_or_sinks_that_fail_are_asked_again_after_a_delay() -> None:
    cause = FailureCause("503")
    desk = Desk()
    desk.start()
    assert desk.tell(RecoveryFailed(cause)) == []
    assert desk.tell(RecoveryFailed(cause)) == []
    assert desk.heard("RecoveryFailed", Heard.DUPLICATE) == 1
    assert desk.wait(1.0) == [LoadLatest()]
    desk.recovered()
    desk.all_report(Ready("x"))
    assert set(commands(desk.tell(SinksFailed(Attempt(1), cause)), Reset)) == set(ALL)
    assert desk.wait(1.5) == [LoadLatest()]
    desk.to_running()
    assert desk.machine.attempt == 2


def test_a_death_while_sinks_recover_waits_for_their_answer() -> None:
    """An old RecoverSinks must not run while a newer attempt does."""
    desk = Desk()
    desk.start()
    desk.recovered()
    desk.all_report(Ready("x"))
    died(desk)
    desk.recovered()
    assert desk.all_report(Ready("y")) == []
    assert desk.tell(SinksRecovered(Attempt(1))) == [RecoverSinks(Attempt(2), None)]
    assert desk.heard("SinksRecovered", Heard.STALE) == 1
    assert set(commands(desk.tell(SinksRecovered(Attempt(2))), Launch)) == set(ALL)


def test_a_death_while_storage_is_read_keeps_the_question() -> None:
    desk = running_desk()
    died(desk)
    actions = desk.tell(SubtaskDied(SOURCE_0, 1, "killed"))
    assert LoadLatest() not in actions
    desk.recovered()
    assert desk.state() is JobState.DEPLOYING


def test_an_answer_of_storage_during_the_delay_is_kept_for_its_end() -> None:
    desk = running_desk()
    died(desk)
    died(desk, incarnation=2)
    assert desk.state() is JobState.RESTARTING
    assert desk.recovered() == []
    actions = desk.wait(1.0)
    assert LoadLatest() not in actions
    assert desk.state() is JobState.DEPLOYING
    desk.ready_to_running()


def test_a_hung_subtask_is_killed_and_replaced() -> None:
    desk = running_desk()
    desk.now = 20.0
    for subtask in SURVIVORS:
        desk.report(subtask, Heartbeat())
    desk.machine.check_invariants()
    assert desk.machine.next_deadline() == 30.0
    actions = desk.wait(10.0)
    assert actions[0] == StopSubtask(LAST, 1)
    assert StartSubtask(LAST, 2) in actions
    assert desk.machine.attempt == 2
    assert died(desk) == []  # the news of what we did


def test_several_hung_subtasks_are_one_failure() -> None:
    desk = running_desk()
    actions = desk.wait(30.0)
    assert [a.subtask for a in actions if isinstance(a, StopSubtask)] == ALL
    assert desk.machine.attempt == 2
    assert desk.machine.restarts == 1


def test_a_survivor_that_does_not_answer_the_reset_is_hung_too() -> None:
    desk = running_desk()
    died(desk)
    desk.recovered()
    for subtask in ALL[1:]:
        desk.report(subtask, Ready("x"))
    assert StopSubtask(SOURCE_0, 1) in desk.wait(30.0)


def test_a_process_may_start_slowly_but_not_for_ever() -> None:
    desk = Desk()
    desk.start()
    desk.recovered()
    assert desk.wait(START_TIMEOUT_S - 1) == []
    assert StopSubtask(LAST, 1) in desk.wait(1.0)


def test_waiting_for_sinks_is_no_hang() -> None:
    desk = Desk()
    desk.start()
    desk.recovered()
    desk.all_report(Ready("x"))
    assert desk.machine.next_deadline() is None
    assert desk.wait(1000.0) == []


def test_no_restart_strategy_ends_with_the_first_cause() -> None:
    desk = running_desk(replace(SETTINGS, restart=RestartSpec("none")))
    ended = died(desk)[-1]
    assert isinstance(ended, JobEnded)
    assert ended.cause is not None
    assert ended.cause.message == "last[0] died: killed"


def test_a_report_lost_for_good_restarts_the_attempt() -> None:
    """F3: the buffer of reports that wait for an earlier one is bounded."""
    desk = running_desk()
    for number in range(3, 4100):
        desk.tell(Reported(ReportEnvelope(Attempt(1), LAST, number, Heartbeat())))
    assert desk.machine.attempt == 2
    assert desk.machine.cause is not None
    assert desk.machine.cause.kind == "ReportLost"
