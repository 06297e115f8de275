"""State as it is frozen into a checkpoint and given back from one. Freezing is taking references."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa

from rayflow.core.manifest import Json

DELETED: Final = "__deleted"
"""Column of keyed state: true in a row says that its key has no row any more."""
EXPIRES: Final = "__expires"
"""Column of keyed state with a time to live: Unix time in us from which on the row is not there."""

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
