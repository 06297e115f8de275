"""State on local disk under ``state="rocksdb"``: a `ColdStore` over RocksDB, by the package rocksdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError
from rayflow.operators.base import ColdStore, OperatorContext


def open_rocks(folder: Path, ctx: OperatorContext) -> ColdStore:
    """An empty store in this empty or missing folder. Raises `ConfigError` if rocksdict is not installed."""
    try:
        from rayflow.storage.rocks.store import RocksStore
    except ImportError as error:
        raise _missing(f"{ctx}: state='rocksdb'") from error
    return RocksStore(folder, ctx)


def read_folder(folder: Path, meta: Json, groups: range | None = None) -> Mapping[str, Iterator[pa.RecordBatch]]:
    """The tables in the downloaded files of a RocksDB checkpoint; see `rayflow.storage.rocks.export.read_folder`."""
    try:
        from rayflow.storage.rocks.export import read_folder as read
    except ImportError as error:
        raise _missing("reading a checkpoint of state='rocksdb'") from error
    return read(folder, meta, groups)


def _missing(what: str) -> ConfigError:
    return ConfigError(f'{what} needs the package rocksdict, which is not installed; pip install "rayflow[rocksdb]"')
