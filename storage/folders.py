"""Folders of local stores (``rocksdb``), given back. How they are written stands in `rayflow.storage.writing`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePath

import pyarrow as pa

from rayflow.core.manifest import FileRef, StateHandle
from rayflow.core.restore import clip, groups_of
from rayflow.errors import CorruptCheckpointError, StorageError
from rayflow.operators.base import RestoredFolder
from rayflow.storage.layout import parse_immutable


def restored_folder(
    handle: StateHandle,
    key_groups: range,
    max_parallelism: int,
    fetch: Callable[[FileRef, str], bytes],
    small: Callable[[], pa.Table],
) -> RestoredFolder:
    """The folder in ``handle`` for the owner of ``key_groups``.

    ``fetch(file, where)`` reads a whole file, checked; ``small`` the table of those that are not files of their own.
    """
    own = clip(handle, key_groups, max_parallelism).groups
    assert own is not None, "a folder is keyed"
    mine = range(*own)
    where = f"folder {handle.name!r} of operator {handle.operator!r} subtask {handle.subtask}"

    def download(folder: Path) -> None:
        for name, file in handle.parts:
            _write(folder, name, fetch(file, f"state file {file.path} ({where})"), where)
        for row in small().to_pylist():
            _write(folder, str(row["file"]), row["data"], where)

    return RestoredFolder(
        format=handle.format,
        key_groups=mine,
        exact=handle.groups is None and mine == groups_of(handle, max_parallelism),
        download=download,
        immutable={
            name: known
            for name, file in handle.parts
            if file.root is None and (known := parse_immutable(file.path)) is not None
        },
    )


def _write(folder: Path, name: str, data: bytes, where: str) -> None:
    if PurePath(name).name != name or name in ("", ".", ".."):
        raise CorruptCheckpointError(
            f"{where} names a file {name!r}, which is no plain name; use an earlier checkpoint"
        )
    try:
        (folder / name).write_bytes(data)
    except OSError as error:
        raise StorageError(
            f"cannot restore {where} to {folder}: {error}; make room or name another local_dir"
        ) from error
