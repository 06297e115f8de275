"""How often something gives results that are not final: every so much time, of events or of the clock, or every so
many rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, get_args

from rayflow.config import Duration, duration_us
from rayflow.errors import ConfigError

Clock = Literal["event", "processing"]


@dataclass(frozen=True, slots=True)
class Every:
    """One of the two is given."""

    period_us: int | None = None
    rows: int | None = None
    clock: Clock = "event"

    def __str__(self) -> str:
        if self.rows is not None:
            return f"every {self.rows} rows"
        assert self.period_us is not None
        return f"every {timedelta(microseconds=self.period_us)}{' of the clock' * (self.clock == 'processing')}"


def every(period: Duration | None = None, *, rows: int | None = None, clock: Clock = "event") -> Every:
    """``every("10s")`` of event time, ``every("10s", clock="processing")`` of the machine's clock, or
    ``every(rows=100)`` of a key. Raises `ConfigError` for anything else."""
    if (period is None) == (rows is None):
        raise ConfigError(f"every() needs either a period or rows=, got {period!r} and rows={rows!r}")
    if clock not in get_args(Clock):
        raise ConfigError(f'every(clock) must be "event" or "processing", got {clock!r}')
    if rows is not None:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
            raise ConfigError(f"every(rows) must be a whole number, 1 or more, got {rows!r}")
        if clock != "event":
            raise ConfigError(f"every(rows={rows}) has no clock")
        return Every(rows=rows)
    assert period is not None
    return Every(period_us=duration_us(period, what="every(period)", minimum_us=1), clock=clock)


class ClockTimer:
    """When results by the clock are due: at the next multiple of the period after something has changed, never while
    nothing has. What has changed is told as ints (starts of panes, slots); it is not in checkpoints: after a restore
    all there is counts as changed."""

    def __init__(self, period_us: int) -> None:
        self._period_us = period_us
        self._changed: set[int] = set()
        self.due: float | None = None
        """Unix seconds."""

    def changed(self, what: Iterable[int], now: float) -> None:
        self._changed.update(what)
        if self.due is None and self._changed:
            self.due = (int(now * 1_000_000) // self._period_us + 1) * self._period_us / 1_000_000

    def take(self, now: float) -> list[int]:
        """What has changed since the last time, ascending; empty before it is due."""
        if self.due is None or now < self.due:
            return []
        taken, self._changed, self.due = sorted(self._changed), set(), None
        return taken


__all__ = ["Clock", "ClockTimer", "Every", "every"]
