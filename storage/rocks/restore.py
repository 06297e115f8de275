"""Folders of a checkpoint become the database of a subtask: as they are, or clipped to its key groups (rule K3).

- One folder that is exactly the subtask's: its files are the database, and keep the names they were uploaded by.
- One folder with more in it: the same, but the other key groups are deleted by range and compacted away at once (about
  2.5 million rows/s that stay), so that nobody uploads, downloads or counts them again.
- Several folders: the largest is the base; the rows of the others in the subtask's key groups are put into it as files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from rayflow.errors import StateSchemaError, StorageError
from rayflow.operators.base import OperatorContext, RestoredFolder
from rayflow.storage.rocks.catalog import CATALOG_FILE, Catalog, TableInfo
from rayflow.storage.rocks.database import BEHIND_ALL, Database

_COPY_ROWS: Final = 65_536


@dataclass(frozen=True, slots=True)
class Restored:
    database: Database
    catalog: Catalog
    immutable: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Parent:
    path: Path
    folder: RestoredFolder
    catalog: Catalog
    nbytes: int


def take_over(
    folders: Sequence[RestoredFolder], into: Path, memory_bytes: int, ctx: OperatorContext
) -> Restored | None:
    """The database ``into / "db"`` with all rows of ``folders``; None if there are none."""
    parents = [_download(folder, into / f"restored-{number:04d}") for number, folder in enumerate(folders)]
    if not parents:
        return None
    base = max(parents, key=lambda parent: parent.nbytes)
    target = into / "db"
    (base.path / CATALOG_FILE).unlink()
    base.path.rename(target)
    database = Database(target, memory_bytes)
    if not base.folder.exact:
        database.delete_range(b"", _start(base.folder.key_groups.start))
        database.delete_range(_start(base.folder.key_groups.stop), BEHIND_ALL)
        database.compact()
    for parent in parents:
        if parent is not base:
            _copy(parent, database, base.catalog, memory_bytes, ctx)
            shutil.rmtree(parent.path, ignore_errors=True)
    return Restored(database, base.catalog, base.folder.immutable)


def _download(folder: RestoredFolder, path: Path) -> _Parent:
    try:
        path.mkdir(parents=True)
        folder.download(path)
        nbytes = sum(file.stat().st_size for file in path.iterdir())
    except OSError as error:
        raise StorageError(
            f"local state cannot be restored into {path}: {error}; see that the disk has room and is sound, "
            "or set JobConfig(local_dir=...) to another one"
        ) from error
    return _Parent(path, folder, Catalog.read(path), nbytes)


def _copy(parent: _Parent, into: Database, catalog: Catalog, memory_bytes: int, ctx: OperatorContext) -> None:
    """Rows of the key groups of ``parent`` into the base, table by table, under the base's numbers and versions."""
    source = Database(parent.path, memory_bytes, read_only=True)
    groups = parent.folder.key_groups
    try:
        for old in parent.catalog.tables.values():
            new = _counterpart(old, catalog, ctx)
            verbatim = old.versions == new.versions[: len(old.versions)]
            into.ingest(
                _rows(source, old, None if verbatim else new, new.number, groups, f"state {old.name!r} of {ctx}")
            )
    finally:
        source.close()


def _rows(
    source: Database, old: TableInfo, anew: TableInfo | None, number: int, groups: range, where: str
) -> Iterator[tuple[list[bytes], list[bytes]]]:
    """Encoded rows of ``old`` as those of table ``number``; ``anew``: values are encoded as there."""
    for group in source.groups(groups):
        prefix = _start(group)
        pairs = source.items(prefix + bytes([old.number]), prefix + bytes([old.number + 1]))
        while chunk := list(islice(pairs, _COPY_ROWS)):
            values = [value for _, value in chunk]
            if anew is not None:
                values = anew.encode_values(old.decode_values(values, where))
            keys = [key for key, _ in chunk]
            yield keys if number == old.number else [prefix + bytes([number]) + key[3:] for key in keys], values


def _counterpart(old: TableInfo, catalog: Catalog, ctx: OperatorContext) -> TableInfo:
    found = catalog.tables.get(old.name)
    if found is None:
        found = catalog.add(old.name, old.keys, old.values, old.subkeys)
        found.versions, found.current = list(old.versions), old.current
        return found
    same = found.keys.equals(old.keys) and found.values.equals(old.values) and found.subkeys == old.subkeys
    if not same:
        raise StateSchemaError(
            f"state {old.name!r} of {ctx} has the columns {found.keys.names + found.values.names} in one old subtask "
            f"and {old.keys.names + old.values.names} in another, or other types; all subtasks of a checkpoint must "
            "agree: start from another checkpoint"
        )
    return found


def _start(group: int) -> bytes:
    return group.to_bytes(2, "big")
