"""Parquet files as a source: splits are ranges of row groups, positions are row offsets in the split.

A file that was read once must be there unchanged for as long as the job may go back to it (rule R2): a reader compares
the footer with what `discover` saw and refuses a file that was replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError, PlanError, StorageError
from rayflow.operators.base import OperatorContext, Polled, Source, SplitReader
from rayflow.operators.sources.paths import FileInfo, Paths, find_files, is_local, normalise, open_fs
from rayflow.operators.sources.schemas import conform, describe, difference, plain, same_columns

SPLIT_ROWS = 1_000_000
"""Row groups are taken together until a split has so many rows: enough work for one hand-out, little to redo."""
_FOOTER_THREADS = 16
BATCH_ROWS_MAX = 262_144
BATCH_BYTES = 8 * 1024 * 1024
"""Large batches make pre-aggregation before an exchange worth more: 20 M rows by 10,100 keys cost 0.98 s of processor
time in batches of 65,536 rows and 0.74 s in batches of 262,144."""


@dataclass(frozen=True)
class ParquetSource(Source):
    """Reads Parquet files: a path, a list, a glob, a folder (all ``.parquet`` below it) or any fsspec URL of these.

    Batches have the columns of the file's schema, without metadata and with dictionaries decoded; with ``columns`` only
    those, in that order. All files must have the schema of the first one (in sorted order).
    """

    paths: Paths
    _: KW_ONLY
    columns: Sequence[str] | None = None
    batch_rows: int | None = None
    """Rows of a batch; None: up to `BATCH_ROWS_MAX`, fewer where rows are wide."""
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    _cache: dict[str, pa.Schema] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", normalise(self.paths))
        if self.batch_rows is not None and self.batch_rows < 1:
            raise ConfigError(f"read_parquet(batch_rows) must be at least 1, got {self.batch_rows}")
        if self.columns is not None:
            object.__setattr__(self, "columns", tuple(self.columns))

    def project(self, columns: Sequence[str]) -> ParquetSource:
        """The same source, reading only these columns."""
        return replace(self, columns=tuple(columns))

    def schema(self) -> pa.Schema:
        """The schema of all batches, from the footer of the first file.

        Raises `DataError` for a missing or unreadable file and `PlanError` for a column that is not there.
        """
        if "schema" not in self._cache:
            first = self._files()[0]
            self._cache["schema"] = self._chosen(
                plain(_footer(first.url, self.storage_options).schema.to_arrow_schema())
            )
        return self._cache["schema"]

    def discover(self) -> Sequence[tuple[str, Json]]:
        """Splits of about `SPLIT_ROWS` rows in reading order. Raises `DataError` when files differ in schema."""
        files = self._files()
        with ThreadPoolExecutor(min(_FOOTER_THREADS, len(files))) as pool:
            footers = list(pool.map(lambda file: _footer(file.url, self.storage_options), files))
        expected = plain(footers[0].schema.to_arrow_schema())
        self._chosen(expected)
        splits: list[tuple[str, Json]] = []
        for file, footer in zip(files, footers, strict=True):
            got = plain(footer.schema.to_arrow_schema())
            if not same_columns(got, expected):
                raise DataError(
                    f"{file.url} has another schema than {files[0].url}: {difference(expected, got)}; "
                    f"expected {describe(expected)}, got {describe(got)}"
                )
            for first, last, rows in _ranges([footer.row_group(i).num_rows for i in range(footer.num_row_groups)]):
                split = {"url": file.url, "nbytes": file.nbytes, "first": first, "last": last, "rows": rows}
                splits.append((f"{file.url}#{first}-{last}", split))
        return splits

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return _ParquetReader(self, split, int(position or 0), ctx)

    def _files(self) -> tuple[FileInfo, ...]:
        assert isinstance(self.paths, tuple)
        return find_files(self.paths, self.storage_options, (".parquet", ".pq"))

    def _chosen(self, schema: pa.Schema) -> pa.Schema:
        if self.columns is None:
            return schema
        for name in self.columns:
            if name not in schema.names:
                raise PlanError(f"read_parquet(columns) names {name!r}, but the files have {describe(schema)}")
        return pa.schema([schema.field(name) for name in self.columns])


def _ranges(group_rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, behind the last, rows) of each range of row groups."""
    first, rows = 0, 0
    for i, n in enumerate(group_rows):
        rows += n
        if rows >= SPLIT_ROWS or i == len(group_rows) - 1:
            yield first, i + 1, rows
            first, rows = i + 1, 0


