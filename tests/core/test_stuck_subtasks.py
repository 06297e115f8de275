"""A subtask whose loop turns and which never gets ready all the same: nobody may wait for its heartbeats for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayflow.core.events import JobState, RecoverSinks, SinksRecovered, StartSubtask, StopSubtask, SubtaskDied
from rayflow.core.ids import CheckpointId
from rayflow.core.messages import Committed, Heartbeat, Ready, Running
from tests.core.desk import ALL, LAST, MIDDLE_0, SETTINGS, Desk, manifest_of, others, running_desk

SETTINGS_PATIENT = replace(SETTINGS, hang_timeout_s=10_000.0)
BEAT_S = SETTINGS.hang_timeout_s / 3


def in_second_attempt() -> Desk:
    """`LAST` was replaced, everybody else is asked to reset."""
    desk = running_desk()
    desk.tell(SubtaskDied(LAST, 1, "killed"))
    desk.wait(2.0)
    desk.recovered()
    assert desk.state() is JobState.DEPLOYING
    return desk


def launched(desk: Desk) -> None:
    desk.all_report(Ready("address"))
    desk.tell(SinksRecovered(desk.machine.attempt))


def beats(desk: Desk, times: int) -> list[object]:
    """`MIDDLE_0` beats and says nothing else."""
    found: list[object] = []
    for _ in range(times):
        found += desk.wait(BEAT_S)
        found += desk.report(MIDDLE_0, Heartbeat())
    return found


def test_a_reset_that_waits_for_stuck_storage_ends_with_the_process() -> None:
    desk = in_second_attempt()
    for subtask in ALL:
        if subtask != MIDDLE_0:
            desk.report(subtask, Ready("address"))
    assert StopSubtask(MIDDLE_0, 1) in beats(desk, 3)
    desk.wait(2.0)
    desk.recovered()
    assert desk.machine.subtasks[MIDDLE_0].incarnation == 2
    desk.ready_to_running()


def test_a_launch_that_was_lost_ends_with_the_process() -> None:
    desk = in_second_attempt()
    launched(desk)
    for subtask in ALL:
        if subtask != MIDDLE_0:
            desk.report(subtask, Running())
    assert StopSubtask(MIDDLE_0, 1) in beats(desk, 3)


@pytest.mark.parametrize("last_moment", [0.1, 20.0])
def test_one_that_runs_at_last_is_seen_then(last_moment: float) -> None:
    desk = in_second_attempt()
    launched(desk)
    desk.wait(SETTINGS.hang_timeout_s - last_moment)
    assert not others(desk.all_report(Running()))
    assert desk.state() is JobState.RUNNING
    assert not [a for a in desk.wait(last_moment) if isinstance(a, StopSubtask)]


def test_a_new_process_is_given_time_from_its_first_sign() -> None:
    """It took long to start; its first heartbeat may come just before its Ready."""
    desk = Desk()
    desk.start()
    started = desk.recovered()
    assert len([a for a in started if isinstance(a, StartSubtask)]) == len(ALL)
    assert desk.wait(SETTINGS.hang_timeout_s * 3) == []
    assert desk.all_report(Heartbeat()) == []
    assert desk.wait(0.1) == []
    launched(desk)
    desk.all_report(Running())
    assert desk.state() is JobState.RUNNING


def test_a_last_commit_that_never_comes_is_made_by_another_attempt() -> None:
    """All is durable and no checkpoint is pending: without a deadline the job would wait for ever."""
    desk = running_desk(SETTINGS_PATIENT)
    desk.all_ended()
    desk.complete(1)
    for subtask in ALL:
        if subtask != MIDDLE_0:
            desk.report(subtask, Committed(CheckpointId(1)))
    desk.wait(SETTINGS.timeout_s - 1.0)
    assert desk.state() is JobState.RUNNING
    assert desk.machine.next_deadline() == desk.now + 1.0
    desk.wait(1.0)
    assert desk.state() is JobState.RESTARTING
    assert desk.machine.cause is not None
    assert "checkpoint 1 (final) is complete, but middle[0] did not commit it" in desk.machine.cause.message
    desk.wait(2.0)
    (recover,) = [a for a in _recovered_and_ready(desk) if isinstance(a, RecoverSinks)]
    assert recover.manifest is not None
    assert recover.manifest.checkpoint == 1


def _recovered_and_ready(desk: Desk) -> list[object]:
    return [*desk.recovered(manifest_of(1)), *desk.all_report(Ready("address"))]
