"""The life of an attempt in a subtask, its failures, and that nothing of another attempt gets into it (rule C6)."""

from __future__ import annotations

import pytest

from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.manifest import SnapshotStats, SubtaskSnapshot
from rayflow.core.messages import (
    Abort,
    Barrier,
    Committed,
    Complete,
    EndOfInput,
    Failed,
    Heartbeat,
    Ready,
    Running,
    Shutdown,
    Watermark,
)
from rayflow.errors import CommitLostError, CorruptCheckpointError, DataError
from rayflow.operators.base import FrozenTable
from rayflow.runtime.ports import (
    BackgroundFailed,
    ChannelBroken,
    CommitDone,
    CreditArrived,
    Drained,
    Nothing,
    SubtaskEvent,
    Uploaded,
    UploadFailed,
)
from rayflow.runtime.subtask_loop import BROKEN_GRACE_S, Phase, SubtaskRuntime
from tests.runtime.fakes import batch
from tests.runtime.rig import FIRST, MID, ONWARD, SECOND, Rig

# ----------------------------------------------------------------------------------------------- the life of an attempt


def test_new_resetting_ready_running() -> None:
    rig = Rig()
    assert rig.phase() is Phase.NEW
    assert not rig.busy()
    rig.work()
    assert rig.host.envelopes == []
    rig.reset()
    assert rig.phase() is Phase.RESETTING
    assert rig.host.accepted == [(1, [FIRST, SECOND])]
    assert rig.host.reports == []
    rig.run_tasks()
    assert rig.phase() is Phase.READY
    assert rig.host.reports == [Ready("here:1", 7, "node-a")]
    rig.launch()
    assert rig.phase() is Phase.RUNNING
    assert rig.host.connected == [(1, {ONWARD: "out:1"})]
    assert rig.host.reports[1:] == [Running()]
    assert [e.sequence for e in rig.host.envelopes] == [0, 1]
    assert rig.log == [("mid", "open"), ("mid", "restore")]


def test_ready_waits_for_the_background_tasks_of_the_attempt_before() -> None:
    rig = Rig().running()
    for channel in (FIRST, SECOND):
        rig.element(Barrier(CheckpointId(1)), channel)
    rig.work_all()
    assert len(rig.host.tasks) == 1
    rig.reset(2)
    assert len(rig.host.tasks) == 2, "behind the upload, not instead of it"
    rig.subtask.handle(rig.host.tasks.popleft()())
    assert rig.phase() is Phase.RESETTING
    rig.run_tasks()
    assert rig.phase() is Phase.READY


def test_a_launch_before_it_is_ready_is_refused_by_the_protocol() -> None:
    rig = Rig()
    rig.reset()
    rig.launch()
    (failed,) = rig.said(Failed)
    assert failed.cause.kind == "ProtocolError"
    assert failed.cause.fatal
    assert rig.phase() is Phase.FAILED


def test_states_are_read_and_given_back() -> None:
    rig = Rig()
    handle = rig.store.add(CheckpointId(3), "mid-op", 0, 1, FrozenTable("mid's", (batch(1, 2),)))
    rig.reset()
    rig.run_tasks()
    rig.launch(handle, restored_from=3)
    assert rig.log == [("mid", "open"), ("mid", "restore", "mid's")]


def test_a_state_that_is_corrupt_ends_the_job() -> None:
    rig = Rig()
    handle = rig.store.add(CheckpointId(3), "mid-op", 0, 1, FrozenTable("mid's", (batch(1, 2),)))
    rig.store.error = CorruptCheckpointError("state file chk-3/x is torn")
    rig.reset()
    rig.run_tasks()
    rig.launch(handle, restored_from=3)
    (failed,) = rig.said(Failed)
    assert failed.cause.fatal
    assert failed.cause.message == "step 'mid' subtask 0/1: state file chk-3/x is torn"


def test_shutdown_closes_for_ever() -> None:
    rig = Rig(heartbeat_s=1.0).running()
    rig.command(Shutdown())
    assert rig.subtask.closed
    assert ("mid", "close") in rig.log
    rig.reset(2)
    rig.work(3, seconds=10)
    assert rig.subtask.closed
    assert rig.host.envelopes == [], "not even a heartbeat"
    assert rig.subtask.next_deadline() is None or rig.subtask.closed
    rig.subtask.close()


def test_a_close_that_raises_does_not_keep_the_next_attempt_from_starting(capsys: pytest.CaptureFixture[str]) -> None:
    rig = Rig(raises={"close": RuntimeError("will not close")}).running()
    rig.reset(2)
    rig.run_tasks()
    assert rig.phase() is Phase.READY
    assert "will not close" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ another attempt


