"""Parquet files in the folder of a Delta table: no reader of the table sees them before the log names them.

A file gets its final name when it is prepared, so a commit writes nothing but the log. What no commit ever named (of
an attempt that failed) is removed by ``VACUUM``, as the files of any other writer that failed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.operators.base import CommitterContext, OperatorContext
from rayflow.operators.delta.table import DeltaTable, check_columns, columns_of
from rayflow.operators.sinks.files import FileSinkOperator, Rolling, Target
from rayflow.operators.sinks.hive import NULL, HiveFolders
from rayflow.operators.sinks.local import sync
from rayflow.operators.sinks.parquet import ParquetFormat
from rayflow.operators.sinks.s3 import Bucket, S3Target
from rayflow.operators.sources.paths import is_local

PENDING = "_rayflow"
"""Below the table: files that are being written on the local disk. Names that begin so are not part of a table."""
_NAME_MAX = 100
"""Of the part of a file's name that is the name of a step."""
_TEXT_MAX = 32
"""Longer texts say nothing in statistics."""


def place(url: str, options: Mapping[str, Any]) -> Target:
    return _LocalFiles(url) if is_local(url) else _S3Files(Bucket(url, options))


def pending_prefix(ctx: OperatorContext | CommitterContext) -> str:
    """How the names of files begin that one sink of one job is writing."""
    name = quote(ctx.operator, safe="")
    if len(name) > _NAME_MAX:
        name = f"~{hashlib.sha256(name.encode()).hexdigest()}"
    return f"{ctx.run_id}-{name}-"


class _LocalFiles(Target):
    def __init__(self, folder: str) -> None:
        self._folder = folder

    def new_path(self, ctx: OperatorContext, seq: int, suffix: str) -> str:
        pending = os.path.join(self._folder, PENDING)
        os.makedirs(pending, exist_ok=True)
        return os.path.join(pending, f"{pending_prefix(ctx)}{ctx.attempt}-{ctx.subtask}-{seq}{suffix}")

    def prepare(self, path: str, final: str, rows: int) -> Json:
        target = os.path.join(self._folder, final)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.exists(path):  # else it was moved by a try that failed behind that
            sync(path)
            os.replace(path, target)
        stats, nbytes = statistics(target), os.path.getsize(target)
        folder = os.path.dirname(target)
        while True:  # the folders of partitions may be new, up to that of the table
            sync(folder)
            if os.path.samefile(folder, self._folder):
                break
            folder = os.path.dirname(folder)
        return {"path": final, "rows": rows, "nbytes": nbytes, "stats": stats}


class _S3Files(S3Target):
    """Uploads in parts and completes the upload at once: nobody looks for objects that the log does not name."""

    def prepare(self, path: str, final: str, rows: int) -> Json:
        stats = statistics(path)
        upload = super().prepare(path, final, rows)
        parts = [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(upload["parts"], start=1)]
        self._bucket.call(
            "complete_multipart_upload",
            Key=upload["key"],
            UploadId=upload["upload_id"],
            MultipartUpload={"Parts": parts},
        )
        return {"path": final, "rows": rows, "nbytes": upload["nbytes"], "stats": stats}


class DeltaOperator(FileSinkOperator):
    """Committables say all that the log has to: file, size, partition, statistics, columns and checkpoint."""

    def __init__(self, table: DeltaTable, compression: str, rolling: Rolling, partition_by: tuple[str, ...]) -> None:
        self._table = table
        self._partition_by = partition_by
        self._telling = _Telling(place(table.url, table.options))
        folders = HiveFolders(partition_by) if partition_by else None
        super().__init__(ParquetFormat(compression), self._telling, rolling, unique_names=True, folders=folders)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        columns = columns_of(batch.schema)
        if self._telling.columns is None:
            self._look_at_table(columns)
            self._telling.columns = columns
        super().process(batch if columns.equals(batch.schema) else batch.cast(columns), input_index)

    def _look_at_table(self, columns: pa.Schema) -> None:
        """Rows that do not fit are told before a checkpoint holds them: then they could never be committed."""
        found = self._table.open()
        if found is not None:
            check_columns(found, columns, self._partition_by, where=str(self.ctx), url=self._table.url)

    def committable(self, checkpoint: CheckpointId, payload: Json) -> Json:
        return {**payload, "run": self.ctx.run_id, "checkpoint": checkpoint}


class _Telling(Target):
    """Adds the columns to the committables: a table that is not there yet is made of them."""

    def __init__(self, inner: Target) -> None:
        self._inner = inner
        self.columns: pa.Schema | None = None

    def new_path(self, ctx: OperatorContext, seq: int, suffix: str) -> str:
        return self._inner.new_path(ctx, seq, suffix)

    def prepare(self, path: str, final: str, rows: int) -> Json:
        assert self.columns is not None
        made = self._inner.prepare(path, final, rows)
        return {**made, "columns": base64.b64encode(self.columns.serialize()).decode()}

    def close(self) -> None:
        self._inner.close()


def columns_in(committable: Json) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(committable["columns"])))


def partition_values(path: str) -> dict[str, str | None]:
    """By the names of the folders (`rayflow.operators.sinks.hive`), as the log writes values."""
    found: dict[str, str | None] = {}
    for segment in path.split("/")[:-1]:
        name, _, value = segment.partition("=")
        found[unquote(name)] = None if value == NULL else unquote(value)
    return found


def statistics(path: str) -> str:
    """What lets readers leave the file out, from the footer of a Parquet file; as the log writes it."""
    footer = pq.read_metadata(path)
    low: dict[str, Any] = {}
    high: dict[str, Any] = {}
    nulls: dict[str, int] = {}
    for column in range(footer.num_columns):
        chunks = [footer.row_group(group).column(column) for group in range(footer.num_row_groups)]
        name = chunks[0].path_in_schema if chunks else ""
        found = [chunk.statistics for chunk in chunks]
        if not chunks or "." in name or any(s is None or not s.has_null_count for s in found):
            continue
        nulls[name] = sum(s.null_count for s in found)
        bounds = [(s.min, s.max) for s in found if s.has_min_max]
        told = bool(bounds) and len(bounds) == sum(s.num_values > 0 for s in found)
        if told and all(_plain(bound) for pair in bounds for bound in pair):
            low[name], high[name] = min(b[0] for b in bounds), max(b[1] for b in bounds)
    return json.dumps({"numRecords": footer.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls})


def _plain(value: object) -> bool:
    """Integers and short texts: their bounds are exact, and JSON writes them as they are."""
    if isinstance(value, str):
        return len(value) <= _TEXT_MAX
    return isinstance(value, int) and not isinstance(value, bool)


def missing(url: str, options: Mapping[str, Any], committable: Json) -> bool:
    """Whether a prepared file is gone or is not what was prepared."""
    if is_local(url):
        path = os.path.join(url, committable["path"])
        return not os.path.exists(path) or os.path.getsize(path) != committable["nbytes"]
    bucket = Bucket(url, options)
    found = bucket.head(bucket.key(committable["path"]))
    return found is None or found[0] != committable["nbytes"]
