"""Parquet files as a source: splits are ranges of row groups, positions are row offsets in the split.

With ``watch_s`` a file is one split, see `rayflow.operators.sources.watching`.

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
from rayflow.operators.base import OperatorContext, Polled, SplitReader
from rayflow.operators.sources.paths import FileInfo, Paths, find_files, is_local, normalise, open_fs
from rayflow.operators.sources.schemas import conform, describe, difference, plain, same_columns
from rayflow.operators.sources.watching import Seen, WatchedSource, check_interval, is_gone, none_yet, visible_files

SPLIT_ROWS = 1_000_000
"""Row groups are taken together until a split has so many rows: enough work for one hand-out, little to redo."""
_FOOTER_THREADS = 16
BATCH_ROWS_MAX = 262_144
BATCH_BYTES = 8 * 1024 * 1024
"""Large batches make pre-aggregation before an exchange worth more: 20 M rows by 10,100 keys cost 0.98 s of processor
time in batches of 65,536 rows and 0.74 s in batches of 262,144."""


@dataclass(frozen=True)
class ParquetSource(WatchedSource):
    """Reads Parquet files: a path, a list, a glob, a folder (all ``.parquet`` below it) or any fsspec URL of these.

    Batches have the columns of the file's schema, without metadata and with dictionaries decoded; with ``columns`` only
    those, in that order. All files must have ``file_schema``, or without it the schema of the first one (in sorted
    order).
    """

    paths: Paths
    _: KW_ONLY
    columns: Sequence[str] | None = None
    batch_rows: int | None = None
    """Rows of a batch; None: up to `BATCH_ROWS_MAX`, fewer where rows are wide."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    file_schema: pa.Schema | None = None
    """Of the files, where it is known without looking; names, types and order count."""
    watch_s: float | None = None
    """Look for new files every so many seconds; then the input does not end."""
    _watched: list[_Watched] = field(default_factory=list, init=False, repr=False, compare=False)
    _cache: dict[str, pa.Schema] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", normalise(self.paths))
        if self.batch_rows is not None and self.batch_rows < 1:
            raise ConfigError(f"read_parquet(batch_rows) must be at least 1, got {self.batch_rows}")
        if self.columns is not None:
            object.__setattr__(self, "columns", tuple(self.columns))
        check_interval(self.watch_s, function="read_parquet")

    def project(self, columns: Sequence[str]) -> ParquetSource:
        """The same source, reading only these columns."""
        return replace(self, columns=tuple(columns))

    def schema(self) -> pa.Schema:
        """The schema of all batches, from the footer of the first file.

        Raises `DataError` for a missing or unreadable file and `PlanError` for a column that is not there.
        """
        if "schema" not in self._cache:
            self._cache["schema"] = self._chosen(self._schema_of_files())
        return self._cache["schema"]

    def declared_schema(self) -> pa.Schema | None:
        """The schema, if that of the files was given."""
        return None if self.file_schema is None else self.schema()

    def discover(self) -> Sequence[tuple[str, Json]]:
        """Splits of about `SPLIT_ROWS` rows in reading order, of watched files one each. Raises `DataError` when files
        differ in schema."""
        if self.watch_s is not None:
            return self._discover_new()
        files = self._files()
        splits: list[tuple[str, Json]] = []
        for file, footer in self._footers(files, None if self.file_schema is None else plain(self.file_schema)):
            for first, last, rows in _ranges([footer.row_group(i).num_rows for i in range(footer.num_row_groups)]):
                split = {"url": file.url, "nbytes": file.nbytes, "first": first, "last": last, "rows": rows}
                splits.append((f"{file.url}#{first}-{last}", split))
        return splits

    def _discover_new(self) -> Sequence[tuple[str, Json]]:
        """All splits of files seen so far in this process; only what is new is opened."""
        if not self._watched:
            self._watched.append(_Watched())
        watched = self._watched[0]
        new = watched.seen.new(self._files(), function="read_parquet")
        if new:
            for file, footer in self._footers(new, self._schema_of_files()):
                watched.seen.add(file)
                split = {
                    "url": file.url,
                    "nbytes": file.nbytes,
                    "first": 0,
                    "last": footer.num_row_groups,
                    "whole": True,
                }
                watched.splits.append((file.url, {**split, "rows": footer.num_rows}))
        return list(watched.splits)

    def _footers(
        self, files: Sequence[FileInfo], expected: pa.Schema | None
    ) -> Iterator[tuple[FileInfo, pq.FileMetaData]]:
        with ThreadPoolExecutor(min(_FOOTER_THREADS, len(files))) as pool:
            footers = list(pool.map(self._footer_of, files))
        if expected is None:
            assert footers[0] is not None
            expected = plain(footers[0].schema.to_arrow_schema())
        self._chosen(expected)
        for file, footer in zip(files, footers, strict=True):
            if footer is None:
                continue
            got = plain(footer.schema.to_arrow_schema())
            if not same_columns(got, expected):
                raise DataError(
                    f"{file.url} has another schema than {self._expected_by(files)}: {difference(expected, got)}; "
                    f"expected {describe(expected)}, got {describe(got)}"
                )
            yield file, footer

    def _footer_of(self, file: FileInfo) -> pq.FileMetaData | None:
        """None for a watched file that has gone since it was listed."""
        try:
            return _footer(file.url, self.storage_options)
        except DataError as error:
            if self.watch_s is not None and is_gone(error):
                return None
            raise

    def _expected_by(self, files: Sequence[FileInfo]) -> str:
        if self.file_schema is not None:
            return "read_parquet(schema)"
        return files[0].url if self.watch_s is None else "the first file seen"

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return _ParquetReader(self, split, int(position or 0), ctx)

    def _files(self) -> tuple[FileInfo, ...]:
        assert isinstance(self.paths, tuple)
        find = find_files if self.watch_s is None else visible_files
        return find(self.paths, self.storage_options, (".parquet", ".pq"))

    def _schema_of_files(self) -> pa.Schema:
        if "files" not in self._cache:
            files = () if self.file_schema is not None else self._files()
            if self.file_schema is None and not files:
                raise none_yet(self.paths, function="read_parquet")
            self._cache["files"] = plain(
                self.file_schema
                if self.file_schema is not None
                else _footer(files[0].url, self.storage_options).schema.to_arrow_schema()
            )
        return self._cache["files"]

    def _chosen(self, schema: pa.Schema) -> pa.Schema:
        if self.columns is None:
            return schema
        for name in self.columns:
            if name not in schema.names:
                raise PlanError(f"read_parquet(columns) names {name!r}, but the files have {describe(schema)}")
        return pa.schema([schema.field(name) for name in self.columns])


class _Watched:
    """What a source that watches has found in this process."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.splits: list[tuple[str, Json]] = []


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
        self._whole = bool(split.get("whole"))
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
        if meta.num_row_groups < self._last or (self._whole and meta.num_row_groups > self._last):
            least = "" if self._whole else "at least "
            raise self._changed(f"{meta.num_row_groups} row groups instead of {least}{self._last}")
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
