"""Which window a time belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa

from rayflow.config import Duration, duration_us
from rayflow.operators.grouping import Int64Array


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
        """The window start of every row, or one for all, which is the common case and makes grouping cheaper."""
        first = self.start_of(earliest)
        return first if self.start_of(latest) == first else self.starts_of(times.to_numpy())

    def starts_of(self, times_us: Int64Array) -> Int64Array:
        starts: Int64Array = (times_us - self.offset_us) // self.size_us
        starts *= self.size_us
        starts += self.offset_us
        return starts


def tumbling(size: Duration, *, offset: Duration = "0s") -> Tumbling:
    """Windows of ``size``, aligned to the epoch (UTC) plus ``offset``. Raises `ConfigError` for a bad duration."""
    size_us = duration_us(size, what="tumbling(size)", minimum_us=1)
    return Tumbling(size_us, duration_us(offset, what="tumbling(offset)") % size_us)


__all__ = ["Tumbling", "tumbling"]
