"""Bounds so small that small jobs meet incremental checkpoints, merges, evictions and local files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from rayflow.operators import runs, spill
from rayflow.operators.joins import buffer
from rayflow.operators.state import journal
from rayflow.runtime.scratch import ProcessFolder

_BOUNDS: tuple[tuple[ModuleType, dict[str, Any]], ...] = (
    (runs, {"PENDING_ROWS": 40, "SMALL_ROWS": 2, "SMALL_RUNS": 6, "PIECE_BYTES": 0}),
    (spill, {"BLOCK_ROWS": 2}),
    (buffer, {"PIECE_BYTES": 0, "PRUNE_ROWS": 4, "SMALL_RUN_BYTES": 200, "FAN_IN": 3}),
    (journal, {"SEAL_ROWS": 8, "SMALL_ROWS": 6, "SMALL_RUNS": 5, "JOIN_RUNS": 2, "JOIN_ROWS": 4, "_WINDOW_MIN": 1}),
)


@contextmanager
def tiny() -> Iterator[None]:
    """Every run is a piece, which the store of a simulated job writes as an object in ``shared/``."""
    before = [(module, name, getattr(module, name)) for module, bounds in _BOUNDS for name in bounds]
    for module, bounds in _BOUNDS:
        for name, bound in bounds.items():
            setattr(module, name, bound)
    try:
        yield
    finally:
        for module, name, bound in before:
            setattr(module, name, bound)


def forget_local_files() -> None:
    """What simulated processes that crashed have left behind: this process lives, so nobody else removes it."""
    for process in ProcessFolder._open.values():
        for path in process.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
