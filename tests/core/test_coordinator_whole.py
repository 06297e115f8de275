"""Sinks that commit as a whole: the coordinator commits first, and only then tells the subtasks (C2, S1)."""

from __future__ import annotations

from dataclasses import replace

from rayflow.core.events import CommitWhole, JobState, ManifestWritten, Retain, WholeCommitted, WholeFailed
from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.messages import Committed, Complete, FailureCause, Heartbeat
from rayflow.core.roster import Heard
from tests.core.desk import ALL, SETTINGS, Desk, commands
from tests.core.fakes import small_topology

ONE = CheckpointId(1)


def whole_desk() -> Desk:
    desk = Desk(SETTINGS, replace(small_topology(), whole=frozenset({"write"})))
    desk.start()
    desk.to_running()
    return desk


def heard(desk: Desk, name: str) -> list[Heard]:
    return [how for (what, how), n in desk.machine.heard.items() if what == name and n]


def test_subtasks_are_told_behind_the_commit() -> None:
    desk = whole_desk()
    desk.wait(10)
    actions = desk.complete(1)
    (commit,) = [a for a in actions if isinstance(a, CommitWhole)]
    assert (commit.attempt, commit.checkpoint) == (desk.machine.attempt, ONE)
    assert len(commit.snapshots) == len(ALL)
    assert actions.index(commit) < actions.index(Retain(ONE)), "its files are needed for it"
    assert commands(actions, Complete) == {}
    told = desk.tell(WholeCommitted(desk.machine.attempt, ONE))
    assert list(commands(told, Complete)) == ALL
    assert desk.tell(WholeCommitted(desk.machine.attempt, ONE)) == []
    assert heard(desk, "WholeCommitted") == [Heard.ACCEPTED, Heard.DUPLICATE]
    desk.tell(WholeCommitted(desk.machine.attempt, CheckpointId(99)))
    assert Heard.UNKNOWN in heard(desk, "WholeCommitted")


def test_the_job_ends_behind_the_commit() -> None:
    desk = whole_desk()
    desk.all_ended()
    desk.complete(1)
    assert desk.state() is JobState.RUNNING
    desk.tell(WholeCommitted(desk.machine.attempt, ONE))
    desk.all_report(Committed(ONE))
    assert desk.state() is JobState.CLEANING


def test_a_last_commit_that_does_not_come_is_named() -> None:
    desk = whole_desk()
    desk.all_ended()
    desk.complete(1)
    desk.now += 61
    desk.all_report(Heartbeat())
    assert desk.machine.cause is not None
    assert "is complete, but sink 'write' did not commit it within 60 s" in desk.machine.cause.message


def test_a_commit_that_fails_is_another_attempt_and_no_other_manifest() -> None:
    desk = whole_desk()
    desk.wait(10)
    desk.complete(1)
    first = desk.machine.attempt
    desk.tell(WholeFailed(first, ONE, FailureCause("the lake is down")))
    assert desk.machine.state is JobState.RESTARTING
    assert desk.machine.last_completed == ONE, "it stays complete: recovery commits what it names"
    assert desk.tell(WholeCommitted(first, ONE)) == []
    assert heard(desk, "WholeCommitted") == [Heard.STALE]
    desk.tell(ManifestWritten(ONE))
    assert desk.machine.counts.completed == 1


def test_a_lost_commit_ends_the_job_even_when_it_is_heard_late() -> None:
    desk = whole_desk()
    desk.wait(10)
    desk.complete(1)
    lost = FailureCause("it is gone", kind="CommitLostError", fatal=True)
    desk.tell(WholeFailed(Attempt(desk.machine.attempt - 1), ONE, lost))
    assert desk.machine.state is JobState.FAILED
