"""The work of a running subtask, from element to element, and the loop around it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rayflow.core.ids import MAX_WATERMARK, Attempt, CheckpointId
from rayflow.core.messages import (
    Abort,
    Acknowledge,
    Barrier,
    CheckpointKind,
    CommandEnvelope,
    Committed,
    Complete,
    Data,
    Decline,
    EndOfInput,
    Heartbeat,
    Idle,
    InputEnded,
    Reset,
    Shutdown,
    SplitRequest,
    Watermark,
)
from rayflow.errors import StorageError
from rayflow.runtime.ports import (
    CommandArrived,
    CreditArrived,
    ElementArrived,
    SubtaskEvent,
)
from rayflow.runtime.subtask_loop import Phase, run_subtask
from tests.runtime.fakes import batch
from tests.runtime.rig import FIRST, MID, ONWARD, SECOND, Rig

# ------------------------------------------------------------------------------------------------------------- the work


def test_a_checkpoint_from_barrier_to_commit() -> None:
    rig = Rig().running()
    rig.rows(1)
    rig.element(Barrier(CheckpointId(1)), FIRST)
    rig.rows(2)  # behind the barrier: not in the snapshot (A2, A3)
    rig.rows(3, channel=SECOND)
    rig.work_all()
    assert rig.sent() == []
    rig.element(Barrier(CheckpointId(1)), SECOND)
    rig.work(1)
    assert rig.log[-1] == ("mid", "snapshot", 1)
    assert ("mid", "process", 2) not in rig.log
    assert rig.sent() == [[1, 3], Barrier(CheckpointId(1))], "A4: behind all output of what came before it"
    assert rig.said(Acknowledge) == [], "C1: not before it is durable"
    rig.work_all()
    assert rig.log[-1] == ("mid", "process", 2)
    rig.run_tasks()
    (ack,) = rig.said(Acknowledge)
    assert ack.checkpoint == 1
    assert [h.name for h in ack.snapshot.states] == ["mid's"]
    rig.command(Complete(CheckpointId(1)))
    rig.run_tasks()
    assert rig.said(Committed) == [Committed(CheckpointId(1))]


def test_an_upload_that_fails_declines() -> None:
    rig = Rig().running()
    rig.store.error = StorageError("disk full")
    for channel in (FIRST, SECOND):
        rig.element(Barrier(CheckpointId(1)), channel)
    rig.work_all()
    rig.run_tasks()
    (decline,) = rig.said(Decline)
    assert decline.checkpoint == 1
    assert decline.reason == "mid[0]: StorageError: disk full"
    assert rig.phase() is Phase.RUNNING


def test_an_aborted_checkpoint_is_not_acknowledged() -> None:
    rig = Rig().running()
    for channel in (FIRST, SECOND):
        rig.element(Barrier(CheckpointId(1)), channel)
    rig.work_all()
    rig.command(Abort(CheckpointId(1)))
    rig.run_tasks()
    assert rig.said(Acknowledge) == []
    assert rig.phase() is Phase.RUNNING


def test_credit_is_returned_when_rows_are_taken_and_not_when_they_arrive() -> None:
    rig = Rig().running()
    rig.rows(1, 2)
    assert rig.host.credit == []
    rig.work_all()
    assert rig.host.credit == [(FIRST, 16)]


def test_output_without_credit_stops_the_input() -> None:
    rig = Rig().running()
    for start in range(0, 400, 40):
        rig.rows(*range(start, start + 40))
    rig.work(20, seconds=0.02)
    sent = sum(len(e) for e in rig.sent() if isinstance(e, list))
    assert sent * 8 <= 1024, "F1"
    assert not rig.busy()
    taken = len(rig.host.credit)
    assert taken < 10, "F3"
    rig.subtask.handle(CreditArrived(rig.attempt, ONWARD, sent * 8))
    assert rig.busy()
    rig.work(20, seconds=0.02)
    assert len(rig.host.credit) > taken


def test_the_end_of_all_inputs_ends_the_subtask() -> None:
    rig = Rig().running()
    rig.rows(1)
    rig.element(EndOfInput(), FIRST)
    rig.work_all()
    assert ("mid", "end") not in rig.log
    rig.element(EndOfInput(), SECOND)
    rig.work_all()
    assert rig.log[-2:] == [("mid", "watermark", MAX_WATERMARK), ("mid", "end")]
    # The operator has turned the last watermark into one below it; else it would not be sent, the end says it all.
    assert rig.sent() == [[1], Watermark(MAX_WATERMARK - 1), [99], EndOfInput()]
    assert [type(r) for r in rig.host.reports] == [Heartbeat, InputEnded]
    assert rig.host.reports[0].metrics["rows_in"] == 1  # type: ignore[union-attr]
    rig.trigger(4, CheckpointKind.FINAL)
    rig.run_tasks()
    (ack,) = rig.said(Acknowledge)
    assert ack.checkpoint == 4
    assert Barrier(CheckpointId(4), CheckpointKind.FINAL) not in rig.sent(), "A6: nothing follows the end"


def test_watermarks_are_forwarded_when_they_have_risen() -> None:
    rig = Rig().running()
    rig.element(Watermark(10), FIRST)
    rig.element(Watermark(20), SECOND)
    rig.work_all()
    assert rig.sent() == [Watermark(9)], "W2, and what the operator makes of it"
    rig.work(3, seconds=1)
    assert rig.sent() == [Watermark(9)], "W1: said once"
    rig.element(Watermark(30), FIRST)
    rig.work_all()
    assert rig.sent() == [Watermark(9), Watermark(19)]


def test_waiting_rows_go_out_after_the_linger_time() -> None:
    rig = Rig().running()
    rig.rows(1)
    rig.work_all()
    assert rig.sent() == []
    deadline = rig.subtask.next_deadline()
    assert deadline is not None
    assert deadline <= 100.01
    rig.work(seconds=0.01)
    assert rig.sent() == [[1]]


# -------------------------------------------------------------------------------------------------------------- sources


def test_a_source_asks_for_splits_and_reads_them_to_the_end() -> None:
    rig = Rig("src", splits={"a": [[1], [2]], "b": [[3]]}).running()
    assert not rig.busy()
    rig.work()
    assert rig.said(SplitRequest) == [SplitRequest()]
    rig.assign("a")
    assert rig.busy()
    rig.work()
    assert len(rig.said(SplitRequest)) == 2, "one ahead"
    rig.assign("b", no_more=True)
    while not rig.said(InputEnded):
        rig.work(seconds=0.01)
    assert [e for each in rig.sent() for e in (each if isinstance(each, list) else [each])] == [1, 2, 3, EndOfInput()]
    assert rig.said(InputEnded) == [InputEnded()]
    assert not rig.polling()
    assert rig.subtask.metrics()["rows_in"] == 3


def test_an_idle_source_is_polled_again_after_a_pause() -> None:
    rig = Rig("src", splits={"a": [None, [1]]}).running()
    rig.assign("a", no_more=True)
    rig.work()
    assert not rig.busy()
    assert rig.polling()
    deadline = rig.subtask.next_deadline()
    assert deadline is not None
    assert 100.0 < deadline <= 100.01
    rig.host.time = deadline
    assert rig.busy()
    rig.work_all()
    rig.work(seconds=0.02)
    assert rig.said(InputEnded) or rig.sent()


def test_a_source_is_triggered_and_its_positions_are_those_of_the_barrier() -> None:
    rig = Rig("src", splits={"a": [[1], [2]]}).running()
    rig.assign("a")
    rig.work()
    rig.trigger(1)
    rig.work_all()
    assert rig.sent()[:2] == [[1], Barrier(CheckpointId(1))]
    rig.run_tasks()
    (ack,) = rig.said(Acknowledge)
    assert [(s.split_id, s.position) for s in ack.snapshot.splits] == [("a", 1)]


def test_a_stop_barrier_is_the_last_a_source_sends() -> None:
    rig = Rig("src", splits={"a": [[1], [2]]}).running()
    rig.assign("a", no_more=True)
    rig.work()
    rig.trigger(1, CheckpointKind.STOP)
    assert not rig.polling()
    rig.work(5, seconds=1)
    assert rig.sent() == [[1], Barrier(CheckpointId(1), CheckpointKind.STOP)]


def test_skipped_rows_are_in_the_metrics_when_there_are_any() -> None:
    rig = Rig("src", splits={"a": [[1], "skip", "skip"]}).running()
    rig.assign("a", no_more=True)
    rig.work()
    assert "skipped_rows" not in rig.subtask.metrics()
    while not rig.said(InputEnded):
        rig.work(seconds=0.01)
    assert rig.subtask.metrics()["skipped_rows"] == 2


# ------------------------------------------------------------------------------------------------------ the loop itself


class Script:
    """An inbox that gives one list of events a call, and writes down how long the loop was ready to wait."""

    def __init__(self, rig: Rig, *steps: Sequence[SubtaskEvent]) -> None:
        self.rig = rig
        self.steps = list(steps)
        self.waits: list[float | None] = []

    def drain(self, timeout_s: float | None) -> Sequence[SubtaskEvent]:
        self.waits.append(timeout_s)
        return self.steps.pop(0)


def test_run_subtask_waits_only_when_there_is_nothing_to_do_and_ends_with_shutdown() -> None:

    rig = Rig().running()
    one = batch(1)
    rows = ElementArrived(rig.attempt, FIRST, Data(one, one.nbytes))
    bye = CommandArrived(CommandEnvelope(rig.attempt, MID, rig.sequence, Shutdown()))
    inbox = Script(rig, [rows, rows], [], [], [bye])
    run_subtask(rig.subtask, inbox, rig.host.now)
    assert rig.subtask.closed
    assert rig.log.count(("mid", "process", 1)) == 2
    assert inbox.waits[1] == 0.0, "one element is left"
    assert all(w is None or w >= 0 for w in inbox.waits)
    assert inbox.waits[2] == pytest.approx(0.01), "until the linger time is over"


def test_run_subtask_waits_for_ever_when_nothing_can_happen_by_itself() -> None:

    rig = Rig()
    reset = CommandArrived(CommandEnvelope(Attempt(1), MID, 0, Reset()))
    bye = CommandArrived(CommandEnvelope(Attempt(1), MID, 1, Shutdown()))
    inbox = Script(rig, [], [reset], [bye])
    run_subtask(rig.subtask, inbox, rig.host.now)
    assert inbox.waits == [None, None, None]


def test_idleness_goes_on_behind_the_output_and_is_taken_back_before_the_next_row() -> None:
    rig = Rig("mid").running()
    rig.element(Watermark(50), FIRST)
    rig.rows(7)
    rig.element(Idle(), FIRST)
    rig.element(EndOfInput(), SECOND)
    rig.work_all()
    rig.work(seconds=0.1)
    assert rig.sent() == [Watermark(49), [7], Idle()]
    rig.work(3, seconds=0.1)
    assert rig.sent()[3:] == [], "said once"
    rig.element(Watermark(50), FIRST)
    rig.rows(8)
    rig.work_all()
    rig.work(seconds=0.01)
    assert rig.sent()[3:] == [Watermark(49), [8]]
    rig.element(Watermark(60), FIRST)
    rig.work_all()
    assert rig.sent()[5:] == [Watermark(59)]


def test_one_idle_input_is_not_enough() -> None:
    rig = Rig("mid").running()
    rig.element(Idle(), FIRST)
    rig.work_all()
    rig.work(3, seconds=0.1)
    assert rig.sent() == []


def test_while_output_waits_for_credit_nothing_is_idle() -> None:
    rig = Rig("mid", inflight_bytes=1024).running()
    for _ in range(3):
        rig.rows(*range(60))
        rig.work_all()
        rig.work(seconds=0.02)
    assert rig.subtask._machine is not None
    assert rig.subtask._machine.output_blocked
    rig.element(Idle(), FIRST)
    rig.element(Idle(), SECOND)
    rig.work(3, seconds=0.1)
    assert Idle() not in rig.sent()


def test_readers_hear_of_a_complete_checkpoint() -> None:
    rig = Rig("src", splits={"a": [[1], [2], [3]]}).running()
    rig.assign("a", no_more=True)
    rig.work()
    rig.trigger(1)
    rig.work()
    rig.run_tasks()
    assert ("checkpointed", 1) not in rig.log
    rig.command(Complete(CheckpointId(1)))
    assert rig.log[-1] == ("checkpointed", 1)
