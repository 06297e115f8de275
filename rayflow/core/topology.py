"""What the protocol knows of a plan: subtasks, channels, and which operators live where.

K4  ``max_parallelism`` is fixed for the life of a job; every parallelism lies between 1 and it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rayflow.core.ids import ChannelId, SubtaskId
from rayflow.core.keygroups import check_parallelism
from rayflow.errors import ProtocolError


@dataclass(frozen=True)
class Topology:
    """The physical plan as the core sees it. Immutable for the life of a coordinator."""

    subtasks: tuple[SubtaskId, ...]
    sources: frozenset[str]
    """Ids of the chains that read splits; the id of the source is the id of its chain."""
    channels: tuple[ChannelId, ...]
    parallelism: Mapping[str, int]
    """Chain id -> number of subtasks."""
    max_parallelism: int
    operators_of: Mapping[str, tuple[str, ...]]
    """Chain id -> ids of its operators, in the order rows pass them."""
    keyed_operators: frozenset[str] = frozenset()
    allow_dropped: frozenset[str] = frozenset()
    """Operators and sources that need not be there any more: what a checkpoint holds of them is left behind."""
    endless: frozenset[str] = frozenset()
    """Sources whose splits never end: a checkpoint holds all of them."""
    in_turns: frozenset[str] = frozenset()
    """Sources whose splits are read side by side: each subtask has its share of them from the beginning."""
    discovering: Mapping[str, float] = field(default_factory=dict)
    """Sources that go on looking for new splits -> how often, in seconds."""
    whole: frozenset[str] = frozenset()
    """Sinks whose output the coordinator commits, once a checkpoint and for all subtasks together."""
    aligned: frozenset[str] = frozenset()
    """Sources that wait for each other when they drift apart (`rayflow.core.drift`)."""
    _inputs: dict[SubtaskId, tuple[ChannelId, ...]] = field(init=False, repr=False, compare=False)
    _outputs: dict[SubtaskId, tuple[ChannelId, ...]] = field(init=False, repr=False, compare=False)
    _chain_of: dict[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = frozenset(self.subtasks)
        expected = {SubtaskId(chain, i) for chain, n in self.parallelism.items() for i in range(n)}
        if known != expected or len(known) != len(self.subtasks):
            raise ProtocolError(f"topology lists subtasks {sorted(known)}, its parallelism says {sorted(expected)}")
        for parallelism in self.parallelism.values():
            check_parallelism(parallelism, self.max_parallelism)
        inputs: dict[SubtaskId, list[ChannelId]] = {s: [] for s in self.subtasks}
        outputs: dict[SubtaskId, list[ChannelId]] = {s: [] for s in self.subtasks}
        for channel in self.channels:
            if channel.source not in known or channel.target not in known:
                raise ProtocolError(f"channel {channel} names a subtask that is not in the topology")
            inputs[channel.target].append(channel)
            outputs[channel.source].append(channel)
        roots = {s.chain for s, ins in inputs.items() if not ins}
        if not self.sources or roots != self.sources:
            raise ProtocolError(f"chains without input are {sorted(roots)}, the sources are {sorted(self.sources)}")
        chain_of = {op: chain for chain, operators in self.operators_of.items() for op in operators}
        object.__setattr__(self, "_inputs", {s: tuple(v) for s, v in inputs.items()})
        object.__setattr__(self, "_outputs", {s: tuple(v) for s, v in outputs.items()})
        object.__setattr__(self, "_chain_of", chain_of)

    def inputs_of(self, subtask: SubtaskId) -> tuple[ChannelId, ...]:
        """Channels that end in ``subtask``, in the order of ``channels``."""
        return self._inputs[subtask]

    def outputs_of(self, subtask: SubtaskId) -> tuple[ChannelId, ...]:
        """Channels that begin in ``subtask``, in the order of ``channels``."""
        return self._outputs[subtask]

    def chain_of(self, operator: str) -> str | None:
        """The chain that holds ``operator``; None when this flow has no such operator."""
        return self._chain_of.get(operator)

    def is_source(self, subtask: SubtaskId) -> bool:
        return subtask.chain in self.sources

    @property
    def roots(self) -> tuple[SubtaskId, ...]:
        """The subtasks of the sources: where barriers begin."""
        return tuple(s for s in self.subtasks if s.chain in self.sources)
