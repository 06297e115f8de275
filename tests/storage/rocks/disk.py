"""What the tests of local state share: a context, rows, a copy of a frozen folder as an uploader would make it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from rayflow.operators.base import Change, FrozenFolder, OperatorContext, RestoredFolder, StateBackend, UInt16Array
from rayflow.partition import hash_columns
from rayflow.storage.rocks.store import RocksStore
from rayflow.storage.rocks.table import RocksTable

GROUPS = 128
KEYS = pa.schema([("k", pa.int64())])
VALUES = pa.schema([("a", pa.int64()), ("s", pa.string())])
Rows = dict[int, tuple[int | None, str | None]]


def context(*, groups: range = range(GROUPS), memory_bytes: int = 8 * 1024 * 1024) -> OperatorContext:
    return OperatorContext(
        job="job",
        run_id="run",
        operator="op",
        step="counts",
        subtask=0,
        parallelism=1,
        max_parallelism=GROUPS,
        attempt=1,
        key_groups=groups,
        now=lambda: 0.0,
        backend=StateBackend("rocksdb", memory_bytes),
    )


def open_store(folder: Path, groups: range = range(GROUPS)) -> tuple[RocksStore, RocksTable]:
    store = RocksStore(folder, context(groups=groups))
    return store, store.table("t", KEYS, VALUES)


def groups_of(keys: pa.RecordBatch, columns: int = 1) -> UInt16Array:
    hashes = hash_columns(keys.columns[:columns])
    return (hashes % np.uint64(GROUPS)).astype(np.uint16)


def puts(rows: Mapping[int, tuple[int | None, str | None]]) -> Change:
    keys = pa.record_batch([pa.array(list(rows), pa.int64())], schema=KEYS)
    columns = [pa.array([row[i] for row in rows.values()], VALUES.field(i).type) for i in range(2)]
    return Change(groups_of(keys), keys, pa.record_batch(columns, schema=VALUES))


def deletes(found: Iterable[int]) -> Change:
    keys = pa.record_batch([pa.array(list(found), pa.int64())], schema=KEYS)
    return Change(groups_of(keys), keys, None)


def group_of(key: int) -> int:
    return int(groups_of(pa.record_batch([pa.array([key])], schema=KEYS))[0])


def rows_of(batches: Iterable[pa.RecordBatch]) -> Rows:
    """Fails if a key comes twice."""
    found: Rows = {}
    for batch in batches:
        for row in batch.to_pylist():
            assert row["k"] not in found
            found[row["k"]] = (row["a"], row["s"])
    return found


def upload(frozen: FrozenFolder, to: Path) -> dict[str, str]:
    """Copy the files, as an uploader does; (file name -> immutable name) of those that have one."""
    files, _ = frozen.finish()
    to.mkdir(parents=True)
    for name, file in files.items():
        shutil.copyfile(file.path, to / name)
    frozen.release()
    return {name: file.immutable for name, file in files.items() if file.immutable}


def uploaded(
    folder: Path, *, groups: range = range(GROUPS), exact: bool = True, immutable: Mapping[str, str] | None = None
) -> RestoredFolder:
    def download(into: Path) -> None:
        for path in folder.iterdir():
            shutil.copyfile(path, into / path.name)

    return RestoredFolder("rocksdb", groups, exact, download, immutable or {})
