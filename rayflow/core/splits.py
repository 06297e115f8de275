"""The splits of one source that no subtask has, and who is to get the next.

Splits are handed out one a request, in their ``order``: a slow subtask asks less often and reads fewer. A pool is
never told that a split has been read: a subtask carries its begun splits in its own snapshots, and asks again when it
is done.

A subtask asks for one split ahead while it still reads. Before the others have their first, it must wait for that: with
as many splits as subtasks, the first to run would otherwise get two, and those of an endless source are never done.

Splits that are read side by side (``in_turns``) are shared out from the beginning: each subtask gets its share of them
and no more, whoever asks first.

A source that goes on looking (``watched``) has a pool that stays open: nobody is ever told that nothing follows, only
that for now it is ``settled``. It remembers every split that it has seen, because what was read to its end is found
again by the next look (rule R2).

**What a checkpoint holds of the pool.** `snapshot` is taken at the moment the checkpoint is triggered. Commands to a
subtask are a FIFO, so a split assigned before the trigger reaches the subtask before the trigger does and stands in the
subtask's snapshot (or was read up before the barrier); one assigned after the trigger reaches it after its barrier and
stands in the pool's snapshot. Each split stands in exactly one of them (rule R1), never in both, never in none.

After a failure nothing is taken back split by split: the pool is made anew from the manifest by `restore`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from rayflow.core.ids import SubtaskId
from rayflow.core.manifest import Json, SplitState
from rayflow.core.messages import Assign
from rayflow.core.seen import SeenLog, SeenSplits
from rayflow.errors import ProtocolError


class SplitOutcome(Enum):
    ACCEPTED = "accepted"
    """Answered at once, or waiting until splits are added or the pool is closed."""
    DUPLICATE = "duplicate"
    """The subtask is waiting already."""


@dataclass(frozen=True, slots=True)
class Assignment:
    subtask: SubtaskId
    assign: Assign


class SplitPool:
    """Splits of ``source``, read by so many subtasks. Starts empty and open; see `restore`, `add`, `close`."""

    def __init__(self, source: str, readers: int = 1, *, in_turns: bool = False, watched: bool = False) -> None:
        self.source = source
        self._readers = readers
        self._in_turns = in_turns
        self._watched = watched
        self._seen = SeenLog(source)  # empty unless watched
        self._found: set[str] = set()  # ids of earlier looks of this attempt: looked up faster than their digests
        self.closed = False  # nothing is ever added again in this attempt
        self._pending: list[SplitState] = []  # ascending by (order, split_id)
        self._known: set[str] = set()  # ids in _pending and _assigned
        self._assigned: dict[str, SubtaskId] = {}  # split id -> who got it in this attempt
        self._waiting: list[SubtaskId] = []  # first come, first served, but see `_reserved`
        self._given: Counter[SubtaskId] = Counter()  # how many splits each has been given in this attempt

    @property
    def exhausted(self) -> bool:
        """Nothing is left and nothing will come."""
        return self.closed and not self._pending

    @property
    def waiting(self) -> tuple[SubtaskId, ...]:
        return tuple(self._waiting)

    def assigned_to(self, subtask: SubtaskId) -> tuple[str, ...]:
        """Ids of the splits the subtask was given in this attempt, in the order given."""
        return tuple(split for split, owner in self._assigned.items() if owner == subtask)

    def snapshot(self) -> tuple[SplitState, ...]:
        """The splits nobody has, for the checkpoint that is triggered now."""
        return tuple(self._pending)

    def seen(self) -> SeenSplits | None:
        """All that were ever found, for the checkpoint that is triggered now; None unless watched."""
        return self._seen.freeze() if self._watched else None

    def restore(self, splits: Iterable[SplitState], seen: SeenSplits | None = None) -> None:
        """Begin a new attempt with these: pending ones and begun ones with their positions (rule R2).

        ``seen``: of a watched one, all that were ever found. The pool is open again and nobody waits. Raises
        `ProtocolError` when a split stands twice.
        """
        self.closed = False
        self._pending.clear()
        self._known.clear()
        self._assigned.clear()
        self._waiting.clear()
        self._given.clear()
        self._found.clear()
        self._seen.restore(seen or ())
        for split in splits:
            if split.split_id in self._known:
                raise ProtocolError(
                    f"split {split.split_id!r} of source {self.source} stands twice in the checkpoint: its rows "
                    "would be read twice (rule R1)"
                )
            self._insert(split)
        self._sort()

    def add(self, splits: Iterable[SplitState]) -> tuple[Assignment, ...]:
        """Newly discovered splits; those known already change nothing. The answers to those who waited."""
        if self.closed:
            raise ProtocolError(f"splits were added to source {self.source}, which had said that none will follow")
        for split in splits:
            if split.split_id not in self._known:
                self._insert(split)
        self._sort()
        return self._serve()

    def discovered(self, found: Iterable[tuple[str, Json]]) -> tuple[int, tuple[Assignment, ...]]:
        """What a look has found, known splits among it: (how many are new, the answers to those who waited)."""
        order = max([len(self._seen), *(split.order + 1 for split in self._pending)])
        new: list[SplitState] = []
        for split_id, split in found:
            if split_id not in self._found:
                self._found.add(split_id)
                if not self._seen.has(split_id):
                    new.append(SplitState(self.source, split_id, order + len(new), split))
        return len(new), self.add(new)

    def close(self) -> tuple[Assignment, ...]:
        """No split will follow. The answers to those who waited."""
        self.closed = True
        return self._serve()

    def request(self, subtask: SubtaskId) -> tuple[SplitOutcome, tuple[Assignment, ...]]:
        """The subtask has nothing left to read. ``no_more`` comes with the last split, so that nobody asks in vain."""
        if subtask in self._waiting:
            return SplitOutcome.DUPLICATE, ()
        self._waiting.append(subtask)
        answers = self._serve()
        if subtask in self._waiting and self._settled(subtask):
            answers += (Assignment(subtask, Assign((), no_more=False, settled=True)),)
        return SplitOutcome.ACCEPTED, answers

    def _insert(self, split: SplitState) -> None:
        if split.source != self.source:
            raise ProtocolError(f"split {split.split_id!r} of source {split.source} came to the pool of {self.source}")
        self._known.add(split.split_id)
        self._pending.append(split)
        if self._watched:
            self._seen.add(split.split_id)

    def _sort(self) -> None:
        self._pending.sort(key=lambda s: (s.order, s.split_id))

    @property
    def _reserved(self) -> int:
        """So many splits are kept for subtasks that have had none."""
        return self._readers - len(self._given)

    def _may_have(self, subtask: SubtaskId) -> bool:
        if not self._pending:
            return self.closed
        if self._in_turns:
            return self._given[subtask] < -(-len(self._known) // self._readers)
        return subtask not in self._given or len(self._pending) > self._reserved

    def _settled(self, subtask: SubtaskId) -> bool:
        """It has all that it is to have of what is known, and more may be found."""
        if not self._watched or self.closed:
            return False
        return not self._may_have(subtask) if self._in_turns else not self._pending

    def _serve(self) -> tuple[Assignment, ...]:
        answers: list[Assignment] = []
        while (subtask := next(filter(self._may_have, self._waiting), None)) is not None:
            self._waiting.remove(subtask)
            splits: tuple[SplitState, ...] = ()
            if self._pending:
                splits = (self._pending.pop(0),)
                self._assigned[splits[0].split_id] = subtask
                self._given[subtask] += 1
            answers.append(Assignment(subtask, Assign(splits, no_more=self.exhausted, settled=self._settled(subtask))))
        return tuple(answers)

    def check_invariants(self) -> None:
        pending = {s.split_id for s in self._pending}
        assert not self._watched or all(map(self._seen.has, self._known)), "R2: a split is known and was not seen"
        assert len(pending) == len(self._pending), "a split stands twice"
        assert not pending & self._assigned.keys(), "a split is pending and assigned"
        assert self._known == pending | self._assigned.keys()
        assert not any(map(self._may_have, self._waiting)), "somebody waits in vain"
        assert len(set(self._waiting)) == len(self._waiting)
        assert self._pending == sorted(self._pending, key=lambda s: (s.order, s.split_id))
