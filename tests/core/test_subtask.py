"""The subtask machine: tables of events and actions."""

from __future__ import annotations

import pytest

from rayflow.core.events import (
    AdvanceWatermark,
    Broadcast,
    CommitUpTo,
    FinishInput,
    ProcessData,
    ReturnCredit,
    Send,
    SubtaskAction,
    TakeSnapshot,
    Tell,
)
from rayflow.core.ids import MAX_WATERMARK, ChannelId, CheckpointId, SubtaskId, Time
from rayflow.core.manifest import SubtaskSnapshot
from rayflow.core.messages import (
    Abort,
    Acknowledge,
    Barrier,
    CheckpointKind,
    Complete,
    Data,
    Decline,
    EndOfInput,
    Idle,
    InputEnded,
    Trigger,
    Watermark,
)
from rayflow.core.subtask import SubtaskMachine
from rayflow.errors import ProtocolError

ME = SubtaskId("me", 0)
A, B = (ChannelId(0, SubtaskId("up", i), ME) for i in range(2))
OUT = ChannelId(1, ME, SubtaskId("down", 0))
PERIODIC = CheckpointKind.PERIODIC


def machine(*inputs: ChannelId, exactly_once: bool = True) -> SubtaskMachine:
    return SubtaskMachine(ME, inputs=inputs, outputs=[OUT], exactly_once=exactly_once, credit_bytes=100)


def take_all(m: SubtaskMachine) -> list[SubtaskAction]:
    taken: list[SubtaskAction] = []
    while m.has_input:
        taken += m.take_input(Time(0.0))
        m.check_invariants()
    return taken


def barrier(n: int) -> Barrier:
    return Barrier(CheckpointId(n))


def snapshot_of(n: int) -> TakeSnapshot:
    return TakeSnapshot(CheckpointId(n), PERIODIC, 0.0)


def test_data_is_processed_and_its_credit_returned_when_taken() -> None:
    m = machine(A)
    m.on_element(A, Data("batch", 7))
    assert take_all(m) == [ProcessData(A, "batch"), ReturnCredit(A, 7)]


def test_a_blocked_channel_yields_nothing_and_keeps_its_credit() -> None:
    m = machine(A, B)
    m.on_element(A, barrier(1))
    m.on_element(A, Data("behind", 5))
    assert take_all(m) == []
    m.on_element(B, Data("before", 3))
    assert take_all(m) == [ProcessData(B, "before"), ReturnCredit(B, 3)]
    m.on_element(B, barrier(1))
    assert take_all(m) == [snapshot_of(1), Broadcast(barrier(1)), ProcessData(A, "behind"), ReturnCredit(A, 5)]


def test_at_least_once_goes_on_reading_the_fast_channel() -> None:
    m = machine(A, B, exactly_once=False)
    m.on_element(A, barrier(1))
    m.on_element(A, Data("behind", 5))
    assert take_all(m) == [ProcessData(A, "behind"), ReturnCredit(A, 5)]


def test_the_barrier_does_not_wait_for_the_upload_and_the_acknowledgement_does() -> None:
    m = machine(A)
    m.on_element(A, barrier(1))
    assert take_all(m) == [snapshot_of(1), Broadcast(barrier(1))]
    snapshot = SubtaskSnapshot(ME)
    assert m.on_uploaded(CheckpointId(1), snapshot) == [Tell(Acknowledge(CheckpointId(1), snapshot))]
    with pytest.raises(ProtocolError, match="C1"):
        m.on_uploaded(CheckpointId(1), snapshot)


def test_an_upload_that_fails_is_declined() -> None:
    m = machine()
    m.on_trigger(Trigger(CheckpointId(1), PERIODIC))
    assert m.on_upload_failed(CheckpointId(1), "disk full") == [Tell(Decline(CheckpointId(1), "disk full"))]


def test_an_upload_that_ends_after_the_abort_is_not_acknowledged() -> None:
    m = machine()
    m.on_trigger(Trigger(CheckpointId(1), PERIODIC))
    m.on_abort(Abort(CheckpointId(1)))
    assert m.on_uploaded(CheckpointId(1), SubtaskSnapshot(ME)) == []
    m.on_trigger(Trigger(CheckpointId(2), PERIODIC))
    m.on_abort(Abort(CheckpointId(2)))
    assert m.on_upload_failed(CheckpointId(2), "disk full") == []


def test_an_abort_that_comes_before_the_barrier_stops_the_alignment() -> None:
    m = machine(A, B)
    m.on_abort(Abort(CheckpointId(1)))
    m.on_element(A, barrier(1))
    m.on_element(A, Data("behind", 5))
    assert take_all(m) == [ProcessData(A, "behind"), ReturnCredit(A, 5)]


