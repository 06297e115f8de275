"""When to look for new splits of the sources that ask for it, and what becomes of what was found.

One look at a source at a time, and only while the job runs. A look is a background task of the shell, so it may take
as long as it likes; what an earlier attempt asked for is not used, because its pool is gone (C6). A look that fails is
told in the timeline and tried again after the interval: a folder that cannot be listed for now is no reason to read
the others again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rayflow.core.events import Discover
from rayflow.core.ids import Attempt
from rayflow.core.manifest import Json
from rayflow.core.roster import Heard, Roster
from rayflow.core.splits import SplitPool
from rayflow.core.timeline import LOOK_FAILED, SPLITS_FOUND, Outbox


class Discovery:
    """Driven by `CoordinatorMachine`, only while the job is RUNNING. ``intervals``: source -> seconds."""

    def __init__(
        self, intervals: Mapping[str, float], roster: Roster, pools: Mapping[str, SplitPool], out: Outbox
    ) -> None:
        self._intervals = intervals
        self._roster = roster
        self._pools = pools
        self._out = out
        self._due: dict[str, float] = {}
        self._asked: set[str] = set()  # sources that are being looked at, whichever attempt asked
        self._failure: dict[str, str] = {}  # why the last look failed

    def begin(self, now: float, *, restored: bool) -> None:
        """A new attempt runs. One that went on from a checkpoint looks at once: it may have been away for long."""
        self._due = {source: now if restored else now + wait for source, wait in self._intervals.items()}

    def next_deadline(self) -> float | None:
        return min((at for source, at in self._due.items() if source not in self._asked), default=None)

    def advance(self, now: float) -> None:
        """Ask for the looks that are due."""
        for source, at in self._due.items():
            if at <= now and source not in self._asked:
                self._asked.add(source)
                self._out.put(Discover(self._roster.attempt, source))

    def discovered(
        self, attempt: Attempt, source: str, found: Sequence[tuple[str, Json]], now: float, *, running: bool
    ) -> Heard:
        heard = self._answered(attempt, source, now, running=running)
        if heard is not Heard.ACCEPTED:
            return heard
        self._failure.pop(source, None)
        new, assignments = self._pools[source].discovered(found)
        if new:
            self._note(SPLITS_FOUND, f"{source}: {new}", now)
        for assignment in assignments:
            self._roster.send(assignment.subtask, assignment.assign)
        return heard

    def failed(self, attempt: Attempt, source: str, reason: str, now: float, *, running: bool) -> Heard:
        heard = self._answered(attempt, source, now, running=running)
        if heard is Heard.ACCEPTED and self._failure.get(source) != reason:
            self._failure[source] = reason  # told once, not every interval
            self._note(LOOK_FAILED, f"{source}: {reason}; it is tried every {self._intervals[source]:g} s", now)
        return heard

    def _answered(self, attempt: Attempt, source: str, now: float, *, running: bool) -> Heard:
        if source not in self._asked:
            return Heard.UNKNOWN
        self._asked.discard(source)
        if attempt != self._roster.attempt or not running:
            return Heard.STALE  # the next one is due when this attempt says so
        self._due[source] = now + self._intervals[source]
        return Heard.ACCEPTED

    def _note(self, what: str, detail: str, now: float) -> None:
        self._out.note(what, detail, attempt=self._roster.attempt, now=now)

    def check_invariants(self) -> None:
        assert self._asked <= self._intervals.keys()
        assert not self._due or self._due.keys() == self._intervals.keys()
