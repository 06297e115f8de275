"""How far the windows of an operator instance have got in event time: what has fired, and what is still kept.

Without allowed lateness a window goes when it fires. With it, results are either held until no row can change them any
more (``final``: one result a key and window, later by the allowed lateness), or they come as soon as the watermark says
so and again for every batch that changes them (``update``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.errors import PlanError, StateSchemaError

Emit = Literal["final", "update"]


@dataclass(slots=True)
class Progress:
    """Event times in us; none ever goes back. ``kept <= fired <= watermark``."""

    lateness_us: int = 0
    emit: Emit = "final"
    watermark: int = MIN_WATERMARK
    fired: int = MIN_WATERMARK
    """Windows that end here or before have given their first result."""
    kept: int = MIN_WATERMARK
    """Windows that end here or before are gone: rows for them are late."""

    def next(self, watermark: int) -> Progress:
        """When the watermark has come there, which is further than before."""
        safe = watermark if watermark == MAX_WATERMARK else max(MIN_WATERMARK, watermark - self.lateness_us)
        kept = max(self.kept, safe)
        fired = max(self.fired, watermark if self.emit == "update" else kept)
        return Progress(self.lateness_us, self.emit, watermark, fired, kept)

    def meta(self) -> Mapping[str, int]:
        """JSON for checkpoints."""
        return {"watermark": self.watermark, "fired": self.fired, "kept": self.kept}

    def restored(self, metas: Sequence[Mapping[str, Any]]) -> Progress:
        """From what `meta` gave in every old subtask: the lowest of each. Lateness and ``emit`` may have changed since:
        what has gone stays gone, and without updates nothing is added to what has fired."""

        def lowest(name: str) -> int:
            return min((int(meta.get(name, meta["watermark"])) for meta in metas), default=MIN_WATERMARK)

        watermark, fired, kept = lowest("watermark"), lowest("fired"), lowest("kept")
        if self.emit == "final":
            kept = max(kept, fired)
        return Progress(self.lateness_us, self.emit, watermark, fired, kept)


def check_emit(emit: str, early_us: int | None) -> None:
    """Raises `PlanError` for options of windows that mean nothing."""
    if emit not in ("final", "update"):
        raise PlanError(f'emit must be "final" or "update", got {emit!r}')
    if early_us is not None and emit != "update":
        raise PlanError('early= needs emit="update": with "final" each key and window has one result')


CUTS: Final = ("size_us", "offset_us", "every_us", "zone")
"""Keys of `WindowSpec.cut`; the first two are there in checkpoints of every version that has any."""


def check_cut(meta: Mapping[str, Any], now: Mapping[str, int | str], where: str) -> None:
    """Raises `StateSchemaError` if the windows of a checkpoint were cut in another way."""
    before = {name: meta.get(name, now[name] if name in CUTS[:2] else None) for name in now}
    before |= {name: meta[name] for name in CUTS if name in meta}
    if before != dict(now):
        raise StateSchemaError(
            f"{where} has windows of {_said(now)}, its checkpoint of {_said(before)}: open windows cannot be cut anew; "
            "give the step another name= to begin without its state, or the windows it had"
        )


def _said(cut: Mapping[str, Any]) -> str:
    every = f" every {cut['every_us']} us" if cut.get("every_us") else ""
    zone = f" in days of {cut['zone']}" if cut.get("zone") else ""
    return f"{cut['size_us']} us{every} from {cut['offset_us']} us on{zone}"


__all__ = ["Emit", "Progress", "check_cut", "check_emit"]