def events_of(attempt: int) -> list[SubtaskEvent]:
    of, one = Attempt(attempt), CheckpointId(1)
    return [
        CreditArrived(of, ONWARD, 5),
        Uploaded(of, one, SubtaskSnapshot(MID, (), (), (), SnapshotStats())),
        UploadFailed(of, one, "full"),
        CommitDone(of, one),
        BackgroundFailed(of, RuntimeError("late")),
        ChannelBroken(of, ONWARD, "gone"),
        Drained(of),
    ]


@pytest.mark.parametrize("attempt", [0, 1, 3])
def test_events_of_another_attempt_change_nothing(attempt: int) -> None:
    rig = Rig().running(2)
    before = rig.subtask.metrics()
    for event in events_of(attempt):
        rig.subtask.handle(event)
    rig.element(Barrier(CheckpointId(9)), attempt=attempt)
    rig.element(EndOfInput(), attempt=attempt)
    assert not rig.busy()
    rig.host.time += BROKEN_GRACE_S
    rig.work()
    assert rig.phase() is Phase.RUNNING
    assert rig.host.reports == []
    assert not rig.host.tasks
    assert rig.subtask.metrics() == before


def test_commands_of_an_older_attempt_change_nothing() -> None:
    rig = Rig().running(2)
    rig.command(Shutdown(), sequence=0, attempt=1)
    rig.command(Complete(CheckpointId(1)), sequence=1, attempt=1)
    assert rig.phase() is Phase.RUNNING
    assert rig.host.reports == []


def test_whatever_comes_first_of_a_newer_attempt_ends_the_older_and_waits_for_its_turn() -> None:
    rig = Rig().running(1)
    rig.attempt, rig.sequence = Attempt(2), 0
    rig.command(Shutdown(), sequence=1)
    assert rig.phase() is Phase.RESETTING
    assert rig.subtask.attempt == 2
    rig.reset(2)
    assert rig.subtask.closed, "the Reset was number 0, then the Shutdown had its turn"


def test_commands_that_are_repeated_or_early_are_put_in_order() -> None:
    rig = Rig("out").running()
    barrier = Barrier(CheckpointId(1))
    rig.element(barrier, ONWARD)
    rig.work_all()
    rig.run_tasks()
    first = rig.sequence
    rig.command(Abort(CheckpointId(2)), sequence=first + 1)
    assert rig.said(Committed) == []
    rig.command(Complete(CheckpointId(1)), sequence=first)
    rig.command(Complete(CheckpointId(1)), sequence=first)
    rig.run_tasks()
    assert rig.said(Committed) == [Committed(CheckpointId(1))]
    assert rig.committables() == [["file 1"]]


class HearsAll(SubtaskRuntime):
    """Broken on purpose (rule C6): takes events of every attempt for its own."""

    def _handle(self, event: SubtaskEvent) -> None:
        if hasattr(event, "attempt"):
            object.__setattr__(event, "attempt", self.attempt)
        super()._handle(event)


def test_a_subtask_that_hears_all_attempts_is_caught() -> None:
    rig = Rig()
    rig.subtask = HearsAll(MID, rig.spec, rig.host, rig.store)
    rig.running(2)
    for event in events_of(1):
        rig.subtask.handle(event)
    assert rig.host.reports != []


# ------------------------------------------------------------------------------------------------------- reset in place


def test_a_reset_drops_everything() -> None:
    rig = Rig().running()
    rig.rows(1, 2)
    rig.work_all()  # waits in the emitter
    rig.rows(3)  # waits in the gate
    rig.element(Barrier(CheckpointId(1)))  # one of two channels is aligned
    rig.subtask.handle(ChannelBroken(rig.attempt, ONWARD, "gone"))
    rig.host.sent.clear()
    disconnects = rig.host.disconnects
    rig.running(2)
    assert rig.host.disconnects == disconnects + 1
    rig.work(5, seconds=BROKEN_GRACE_S)
    assert [e for e in rig.sent() if not isinstance(e, Watermark)] == []
    assert rig.host.reports == []
    rig.rows(7)
    rig.work_all()
    assert ("mid", "process", 7) in rig.log
    assert not any(entry[:2] == ("mid", "process") and entry != ("mid", "process", 7) for entry in rig.log)


def test_reports_of_the_new_attempt_are_numbered_anew() -> None:
    rig = Rig().running()
    rig.reset(2)
    rig.run_tasks()
    assert [(e.attempt, e.sequence) for e in rig.host.envelopes] == [(2, 0)]


def test_background_tasks_that_have_not_begun_do_nothing_after_a_reset() -> None:
    rig = Rig("out").running()
    rig.element(Barrier(CheckpointId(1)), ONWARD)
    rig.work_all()
    rig.run_tasks()
    rig.command(Complete(CheckpointId(1)))
    rig.element(Barrier(CheckpointId(2)), ONWARD)
    rig.work_all()
    commit, upload = rig.host.tasks
    rig.reset(2)
    assert commit() == Nothing()
    assert upload() == Nothing()
    assert rig.committables() == []


