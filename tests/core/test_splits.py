"""Pools of splits: order, who waits, and what a checkpoint holds of them (rules R1, R2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayflow.core.ids import SubtaskId
from rayflow.core.manifest import SplitState
from rayflow.core.messages import Assign
from rayflow.core.splits import Assignment, SplitOutcome, SplitPool
from rayflow.errors import ProtocolError

A, B = SubtaskId("s", 0), SubtaskId("s", 1)


def split(order: int, position: int | None = None) -> SplitState:
    return SplitState("s", f"split-{order}", order, {"n": order}, position)


def pool_of(*orders: int, closed: bool = True) -> SplitPool:
    pool = SplitPool("s")
    pool.restore(split(n) for n in orders)
    if closed:
        pool.close()
    return pool


def test_in_order_one_a_request_and_no_more_with_the_last() -> None:
    pool = pool_of(2, 0, 1)
    answers = [pool.request(s)[1] for s in (A, B, A, B)]
    assert answers == [
        (Assignment(A, Assign((split(0),), False)),),
        (Assignment(B, Assign((split(1),), False)),),
        (Assignment(A, Assign((split(2),), True)),),
        (Assignment(B, Assign((), True)),),
    ]
    assert pool.assigned_to(A) == ("split-0", "split-2")
    assert pool.exhausted


def test_nobody_gets_a_second_split_that_would_be_the_first_of_another() -> None:
    """With as many splits as subtasks, the first one that runs asks again before the other one has asked at all."""
    pool = SplitPool("s", readers=2)
    pool.restore([split(0), split(1)])
    pool.close()
    assert pool.request(A)[1] == (Assignment(A, Assign((split(0),), False)),)
    assert pool.request(A) == (SplitOutcome.ACCEPTED, ())
    assert pool.waiting == (A,)
    assert pool.request(B)[1] == (Assignment(B, Assign((split(1),), True)), Assignment(A, Assign((), True)))


def test_what_nobody_lacks_is_given_ahead_at_once() -> None:
    pool = SplitPool("s", readers=2)
    pool.restore([split(0), split(1), split(2)])
    assert [a.assign.splits for _ in range(2) for a in pool.request(A)[1]] == [(split(0),), (split(1),)]
    assert pool.request(A)[1] == ()
    assert [a.subtask for a in pool.request(B)[1]] == [B]
    pool.restore([split(0), split(1)])
    assert pool.request(B)[1] == (Assignment(B, Assign((split(0),), False)),)
    assert pool.request(B)[1] == (), "a new attempt, and A has none again"


def test_an_open_pool_lets_subtasks_wait_in_turn() -> None:
    pool = pool_of(closed=False)
    assert pool.request(B) == (SplitOutcome.ACCEPTED, ())
    assert pool.request(A) == (SplitOutcome.ACCEPTED, ())
    assert pool.request(A) == (SplitOutcome.DUPLICATE, ())
    assert pool.waiting == (B, A)
    assert pool.add([split(7)]) == (Assignment(B, Assign((split(7),), False)),)
    assert pool.add([split(7)]) == ()  # known: changes nothing
    assert pool.close() == (Assignment(A, Assign((), True)),)
    with pytest.raises(ProtocolError, match="none will follow"):
        pool.add([split(8)])


def test_a_restore_forgets_the_old_attempt() -> None:
    pool = pool_of(0, 1)
    pool.request(A)
    pool.restore([split(1), split(0, position=3)])
    assert pool.snapshot() == (split(0, position=3), split(1))
    assert pool.assigned_to(A) == ()
    assert not pool.closed
    assert pool.request(B)[1] == (Assignment(B, Assign((split(0, position=3),), False)),)


def test_a_split_that_stands_twice_or_belongs_elsewhere_is_refused() -> None:
    pool = SplitPool("s")
    with pytest.raises(ProtocolError, match="stands twice"):
        pool.restore([split(0), split(0, position=1)])
    with pytest.raises(ProtocolError, match="pool of s"):
        pool.restore([SplitState("other", "x", 0, {})])


def test_a_split_stands_in_exactly_one_place_of_a_checkpoint() -> None:
    """Assigned before the trigger: in the subtask's snapshot. Assigned after it: in the pool's."""
    pool = pool_of(0, 1, 2)
    queue: list[object] = [a.assign for a in pool.request(A)[1]]
    in_pool = pool.snapshot()
    queue.append("trigger")
    queue += [a.assign for a in pool.request(A)[1]]
    before = queue[: queue.index("trigger")]
    in_subtask = [s for command in before if isinstance(command, Assign) for s in command.splits]
    assert sorted(s.order for s in [*in_subtask, *in_pool]) == [0, 1, 2]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2)),
        st.tuples(st.just("add"), st.integers(0, 20)),
        st.tuples(st.just("close"), st.just(0)),
        st.tuples(st.just("restore"), st.integers(0, 5)),
    ),
    max_size=40,
)


@given(STEPS, st.integers(1, 3))
def test_no_split_is_lost_or_given_twice(steps: list[tuple[str, int]], readers: int) -> None:
    pool = SplitPool("s", readers)
    given_out: list[int] = []
    known: set[int] = set()
    for step, n in steps:
        answers: tuple[Assignment, ...] = ()
        if step == "ask":
            _, answers = pool.request(SubtaskId("s", n))
        elif step == "add" and not pool.closed:
            answers = pool.add([split(n)])
            known.add(n)
        elif step == "close":
            answers = pool.close()
        elif step == "restore":
            pool.restore(split(i) for i in range(n))
            given_out, known = [], set(range(n))
        given_out += [s.order for a in answers for s in a.assign.splits]
        pool.check_invariants()
        assert sorted([*given_out, *(s.order for s in pool.snapshot())]) == sorted(known)


def test_splits_that_never_end_are_shared_out_however_fast_one_asks() -> None:
    pool = SplitPool("s", 2, in_turns=True)
    pool.restore(split(n) for n in range(5))
    pool.close()
    for _ in range(5):
        pool.request(A)
        pool.check_invariants()
    assert pool.assigned_to(A) == ("split-0", "split-1", "split-2")
    assert pool.waiting == (A,)
    (first,) = pool.request(B)[1]
    assert first == Assignment(B, Assign((split(3),), False))
    last, freed = pool.request(B)[1]
    assert last == Assignment(B, Assign((split(4),), True))
    assert freed == Assignment(A, Assign((), True))


def test_subtasks_without_a_share_are_told_that_nothing_comes() -> None:
    pool = SplitPool("s", 2, in_turns=True)
    pool.restore([split(0)])
    pool.close()
    assert pool.request(A)[1] == (Assignment(A, Assign((split(0),), True)),)
    assert pool.request(B)[1] == (Assignment(B, Assign((), True)),)
