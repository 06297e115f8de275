"""Windows of one size that begin every so often, so that a row is in several of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa

from rayflow.config import Duration, duration_us
from rayflow.errors import ConfigError
from rayflow.operators.grouping import Int64Array
from rayflow.operators.tumbling import Tumbling, window_size


@dataclass(frozen=True, slots=True)
class Sliding:
    """Windows [offset + n * every, offset + n * every + size) for all whole n; ``every <= size``.

    A pane is ``gcd(size, every)`` long: windows begin and end between panes, whether ``every`` divides ``size`` or not.
    """

    size_us: int
    every_us: int
    offset_us: int = 0

    def __str__(self) -> str:
        size, every = timedelta(microseconds=self.size_us), timedelta(microseconds=self.every_us)
        return f"sliding {size} every {every}"

    @property
    def panes(self) -> Tumbling:
        pane_us = math.gcd(self.size_us, self.every_us)
        return Tumbling(pane_us, self.offset_us % pane_us)

    def start_of(self, time_us: int) -> int:
        return self.panes.start_of(time_us)

    def window_starts(self, times: pa.Array, earliest: int, latest: int) -> Int64Array | int:
        return self.panes.window_starts(times, earliest, latest)

    def first_open(self, watermark: int) -> int:
        """The last window that has ended begins at ``watermark - size`` or just before; this is the next one."""
        return (watermark - self.size_us - self.offset_us) // self.every_us * self.every_us + (
            self.every_us + self.offset_us
        )

    def next_start(self, start: int) -> int:
        return start + self.every_us

    def ends_of(self, starts: Int64Array) -> Int64Array:
        return starts + self.size_us

    def cut(self) -> Mapping[str, int | str]:
        return {"size_us": self.size_us, "offset_us": self.offset_us, "every_us": self.every_us}


def sliding(size: Duration, *, every: Duration, offset: Duration = "0s") -> Sliding:
    """Windows of ``size`` of which one begins ``every`` so often, aligned to the epoch (UTC) plus ``offset``.

    A row is in ``size / every`` windows, but is stored once: what a window costs does not grow with that. ``every``
    need not divide ``size``. Raises `ConfigError` for a bad duration, and for an ``every`` above ``size``: rows between
    two windows would be in none.
    """
    size_us = window_size(size, what="sliding(size)")
    every_us = duration_us(every, what="sliding(every)", minimum_us=1)
    if every_us > size_us:
        raise ConfigError(
            f"sliding(every) must be at most the size {size!r}, got {every!r}: rows between two windows would be in "
            "none; filter them out and use tumbling windows if that is meant"
        )
    return Sliding(size_us, every_us, duration_us(offset, what="sliding(offset)") % every_us)


__all__ = ["Sliding", "sliding"]
