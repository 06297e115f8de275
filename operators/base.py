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

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.core.manifest import Json, SplitState

DELETED: Final = "__deleted"
"""Column of keyed state: true in a row says that its key has no row any more."""
EXPIRES: Final = "__expires"
"""Column of keyed state with a time to live: Unix time in us from which on the row is not there."""
MAIN = "main"
"""Tag of an operator's ordinary output; side outputs have other tags (``late``, ``dead_letter``)."""


@dataclass(frozen=True, slots=True)
class StateBackend:
    """What ``JobConfig(state=...)`` means for one subtask. Operators ask for it only through `rayflow.operators.state`
    (keyed state) and `rayflow.operators.runs` (columnar runs)."""

    kind: Literal["memory", "fs", "rocksdb"] = "fs"
    memory_bytes: int = 256 * 1024 * 1024
    """How much an operator instance may keep in memory under ``rocksdb`` before it uses the local disk."""
    scratch: Callable[[str], Path] | None = None
    """Under ``rocksdb``: makes a new empty local folder with this in its name; removed when the attempt is over."""
    open_cold: Callable[[Path, OperatorContext], ColdStore] | None = None
    """Under ``rocksdb``: an empty `ColdStore` in that folder."""


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder beside the checkpoints of the job in which sinks may keep rows until they are committed."""

    url: str
    storage_options: Mapping[str, object] = field(default_factory=dict)


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
    """Seconds of a clock that never goes back; injected, so that the simulator can run time."""
    wall_time: Callable[[], float] = lambda: 0.0
    """Unix seconds: for processing-time timers and time to live, which must mean the same after a restart."""
    backend: StateBackend = field(default_factory=lambda: StateBackend())
    staging: Staging | None = None
    """Where a sink may keep rows until they are committed; None without a checkpoint directory."""
    threads: bool = False
    """Whether what an operator does may depend on how fast threads of its own are. Not in the local runtime and the
    simulator: there it waits for them."""

    def __str__(self) -> str:
        return f"step {self.step!r} subtask {self.subtask}/{self.parallelism}"


class Output(Protocol):
    """Where an operator emits to: the next operator of the chain, or the exchange."""

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None: ...


Spread = Literal["subtask", "list", "union"]


@dataclass(eq=False, slots=True)
class Piece:
    """Immutable rows that are uploaded once, however many checkpoints name them: incremental checkpoints.

    ``id`` is never used for other rows, in no attempt and no subtask of the job: make it with `new_piece`, or take over
    the one that `RestoredState.piece` gave for exactly the rows restored. A piece that has left the state does not come
    back. ``batches`` is only read by the uploader; with ``transient`` it is set to () once a complete checkpoint holds
    the piece, so that an operator that has the rows elsewhere does not pay for them twice.
    """

    id: str
    batches: tuple[pa.RecordBatch | pa.Table, ...]
    transient: bool = False


def new_piece(batches: Sequence[pa.RecordBatch | pa.Table], *, transient: bool = False) -> Piece:
    """A piece with an id that nothing else has."""
    return Piece(uuid.uuid4().hex, tuple(batches), transient)


@dataclass(frozen=True, slots=True)
class FrozenTable:
    """One named state, frozen: immutable batches of one schema. Freezing is taking references.

    The state is the rows of ``pieces``, in their order, and then those of ``batches``, which are written anew in every
    checkpoint. ``key_columns`` names the columns that hold the key of a row for keyed state; None for operator state,
    which is dealt out by ``spread`` (see `StateHandle.spread`). The snapshot writer sorts keyed rows by key group and
    writes them off the loop thread.
    """

    name: str
    batches: tuple[pa.RecordBatch | pa.Table, ...] = ()
    schema: pa.Schema | None = None
    """Needed only when there is neither a batch nor a piece."""
    key_columns: tuple[str, ...] | None = None
    meta: Json = None
    pieces: tuple[Piece, ...] = ()
    spread: Spread = "subtask"
    mode: Literal["append", "upsert"] = "append"
    """``append``: all rows are the state. ``upsert``: a key has one row, the last; a true `DELETED`: it has none."""
    subkey_columns: tuple[str, ...] = ()
    """Columns that tell rows of one key apart (map keys, list positions): with `key_columns` they are what `mode` calls
    the key of a row; the key group is that of ``key_columns`` alone (rule K2)."""


@dataclass(frozen=True, slots=True)
class FolderFile:
    path: Path
    immutable: str = ""
    """A name for exactly this content, unique for ever: uploaded once, as a `Piece` is. "": written every time."""


@dataclass(frozen=True, slots=True)
class FrozenFolder:
    """Keyed state that is files of a store on local disk (``rocksdb``), frozen."""

    name: str
    meta: Json
    """What a reader needs to know of the tables inside: JSON, part of the checkpoint format."""
    finish: Callable[[], tuple[Mapping[str, FolderFile], int]]
    """Runs in the uploader, once: completes the freeze; (file name in the folder -> file, rows in all)."""
    release: Callable[[], None]
    """The uploader has read the files, or never will: they may be removed. Called at least once, from any thread."""
    format: str = "rocksdb"


@dataclass(frozen=True, slots=True)
class FrozenState:
    """What an operator gives to a checkpoint."""

    tables: tuple[FrozenTable, ...] = ()
    prepare: Callable[[], Sequence[Json]] | None = None
    """Sinks: finishes the pre-commit off the loop thread (sync to disk, upload) and returns the committables of this
    checkpoint. They are durable when it returns. It must not touch what the loop thread goes on using."""
    folders: tuple[FrozenFolder, ...] = ()


@dataclass(frozen=True, slots=True)
class RestoredFolder:
    """A `FrozenFolder` given back. Rows outside ``key_groups`` may be in it and are not state of this subtask."""

    format: str
    key_groups: range
    exact: bool
    """The folder holds nothing outside ``key_groups``: it can be used as it is."""
    download: Callable[[Path], None]
    """Fetch all files into an existing local folder, checked. Raises `CorruptCheckpointError`."""
    immutable: Mapping[str, str] = field(default_factory=dict)
    """File name -> the ``immutable`` name it was uploaded by; to be given again for the same file."""


@dataclass(frozen=True, slots=True)
class RestoredState:
    """One piece of one named state given back. Keyed tables hold only rows of the subtask's own key groups (rule K3).

    An operator gets several of one name, in the order in which they were frozen; after a change of parallelism those of
    several old subtasks, one old subtask after the other. In ``upsert`` mode later rows of a key replace earlier ones.
    """

    name: str
    table: pa.Table
    """Empty and without columns where there is a ``folder``."""
    meta: Json = None
    piece: str = ""
    """The id of the `Piece` it was, to be frozen again under; "" when it was written for one checkpoint only, or comes
    from a savepoint."""
    folder: RestoredFolder | None = None
    subkey_columns: tuple[str, ...] = ()
    """As in `FrozenTable`."""


# ------------------------------------------------------------------------------------------------ state on local disk

UInt16Array = npt.NDArray[np.uint16]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Change:
    """Rows to be put or, with ``values`` None, keys to be deleted. Row i of all three belongs together."""

    groups: UInt16Array
    keys: pa.RecordBatch
    values: pa.RecordBatch | None


class ColdTable(Protocol):
    """One table of a `ColdStore`: rows by key, sorted by key group. Keys are unique; the last columns of the key may be
    a subkey (map keys, list positions) that `scan_prefix` leaves open. All methods work on whole batches."""

    def get(self, groups: UInt16Array, keys: pa.RecordBatch) -> tuple[BoolArray, pa.RecordBatch]:
        """(which keys are there, their values; null rows where not). Reads, here and below, see what was frozen."""

    def write(self, change: Change) -> None:
        """Put or delete. Finishes an outstanding freeze first, so that the change is not in it."""

    def scan(self, groups: range | None = None, batch_rows: int = 65_536) -> Iterator[pa.RecordBatch]:
        """All rows, keys and values, in ascending order of the key group; the store must not be written meanwhile."""

    def scan_prefix(self, groups: UInt16Array, prefixes: pa.RecordBatch) -> pa.RecordBatch:
        """All rows whose key begins with one of the prefixes (distinct; the first columns of the key)."""


class ColdStore(Protocol):
    """The state of one operator instance on local disk (``rocksdb``). One thread uses it, but for what `freeze`
    gives to the uploader. Raises `StorageError` naming the folder when the disk is full or fails: nothing of an earlier
    checkpoint is lost by that."""

    def table(self, name: str, keys: pa.Schema, values: pa.Schema, *, subkeys: int = 0) -> ColdTable:
        """The table, made if it is not there; one that was restored with other columns is migrated where that is
        possible (`rayflow.operators.state.evolution`), else `StateSchemaError`.

        The last ``subkeys`` columns of ``keys`` are not of the stream's key. The meta of the folder tells their number,
        because a reader computes key groups from the others.
        """

    def tables(self) -> Mapping[str, tuple[pa.Schema, pa.Schema]]:
        """(key schema, value schema) of the tables there are, by name."""

    def freeze(self, changes: Mapping[str, Sequence[Change]]) -> FrozenFolder:
        """O(1) and without touching the disk: the state is what has been written and, on top, ``changes`` by table.

        Whoever comes first performs it: the uploader (`FrozenFolder.finish`), or the next `write`.
        """

    def restore(self, folders: Sequence[RestoredFolder]) -> None:
        """Before anything else: take these over, each clipped to its key groups."""

    def close(self) -> None: ...


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

    def on_idle(self, inputs_idle: bool) -> bool:
        """Asked from time to time: whether nothing more will come out of here for now, so that others need not wait.

        ``inputs_idle``: no rows will come in for now. An operator that then still holds rows which it will emit by
        itself (in flight, or on a timer) must return False: what it emits later could be late.
        """
        return inputs_idle

    def full(self) -> bool:
        """Whether no input should be taken for now, because results are waited for: `on_time` must make that end."""
        return False

    def next_timer(self) -> float | None:
        """The `OperatorContext.wall_time` at which `on_time` should be called next; None: not at all."""
        return None

    def on_time(self, now: float) -> None:
        """The clock has reached ``next_timer()``; ``now`` in Unix seconds. Called between batches, and not while the
        outputs are blocked."""

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

    # Optional: ``state_schemas(input_schema) -> Mapping[str, pa.Schema] | None``, the keyed states by name as they are
    # frozen, so that a dry run of a restore can compare them (`rayflow restore-plan`). ``migrates_state = False`` says
    # that they must be the same: without it the changes that `rayflow.operators.state.evolution` allows are taken over.


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


# --------------------------------------------------------------------------------------------------------------- sinks


Guarantee = Literal["exactly_once", "idempotent", "at_least_once"]
"""What a sink makes of a job with exactly-once checkpoints. ``exactly_once``: each row is visible once (two-phase
commit, write-ahead log). ``idempotent``: rows may be written again after a failure, and replace themselves (upsert by
key). ``at_least_once``: rows may be there twice."""


@dataclass(frozen=True, slots=True)
class CommitterContext:
    """For whom a committer works; the same in the coordinator and in all subtasks, after restarts too."""

    job: str
    run_id: str
    """Of the job's life on its checkpoint directory; another one when it begins anew in an empty one."""
    operator: str
    step: str
    parallelism: int
    """Of the sink, now; earlier attempts may have had another."""
    staging: Staging | None = None
    """None without a checkpoint directory."""

    def __str__(self) -> str:
        return f"step {self.step!r}"


class Committer(ABC):
    """Makes prepared output visible. Used on the coordinator side for recovery and in subtasks on completion."""

    whole: ClassVar[bool] = False
    """One commit a checkpoint: the coordinator commits what all subtasks prepared, together, and no subtask commits."""
    ctx: CommitterContext

    def open(self, ctx: CommitterContext) -> None:
        """Called once, before anything else."""
        self.ctx = ctx

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

    # Optional: ``guarantee: Guarantee``, "exactly_once" where it is missing.


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
    "DELETED",
    "EXPIRES",
    "MAIN",
    "MIN_WATERMARK",
    "Change",
    "ColdStore",
    "ColdTable",
    "Collected",
    "Committer",
    "CommitterContext",
    "EventTime",
    "FolderFile",
    "FrozenFolder",
    "FrozenState",
    "FrozenTable",
    "Guarantee",
    "Operator",
    "OperatorContext",
    "OperatorFactory",
    "Output",
    "Piece",
    "Polled",
    "RestoredFolder",
    "RestoredState",
    "SinkFactory",
    "SinkOperator",
    "Source",
    "SplitReader",
    "SplitState",
    "Spread",
    "Staging",
    "StateBackend",
    "new_piece",
]
