"""Parquet output, exactly once, to a local folder or to S3."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from rayflow.operators.sinks.files import FileWriter
from rayflow.operators.sinks.output import FileSink

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
class ParquetSink(FileSink):
    """`FileSink` of Parquet files."""

    compression: str = field(default="snappy", kw_only=True)

    function: ClassVar[str] = "write_parquet"
    suffixes: ClassVar[tuple[str, ...]] = (SUFFIX,)
    compressions: ClassVar[tuple[str, ...]] = COMPRESSIONS

    def format(self) -> ParquetFormat:
        return ParquetFormat(self.compression)
