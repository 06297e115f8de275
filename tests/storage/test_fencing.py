"""Rule C8: every interleaving of an old coordinator's commits with a new one's start, on the real code.

The store hands out turns: an actor does one storage operation a turn, and all orders of turns are run. What must never
be: a coordinator told of a checkpoint that the next one goes on from before.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.manifest import Manifest
from rayflow.errors import FencedError
from rayflow.storage.checkpoints import ATTEMPTS_AN_INCARNATION, CheckpointStore, Incarnation
from rayflow.storage.fencing import Directory, counts, may_count, understand
from rayflow.storage.layout import Decision
from rayflow.storage.store import MemoryStore, Store
from tests.storage.fakes import JOB, Crash, HookedStore, coordinator, make_manifest


class Turns:
    """Actors in threads, each waiting before every storage operation until it is given a turn."""

    def __init__(self, inner: Store, actors: Sequence[Callable[[Store], None]]) -> None:
        self._go = [threading.Semaphore(0) for _ in actors]
        self._arrived = [threading.Semaphore(0) for _ in actors]
        self._over = [False] * len(actors)
        self._killed = [False] * len(actors)
        self._threads = [
            threading.Thread(target=self._run, args=(who, actor, inner), daemon=True)
            for who, actor in enumerate(actors)
        ]
        for who, thread in enumerate(self._threads):
            thread.start()
            assert self._arrived[who].acquire(timeout=30)

    def step(self, who: int) -> None:
        """One operation of this actor, and its own code up to the next one."""
        if not self._over[who]:
            self._go[who].release()
            assert self._arrived[who].acquire(timeout=30)

    def finish(self, *, kill: int | None = None) -> None:
        """Let each actor run to its end, the one to ``kill`` die where it stands."""
        for who, thread in enumerate(self._threads):
            self._killed[who] = who == kill
            while not self._over[who]:
                self.step(who)
            thread.join(30)

    def _run(self, who: int, actor: Callable[[Store], None], inner: Store) -> None:
        def wait(operation: str, path: str) -> None:
            self._arrived[who].release()
            self._go[who].acquire()
            if self._killed[who]:
                raise Crash

        try:
            actor(HookedStore(inner, before=wait))
        except Crash:
            pass
        finally:
            self._over[who] = True
            self._arrived[who].release()


@dataclass
class Story:
    told: list[tuple[int, int]] = field(default_factory=list)
    """(coordinator, checkpoint) whose commit returned."""
    went_on_from: int | None = None
    """What the second coordinator restored; None: it never got that far."""
    reused: list[int] = field(default_factory=list)

    def complaints(self, final: Manifest) -> list[str]:
        """What is wrong, given what a third coordinator finds."""
        found = []
        lost = [n for who, n in self.told if who == 1 and self.went_on_from is not None and n > self.went_on_from]
        if lost:
            found.append(f"coordinator 1 told of {lost}, coordinator 2 went on from {self.went_on_from}")
        if any(n > final.checkpoint for _, n in self.told):
            found.append(f"{self.told} were told, the third goes on from {final.checkpoint}")
        if self.went_on_from is not None and final.incarnation == 1 and final.checkpoint > self.went_on_from:
            found.append(f"2 went on from {self.went_on_from}, the third from 1's later {final.checkpoint}")
        if self.reused:
            found.append(f"ids {self.reused} were used before (rule C4)")
        return found


def play(
    make: Callable[[Store], CheckpointStore], schedule: Sequence[int], *, kill: int | None = None
) -> tuple[Story, list[str]]:
    """One run: coordinator 1 (checkpoint 1 complete) commits 2 and 3 while 2 starts and commits; then a third looks."""
    inner, story = MemoryStore(), Story()
    begun: list[tuple[Incarnation, CheckpointStore]] = []

    def old(store: Store) -> None:
        first = make(inner)
        incarnation = first.claim()
        first.commit(make_manifest(inner, incarnation, 1))
        first._store = store  # from here on by turns
        begun.append((incarnation, first))
        for n in (2, 3):
            manifest = make_manifest(inner, incarnation, n)
            try:
                first.commit(manifest)
            except FencedError:
                return
            story.told.append((1, n))

    def new(store: Store) -> None:
        second = make(store)
        try:
            incarnation = second.claim()
            assert incarnation.manifest is not None
            story.went_on_from = incarnation.manifest.checkpoint
            n = incarnation.next_checkpoint
            story.reused.extend({n} & {1, 2, 3})
            second.commit(make_manifest(inner, incarnation, n))
        except FencedError:
            return
        story.told.append((2, n))

    turns = Turns(inner, [old, new])
    for who in schedule:
        turns.step(who)
    turns.finish(kill=kill)
    final = coordinator(inner).claim()
    assert final.manifest is not None
    return story, story.complaints(final.manifest)


OLD_STEPS, NEW_STEPS = 4, 10


def schedules(new_steps: int = NEW_STEPS) -> Iterator[list[int]]:
    """Every order of the old coordinator's four operations and this many of the new one's."""
    for places in itertools.combinations(range(OLD_STEPS + new_steps), OLD_STEPS):
        yield [0 if turn in places else 1 for turn in range(OLD_STEPS + new_steps)]


def test_the_number_of_steps_is_what_the_schedules_assume() -> None:
    """Should the code take more steps, the enumeration would no longer be of all orders."""
    inner = MemoryStore()
    steps: list[str] = []
    first = coordinator(inner)
    incarnation = first.claim()
    first.commit(make_manifest(inner, incarnation, 1))
    first._store = HookedStore(inner, before=lambda operation, path: steps.append(operation))
    first.commit(make_manifest(inner, incarnation, 2))
    assert len(steps) * 2 == OLD_STEPS
    steps.clear()
    second = coordinator(HookedStore(inner, before=lambda operation, path: steps.append(operation)))
    after = second.claim()
    second.commit(make_manifest(inner, after, after.next_checkpoint))
    assert len(steps) == NEW_STEPS


def test_no_interleaving_loses_what_was_told() -> None:
    outcomes = set()
    for schedule in schedules():
        story, complaints = play(coordinator, schedule)
        assert not complaints, (schedule, complaints)
        outcomes.add((tuple(story.told), story.went_on_from))
    told_by_the_old = {tuple(n for who, n in told if who == 1) for told, _ in outcomes}
    assert told_by_the_old == {(), (2,), (2, 3)}, "the schedules reach every outcome"
    assert {m for _, m in outcomes} == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("dies_after", range(NEW_STEPS))
def test_no_interleaving_with_a_second_one_that_dies_loses_what_was_told(dies_after: int) -> None:
    for schedule in schedules(dies_after):
        _, complaints = play(coordinator, schedule, kill=1)
        assert not complaints, (schedule, complaints)


class ChecksBeforeItWrites(CheckpointStore):
    def commit(self, manifest: Manifest) -> None:
        self._check_not_fenced()
        self._write_manifest(manifest)


class ListsBeforeItClaims(CheckpointStore):
    def claim(self, *, start_from: CheckpointId | None = None) -> Incarnation:
        directory = self.survey()
        manifest = self.choose(directory, start_from)
        number = self._take_number()
        self._decide(number, directory, None if manifest is None else manifest.checkpoint)
        next_id = directory.next_id()
        return Incarnation(number, manifest, next_id, Attempt(number * ATTEMPTS_AN_INCARNATION), "run")


class DecidesNothing(CheckpointStore):
    def _decide(self, number: int, directory: Directory, restored: CheckpointId | None, *, above: int = 0) -> None:
        self._decision = Decision(number, None, directory.next_id(), directory.next_id() + 100)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (ChecksBeforeItWrites, "coordinator 2 went on from 1"),
        (ListsBeforeItClaims, "coordinator 2 went on from 1"),
        (DecidesNothing, "the third from 1's later"),
        (DecidesNothing, "were used before"),
    ],
)
def test_a_broken_order_is_caught(broken: type[CheckpointStore], complaint: str) -> None:
    whole = ((schedule, None) for schedule in schedules())
    killed = ((schedule, 1) for schedule in schedules(NEW_STEPS - 3))  # it has gone on, and written nothing yet
    for schedule, kill in itertools.chain(killed, whole):
        _, complaints = play(lambda store: broken(store, JOB), schedule, kill=kill)
        if any(complaint in found for found in complaints):
            return
    pytest.fail(f"{broken.__name__} passes every interleaving: the test proves nothing")


def test_many_claim_at_once_and_one_goes_on() -> None:
    inner = MemoryStore()
    found: list[int] = []
    start = threading.Barrier(8)

    def claim() -> None:
        start.wait()
        try:
            found.append(coordinator(inner).claim().number)
        except FencedError:
            return

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert understand(inner.list()).claims == tuple(range(1, 9)), "every one has its own number"
    assert found[-1:] == [8], "the last is not fenced; earlier ones may have been quick enough"
    assert len(set(found)) == len(found)


# ------------------------------------------------------------------------------------------------------- the pure rules

DECISIONS = (
    Decision(1, None, 1, 101),
    Decision(2, CheckpointId(40), 101, 201),
    Decision(3, CheckpointId(40), 201, 301),
    Decision(4, CheckpointId(205), 301, 401),
)


@pytest.mark.parametrize(
    ("checkpoint", "incarnation", "expected"),
    [
        (40, 1, True),
        (41, 1, False),
        (101, 2, False),
        (205, 3, True),
        (206, 3, False),
        (301, 4, True),
        (39, 1, True),
    ],
)
def test_a_manifest_counts_unless_a_later_one_went_on_from_before_it(
    checkpoint: int, incarnation: int, expected: bool
) -> None:
    assert counts(checkpoint, incarnation, DECISIONS) is expected
    assert may_count(checkpoint, DECISIONS) is expected, "the id alone tells its writer"


def test_nothing_counts_behind_a_fresh_start() -> None:
    assert not counts(7, 1, [Decision(2, None, 101, 201)])
    assert counts(107, 2, [Decision(2, None, 101, 201)])


def test_an_unreadable_manifest_of_an_unknown_writer_may_count() -> None:
    assert may_count(500, DECISIONS)
