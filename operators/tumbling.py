"""Which window a time belongs to.

Rows are put into *panes*: stretches of time that no window begins or ends within. A tumbling window is one pane, a
sliding window several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Protocol

import pyarrow as pa

from rayflow.config import Duration, duration_us
from rayflow.errors import ConfigError
from rayflow.operators.event_time import TIME_BOUND_US
from rayflow.operators.grouping import Int64Array

SIZE_BOUND_US: Final = TIME_BOUND_US // 2
"""Of a window: its ends must not leave 64 bits."""


class WindowSpec(Protocol):
    """How event time is cut into windows; immutable and picklable. All times are int microseconds since the epoch."""

    def start_of(self, time_us: int) -> int:
        """Start of the pane of one time."""

    def window_starts(self, times: pa.Array, earliest: int, latest: int) -> Int64Array | int:
        """The start of the pane of every row, or one for all, which is the common case and makes grouping cheaper."""

    def first_open(self, watermark: int) -> int:
        """Start of the earliest window that ends after ``watermark``. No pane before it is in an open window."""

    def next_start(self, start: int) -> int:
        """Start of the window that begins after the one that starts here."""

    def ends_of(self, starts: Int64Array) -> Int64Array:
        """Ends of the windows with these starts."""

    def cut(self) -> Mapping[str, int | str]:
        """What must be equal for open windows to be taken over from a checkpoint: JSON."""


@dataclass(frozen=True, slots=True)
class Tumbling:
    """Windows of one size that follow each other without a gap: [offset + n * size, offset + (n + 1) * size)."""

    size_us: int
    offset_us: int = 0

    def __str__(self) -> str:
        return f"tumbling {timedelta(microseconds=self.size_us)}"

    def start_of(self, time_us: int) -> int:
        """Start of the window of one time; right before 1970 too, because Python's // floors."""
        return (time_us - self.offset_us) // self.size_us * self.size_us + self.offset_us

    def window_starts(self, times: pa.Array, earliest: int, latest: int) -> Int64Array | int:
        """The window start of every row, or one for all."""
        first = self.start_of(earliest)
        return first if self.start_of(latest) == first else self.starts_of(times.to_numpy())

    def starts_of(self, times_us: Int64Array) -> Int64Array:
        starts: Int64Array = (times_us - self.offset_us) // self.size_us
        starts *= self.size_us
        starts += self.offset_us
        return starts

    def first_open(self, watermark: int) -> int:
        return self.start_of(watermark)

    def next_start(self, start: int) -> int:
        return start + self.size_us

    def ends_of(self, starts: Int64Array) -> Int64Array:
        return starts + self.size_us

    def cut(self) -> Mapping[str, int | str]:
        return {"size_us": self.size_us, "offset_us": self.offset_us}


def tumbling(size: Duration, *, offset: Duration = "0s") -> Tumbling:
    """Windows of ``size``, aligned to the epoch (UTC) plus ``offset``. Raises `ConfigError` for a bad duration."""
    size_us = window_size(size, what="tumbling(size)")
    return Tumbling(size_us, duration_us(offset, what="tumbling(offset)") % size_us)


def window_size(size: Duration, *, what: str) -> int:
    """Microseconds, at least 1; raises `ConfigError` for a bad duration."""
    size_us = duration_us(size, what=what, minimum_us=1)
    if size_us > SIZE_BOUND_US:
        raise ConfigError(f"{what} must be at most {SIZE_BOUND_US // 1_000_000} s, got {size!r}")
    return size_us


__all__ = ["Tumbling", "WindowSpec", "tumbling", "window_size"]
