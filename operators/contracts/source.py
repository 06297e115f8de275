"""A source: splits with positions, readers of them, and the event time of what they give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.operators.contracts.operator import OperatorContext


@dataclass(frozen=True, slots=True)
class Polled:
    """What a source reader found. ``batch`` None: nothing just now.

    ``position`` is the position *behind* the batch: resuming at it must yield the row after the last one of the batch.
    """

    batch: pa.RecordBatch | None = None
    position: Json = None
    done: bool = False
    """This split is read to its end (the batch, if any, is the last)."""


class SplitReader(ABC):
    """Reads one split from a position on. Used by one subtask on its loop thread."""

    skipped: int = 0
    """Rows left out by policy so far; they are counted in the metrics as ``skipped_rows``."""

    @abstractmethod
    def poll(self) -> Polled:
        """The next batch. Must not block for long (some 100 ms at most); return an empty `Polled` instead."""

    def checkpointed(self, position: Json) -> None:
        """A checkpoint that holds ``position`` is complete. For outside views of progress only (a consumer group's
        offsets): what a job goes on from is its checkpoint. Must neither block nor raise."""

    def close(self) -> None:
        """Release resources."""


class Source(ABC):
    """A replayable input: a set of splits with positions. Immutable and picklable.

    The coordinator side calls `discover`; subtasks call `reader`. Reading a split from the same position must give the
    same rows in the same order, every time: exactly-once stands on that (rule R2).
    """

    @abstractmethod
    def schema(self) -> pa.Schema | None:
        """Schema of all batches; None when it is known only at run time. May look into the input; is cached."""

    def declared_schema(self) -> pa.Schema | None:
        """The schema, where it is known without looking into the input; then a flow is checked while it is built."""
        return None

    @abstractmethod
    def discover(self) -> Sequence[tuple[str, Json]]:
        """All splits in reading order, as (stable id, description). Called at the start and on recovery."""

    @abstractmethod
    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        """A reader that begins at ``position`` (None: at the beginning)."""

    def discover_again(self) -> Sequence[tuple[str, Json]]:
        """As `discover`, every `discovery_interval_s` while the job runs: ids that were not known before are new.

        The coordinator keeps every id that it has seen in its checkpoints, so that no split is read twice. A
        `DataError` or `PlanError` ends the job; after anything else that is raised it looks again in time."""
        return self.discover()

    @property
    def discovery_interval_s(self) -> float | None:
        """How often to look for new splits, in seconds; None: the splits of the beginning are all."""
        return None

    @property
    def bounded(self) -> bool:
        """Whether the input ends. One that looks for new splits does not."""
        return True

    @property
    def in_turns(self) -> bool:
        """Whether a subtask reads its splits side by side, each with a watermark of its own, instead of one after
        another. Splits that never end must be."""
        return not self.bounded

    @property
    def replayable(self) -> bool:
        """Whether a position can be read again. Without that a failure loses rows (at most once)."""
        return True


@dataclass(frozen=True, slots=True)
class EventTime:
    """Event time of a stream: the column and how late rows may be, in the source's reading order.

    ``max_delay_us`` None: rows may come in any order, so event time advances only at the end of the input.
    """

    column: str
    max_delay_us: int | None = None
    idle_timeout_us: int | None = None
    """A split, or for `with_event_time` a subtask, without rows for so long holds event time back no more."""
    max_ahead_us: int | None = None
    """How far ahead of the wall clock an event time may be; None: as far as it likes."""
    on_ahead: Literal["fail", "skip"] = "fail"
    """What becomes of rows further ahead."""
    max_drift_us: int | None = None
    """A source whose watermark is further ahead than this of the slowest that has such a bound stops reading."""
    derive: Callable[[pa.RecordBatch], Any] | None = None
    """Makes the column from the rows, which do not have it yet; see `rayflow.operators.event_time.TimeFunction`."""
