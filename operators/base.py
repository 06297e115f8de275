"""Contracts of operators, sources and sinks. Nothing here knows of Ray, files or the checkpoint protocol.

Life of an operator, always in this order and always on the one loop thread of its subtask:

    build() -> open(context, output) -> restore(states)?
            -> { process | on_watermark | on_timer | snapshot }* -> on_end -> close

- `open` may be expensive (a model, a connection); it is called once an attempt.
- `restore` is called before the first batch, with the states of this subtask's key-group range (keyed) or the states
  dealt to this subtask (operator state); not at all on a fresh start.
- `process` must not keep the batch mutable (Arrow is immutable) and emits by calling ``self.out.emit(batch)``.
- `snapshot` runs in the sync phase: it must take O(1) time in the size of the state. What it returns is frozen: later
  changes of the operator must not show in it. Heavy work belongs into `FrozenState.prepare`, which the uploader runs.
- After `on_end` come only snapshots, and then `close`. `close` is also called after a failure, at any point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.core.manifest import Json, SplitState

MAIN = "main"
"""Tag of an operator's ordinary output; side outputs have other tags (``late``, ``dead_letter``)."""


@dataclass(frozen=True, slots=True)
class OperatorContext:
    """Who and where this operator instance is."""

    job: str
    run_id: str
    operator: str
    """Stable id of the operator in the plan; state is mapped by it on restore."""
    step: str
    """What to call it in messages to people."""
    subtask: int
    parallelism: int
    max_parallelism: int
    attempt: int
    key_groups: range
    now: Callable[[], float]
    """Seconds; injected, so that the simulator can run time."""

    def __str__(self) -> str:
        return f"step {self.step!r} subtask {self.subtask}/{self.parallelism}"


class Output(Protocol):
    """Where an operator emits to: the next operator of the chain, or the exchange."""

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None: ...


@dataclass(frozen=True, slots=True)
class FrozenTable:
    """One named state, frozen: immutable batches of one schema. Freezing is taking references.

    ``key_columns`` names the columns that hold the key of a row for keyed state; None for operator state. The snapshot
    writer concatenates the batches, sorts keyed ones by key group and writes them off the loop thread.
    """

    name: str
    batches: tuple[pa.RecordBatch | pa.Table, ...]
    schema: pa.Schema | None = None
    """Needed only when ``batches`` is empty."""
    key_columns: tuple[str, ...] | None = None
    meta: Json = None


@dataclass(frozen=True, slots=True)
class FrozenState:
    """What an operator gives to a checkpoint."""

    tables: tuple[FrozenTable, ...] = ()
    prepare: Callable[[], Sequence[Json]] | None = None
    """Sinks: finishes the pre-commit off the loop thread (sync to disk, upload) and returns the committables of this
    checkpoint. They are durable when it returns. It must not touch what the loop thread goes on using."""


@dataclass(frozen=True, slots=True)
class RestoredState:
    """One named state given back. Keyed tables hold only rows of the subtask's own key groups (rule K3).

    After a change of parallelism an operator gets several with the same name (one for each old subtask).
    """

    name: str
    table: pa.Table
    meta: Json = None


class Operator(ABC):
    """Base of everything in a chain."""

    ctx: OperatorContext
    out: Output

    def open(self, ctx: OperatorContext, out: Output) -> None:
        self.ctx = ctx
        self.out = out

    def restore(self, states: Sequence[RestoredState]) -> None:
        """Take back what `snapshot` gave. The default refuses state: dropping it silently would be data loss."""
        if states:
            raise NotImplementedError(f"{self.ctx} cannot restore state {[s.name for s in states]}")

    @abstractmethod
    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        """One batch. ``input_index`` tells the inputs of a step apart (0 for a single one)."""

    def on_watermark(self, time: int) -> int:
        """Event time has reached ``time`` (us). Emit what is due, then return the watermark to pass on (rule W1)."""
        return time

    def on_end(self) -> None:
        """All inputs have ended; called after ``on_watermark(MAX_WATERMARK)``. Emit what is still held."""

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        """The state behind all batches processed so far and before all later ones (rule A3). None: stateless."""
        return None

    def close(self) -> None:
        """Release resources; must be safe after a failure and when called twice."""


class OperatorFactory(Protocol):
    """Immutable, picklable description of an operator; built once in every subtask, every attempt."""

    def build(self) -> Operator: ...

    @property
    def stateful(self) -> bool: ...


# ------------------------------------------------------------------------------------------------------------- sources


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

    @property
    def bounded(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class EventTime:
    """Event time of a stream: the column and how late rows may be, in the source's reading order.

    ``max_delay_us`` None: rows may come in any order, so event time advances only at the end of the input.
    """

    column: str
    max_delay_us: int | None = None
    idle_timeout_us: int | None = None


# --------------------------------------------------------------------------------------------------------------- sinks


class Committer(ABC):
    """Makes prepared output visible. Used on the coordinator side for recovery and in subtasks on completion."""

    @abstractmethod
    def commit(self, committables: Sequence[Json]) -> None:
        """Make them visible; a no-op for those already committed (rule S1).

        Raises `CommitLostError` when what was prepared is gone and the result is not there either.
        """

    @abstractmethod
    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        """Commit these, then abort everything prepared by earlier attempts that is not among them.

        No subtask of the job runs meanwhile. ``fresh``: there is no checkpoint, so nothing is to be committed, and
        output of another run in the target must be refused with `DataError` (rule R3: never mix two runs).
        """

    def finish(self) -> None:
        """The job is over and everything is committed: leave nothing behind but the output."""


class SinkOperator(Operator):
    """The end of a chain. `snapshot` closes what was written since the last barrier and returns a `FrozenState` whose
    ``prepare`` makes it durable and returns its committables.

    Committables of checkpoints that were aborted are kept by the subtask loop and committed with the next complete one;
    the operator itself hands out each committable once."""


class SinkFactory(OperatorFactory, Protocol):
    def committer(self) -> Committer | None:
        """None for a sink that needs no commit (print)."""


# -------------------------------------------------------------------------------------------------- helpers for testing


@dataclass(slots=True)
class Collected:
    """An `Output` that keeps what is emitted, by tag; for operators under test."""

    batches: dict[str, list[pa.RecordBatch]] = field(default_factory=dict)

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
        self.batches.setdefault(tag, []).append(batch)

    def table(self, tag: str = MAIN) -> pa.Table | None:
        found = self.batches.get(tag)
        return pa.Table.from_batches(found) if found else None


__all__ = [
    "MAIN",
    "MIN_WATERMARK",
    "Collected",
    "Committer",
    "EventTime",
    "FrozenState",
    "FrozenTable",
    "Operator",
    "OperatorContext",
    "OperatorFactory",
    "Output",
    "Polled",
    "RestoredState",
    "SinkFactory",
    "SinkOperator",
    "Source",
    "SplitReader",
    "SplitState",
]