def test_the_answer_of_a_task_that_was_running_at_the_reset_is_of_another_attempt() -> None:
    rig = Rig("out").running()
    rig.element(Barrier(CheckpointId(1)), ONWARD)
    rig.work_all()
    answer = rig.host.tasks.popleft()()
    assert isinstance(answer, Uploaded)
    rig.reset(2)
    rig.run_tasks()
    rig.host.envelopes.clear()
    rig.subtask.handle(answer)
    assert rig.host.reports == []


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_failure_is_told_once_and_then_it_holds_still() -> None:
    rig = Rig(raises={"process": ValueError("what a row")}).running()
    rig.rows(1)
    rig.rows(2)
    rig.work_all()
    (failed,) = rig.host.reports
    assert isinstance(failed, Failed)
    assert failed.cause.message == "step 'mid' subtask 0/1 raised ValueError: what a row"
    assert failed.cause.kind == "UserCodeError(ValueError)"
    assert "what a row" in failed.cause.traceback
    assert failed.cause.position == "after checkpoint None"
    assert not failed.cause.fatal
    assert isinstance(rig.subtask.last_error, Exception)
    rig.rows(3)
    for event in events_of(1):
        rig.subtask.handle(event)
    rig.trigger(5)
    rig.work(3, seconds=1)
    assert not rig.busy()
    assert len(rig.host.reports) == 1
    assert rig.phase() is Phase.FAILED


def test_a_failed_one_can_be_reset_and_shut_down() -> None:
    rig = Rig(raises={"process": ValueError("what a row")}).running()
    rig.rows(1)
    rig.work_all()
    rig.running(2)
    rig.rows(1)
    rig.work_all()
    rig.command(Shutdown())
    assert rig.subtask.closed


def test_the_failure_of_a_source_tells_its_position() -> None:
    rig = Rig("src", splits={"a": [[1], DataError("line 2 of a")]}).running()
    rig.assign("a", no_more=True)
    rig.work_all()
    (failed,) = rig.said(Failed)
    assert failed.cause.position == "split a at 1"
    assert failed.cause.message == "step 'src' subtask 0/2: line 2 of a"


def test_a_background_task_that_raises_fails_the_attempt() -> None:
    rig = Rig("out").running()
    rig.element(Barrier(CheckpointId(1)), ONWARD)
    rig.work_all()
    rig.run_tasks()
    rig.committer.error = CommitLostError("part-0 is gone")
    rig.command(Complete(CheckpointId(1)))
    rig.run_tasks()
    (failed,) = rig.said(Failed)
    assert failed.cause.fatal
    assert "part-0 is gone" in failed.cause.message


def test_a_broken_channel_is_a_failure_only_after_its_grace() -> None:
    """The coordinator usually hears of the death first and resets everybody."""
    rig = Rig().running()
    rig.subtask.handle(ChannelBroken(rig.attempt, ONWARD, "connection reset"))
    rig.work()
    rig.subtask.handle(ChannelBroken(rig.attempt, ONWARD, "again"))
    rig.work(seconds=BROKEN_GRACE_S - 0.01)
    assert rig.said(Failed) == []
    deadline = rig.subtask.next_deadline()
    assert deadline is not None
    assert deadline <= 100.0 + BROKEN_GRACE_S
    rig.work(seconds=0.02)
    (failed,) = rig.said(Failed)
    assert "mid[0]->out[0]#1 broke: connection reset" in failed.cause.message
    assert failed.cause.kind == "ConnectionError"
    assert not failed.cause.fatal


# ----------------------------------------------------------------------------------------------------------- heartbeats


def test_heartbeats_come_from_the_loop_in_every_phase_of_an_attempt() -> None:
    rig = Rig(heartbeat_s=1.0, raises={"process": ValueError("x")})
    rig.work(seconds=5)
    assert rig.host.reports == []
    rig.reset()
    rig.work()
    assert len(rig.said(Heartbeat)) == 1, "while resetting"
    rig.run_tasks()
    rig.work(seconds=0.5)
    assert len(rig.said(Heartbeat)) == 1, "not before it is due"
    rig.work(seconds=0.5)
    assert len(rig.said(Heartbeat)) == 2
    assert rig.subtask.next_deadline() == rig.host.time + 1.0
    rig.launch()
    rig.rows(1)
    rig.work(seconds=1)
    assert rig.phase() is Phase.FAILED
    rig.work(seconds=1)
    assert len(rig.said(Heartbeat)) == 3


def test_without_an_interval_there_are_no_heartbeats() -> None:
    rig = Rig().running()
    rig.work(10, seconds=10)
    assert rig.said(Heartbeat) == []
