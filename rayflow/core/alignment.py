"""Barrier alignment over a subtask's input channels.

A1  barrier ids on a channel strictly increase.
A2  while aligning (exactly-once), a channel that has delivered its barrier yields nothing to the operator.
A5  one alignment at a time: a newer barrier aborts the older by name.
A6  an ended channel counts as aligned.

In at-least-once mode channels are not blocked: rows behind the barrier of a fast channel then belong to the snapshot
*and* are sent again after a restore.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rayflow.core.ids import ChannelId, CheckpointId, Time
from rayflow.core.messages import Barrier
from rayflow.errors import ProtocolError


@dataclass(frozen=True, slots=True)
class Aligned:
    """All channels have the barrier: take the snapshot now."""

    barrier: Barrier
    alignment_s: float


@dataclass(frozen=True, slots=True)
class Overtaken:
    """A newer barrier came before ``checkpoint`` was aligned (rule A5)."""

    checkpoint: CheckpointId
    by: CheckpointId


class Aligner:
    """Decides when a snapshot is due and which channels are blocked meanwhile."""

    def __init__(self, channels: Iterable[ChannelId], *, exactly_once: bool) -> None:
        self._channels = frozenset(channels)
        self._exactly_once = exactly_once
        self._last_on: dict[ChannelId, CheckpointId] = {}
        self._ended: set[ChannelId] = set()
        self._barrier: Barrier | None = None
        self._arrived: set[ChannelId] = set()
        self._since: Time = Time(0.0)
        self._settled = CheckpointId(0)
        """Every id up to this one is aligned, overtaken or aborted; its late barriers change nothing."""

    @property
    def aligning(self) -> CheckpointId | None:
        return self._barrier.checkpoint if self._barrier else None

    def blocked(self, channel: ChannelId) -> bool:
        """Whether the channel must yield nothing (rule A2)."""
        return self._exactly_once and self._barrier is not None and channel in self._arrived

    @property
    def all_ended(self) -> bool:
        return self._ended == self._channels

    def on_barrier(self, channel: ChannelId, barrier: Barrier, now: Time) -> list[Aligned | Overtaken]:
        """The channel has delivered its barrier."""
        last = self._last_on.get(channel)
        if last is not None and barrier.checkpoint <= last:
            raise ProtocolError(f"A1: barrier {barrier.checkpoint} after {last} on {channel}")
        if channel in self._ended:
            raise ProtocolError(f"A6: barrier {barrier.checkpoint} on {channel}, which has ended")
        self._last_on[channel] = barrier.checkpoint
        if barrier.checkpoint <= self._settled:
            return []
        outcome: list[Aligned | Overtaken] = []
        if self._barrier is not None and barrier.checkpoint > self._barrier.checkpoint:
            outcome.append(Overtaken(self._barrier.checkpoint, by=barrier.checkpoint))
            self.abort(self._barrier.checkpoint)
        if self._barrier is None:
            self._barrier, self._since = barrier, now
        elif barrier.checkpoint < self._barrier.checkpoint:
            return []
        self._arrived.add(channel)
        return outcome + self._completed(now)

    def on_end(self, channel: ChannelId, now: Time) -> list[Aligned | Overtaken]:
        """The channel has ended and counts as aligned from here on (rule A6)."""
        self._ended.add(channel)
        return list(self._completed(now))

    def abort(self, checkpoint: CheckpointId) -> None:
        """Forget the alignment of ``checkpoint``, if it is under way, and ignore its late barriers."""
        if self._barrier is not None and self._barrier.checkpoint <= checkpoint:
            self._barrier = None
            self._arrived.clear()
        self._settled = max(self._settled, checkpoint)

    def _completed(self, now: Time) -> list[Aligned | Overtaken]:
        if self._barrier is None or self._arrived | self._ended != self._channels:
            return []
        barrier, since = self._barrier, self._since
        self.abort(barrier.checkpoint)
        return [Aligned(barrier, max(0.0, now - since))]

    def check_invariants(self) -> None:
        assert self._arrived <= self._channels
        assert self._ended <= self._channels
        assert bool(self._arrived) == (self._barrier is not None), (self._arrived, self._barrier)
        if self._barrier is not None:
            assert self._barrier.checkpoint > self._settled
            assert self._arrived | self._ended != self._channels
