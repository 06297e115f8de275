"""Engines that break one rule of windows, joins, orders or calls in flight each; see `tests.simulation.broken`.

Each comes with the kind of flow (`tests.simulation.events.KINDS`) that must show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK
from rayflow.operators.async_map import AsyncMapOperator
from rayflow.operators.base import RestoredState
from rayflow.operators.joins.buffer import Buffer
from rayflow.operators.joins.columns import LEFT
from rayflow.operators.joins.operator import JoinOperator
from rayflow.operators.keyed.deduplicate import PASSED, DeduplicateWithinOperator
from rayflow.operators.ordering.sort import SortOperator
from rayflow.operators.windowing.count import CountOperator
from rayflow.operators.windowing.progress import Progress
from rayflow.operators.windowing.session_operator import PROGRESS, SessionOperator
from tests.simulation.broken import replaced


@contextmanager
def forget_one_side() -> Iterator[None]:
    """R3: the rows of the right side are no part of the snapshot of a join."""

    def make(original: Any) -> Any:
        def snapshot(self: JoinOperator, *args: Any) -> Any:
            kept = self.buffers
            self.buffers = (kept[LEFT], Buffer())
            try:
                return original(self, *args)
            finally:
                self.buffers = kept

        return snapshot

    with replaced(JoinOperator, "snapshot", make):
        yield


@contextmanager
def join_from_the_beginning_of_time() -> Iterator[None]:
    """W3: a restored join does not know what it has decided."""

    def make(original: Any) -> Any:
        def restore(self: JoinOperator, states: Sequence[RestoredState]) -> None:
            original(self, states)
            self.watermark = MIN_WATERMARK

        return restore

    with replaced(JoinOperator, "restore", make):
        yield


@contextmanager
def pass_on_the_watermark_of_the_input() -> Iterator[None]:
    """W1: rows without a partner come out behind the watermark that was passed on."""
    with replaced(JoinOperator, "passed_on", lambda _: lambda self: self.watermark):
        yield


@contextmanager
def prune_versions_of_the_future() -> Iterator[None]:
    """R3: of the versions of a key the last one is kept, although rows will ask for the one before."""

    def make(original: Any) -> Any:
        def prune(self: Buffer, time: int) -> None:
            original(self, MAX_WATERMARK)

        return prune

    with replaced(Buffer, "prune", make):
        yield


def _progress_only(original: Any) -> Any:
    def restore(self: Any, states: Sequence[RestoredState]) -> None:
        original(self, [state for state in states if state.name == PROGRESS])

    return restore


@contextmanager
def close_open_sessions() -> Iterator[None]:
    """R3: sessions begin anew after a restore."""
    with replaced(SessionOperator, "restore", _progress_only):
        yield


@contextmanager
def count_from_nothing() -> Iterator[None]:
    """R3: count windows that were not full begin anew after a restore."""
    with replaced(CountOperator, "restore", _progress_only):
        yield


@contextmanager
def fire_windows_again() -> Iterator[None]:
    """W3: restored windows do not know which of them have fired."""

    def make(original: Any) -> Any:
        def restored(self: Progress, metas: Sequence[Any]) -> Progress:
            return Progress(self.lateness_us, self.emit)

        return restored

    with replaced(Progress, "restored", make):
        yield


@contextmanager
def sort_what_has_come_out() -> Iterator[None]:
    """R3: rows that a piece still has are taken for rows that wait."""

    def make(original: Any) -> Any:
        def restore(self: SortOperator, states: Sequence[RestoredState]) -> None:
            metas = ({**state.meta, "watermark": MIN_WATERMARK} if state.meta else state.meta for state in states)
            original(self, [replace(state, meta=meta) for state, meta in zip(states, metas, strict=True)])

        return restore

    with replaced(SortOperator, "restore", make):
        yield


@contextmanager
def drop_calls_in_flight() -> Iterator[None]:
    """A3: batches whose results are not there yet are no part of the snapshot."""
    with replaced(AsyncMapOperator, "snapshot", lambda _: lambda self, checkpoint: None):
        yield


@contextmanager
def measure_from_the_restore() -> Iterator[None]:
    """R3: every key counts as having passed a row at the watermark that was restored."""

    def make(original: Any) -> Any:
        def take(self: DeduplicateWithinOperator, batch: pa.RecordBatch) -> Any:
            if self._watermark != MIN_WATERMARK and self._watermark == self._swept_at and not self._new_rows:
                for rows in list(self._table.scan()):
                    slots = self._table.slots(rows.select(list(self.keys)).columns, insert=False)
                    self._table.set(slots, PASSED, pa.array(np.full(len(slots), self._watermark)))
            return original(self, batch)

        return take

    with replaced(DeduplicateWithinOperator, "take", make):
        yield


BROKEN_EVENTS: dict[str, tuple[Callable[[], AbstractContextManager[None]], str]] = {
    broken.__name__: (broken, kind)
    for broken, kind in (
        (forget_one_side, "interval_join"),
        (join_from_the_beginning_of_time, "window_join"),
        (pass_on_the_watermark_of_the_input, "joined_sessions"),
        (prune_versions_of_the_future, "asof_join"),
        (close_open_sessions, "sessions"),
        (count_from_nothing, "counts"),
        (fire_windows_again, "sliding"),
        (sort_what_has_come_out, "sorted_running"),
        (drop_calls_in_flight, "async_map"),
        (measure_from_the_restore, "deduplicate_within"),
    )
}

__all__ = ["BROKEN_EVENTS"]
