"""One figure, one JSON line: what a benchmark measured, in which unit, against which bar.

A benchmark module is run as `python -m benchmarks.<name>` and calls `emit` for each of its figures. It exits
with 0 when it has measured, whether or not a bar was missed: `ok` says a missed bar, the exit code a crash.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import TextIO

KEYS = ("figure", "value", "unit", "bar", "ok")


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure. `bar` is what was asked for, as prose or a number ("<= 5", 0.6), if anything."""

    figure: str
    value: float | str
    unit: str
    bar: float | str | None
    ok: bool

    def __post_init__(self) -> None:
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise ValueError(f"figure {self.figure!r}: expected a finite value, got {self.value}; report why as text")

    def to_json(self) -> str:
        """The figure as one line, with exactly the keys of `KEYS` in their order."""
        return json.dumps(asdict(self), allow_nan=False)


def emit(
    figure: str,
    value: float | str,
    unit: str,
    bar: float | str | None = None,
    ok: bool = True,
    *,
    stream: TextIO | None = None,
) -> Figure:
    """Print the figure as one JSON line, at once, and return it."""
    made = Figure(figure=figure, value=value, unit=unit, bar=bar, ok=bool(ok))
    print(made.to_json(), file=stream or sys.stdout, flush=True)
    return made


def parse(line: str) -> Figure | None:
    """The figure on this line; None when the line is something else a benchmark said."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    if not isinstance(found, dict) or set(found) != set(KEYS) or not isinstance(found["ok"], bool):
        return None
    return Figure(**found)
