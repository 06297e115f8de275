"""Streams that end in files: Parquet, CSV and JSON lines, exactly once, in a local folder or on S3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rayflow.operators.sinks.output import FileSink
from rayflow.operators.sinks.parquet import ParquetSink
from rayflow.operators.sinks.text import CsvSink, JsonSink

if TYPE_CHECKING:
    from rayflow.stream import StreamEnd

Mode = Literal["error", "append"]
FILE_BYTES = 512 * 1024 * 1024


class WritesFiles:
    """The part of a `Stream` that writes files."""

    def _sink(self, label: str, operator: Any, *, detail: str = "", name: str | None = None) -> StreamEnd:
        raise NotImplementedError

    def write_parquet(
        self,
        path: str,
        *,
        compression: str = "snappy",
        partition_by: str | Sequence[str] = (),
        max_file_rows: int | None = None,
        max_file_bytes: int = FILE_BYTES,
        mode: Mode = "error",
        manifest: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> StreamEnd:
        """Exactly-once Parquet files below ``path`` (local folder or ``s3://``), visible when a checkpoint completes.

        A new run refuses a folder that already holds files, unless ``mode="append"``. ``partition_by``: a folder for
        each value of these columns (``day=2026-11-01/country=DE``), which then are not in the files. Every checkpoint
        closes the files; ``max_file_rows`` and ``max_file_bytes`` do so earlier. ``manifest`` records in
        ``_rayflow_manifest/`` what each checkpoint committed, see `rf.committed_files`.
        """
        return self._files(
            ParquetSink(
                path,
                compression=compression,
                partition_by=partition_by,
                max_file_rows=max_file_rows,
                max_file_bytes=max_file_bytes,
                mode=mode,
                manifest=manifest,
                storage_options=dict(storage_options or {}),
            ),
            str(path),
            name,
        )

    def write_csv(
        self,
        path: str,
        *,
        delimiter: str = ",",
        header: bool = True,
        compression: str = "none",
        partition_by: str | Sequence[str] = (),
        max_file_rows: int | None = None,
        max_file_bytes: int = FILE_BYTES,
        mode: Mode = "error",
        manifest: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> StreamEnd:
        """Exactly-once CSV files, each with a header; ``compression``: ``none``, ``gzip`` or ``zstd``.

        Texts are quoted, a null is nothing between two delimiters, times are ISO 8601. The rest as `write_parquet`.
        """
        return self._files(
            CsvSink(
                path,
                delimiter=delimiter,
                header=header,
                compression=compression,
                partition_by=partition_by,
                max_file_rows=max_file_rows,
                max_file_bytes=max_file_bytes,
                mode=mode,
                manifest=manifest,
                storage_options=dict(storage_options or {}),
            ),
            str(path),
            name,
        )

    def write_json(
        self,
        path: str,
        *,
        compression: str = "none",
        partition_by: str | Sequence[str] = (),
        max_file_rows: int | None = None,
        max_file_bytes: int = FILE_BYTES,
        mode: Mode = "error",
        manifest: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> StreamEnd:
        """Exactly-once files with one JSON object a line; ``compression``: ``none``, ``gzip`` or ``zstd``.

        Times are ISO 8601 texts; NaN and infinities, which JSON does not have, are null. The rest as `write_parquet`.
        """
        return self._files(
            JsonSink(
                path,
                compression=compression,
                partition_by=partition_by,
                max_file_rows=max_file_rows,
                max_file_bytes=max_file_bytes,
                mode=mode,
                manifest=manifest,
                storage_options=dict(storage_options or {}),
            ),
            str(path),
            name,
        )

    def _files(self, sink: FileSink, path: str, name: str | None) -> StreamEnd:
        made = self._sink(sink.function, sink, detail=path, name=name)
        made.node.schema(look=False)
        return made
