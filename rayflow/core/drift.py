"""Sources that drift apart wait for each other: those that are far ahead of the slowest stop reading.

Without it a fast source fills the state behind it (windows and joins that the slow one holds open) for as long as it
is ahead. Source subtasks with a maximum drift report their watermark when it has changed; the coordinator tells all of
them the lowest; each holds back what is further ahead than it may be. After Flink's watermark alignment (FLIP-182/217).

C6  what is known is of the present attempt alone: reports of another one do not reach `SourceDrift`.
W2  idle and ended subtasks are waited for by nobody.

**It delays and never deadlocks.** One that has no watermark yet is never held. Whoever is the slowest is ahead of
nobody and reads on, and one that is held goes on to report and to ask for splits; so old news only keeps somebody
waiting until the next news, which the slowest sends because it reads on, or turns idle, or ends.
"""

from __future__ import annotations

from collections.abc import Iterable

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, SubtaskId


def too_far(watermark: int, slowest: int, max_drift_us: int) -> bool:
    """Whether one who has got to ``watermark`` must wait for the ``slowest``."""
    return watermark > MIN_WATERMARK and watermark - slowest > max_drift_us


class SourceDrift:
    """The coordinator's side, for one attempt."""

    def __init__(self, members: Iterable[SubtaskId]) -> None:
        self._watermarks = dict.fromkeys(members, MIN_WATERMARK)
        """Of those that have not ended."""
        self._idle: set[SubtaskId] = set()
        self.announced = MIN_WATERMARK
        """What everybody was told last."""

    @property
    def slowest(self) -> int:
        """`MIN_WATERMARK` while somebody has none yet; `MAX_WATERMARK` when there is nobody to wait for."""
        return min((w for s, w in self._watermarks.items() if s not in self._idle), default=MAX_WATERMARK)

    @property
    def members(self) -> tuple[SubtaskId, ...]:
        """Who is to be told: all that have not ended."""
        return tuple(self._watermarks)

    def reported(self, subtask: SubtaskId, watermark: int, *, idle: bool) -> int | None:
        """One has got so far; what everybody is to be told if that changes it.

        It may fall: one that was idle and comes back is waited for again.
        """
        if subtask in self._watermarks:
            self._watermarks[subtask] = max(watermark, self._watermarks[subtask])
            (self._idle.add if idle else self._idle.discard)(subtask)
        return self._news()

    def ended(self, subtask: SubtaskId) -> int | None:
        """It reads nothing more; what everybody is to be told if that changes it."""
        self._watermarks.pop(subtask, None)
        self._idle.discard(subtask)
        return self._news()

    def _news(self) -> int | None:
        if self.slowest == self.announced:
            return None
        self.announced = self.slowest
        return self.announced

    def check_invariants(self) -> None:
        assert self._idle <= self._watermarks.keys()
        assert self.announced == self.slowest, "somebody waits for old news"