def test_a_source_is_triggered_once() -> None:
    m = machine()
    trigger = Trigger(CheckpointId(3), PERIODIC)
    assert m.on_trigger(trigger) == [snapshot_of(3), Broadcast(barrier(3))]
    assert m.on_trigger(trigger) == []


def test_a_trigger_for_a_subtask_with_live_input_is_refused() -> None:
    with pytest.raises(ProtocolError, match="A3"):
        machine(A).on_trigger(Trigger(CheckpointId(1), PERIODIC))


def test_the_end_of_all_input_flushes_and_is_told() -> None:
    m = machine(A, B)
    m.on_element(A, EndOfInput())
    assert take_all(m) == []
    m.on_element(B, EndOfInput())
    assert take_all(m) == [
        AdvanceWatermark(MAX_WATERMARK),
        FinishInput(),
        Broadcast(EndOfInput()),
        Tell(InputEnded()),
    ]
    assert m.on_trigger(Trigger(CheckpointId(1), CheckpointKind.FINAL)) == [
        TakeSnapshot(CheckpointId(1), CheckpointKind.FINAL, 0.0)
    ]


def test_the_end_of_the_last_channel_can_complete_an_alignment() -> None:
    m = machine(A, B)
    m.on_element(A, barrier(1))
    m.on_element(A, EndOfInput())
    m.on_element(B, EndOfInput())
    assert take_all(m) == [
        snapshot_of(1),
        Broadcast(barrier(1)),
        AdvanceWatermark(MAX_WATERMARK),
        FinishInput(),
        Broadcast(EndOfInput()),
        Tell(InputEnded()),
    ]
    assert m.on_trigger(Trigger(CheckpointId(1), PERIODIC)) == []


def test_a_stop_barrier_stops_a_source() -> None:
    m = machine()
    m.on_trigger(Trigger(CheckpointId(1), CheckpointKind.STOP))
    assert m.stopped


def test_complete_commits_once_and_only_what_was_snapshotted() -> None:
    m = machine()
    m.on_trigger(Trigger(CheckpointId(1), PERIODIC))
    assert m.on_complete(Complete(CheckpointId(1))) == [CommitUpTo(CheckpointId(1))]
    assert m.on_complete(Complete(CheckpointId(1))) == []
    with pytest.raises(ProtocolError, match="C2"):
        m.on_complete(Complete(CheckpointId(2)))


def test_watermarks_advance_by_the_slowest_channel() -> None:
    m = machine(A, B)
    m.on_element(A, Watermark(10))
    m.on_element(B, Watermark(4))
    assert take_all(m) == [AdvanceWatermark(4)]


def test_output_waits_for_credit_and_blocks_the_subtask() -> None:
    m = machine(A)
    assert m.offer(OUT, Data("x", 80)) == [Send(OUT, Data("x", 80))]
    assert m.offer(OUT, Data("y", 80)) == []
    assert m.output_blocked
    assert m.on_credit(OUT, 80) == [Send(OUT, Data("y", 80))]
    assert not m.output_blocked


class NeverBlocks(SubtaskMachine):
    """Broken on purpose: claims exactly-once and never blocks (breaks A2)."""

    def __init__(self, *inputs: ChannelId) -> None:
        super().__init__(ME, inputs=inputs, outputs=[OUT], exactly_once=False, credit_bytes=100)


def test_an_engine_that_skips_alignment_is_caught() -> None:
    m = NeverBlocks(A, B)
    m.on_element(A, barrier(1))
    m.on_element(A, Data("behind", 5))
    actions = take_all(m)
    m.on_element(B, barrier(1))
    actions += take_all(m)
    assert actions.index(ProcessData(A, "behind")) < actions.index(snapshot_of(1))


def test_an_idle_channel_is_left_out_until_its_next_watermark() -> None:
    m = machine(A, B)
    m.on_element(A, Watermark(10))
    m.on_element(B, Idle())
    assert take_all(m) == [AdvanceWatermark(10)]
    m.on_element(A, Idle())
    assert take_all(m) == []
    assert m.inputs_idle
    m.on_element(B, Watermark(3))
    assert take_all(m) == [], "it lags behind what was said (W1)"
    assert m.input_watermark == 10
    m.on_element(B, EndOfInput())
    assert take_all(m) == [], "A may come back (W2)"
    m.on_element(A, EndOfInput())
    assert AdvanceWatermark(MAX_WATERMARK) in take_all(m)


def test_idleness_waits_behind_the_data_and_the_barrier_of_its_channel() -> None:
    m = machine(A, B)
    m.on_element(A, barrier(1))
    m.on_element(A, Idle())
    m.on_element(B, Watermark(5))
    assert take_all(m) == [], "A is blocked, and with it that it is idle (A2)"
    m.on_element(B, barrier(1))
    assert take_all(m) == [snapshot_of(1), Broadcast(barrier(1)), AdvanceWatermark(5)]
