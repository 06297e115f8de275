"""Engines that break one rule of keyed state or of incremental checkpoints each; see `tests.simulation.broken`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from rayflow.core import restore
from rayflow.core.manifest import StateHandle
from rayflow.operators.base import RestoredState
from rayflow.operators.runs import RunStore
from rayflow.operators.state.journal import Journal
from rayflow.operators.state.keyed import KeyedState
from rayflow.operators.state.timers import Timers
from rayflow.runtime import assembly
from rayflow.storage import retention, snapshots
from rayflow.storage.layout import parse_shared
from tests.simulation.broken import replaced


@contextmanager
def delete_shared_files_by_their_age() -> Iterator[None]:
    """C7: retention keeps of ``shared/`` what the retained checkpoints have written, not what they name."""

    def make(original: Any) -> Any:
        def referred(self: Any) -> set[str]:
            found: set[str] = original(self)
            return {path for path in found if (by := parse_shared(path)) is None or by in self.kept}

        return referred

    with replaced(retention._Sorted, "referred", make):
        yield


@contextmanager
def read_all_key_groups() -> Iterator[None]:
    """K3: after a change of parallelism every subtask takes all rows of a file."""

    def make(original: Any) -> Any:
        def read(self: Any, handle: StateHandle, key_groups: range | None = None) -> RestoredState:
            state: RestoredState = original(self, replace(handle, groups=None), None)
            return state

        return read

    with replaced(snapshots.SnapshotStore, "read", make):
        yield


@contextmanager
def call_a_part_of_a_piece_by_the_name_of_the_whole() -> Iterator[None]:
    """K3: after p -> q -> p the parts of a piece cannot be told apart, and one stands for all."""
    original = restore.clip

    def clip(handle: StateHandle, *args: Any) -> StateHandle:
        return replace(original(handle, *args), piece=handle.piece)

    with ExitStack() as stack:
        for module in (assembly, snapshots):
            stack.callback(setattr, module, "clip", original)
            setattr(module, "clip", clip)  # noqa: B010
        yield


@contextmanager
def forget_timers() -> Iterator[None]:
    """R3: timers of a checkpoint are not set again."""
    with replaced(Timers, "_restored", lambda _: lambda self, batch: None):
        yield


@contextmanager
def reopen_closed_windows() -> Iterator[None]:
    """W3: rows of closed windows that a piece still has are taken for open ones."""

    def make(original: Any) -> Any:
        def reopen(self: RunStore, table: Any, **options: Any) -> None:
            original(self, table, **{**options, "closed": None})

        return reopen

    with replaced(RunStore, "restore", make):
        yield


@contextmanager
def apply_pieces_backwards() -> Iterator[None]:
    """R1: an older row of a key replaces a newer one."""

    def make(original: Any) -> Any:
        def backwards(self: KeyedState, states: Sequence[RestoredState]) -> None:
            original(self, list(reversed(states)))

        return backwards

    with replaced(KeyedState, "restore", make):
        yield


@contextmanager
def let_pieces_go_too_early() -> Iterator[None]:
    """R3: a lap of the window counts as ended although rows behind it stand in older pieces only."""

    def make(original: Any) -> Any:
        def passed(self: Journal, count: int) -> Any:
            slots, _ = original(self, count)
            return slots, count > 0

        return passed

    with replaced(Journal, "_pass", make):
        yield


BROKEN_STATE = {
    f.__name__: f
    for f in (
        delete_shared_files_by_their_age,
        read_all_key_groups,
        call_a_part_of_a_piece_by_the_name_of_the_whole,
        forget_timers,
        reopen_closed_windows,
        apply_pieces_backwards,
        let_pieces_go_too_early,
    )
}

__all__ = ["BROKEN_STATE"]
