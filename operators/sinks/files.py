"""Exactly-once files: written aside, made durable by the pre-commit, made visible by the commit (DESIGN 7, rule S1).

Nothing of an interval shows in the output before its checkpoint is complete. The names of files are a function of the
subtask, the checkpoint that sealed them and a counter; checkpoint ids are never used twice (rule C4), so names are not
either. The format of the files and the place they go to are parts: a `FileFormat` and a `Target`.

No file lives longer than a checkpoint interval, because the barrier closes all of them: ``max_file_rows`` and
``max_file_bytes`` make files smaller than that. Rolling by time would be a second name for the checkpoint interval.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import DataError, SchemaChangedError, StorageError
from rayflow.operators.base import FrozenState, OperatorContext, SinkOperator
from rayflow.operators.sinks.hive import HiveFolders
from rayflow.operators.sources.schemas import conform, describe, difference, plain, same_columns

FLUSH_ROWS = 131_072
FLUSH_BYTES = 32 * 1024 * 1024
"""Rows of a file are buffered until one of these is reached and then encoded together (in Parquet: one row group)."""
BUFFERED_BYTES_MAX = 128 * 1024 * 1024
"""Of all open files together: beyond it the largest buffers are written until half of it is left."""
OPEN_FILES_MAX = 64
"""Beyond it the file that was longest without rows is closed; later rows of its folder go to another file."""


class FileWriter(Protocol):
    """Writes one local file."""

    @property
    def nbytes(self) -> int: ...

    def write(self, batches: Sequence[pa.RecordBatch]) -> None: ...

    def finish(self) -> None:
        """Complete and close the file; not yet durable."""

    def abandon(self) -> None:
        """Release what is held, after a failure; never raises."""


class FileFormat(Protocol):
    """Immutable and picklable."""

    @property
    def suffix(self) -> str: ...

    def create(self, path: str, schema: pa.Schema) -> FileWriter: ...


class Target(ABC):
    """Where finished files go. Made in the process of the subtask that it serves."""

    @abstractmethod
    def new_path(self, ctx: OperatorContext, seq: int, suffix: str) -> str:
        """A local path to write file number ``seq`` of this attempt to, in a folder that exists."""

    @abstractmethod
    def prepare(self, path: str, final: str, rows: int) -> Json:
        """Make the finished file at ``path`` durable but not visible; returns its committable. May be tried again."""

    def close(self) -> None:
        """The subtask is over: release what only this process uses."""


@dataclass(frozen=True, slots=True)
class Rolling:
    """When a file is long enough."""

    max_rows: int | None = None
    max_bytes: int = 512 * 1024 * 1024


class _OpenFile:
    """A file being written, with its buffer. Used by the loop thread until it is sealed, then by the uploader only."""

    def __init__(self, path: str, folder: str, schema: pa.Schema, format: FileFormat) -> None:
        self.path = path
        self.folder = folder
        self.rows = 0
        self.buffered_bytes = 0
        self._schema = schema
        self._format = format
        self._writer: FileWriter | None = None
        self._buffer: list[pa.RecordBatch] = []
        self._buffered_rows = 0
        self._finished = False
        self._failure: Exception | None = None
        """A file that failed half-way cannot be continued: whoever asks for it again gets the same error."""

    @property
    def nbytes(self) -> int:
        """Bytes written and waiting, about."""
        return self.buffered_bytes + (self._writer.nbytes if self._writer is not None else 0)

    @property
    def opened(self) -> bool:
        """Whether it holds a file handle and what an encoder needs."""
        return self._writer is not None

    def add(self, batch: pa.RecordBatch) -> None:
        self._buffer.append(batch)
        self.rows += batch.num_rows
        self._buffered_rows += batch.num_rows
        self.buffered_bytes += batch.nbytes
        if self._buffered_rows >= FLUSH_ROWS or self.buffered_bytes >= FLUSH_BYTES:
            self.flush()

    def finish(self) -> None:
        """Complete; calling it again after success does nothing."""
        if self._finished:
            return
        self.flush()
        assert self._writer is not None
        try:
            self._writer.finish()
        except Exception as error:
            self._failure = error
            raise
        self._finished = True

    def abandon(self) -> None:
        if self._writer is not None and not self._finished:
            self._writer.abandon()

    def flush(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._writer is None:
            self._writer = self._format.create(self.path, self._schema)
        try:
            if self._buffer:
                self._writer.write(self._buffer)
        except Exception as error:
            self._failure = error
            raise
        self._buffer, self._buffered_rows, self.buffered_bytes = [], 0, 0


@dataclass(frozen=True, slots=True)
class _Sealed:
    checkpoint: CheckpointId
    file: _OpenFile
    final: str


class FileSinkOperator(SinkOperator):
    """Writes batches to files. `snapshot` takes O(1): closing and syncing the files is the uploader's work.

    Batches must all have one schema (the first one's). A file that could not be prepared stays in the queue and is
    tried again with the next checkpoint, so that an aborted upload loses no rows.
    """

    def __init__(
        self,
        format: FileFormat,
        target: Target,
        rolling: Rolling,
        *,
        unique_names: bool,
        folders: HiveFolders | None = None,
    ) -> None:
        self._format = format
        self._target = target
        self._rolling = rolling
        self._unique_names = unique_names
        self._folders = folders
        self._schema: pa.Schema | None = None
        self._open: dict[str, _OpenFile] = {}
        """By folder below the output ("" without partitions), at most one each."""
        self._writing: dict[str, None] = {}
        """Those of them that are `opened`, the one that was longest without rows first."""
        self._buffered_bytes = 0
        """Of all in ``_open``."""
        self._full: list[_OpenFile] = []
        self._created = 0
        self._closed = False
        self._lock = threading.Lock()  # guards the two below, which the uploader thread shares
        self._sealed: list[_Sealed] = []
        self._ready: list[tuple[CheckpointId, Json]] = []

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if not batch.num_rows:
            return
        batch = self._conformed(batch)
        try:
            if self._folders is None:
                self._write("", batch)
                return
            for folder, rows in self._folders.split(batch):
                self._write(folder, rows)
            self._keep_bounds()
        except OSError as error:
            raise _storage_error(self.ctx, error) from error
        except pa.ArrowException as error:
            raise DataError(f"{self.ctx} cannot write {describe(batch.schema)}: {error}") from error
        except DataError as error:
            raise DataError(f"{self.ctx}: {error}") from error

    def _write(self, folder: str, batch: pa.RecordBatch) -> None:
        while batch.num_rows:
            file = self._open.get(folder) or self._new_file(folder, batch.schema)
            room = batch.num_rows if self._rolling.max_rows is None else self._rolling.max_rows - file.rows
            before = file.buffered_bytes
            file.add(batch.slice(0, room))
            self._buffered_bytes += file.buffered_bytes - before
            batch = batch.slice(room)
            full = self._rolling.max_rows is not None and file.rows >= self._rolling.max_rows
            if full or file.nbytes >= self._rolling.max_bytes:
                self._finish(folder)
            else:
                self._used(folder, file)

    def _used(self, folder: str, file: _OpenFile) -> None:
        if file.opened:
            self._writing.pop(folder, None)
            self._writing[folder] = None

    def _finish(self, folder: str) -> None:
        file = self._open.pop(folder)
        self._writing.pop(folder, None)
        self._buffered_bytes -= file.buffered_bytes
        self._full.append(file)  # first: should it fail, it is abandoned with the others
        file.finish()

    def _keep_bounds(self) -> None:
        if self._buffered_bytes > BUFFERED_BYTES_MAX:
            for folder, file in sorted(self._open.items(), key=lambda item: -item[1].buffered_bytes):
                if self._buffered_bytes <= BUFFERED_BYTES_MAX // 2:
                    break
                if folder not in self._open:  # closed since, to let another one be opened
                    continue
                self._buffered_bytes -= file.buffered_bytes
                file.flush()
                self._used(folder, file)
                self._close_some()
        self._close_some()

    def _close_some(self) -> None:
        while len(self._writing) > OPEN_FILES_MAX:
            self._finish(next(iter(self._writing)))

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        files = self._taken()
        with self._lock:
            self._sealed += [_Sealed(checkpoint, f, self._name(f.folder, checkpoint, i)) for i, f in enumerate(files)]
            if not self._sealed and not self._ready:
                return None
        return FrozenState(prepare=partial(self._prepare, checkpoint))

    def close(self) -> None:
        for file in self._taken():
            file.abandon()
        self._closed = True
        self._release()

    def _release(self) -> None:
        """Never waits for an upload: whoever of the two threads comes last does it."""
        if self._lock.acquire(blocking=False):
            try:
                for sealed in self._sealed:
                    sealed.file.abandon()
                self._sealed = []
                self._target.close()
            finally:
                self._lock.release()

    def _prepare(self, checkpoint: CheckpointId) -> Sequence[Json]:
        """On the uploader thread."""
        try:
            return self._prepare_up_to(checkpoint)
        finally:
            if self._closed:
                self._release()

    def _prepare_up_to(self, checkpoint: CheckpointId) -> Sequence[Json]:
        """Not beyond this checkpoint: later rows do not lie before its barrier (rule A3)."""
        with self._lock:
            while self._sealed and self._sealed[0].checkpoint <= checkpoint:
                sealed = self._sealed[0]
                try:
                    sealed.file.finish()
                    payload = self._target.prepare(sealed.file.path, sealed.final, sealed.file.rows)
                    payload = self.committable(sealed.checkpoint, payload)
                except OSError as error:
                    raise _storage_error(self.ctx, error) from error
                except pa.ArrowException as error:
                    # Without the name: it holds the checkpoint, and the same error must read the same every time.
                    raise DataError(f"{self.ctx} cannot write its output file: {error}") from error
                self._ready.append((sealed.checkpoint, payload))
                del self._sealed[0]
            due = [payload for n, payload in self._ready if n <= checkpoint]
            self._ready = [(n, payload) for n, payload in self._ready if n > checkpoint]
            return due

    def committable(self, checkpoint: CheckpointId, payload: Json) -> Json:
        """What a file sealed for ``checkpoint`` leaves in its manifest."""
        return payload

    def _taken(self) -> list[_OpenFile]:
        files = [*self._full, *self._open.values()]
        self._full, self._open, self._writing, self._buffered_bytes = [], {}, {}, 0
        return files

    def _new_file(self, folder: str, schema: pa.Schema) -> _OpenFile:
        path = self._target.new_path(self.ctx, self._created, self._format.suffix)
        self._created += 1
        self._open[folder] = file = _OpenFile(path, folder, schema, self._format)
        return file

    def _conformed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        got = plain(batch.schema)
        if self._schema is None:
            self._schema = got
        elif not same_columns(got, self._schema):
            raise SchemaChangedError(
                f"{self.ctx} cannot write batches of two schemas to one output: {difference(self._schema, got)}; "
                f"expected {describe(self._schema)}, got {describe(got)}; cast them alike before the sink"
            )
        return conform(batch, self._schema)

    def _name(self, folder: str, checkpoint: CheckpointId, seq: int) -> str:
        run = f"-{self.ctx.run_id}" if self._unique_names else ""
        below = f"{folder}/" if folder else ""
        return f"{below}part-{self.ctx.subtask:05d}-{checkpoint:08d}-{seq:04d}{run}{self._format.suffix}"


def _storage_error(ctx: OperatorContext, error: OSError) -> StorageError:
    return StorageError(
        f"{ctx} cannot write its output: {error}; nothing committed is lost, free space or fix the path"
    )
