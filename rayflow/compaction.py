"""Small files into larger ones, behind a job's back: Parquet output written with ``manifest=True``, merged in place.

The order of steps makes it safe to kill at any of them:
1. The merged file is written as ``merged-<n>-<random>.parquet``.
2. The record ``_rayflow_manifest/merge-<n>.json``, which names it and what it replaces, is created only if there is
   none of that number: the commit point, and of two compactions at once one loses.
3. What it replaces is deleted.

Whoever comes next deletes what a record replaces and what lost its number, before anything else. Readers by
`rf.committed_files` see the old files or the merged one; a reader of the whole folder may see rows twice between the
first step and the last. A job that commits again what has been merged finds the record and is content.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayflow.errors import ConfigError, DataError, StorageError
from rayflow.operators.sinks.committed import FOLDER, MERGE, CommittedFile, Merge, committed_in, merge_record
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.store import PutOutcome

TARGET_BYTES = 128 * 1024 * 1024
_MERGED = re.compile(r"(?:^|/)merged-(\d+)-[0-9a-f]+\.parquet$")


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a call of `compact_files` did."""

    merged: int
    """Files that were replaced."""
    written: int
    """Files they were replaced by."""
    removed: int
    """Files of earlier calls, broken off, that were removed."""


def compact_files(
    path: str,
    *,
    target_bytes: int = TARGET_BYTES,
    compression: str = "snappy",
    storage_options: Mapping[str, Any] | None = None,
) -> Compacted:
    """Merge small files of a Parquet output, folder by folder, into files of about ``target_bytes``.

    For outputs of ``write_parquet(..., manifest=True)``, while the job runs or not. Files of one group are held in
    memory together. Raises `DataError` where there is no record of committed files, or a file that one names is gone;
    `StorageError` when another compaction is at work here. What has been merged by then stays merged.
    """
    if target_bytes < 1:
        raise ConfigError(f"compact_files(target_bytes) must be at least 1, got {target_bytes}")
    store = ObjectStore(path, storage_options)
    contents = {name: store.get(name) for name, _ in store.list(f"{FOLDER}/") if name.endswith(".json")}
    if not contents:
        raise DataError(f"there is no {FOLDER} at {path}; only output written with manifest=True can be merged")
    files, merges = committed_in(contents, path)
    number, removed = _clean_up(store, merges)
    merged = written = 0
    for group in _groups(files, target_bytes):
        _merge(store, group, number, compression)
        number, merged, written = number + 1, merged + len(group), written + 1
    return Compacted(merged, written, removed)


def _clean_up(store: ObjectStore, merges: Mapping[int, Merge]) -> tuple[int, int]:
    """(the next number, files removed): finish what calls that were killed had begun."""
    number = max(merges, default=0) + 1
    there = [path for path, _ in store.list()]
    strays = [path for path in there if _is_stray(path, merges)]
    if any(_number(path) >= number for path in strays):
        _record(store, number, Merge("", 0, 0, 0, ()))  # from here on nobody can win it any more
        number += 1
        strays = [path for path in strays if _number(path) < number]
    gone = {path for merge in merges.values() for path in merge.replaces}
    doomed = sorted({*strays, *(path for path in there if path in gone)})
    for path in doomed:
        store.delete(path)
    return number, len(doomed)


def _number(path: str) -> int:
    match = _MERGED.search(path)
    return int(match[1]) if match else -1


def _is_stray(path: str, merges: Mapping[int, Merge]) -> bool:
    number = _number(path)
    return number >= 0 and (number not in merges or merges[number].path != path)


def _groups(files: list[tuple[str, CommittedFile]], target_bytes: int) -> Iterator[list[tuple[str, CommittedFile]]]:
    folders: dict[str, list[tuple[str, CommittedFile]]] = defaultdict(list)
    for path, file in files:
        if path.endswith(".parquet") and file.nbytes < target_bytes:
            folders[path.rpartition("/")[0]].append((path, file))
    for small in folders.values():
        group: list[tuple[str, CommittedFile]] = []
        size = 0
        for path, file in small:
            if group and size + file.nbytes > target_bytes:
                if len(group) > 1:
                    yield group
                group, size = [], 0
            group.append((path, file))
            size += file.nbytes
        if len(group) > 1:
            yield group


def _merge(store: ObjectStore, group: list[tuple[str, CommittedFile]], number: int, compression: str) -> None:
    folder = group[0][0].rpartition("/")[0]
    path = f"{folder}/" if folder else ""
    path += f"merged-{number:08d}-{uuid.uuid4().hex[:12]}.parquet"
    out = pa.BufferOutputStream()
    rows = 0
    with pq.ParquetWriter(out, _table(store, group[0][0]).schema, compression=compression) as writer:
        for name, file in group:
            table = _table(store, name)
            if table.num_rows != file.rows:
                raise DataError(f"{name} has {table.num_rows} rows, but {file.rows} were committed; restore the file")
            writer.write_table(table)
            rows += table.num_rows
    content = out.getvalue()
    store.put(path, content.to_pybytes())
    newest = max(file.checkpoint for _, file in group)
    _record(store, number, Merge(path, newest, rows, content.size, tuple(name for name, _ in group)))
    for name, _ in group:
        store.delete(name)


def _record(store: ObjectStore, number: int, merge: Merge) -> None:
    outcome = store.put_if_absent(f"{FOLDER}/{MERGE}{number:08d}.json", json.dumps(merge_record(merge)).encode())
    if outcome is PutOutcome.EXISTS:
        if merge.path:
            store.delete(merge.path)
        raise StorageError(
            f"another compaction is at work on {store.url}; nothing is lost, start again when it is done"
        )


def _table(store: ObjectStore, path: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(store.get(path)), partitioning=None)
    except FileNotFoundError as error:
        raise DataError(f"{path} was committed, but is not in {store.url} any more; restore the file") from error
    except pa.ArrowException as error:
        raise DataError(f"{path} in {store.url} is not a readable Parquet file: {error}") from error
