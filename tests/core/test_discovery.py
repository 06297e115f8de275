"""Sources that go on looking for splits: when they are asked, and that no split is lost or read twice (rule R2)."""

from __future__ import annotations

from dataclasses import replace
from time import thread_time

import pytest

from rayflow.core.events import CheckpointRequested, Discover, Discovered, JobState, LookFailed, WriteManifest
from rayflow.core.ids import SubtaskId
from rayflow.core.manifest import SplitState, decode, encode
from rayflow.core.messages import Assign, CheckpointKind, Failed, FailureCause, SplitRequest
from rayflow.core.restore import mismatch
from rayflow.core.roster import Heard
from rayflow.core.seen import SeenSplits, digest_of
from rayflow.core.splits import Assignment, SplitPool
from rayflow.core.topology import Topology
from tests.core.desk import SETTINGS, SOURCE_0, SOURCE_1, Desk, commands, manifest_of
from tests.core.fakes import small_topology

A, B = SubtaskId("s", 0), SubtaskId("s", 1)
EVERY_S = 5.0


def watching(**more: object) -> Topology:
    return replace(small_topology(), discovering={"source": EVERY_S}, **more)  # type: ignore[arg-type]


def watching_desk() -> Desk:
    desk = Desk(replace(SETTINGS, interval_s=1000.0, hang_timeout_s=1000.0), watching())
    desk.start()
    desk.to_running(splits=2)
    return desk


def found(desk: Desk, *names: str) -> Discovered:
    return Discovered(desk.machine.attempt, "source", tuple((name, {"n": name}) for name in names))


def looks(actions: list[object]) -> list[Discover]:
    return [a for a in actions if isinstance(a, Discover)]


# ------------------------------------------------------------------------------------------------------------- machine


def test_one_look_at_a_time_every_interval() -> None:
    desk = watching_desk()
    assert desk.machine.next_deadline() == EVERY_S
    (look,) = looks([*desk.wait(EVERY_S)])
    assert look == Discover(desk.machine.attempt, "source")
    assert looks([*desk.wait(100)]) == [], "it takes as long as it takes"
    desk.tell(found(desk, "s0", "s1"))
    assert looks([*desk.wait(EVERY_S - 1)]) == []
    assert len(looks([*desk.wait(1)])) == 1


def test_new_splits_go_to_those_who_wait_and_known_ones_to_nobody() -> None:
    desk = watching_desk()
    for subtask in (SOURCE_0, SOURCE_1, SOURCE_0, SOURCE_1):
        desk.report(subtask, SplitRequest())
    desk.wait(EVERY_S)
    assigned = commands(desk.tell(found(desk, "s0", "new", "s1")), Assign)
    assert assigned == {SOURCE_0: Assign((SplitState("source", "new", 2, {"n": "new"}),), False, True)}
    assert "splits found" in desk.notes
    desk.wait(EVERY_S)
    assert desk.tell(found(desk, "s0", "new", "s1")) == []


def test_a_look_that_fails_is_told_once_and_tried_again() -> None:
    desk = watching_desk()
    for _ in range(3):
        assert len(looks([*desk.wait(EVERY_S)])) == 1
        desk.tell(LookFailed(desk.machine.attempt, "source", "OSError: no network"))
    assert desk.notes.count("look for splits failed") == 1
    assert desk.state() is JobState.RUNNING
    desk.wait(EVERY_S)
    desk.tell(found(desk, "new"))
    desk.wait(EVERY_S)
    desk.tell(LookFailed(desk.machine.attempt, "source", "OSError: no network"))
    assert desk.notes.count("look for splits failed") == 2


def test_what_looking_again_will_not_mend_ends_the_job() -> None:
    desk = watching_desk()
    desk.wait(EVERY_S)
    wrong = FailureCause("a.csv has changed", fatal=True)
    desk.tell(LookFailed(desk.machine.attempt, "source", "DataError: a.csv has changed", wrong))
    assert desk.state() is JobState.FAILED


def test_nothing_is_looked_for_while_the_job_restarts_and_an_old_answer_changes_nothing() -> None:
    desk = watching_desk()
    desk.wait(EVERY_S)
    old = found(desk, "new")
    desk.report(SOURCE_0, Failed(FailureCause("boom")))
    assert desk.state() is JobState.RESTARTING
    assert looks([*desk.wait(0.5)]) == []
    desk.tell(old)
    assert desk.heard("Discovered", Heard.STALE) == 1
    desk.tell(old)
    assert desk.heard("Discovered", Heard.UNKNOWN) == 1


def test_a_restored_job_looks_at_once_and_knows_what_was_read() -> None:
    desk = watching_desk()
    desk.report(SOURCE_0, SplitRequest())
    actions = [*desk.tell(CheckpointRequested(CheckpointKind.PERIODIC)), *desk.acknowledge(1)]
    (write,) = [a for a in actions if isinstance(a, WriteManifest)]
    assert write.seen_splits == (SeenSplits("source", digest_of("s0") + digest_of("s1")),)
    assert [s.split_id for s in write.pending_splits] == ["s1"]
    restored = manifest_of(1, topology=watching(), seen_splits=write.seen_splits, pending_splits=write.pending_splits)
    again = Desk(SETTINGS, watching())
    again.start()
    assert len(looks([*again.to_running(restored)])) == 1
    again.report(SOURCE_1, SplitRequest())
    again.tell(found(again, "s0", "s1", "s2"))
    told = commands(again.report(SOURCE_0, SplitRequest()), Assign)
    assert [s.split_id for a in told.values() if isinstance(a, Assign) for s in a.splits] == ["s2"]


