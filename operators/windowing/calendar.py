"""Windows of calendar days in a time zone, which have 23 or 25 hours when its clocks are changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.config import Duration, duration_us
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import ConfigError, DataError
from rayflow.operators.grouping import Int64Array
from rayflow.operators.tumbling import Tumbling, window_size
from rayflow.operators.tumbling import tumbling as tumbling_utc

_DAY_US: Final = 86_400_000_000
# Years 2 to 9998: what Arrow and everybody who looks at the results can show as a date in any zone.
_FIRST_US: Final = -62_104_060_800_000_000
_LAST_US: Final = 253_370_764_800_000_000


@dataclass(frozen=True, slots=True)
class CalendarDays:
    """Windows of ``days`` days of the zone that follow each other without a gap.

    They begin when the clocks of the zone show midnight plus ``offset_us``: where these show it twice, the first time;
    where they skip it, right after. Several days are counted from 1970-01-01, a Thursday.
    """

    days: int
    offset_us: int
    zone: str

    def __str__(self) -> str:
        return f"tumbling {self.days} calendar day{'s' * (self.days > 1)} of {self.zone}"

    def start_of(self, time_us: int) -> int:
        self._check(time_us, time_us)
        edges = self._edges(time_us, time_us)
        return int(edges[np.searchsorted(edges, time_us, side="right") - 1])

    def window_starts(self, times: pa.Array, earliest: int, latest: int) -> Int64Array | int:
        self._check(earliest, latest)
        edges = self._edges(earliest, latest)
        first, last = np.searchsorted(edges, [earliest, latest], side="right") - 1
        if first == last:
            return int(edges[first])
        starts: Int64Array = edges[np.searchsorted(edges, times.to_numpy(), side="right") - 1]
        return starts

    def first_open(self, watermark: int) -> int:
        if watermark < _FIRST_US:
            return MIN_WATERMARK
        return MAX_WATERMARK if watermark > _LAST_US else self.start_of(watermark)

    def next_start(self, start: int) -> int:
        return int(self.ends_of(np.array([start], np.int64))[0])

    def ends_of(self, starts: Int64Array) -> Int64Array:
        if len(starts) == 0:
            return starts
        edges = self._edges(int(starts.min()), int(starts.max()))
        ends: Int64Array = edges[np.searchsorted(edges, starts, side="right")]
        return ends

    def cut(self) -> Mapping[str, int | str]:
        return {"size_us": self.days * _DAY_US, "offset_us": self.offset_us, "zone": self.zone}

    def _edges(self, low: int, high: int) -> Int64Array:
        """Ends of windows, ascending: one at or before ``low``, one behind ``high``, and all between them."""
        size_us = self.days * _DAY_US
        # No zone is more than a day away from UTC.
        first = (low - self.offset_us - _DAY_US) // size_us - 1
        last = (high - self.offset_us + _DAY_US) // size_us + 2
        shown = np.arange(first, last + 1) * size_us + self.offset_us
        edges = pc.assume_timezone(
            pa.array(shown).view(pa.timestamp("us")), self.zone, ambiguous="earliest", nonexistent="latest"
        )
        found: Int64Array = edges.view(pa.int64()).to_numpy()
        return found

    def _check(self, earliest: int, latest: int) -> None:
        if earliest < _FIRST_US or latest > _LAST_US:
            raise DataError(
                f"calendar days are known from the year 2 to the year 9998, got event times between {earliest} and "
                f"{latest} us since 1970; filter out or repair the rows, or use windows without zone="
            )


def tumbling(size: Duration, *, offset: Duration = "0s", zone: str | None = None) -> Tumbling | CalendarDays:
    """Windows of ``size`` without gaps between them.

    Without ``zone`` they are aligned to the epoch (UTC) plus ``offset``. With it, ``size`` is a number of whole days
    and windows begin when clocks in that zone (``"Europe/Berlin"``) show midnight plus ``offset``: a day has 23 or 25
    hours when they are changed; weeks that begin on Monday are ``tumbling("7d", offset="4d", zone=...)``. Columns keep
    the zone of the event time, whatever ``zone`` is. Raises `ConfigError` for a bad duration or zone.
    """
    if zone is None:
        return tumbling_utc(size, offset=offset)
    size_us = window_size(size, what="tumbling(size)")
    if size_us % _DAY_US:
        raise ConfigError(f'tumbling(size) must be whole days when it has a zone, such as "1d", got {size!r}')
    made = CalendarDays(size_us // _DAY_US, duration_us(offset, what="tumbling(offset)") % size_us, zone)
    try:
        made.start_of(0)
    except (pa.ArrowInvalid, TypeError) as error:
        raise ConfigError(
            f'tumbling(zone) must be a name of the time zone database, such as "Europe/Berlin", got {zone!r}'
        ) from error
    return made


__all__ = ["CalendarDays", "tumbling"]
