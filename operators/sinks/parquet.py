"""Parquet output, exactly once, to a local folder or to S3."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rayflow.errors import ConfigError, PlanError
from rayflow.operators.base import Committer
from rayflow.operators.sinks.files import FileSinkOperator, FileWriter, Rolling
from rayflow.operators.sinks.local import LocalCommitter, LocalTarget
from rayflow.operators.sinks.s3 import Bucket, S3Committer, S3Target
from rayflow.operators.sources.paths import is_local, normalise

SUFFIX = ".parquet"
COMPRESSIONS = ("none", "snappy", "gzip", "brotli", "lz4", "zstd")


@dataclass(frozen=True, slots=True)
class ParquetFormat:
    compression: str = "snappy"

    @property
    def suffix(self) -> str:
        return SUFFIX

    def create(self, path: str, schema: pa.Schema) -> FileWriter:
        return _ParquetWriter(path, schema, self.compression)


class _ParquetWriter:
    """One row group for each `write`. The file is opened by us, because a `ParquetWriter` tells no size."""

    def __init__(self, path: str, schema: pa.Schema, compression: str) -> None:
        self._file = pa.OSFile(path, "wb")
        try:
            self._writer = pq.ParquetWriter(self._file, schema, compression=compression)
        except BaseException:
            self._file.close()
            raise

    @property
    def nbytes(self) -> int:
        return int(self._file.tell())

    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        table = pa.Table.from_batches(batches)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))

    def finish(self) -> None:
        self._writer.close()
        self._file.close()

    def abandon(self) -> None:
        # What this would complain about (a full disk) has been raised already by whoever abandons the file.
        with contextlib.suppress(Exception):
            self._writer.close()
        self._writer.is_open = False
        with contextlib.suppress(Exception):
            self._file.close()


@dataclass(frozen=True)
class ParquetSink:
    """Writes all rows as Parquet files ``part-<subtask>-<checkpoint>-<n>.parquet`` in the folder ``path``.

    Rows are visible when the checkpoint behind them is complete, and then exactly once; a job without rows leaves an
    empty folder. ``mode="error"`` refuses a folder that holds Parquet files of another run; ``"append"`` adds to them
    and puts the id of the run into the names. ``max_file_rows`` and ``max_file_bytes`` (about) bound a file. One
    sink of one job at a time may write to a folder.
    """

    path: str | Path
    _: KW_ONLY
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    compression: str = "snappy"
    max_file_rows: int | None = None
    max_file_bytes: int = 512 * 1024 * 1024
    mode: Literal["error", "append"] = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", normalise(self.path)[0].rstrip("/") or "/")
        if self.mode not in ("error", "append"):
            raise ConfigError(f'write_parquet(mode) must be "error" or "append", got {self.mode!r}')
        for name in ("max_file_rows", "max_file_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"write_parquet({name}) must be at least 1, got {value}")
        if self.compression not in COMPRESSIONS:
            raise ConfigError(f"write_parquet(compression) must be one of {COMPRESSIONS}, got {self.compression!r}")
        if not is_local(self._url) and not self._url.startswith(("s3://", "s3a://")):
            raise PlanError(f"write_parquet writes to a local folder or to s3://bucket/prefix, got {self._url!r}")

    @property
    def _url(self) -> str:
        return str(self.path)

    @property
    def stateful(self) -> bool:
        return False

    def build(self) -> FileSinkOperator:
        rolling = Rolling(self.max_file_rows, self.max_file_bytes)
        target = LocalTarget(self._url) if is_local(self._url) else S3Target(Bucket(self._url, self.storage_options))
        return FileSinkOperator(ParquetFormat(self.compression), target, rolling, unique_names=self.mode == "append")

    def committer(self) -> Committer:
        refuse = self.mode == "error"
        if is_local(self._url):
            return LocalCommitter(self._url, SUFFIX, refuse)
        return S3Committer(Bucket(self._url, self.storage_options), SUFFIX, refuse)