# --------------------------------------------------------------------------------------------------------------- pools


def watched(readers: int = 2, *, in_turns: bool = False) -> SplitPool:
    return SplitPool("s", readers, in_turns=in_turns, watched=True)


def split(order: int) -> SplitState:
    return SplitState("s", f"split-{order}", order, {"n": order}, None)


def ids(answers: tuple[Assignment, ...]) -> list[tuple[SubtaskId, list[str], bool]]:
    return [(a.subtask, [s.split_id for s in a.assign.splits], a.assign.settled) for a in answers]


def test_nobody_is_told_that_nothing_follows_but_that_all_is_dealt_out() -> None:
    pool = watched()
    pool.add([split(0), split(1)])
    assert ids(pool.request(A)[1]) == [(A, ["split-0"], False)]
    assert ids(pool.request(B)[1]) == [(B, ["split-1"], True)]
    assert ids(pool.request(A)[1]) == [(A, [], True)], "it stays in the queue"
    assert pool.waiting == (A,)
    assert pool.discovered([("split-0", 0), ("x", 9)]) == (
        1,
        (Assignment(A, Assign((SplitState("s", "x", 2, 9),), False, True)),),
    )
    assert not pool.exhausted
    pool.check_invariants()


def test_shares_of_splits_read_in_turns_grow_with_what_is_found() -> None:
    pool = watched(in_turns=True)
    pool.add([split(0), split(1), split(2)])
    assert ids(pool.request(A)[1]) == [(A, ["split-0"], False)]
    assert ids(pool.request(A)[1]) == [(A, ["split-1"], True)], "its share"
    assert ids(pool.request(A)[1]) == [(A, [], True)]
    assert ids(pool.request(B)[1]) == [(B, ["split-2"], True)]
    assert ids(pool.request(B)[1]) == [(B, [], True)]
    new, answers = pool.discovered([(f"new-{n}", n) for n in range(3)])
    assert new == 3
    assert sorted(ids(answers)) == [(A, ["new-0"], True), (B, ["new-1"], False)]
    assert ids(pool.request(B)[1]) == [(B, ["new-2"], True)]


def test_what_was_read_is_not_found_again_after_a_restore() -> None:
    pool = watched()
    pool.discovered([("a", 1), ("b", 2), ("c", 3)])
    pool.request(A)
    seen, pending = pool.seen(), pool.snapshot()
    other = watched()
    other.restore(pending, seen)
    assert other.discovered([("a", 1), ("b", 2), ("c", 3), ("d", 4)])[0] == 1
    assert [(s.split_id, s.order) for s in other.snapshot()] == [("b", 1), ("c", 2), ("d", 3)]
    other.check_invariants()
    forgets = watched()
    forgets.restore(pending, None)
    assert forgets.discovered([("a", 1)])[0] == 1, "the broken variant: it would be read twice"


def test_what_was_found_after_the_restored_checkpoint_is_found_again() -> None:
    pool = watched()
    pool.discovered([("a", 1)])
    pool.restore([], None)
    assert pool.discovered([("a", 1)])[0] == 1


# ------------------------------------------------------------------------------------------------------------ manifests


def test_a_hundred_thousand_files_are_a_small_part_of_a_checkpoint() -> None:
    pool = watched()
    names = [(f"s3://bucket/some/folder/part-{n:08d}.parquet#0", None) for n in range(100_000)]
    pool.discovered(names)
    began = thread_time()
    seen = pool.seen()
    froze = thread_time() - began
    assert seen is not None
    assert len(seen) == 100_000
    assert froze < 0.05, f"freezing took {froze:.3f} s on the loop"
    data = encode(manifest_of(1, seen_splits=(seen,)))
    assert len(data) < 1_400_000
    assert decode(data, path="m").seen_splits == (seen,)


def test_a_checkpoint_that_does_not_know_what_was_read_is_refused_unless_splits_never_end() -> None:
    blind = manifest_of(3)
    told = mismatch(blind, watching())
    assert told is not None
    assert told.startswith("checkpoint 3 does not tell which splits of source 'source' were read to their end")
    assert mismatch(blind, watching(endless=frozenset({"source"}))) is None
    assert mismatch(manifest_of(3, seen_splits=(SeenSplits("source"),)), watching()) is None
    assert mismatch(manifest_of(3, seen_splits=(SeenSplits("source"),)), small_topology()) is None


def test_torn_digests_are_refused() -> None:
    body = SeenSplits("s", digest_of("a")).to_json()
    assert SeenSplits.from_json(body) == SeenSplits("s", digest_of("a"))
    with pytest.raises(ValueError, match="2 digests of source 's'"):
        SeenSplits.from_json({**body, "count": 2})
