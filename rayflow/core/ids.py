"""Names of the things of the protocol. All are plain values: hashable, ordered, printable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

CheckpointId = NewType("CheckpointId", int)
"""Positive; grows with every trigger and is never used twice in a checkpoint directory (rule C4)."""

Attempt = NewType("Attempt", int)
"""Grows with every failover and every coordinator; messages of another attempt change nothing (rule C6)."""

Time = NewType("Time", float)
"""Seconds on the clock of whoever drives the machine. The core never reads a clock."""

MIN_WATERMARK = -(2**63)
MAX_WATERMARK = 2**63 - 1
"""Event times are int microseconds since the epoch; the maximum means: no row can come any more."""


@dataclass(frozen=True, slots=True, order=True)
class SubtaskId:
    """One parallel instance of a chain. ``chain`` is the id of the chain in the plan."""

    chain: str
    index: int

    def __str__(self) -> str:
        return f"{self.chain}[{self.index}]"


@dataclass(frozen=True, slots=True, order=True)
class ChannelId:
    """The stream of elements from one upstream subtask over one edge to one downstream subtask."""

    edge: int
    source: SubtaskId
    target: SubtaskId

    def __str__(self) -> str:
        return f"{self.source}->{self.target}#{self.edge}"
