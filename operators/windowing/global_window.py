"""One window of all rows of a key, which never ends: what tells when to give results is a trigger."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayflow.errors import ConfigError
from rayflow.operators.grouping import Int64Array
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing.triggers import Every


@dataclass(frozen=True, slots=True)
class GlobalWindow:
    """All rows of a key so far, whenever the trigger says."""

    trigger: Every

    def __str__(self) -> str:
        return f"global, {self.trigger}"


def global_window(*, trigger: Every) -> GlobalWindow:
    """Aggregates over all rows of a key so far.

    ``rf.every(rows=100)``: with every 100th row of the key, over exactly these rows. ``rf.every("1h")``: when the
    watermark passes a full hour, over all rows before it, for keys that had rows in that hour; late rows count with the
    next hour. ``rf.every("10s", clock="processing")``: so often by the clock of the machine, over what has come, for
    keys that have changed. What has not been told is told when the input ends. To begin anew after every result take
    `rf.count_window` or `rf.tumbling`. Raises `ConfigError` for what is no trigger.
    """
    if not isinstance(trigger, Every):
        raise ConfigError(
            f'global_window(trigger) must be such as rf.every("1h") or rf.every(rows=100), got {trigger!r}'
        )
    return GlobalWindow(trigger)


class Periods:
    """`WindowSpec` of the periods of a trigger by event time. Rows that come too late for theirs are put into the first
    that has not been told: nothing is late for a window that never ends."""

    def __init__(self, period_us: int) -> None:
        self._periods = Tumbling(period_us)
        self.floor: int | None = None
        """Start of the first period that is open."""

    def start_of(self, time_us: int) -> int:
        start = self._periods.start_of(time_us)
        return start if self.floor is None else max(start, self.floor)

    def window_starts(self, times: pa.Array, earliest: int, latest: int) -> Int64Array | int:
        starts = self._periods.window_starts(times, earliest, latest)
        if self.floor is None:
            return starts
        return max(starts, self.floor) if isinstance(starts, int) else np.maximum(starts, self.floor)

    def first_open(self, watermark: int) -> int:
        return self._periods.first_open(watermark)

    def next_start(self, start: int) -> int:
        return self._periods.next_start(start)

    def ends_of(self, starts: Int64Array) -> Int64Array:
        return self._periods.ends_of(starts)

    def cut(self) -> dict[str, int | str]:
        return dict(self._periods.cut())


__all__ = ["GlobalWindow", "Periods", "global_window"]
