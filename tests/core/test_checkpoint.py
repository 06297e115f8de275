"""One checkpoint from its trigger to its end (rules C1, C2, C3)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayflow.core.checkpoint import AckOutcome, CheckpointState, PendingCheckpoint
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import SubtaskSnapshot
from rayflow.core.messages import CheckpointKind
from rayflow.errors import ProtocolError

SUBTASKS = [SubtaskId("a", 0), SubtaskId("a", 1), SubtaskId("b", 0)]


def pending() -> PendingCheckpoint:
    return PendingCheckpoint(
        CheckpointId(5), kind=CheckpointKind.PERIODIC, attempt=Attempt(1), expected=SUBTASKS, triggered_at=0.0
    )


def acknowledge(p: PendingCheckpoint, subtask: SubtaskId) -> AckOutcome:
    outcome = p.acknowledge(subtask, SubtaskSnapshot(subtask))
    p.check_invariants()
    return outcome


def written() -> PendingCheckpoint:
    p = pending()
    for subtask in SUBTASKS:
        acknowledge(p, subtask)
    p.begin_writing()
    return p


def test_each_subtask_acknowledges_once() -> None:
    p = pending()
    assert acknowledge(p, SUBTASKS[0]) is AckOutcome.ACCEPTED
    assert acknowledge(p, SUBTASKS[0]) is AckOutcome.DUPLICATE
    assert acknowledge(p, SubtaskId("c", 0)) is AckOutcome.UNKNOWN
    assert p.acknowledge(SUBTASKS[1], SubtaskSnapshot(SUBTASKS[2])) is AckOutcome.UNKNOWN
    assert p.missing == set(SUBTASKS[1:])
    assert p.lacks(SUBTASKS[1])
    assert not p.lacks(SUBTASKS[0])


def test_a_manifest_without_a_subtask_is_never_written() -> None:
    p = pending()
    acknowledge(p, SUBTASKS[0])
    with pytest.raises(ProtocolError, match=r"a\[1\], b\[0\].*C1"):
        p.begin_writing()


def test_complete_only_after_the_write() -> None:
    p = pending()
    with pytest.raises(ProtocolError, match="C2"):
        p.complete()
    p = written()
    p.check_invariants()
    p.complete()
    assert p.state is CheckpointState.COMPLETED
    assert [s.subtask for s in p.snapshots()] == SUBTASKS


@pytest.mark.parametrize("end", ["completed", "aborted"])
def test_terminal_states_absorb(end: str) -> None:
    p = written()
    if end == "completed":
        p.complete()
        assert not p.abort("too late")
    else:
        assert p.abort("first")
        assert not p.abort("second")
        assert p.reason == "first"
        with pytest.raises(ProtocolError):
            p.complete()
    state = p.state
    assert acknowledge(p, SUBTASKS[0]) is AckOutcome.STALE
    with pytest.raises(ProtocolError):
        p.begin_writing()
    assert p.state is state
    p.check_invariants()


@given(st.lists(st.tuples(st.sampled_from(["ack", "write", "complete", "abort"]), st.integers(0, 3)), max_size=15))
def test_any_sequence_keeps_the_rules(steps: list[tuple[str, int]]) -> None:
    p = pending()
    reached: CheckpointState | None = None
    for step, index in steps:
        try:
            if step == "ack":
                acknowledge(p, [*SUBTASKS, SubtaskId("c", 0)][index])
            elif step == "write":
                p.begin_writing()
            elif step == "complete":
                p.complete()
            else:
                p.abort("why")
        except ProtocolError:
            pass
        p.check_invariants()
        assert reached is None or p.state is reached
        reached = p.state if p.ended else None