def _open(url: str, options: Mapping[str, Any]) -> pq.ParquetFile:
    """Raises `DataError` when the file is missing or not Parquet."""
    fs, path = open_fs(url, options)
    try:
        # Not memory-mapped: a file cut short while it is read would kill the process (SIGBUS).
        if is_local(url):
            return pq.ParquetFile(path)
        return pq.ParquetFile(pa.PythonFile(fs.open(path, "rb", cache_type="none"), mode="r"), pre_buffer=True)
    except FileNotFoundError as error:
        raise DataError(f"no such file: {url!r}") from error
    except pa.ArrowException as error:
        raise DataError(f"{url} is not a readable Parquet file: {error}") from error
    except Exception as error:
        raise StorageError(f"cannot read {url!r}: {type(error).__name__}: {error}") from error


def _footer(url: str, options: Mapping[str, Any]) -> pq.FileMetaData:
    with _open(url, options) as file:
        return file.metadata


def _batch_rows(meta: pq.FileMetaData, columns: Sequence[str] | None) -> int:
    """Rows of about `BATCH_BYTES`, by the sizes in the footer."""
    rows = sum(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
    size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    share = 1.0 if columns is None else len(columns) / max(1, len(meta.schema.to_arrow_schema()))
    return max(1, min(BATCH_ROWS_MAX, int(BATCH_BYTES * rows / max(1.0, size * share))))


class _ParquetReader(SplitReader):
    """Opens its file at the first poll. Row groups before the position are skipped without being read."""

    def __init__(self, source: ParquetSource, split: Json, position: int, ctx: OperatorContext) -> None:
        self._source = source
        self._url = str(split["url"])
        self._first, self._last, self._rows = int(split["first"]), int(split["last"]), int(split["rows"])
        self._position = position
        self._ctx = ctx
        self._file: pq.ParquetFile | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._schema: pa.Schema | None = None

    def poll(self) -> Polled:
        if self._position >= self._rows:
            return Polled(None, self._position, done=True)
        if self._file is None:
            self._start()
        try:
            batch = next(self._batches)
        except StopIteration:
            raise self._changed(f"{self._position} rows instead of {self._rows}") from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._ctx} cannot read {self._url} behind row {self._position} of row groups "
                f"{self._first}-{self._last - 1}: {error}"
            ) from error
        self._position += batch.num_rows
        return Polled(conform(batch, self._schema), self._position, done=self._position >= self._rows)

    def close(self) -> None:
        self._batches = iter(())
        if self._file is not None:
            self._file.close(force=True)
            self._file = None

    def _start(self) -> None:
        self._file = _open(self._url, self._source.storage_options)
        meta = self._file.metadata
        if meta.num_row_groups < self._last:
            raise self._changed(f"{meta.num_row_groups} row groups instead of at least {self._last}")
        sizes = [meta.row_group(i).num_rows for i in range(self._first, self._last)]
        if sum(sizes) != self._rows:
            raise self._changed(f"{sum(sizes)} rows instead of {self._rows}")
        full = plain(self._file.schema_arrow)
        self._schema = self._source._chosen(full)
        group, skip = self._first, self._position
        while skip >= sizes[group - self._first]:
            skip -= sizes[group - self._first]
            group += 1
        self._batches = self._rows_from(self._file, group, skip)

    def _rows_from(self, file: pq.ParquetFile, group: int, skip: int) -> Iterator[pa.RecordBatch]:
        columns = None if self._source.columns is None else list(self._source.columns)
        # One thread: parallelism comes from the subtasks, and a pool shared by them would only hide what each costs.
        batches = file.iter_batches(
            self._source.batch_rows or _batch_rows(file.metadata, columns),
            row_groups=range(group, self._last),
            columns=columns,
            use_threads=False,
        )
        for batch in batches:
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            if columns:
                batch = batch.select(columns)  # the file's order is not the order that was asked for
            yield batch.slice(skip)
            skip = 0

    def _changed(self, got: str) -> DataError:
        return DataError(
            f"{self._ctx}: {self._url} has changed since it was discovered (row groups {self._first}-{self._last - 1} "
            f"now have {got}); input files must stay as they are while a job may read them again"
        )
