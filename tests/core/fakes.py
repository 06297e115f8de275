"""What the fake cluster is made of: a plan, storage with a table for the sinks, and processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.manifest import Manifest, SplitState, SubtaskSnapshot
from rayflow.core.messages import (
    Command,
)
from rayflow.core.resequence import Resequencer
from rayflow.core.topology import Topology
from tests.core.watch import require


def small_topology(sources: int = 2, middles: int = 2, sinks: int = 1) -> Topology:
    """source -> middle -> last, all to all."""
    sizes = {"source": sources, "middle": middles, "last": sinks}
    subtasks = tuple(SubtaskId(chain, i) for chain, n in sizes.items() for i in range(n))
    channels = tuple(
        ChannelId(edge, a, b)
        for edge, (up, down) in enumerate((("source", "middle"), ("middle", "last")))
        for a in subtasks
        if a.chain == up
        for b in subtasks
        if b.chain == down
    )
    return Topology(
        subtasks=subtasks,
        sources=frozenset({"source"}),
        channels=channels,
        parallelism=sizes,
        max_parallelism=16,
        operators_of={"source": ("read",), "middle": ("count",), "last": ("write",)},
        keyed_operators=frozenset({"count"}),
    )


def some_splits(count: int) -> tuple[SplitState, ...]:
    return tuple(SplitState("source", f"s{i}", i, {"n": i}) for i in range(count))


@dataclass
class Storage:
    """Manifests, create-if-absent, and the table that the sinks write to."""

    manifests: dict[int, Manifest] = field(default_factory=dict)
    void: set[int] = field(default_factory=set)
    late: list[Manifest] = field(default_factory=list)  # told as failed, not durable yet
    highest: int = 0
    staged: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    committed: dict[str, list[tuple[str, int]]] = field(default_factory=dict)

    def create(self, manifest: Manifest) -> bool:
        if manifest.checkpoint in self.void or manifest.checkpoint in self.manifests:
            return False
        self.manifests[manifest.checkpoint] = manifest
        return True

    def latest(self) -> Manifest | None:
        return self.manifests[max(self.manifests)] if self.manifests else None

    def commit(self, name: str) -> None:
        if name not in self.committed:
            require(name in self.staged, f"S1: {name} was prepared and is gone: a lost commit")
            self.committed[name] = self.staged.pop(name)

    def rows(self) -> Counter[tuple[str, int]]:
        return Counter(row for rows in self.committed.values() for row in rows)


@dataclass
class Process:
    """One process of one subtask."""

    subtask: SubtaskId
    incarnation: int
    is_source: bool
    alive: bool = True
    hung: bool = False
    commands: Resequencer[Command] = field(default_factory=lambda: Resequencer[Command](Attempt(0), follow=True))
    sent: int = 0
    launched: bool = False
    ended: bool = False
    begun: int = 0
    barrier: int = 0  # the last one that went downstream
    splits: list[SplitState] = field(default_factory=list)
    no_more: bool = False
    stopped: bool = False
    asked: bool = False
    rows: list[tuple[str, int]] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    uploads: list[tuple[int, SubtaskSnapshot]] = field(default_factory=list)

    def reset(self) -> None:
        self.launched = self.ended = self.no_more = self.asked = self.stopped = False
        self.begun = self.barrier = self.sent = 0
        self.splits, self.rows, self.prepared, self.uploads = [], [], [], []


@dataclass(frozen=True)
class Faults:
    """How many of each may happen in one run."""

    kills: int = 0
    hangs: int = 0
    raises: int = 0
    declines: int = 0
    write_failures: int = 0
    late_writes: int = 0
    requests: int = 0
    """Of users: a checkpoint, a savepoint, a stop."""
    disorder: bool = False
    """Reports and commands are reordered and repeated."""


NO_FAULTS = Faults()
ALL_FAULTS = Faults(kills=4, hangs=1, raises=1, declines=2, write_failures=2, late_writes=2, requests=1, disorder=True)
