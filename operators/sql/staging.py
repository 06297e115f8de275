"""Rows kept beside the checkpoints until they are committed: Arrow IPC files that are durable before they are promised.

One folder for each operator. Files are written whole and never changed; their names are never used twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayflow.errors import CommitLostError, ConfigError, StorageError
from rayflow.operators.base import Staging
from rayflow.operators.sources.paths import open_fs
from rayflow.operators.sql.marks import word

SUFFIX = ".arrow"
DONE = ".done"


def staging_of(staging: Staging | None, operator: str, where: object) -> StagedFiles:
    """Raises `ConfigError` where there is no checkpoint directory."""
    if staging is None:
        raise ConfigError(
            f"{where} keeps rows beside the checkpoints until they are committed, but the job has no checkpoint "
            "directory; give checkpoints=rf.CheckpointConfig(url) or another guarantee"
        )
    url = staging.url.removeprefix("file://")
    folder = word(operator, 100)
    return StagedFiles(f"{url}/{folder if folder.strip('.') else '%2E' * len(folder)}", staging)


@dataclass(frozen=True, slots=True)
class StagedFiles:
    url: str
    staging: Staging

    def open(self) -> tuple[Any, str]:
        """The file system and the folder on it."""
        return open_fs(self.url, self.staging.storage_options)

    def put(self, rows: pa.Table) -> tuple[str, int, str]:
        """Write the rows durably to a new file; its name, size and checksum."""
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, rows.schema, options=options) as writer:
            writer.write_table(rows)
        content = sink.getvalue()
        name = f"{uuid.uuid4().hex}{SUFFIX}"
        fs, folder = self.open()
        try:
            if "://" in self.url:
                fs.pipe_file(f"{folder}/{name}", content.to_pybytes())
            else:
                _write_local(folder, name, content)
        except Exception as error:  # fsspec back ends raise whatever their client library raises
            raise StorageError(f"cannot keep rows in {self.url!r}: {type(error).__name__}: {error}") from error
        return name, content.size, _sha256(content)

    def get(self, name: str, nbytes: int, sha256: str) -> pa.Table:
        """Raises `CommitLostError` when the file is gone or not whole: its rows were promised."""
        fs, folder = self.open()
        try:
            content = fs.cat_file(f"{folder}/{name}")
        except FileNotFoundError as error:
            self._check_bucket(error)
            raise CommitLostError(
                f"{self.url}/{name} held rows of a complete checkpoint, but is gone, and they are not in the target; "
                "restore the file or go back to an earlier checkpoint"
            ) from error
        except Exception as error:
            raise StorageError(f"cannot read {self.url}/{name}: {type(error).__name__}: {error}") from error
        if len(content) != nbytes:
            raise CommitLostError(
                f"{self.url}/{name} held rows of a complete checkpoint in {nbytes} bytes, but has {len(content)}; "
                "restore the file or go back to an earlier checkpoint"
            )
        if _sha256(content) != sha256:
            raise CommitLostError(
                f"{self.url}/{name} held rows of a complete checkpoint, but its content has changed since; restore the "
                "file or go back to an earlier checkpoint"
            )
        with pa.ipc.open_file(pa.py_buffer(content)) as reader:
            return reader.read_all()

    def names(self) -> set[str]:
        fs, folder = self.open()
        try:
            return {str(path).rsplit("/", 1)[-1] for path in fs.find(folder)}
        except FileNotFoundError as error:
            self._check_bucket(error)
            return set()
        except Exception as error:
            raise StorageError(f"cannot list {self.url!r}: {type(error).__name__}: {error}") from error

    def _check_bucket(self, error: FileNotFoundError) -> None:
        """A bucket that is not there is not a file that is gone: it may come back with all its files."""
        if "NoSuchBucket" in repr(error.__cause__):
            raise StorageError(
                f"the bucket of {self.url!r} is gone, in which rows are kept until they are committed; bring it back, "
                "nothing committed is lost"
            ) from error

    def remove(self, names: set[str]) -> None:
        """Garbage: what cannot be removed now is found by the next recovery."""
        if not names:
            return
        fs, folder = self.open()
        for name in sorted(names):
            with contextlib.suppress(Exception):
                fs.rm_file(f"{folder}/{name}")

    def remove_all(self, *, but: frozenset[str] = frozenset()) -> None:
        """All files, but for the notes on ``but``."""
        self.remove(self.names() - {name + DONE for name in but})
        if "://" not in self.url:
            with contextlib.suppress(OSError):
                os.rmdir(self.url)

    def note_done(self, name: str) -> None:
        """What the file held has been delivered."""
        fs, folder = self.open()
        try:
            fs.pipe_file(f"{folder}/{name}{DONE}", b"")
        except Exception as error:
            raise StorageError(f"cannot write to {self.url!r}: {type(error).__name__}: {error}") from error

    def is_done(self, name: str) -> bool:
        return name + DONE in self.names()


def _sha256(content: bytes | pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_local(folder: str, name: str, content: pa.Buffer) -> None:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path + ".part", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
