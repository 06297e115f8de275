"""Parquet files where an Iceberg table has its data: no reader of the table sees them before a snapshot names them.

Files are written on the local disk of the subtask and get their final name and place when they are prepared, through
the table's own ``FileIO``, with the storage and the credentials that its catalog knows. What no commit ever named (of
an attempt that failed) is removed as the files of any other writer that failed (``remove_orphan_files``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import DataError
from rayflow.operators.base import OperatorContext
from rayflow.operators.iceberg.table import IcebergTable, check_columns, columns_of
from rayflow.operators.sinks.files import FileSinkOperator, FileWriter, Rolling, Target
from rayflow.operators.sinks.hive import HiveFolders
from rayflow.operators.sinks.parquet import ParquetFormat
from rayflow.operators.sinks.spool import Spool

_COPY_BYTES = 8 * 1024 * 1024


class IcebergOperator(FileSinkOperator):
    """Committables say where a file is, of how many bytes and rows, of which table and checkpoint."""

    def __init__(self, table: IcebergTable, compression: str, rolling: Rolling, partition_by: tuple[str, ...]) -> None:
        self._table = table
        self._partition_by = partition_by
        self._files = _TableFiles(table)
        self._columns_as = _AsTable(ParquetFormat(compression))
        folders = HiveFolders(partition_by, keep_columns=True) if partition_by else None
        super().__init__(self._columns_as, self._files, rolling, unique_names=True, folders=folders)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        columns = columns_of(batch.schema)
        if self._files.found is None:
            self._look_at_table(columns)
        super().process(batch if columns.equals(batch.schema) else batch.cast(columns), input_index)

    def _look_at_table(self, columns: pa.Schema) -> None:
        """Rows that do not fit are told before a checkpoint holds them: then they could never be committed."""
        found = self._table.open() or self._table.create(columns, self._partition_by)
        check_columns(found, columns, self._partition_by, where=str(self.ctx), name=self._table.name)
        self._columns_as.schema = found.schema().as_arrow()
        self._columns_as.where = f"{self.ctx} cannot write to the Iceberg table {self._table.name!r}"
        self._files.found = found

    def committable(self, checkpoint: CheckpointId, payload: Json) -> Json:
        return {**payload, "run": self.ctx.run_id, "checkpoint": checkpoint}


class _TableFiles(Target):
    def __init__(self, table: IcebergTable) -> None:
        self._table = table
        self._spool: Spool | None = None
        self.found: Any = None
        """The table, once it is known; its location does not change."""

    def new_path(self, ctx: OperatorContext, seq: int, suffix: str) -> str:
        if self._spool is None:
            self._spool = Spool()
        return os.path.join(self._spool.path, f"{ctx.attempt}-{ctx.subtask}-{seq}{suffix}")

    def prepare(self, path: str, final: str, rows: int) -> Json:
        location = self.found.location_provider().new_data_location(final)
        nbytes = os.path.getsize(path)
        try:
            # Cut off half-way it may leave a part of the file, which the next try writes over and no snapshot names.
            with open(path, "rb") as source, self.found.io.new_output(location).create(overwrite=True) as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
            _sync(location, self.found.location())
        except Exception as error:
            raise self._table.failed("write to", error) from error
        os.unlink(path)
        return {"path": location, "rows": rows, "nbytes": nbytes, "table": str(self.found.metadata.table_uuid)}

    def close(self) -> None:
        self._table.close()
        if self._spool is not None:
            self._spool.close()
            self._spool = None


class _AsTable:
    """A `FileFormat` of files with exactly the columns of the table: its field ids, and what must not be null."""

    def __init__(self, inner: ParquetFormat) -> None:
        self._inner = inner
        self.schema: pa.Schema = None
        self.where = ""

    @property
    def suffix(self) -> str:
        return self._inner.suffix

    def create(self, path: str, schema: pa.Schema) -> FileWriter:
        return _Casting(self._inner.create(path, self.schema), self.schema, self.where)


class _Casting:
    def __init__(self, inner: FileWriter, schema: pa.Schema, where: str) -> None:
        self._inner = inner
        self._schema = schema
        self._where = where

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        try:
            cast = [batch.cast(self._schema) for batch in batches]
        except (ValueError, pa.ArrowException) as error:
            raise DataError(f"{self._where}: {error}; fill or drop such rows") from error
        self._inner.write(cast)

    def finish(self) -> None:
        self._inner.finish()

    def abandon(self) -> None:
        self._inner.abandon()


def missing(table: Any, committable: Json) -> bool:
    """Whether a prepared file is gone or is not what was prepared."""
    try:
        return len(table.io.new_input(committable["path"])) != int(committable["nbytes"])
    except FileNotFoundError:
        return True


def _sync(location: str, table: str) -> None:
    """What is on the local disk is durable only then: the file, and the folders that may be new, up to the table's."""
    path, top = _local(location), _local(table)
    if path is None:
        return
    while True:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        if top is None or not path.startswith(f"{top}/"):
            return
        path = os.path.dirname(path)


def _local(location: str) -> str | None:
    """The path, as pyiceberg reads it (no quoting is undone); None for what is elsewhere."""
    found = urlparse(location.rstrip("/"))
    return found.path if found.scheme in ("", "file") else None
