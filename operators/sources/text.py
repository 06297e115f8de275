"""CSV and newline-delimited JSON as sources: byte ranges as splits, byte offsets of lines as positions.

The schema is given or taken from the first block of the first file, and then it holds: a later value that does not fit
is an error (or a counted skip), never a silent change of type.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.json as pj

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.base import OperatorContext, Polled, Source, SplitReader
from rayflow.operators.sources import lines
from rayflow.operators.sources.lines import LineBlocks, LineReader, Parser, compressed, open_binary
from rayflow.operators.sources.paths import FileInfo, Paths, find_files, normalise
from rayflow.operators.sources.schemas import describe, plain

NULL_VALUES = ("", "NA", "N/A", "NULL", "null")
"""Read as null when not in quotes, in columns of every type."""
_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst", ".zip")
_BOM = b"\xef\xbb\xbf"
_HEADER_THREADS = 16


@dataclass(frozen=True)
class _Opening:
    """How a file begins."""

    names: tuple[str, ...]
    data_start: int


class TextSource(Source):
    """What CSV and JSON have in common."""

    _suffixes: tuple[str, ...]
    _function: str

    def __init__(
        self,
        paths: Paths,
        *,
        schema: pa.Schema | None,
        on_error: Literal["fail", "skip"],
        storage_options: Mapping[str, Any] | None,
        columns: Sequence[str] | None,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ConfigError(f'{self._function}(on_error) must be "fail" or "skip", got {on_error!r}')
        self.paths = normalise(paths)
        self.storage_options: Mapping[str, Any] = dict(storage_options or {})
        self.on_error: Literal["fail", "skip"] = on_error
        self.columns = None if columns is None else tuple(columns)
        self._given = None if schema is None else plain(schema)
        self._cache: dict[str, Any] = {}

    def project(self, columns: Sequence[str]) -> Self:
        """The same source, giving only these columns; itself where they cannot be left out.

        With ``on_error="skip"`` every column is read, because leaving one out would change which rows are bad.
        """
        if self.on_error == "skip" or not columns:
            return self
        other = copy.copy(self)
        other.columns = tuple(columns)
        other._cache = {}
        return other

    def schema(self) -> pa.Schema:
        """The schema of all batches: as given, or inferred from the first block of the first file.

        Raises `DataError` for a file that is missing or has nothing to infer from, `PlanError` for a wrong column.
        """
        if "schema" not in self._cache:
            full = self._given if self._given is not None else self._inferred()
            for name in self.columns or ():
                if name not in full.names:
                    raise PlanError(f"{self._function}(columns) names {name!r}, but the files have {describe(full)}")
            self._cache["schema"] = full if self.columns is None else pa.schema([full.field(n) for n in self.columns])
        return self._cache["schema"]

    def discover(self) -> Sequence[tuple[str, Json]]:
        """Byte ranges of about 64 MB; one for a compressed file. Raises `DataError` when headers differ."""
        files = self._files()
        self.schema()
        splits: list[tuple[str, Json]] = []
        for file, opening in zip(files, self._openings(files), strict=True):
            if opening is not None:
                splits += self._splits(file, opening)
        return splits

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return LineReader(split, position, self._parser(self.schema()), self.storage_options, self.on_error, ctx)

    @abstractmethod
    def _infer(self, block: bytes) -> pa.Schema:
        """Raises `pyarrow.ArrowException`."""

    @abstractmethod
    def _opening(self, file: FileInfo) -> _Opening | None:
        """None for a file without anything in it."""

    @abstractmethod
    def _parser(self, schema: pa.Schema) -> Parser: ...

    def _files(self) -> tuple[FileInfo, ...]:
        return find_files(self.paths, self.storage_options, tuple(s + c for s in self._suffixes for c in _COMPRESSED))

    def _openings(self, files: Sequence[FileInfo]) -> list[_Opening | None]:
        with ThreadPoolExecutor(min(_HEADER_THREADS, len(files))) as pool:
            found = list(pool.map(self._opening, files))
        known = [(file, opening) for file, opening in zip(files, found, strict=True) if opening is not None]
        for file, opening in known[1:]:
            if opening.names != known[0][1].names:
                raise DataError(
                    f"{file.url} has another header than {known[0][0].url}: expected "
                    f"{', '.join(known[0][1].names)}, got {', '.join(opening.names)}"
                )
        return found

    def _splits(self, file: FileInfo, opening: _Opening) -> Iterator[tuple[str, Json]]:
        first = opening.data_start
        if compressed(file.url):
            split = {"url": file.url, "start": first, "end": None, "nbytes": None, "at_line": True}
            yield f"{file.url}@{first}", split
            return
        pieces = max(1, round((file.nbytes - first) / lines.SPLIT_BYTES))
        edges = [first + (file.nbytes - first) * i // pieces for i in range(pieces + 1)]
        for start, end in pairwise(edges):
            if end > start:
                split = {"url": file.url, "start": start, "end": end, "nbytes": file.nbytes, "at_line": start == first}
                yield f"{file.url}@{start}", split

    def _inferred(self) -> pa.Schema:
        for file in self._files():
            opening = self._opening(file)
            if opening is None:
                continue
            self._cache["names"] = opening.names
            binary = open_binary(file.url, self.storage_options)
            try:
                block = LineBlocks(binary, file.url, opening.data_start, None, None, at_line=True).next() or b""
            finally:
                binary.close()
            try:
                schema = self._infer(block)
            except pa.ArrowException as error:
                raise DataError(
                    f"{self._function} cannot tell the columns of {file.url} from its first {len(block)} bytes: "
                    f"{error}; pass schema="
                ) from error
            return pa.schema([pa.field(f.name, _settled(f.type)) for f in schema])
        raise DataError(f"{self._function} found only empty files at {self.paths}; pass schema=")


class CsvSource(TextSource):
    """Reads CSV files in parallel by byte ranges: any path, glob, folder, list or fsspec URL; also compressed ones.

    Without ``schema`` the header and the first 4 MB decide: integers, floats, booleans, dates, times, ISO 8601
    timestamps (in microseconds, with a zone where the text has one), else strings; so is a column that is all null there.
    With ``schema`` and a header only its columns are read, found by name. ``null_values`` (default: `NULL_VALUES`) are
    null where they are not quoted. ``timestamp_formats`` are strptime patterns tried before ISO 8601.

    ``newlines_in_values=True`` allows quoted values with newlines: then a file is one split, read from its beginning,
    and resuming re-reads what lies before the position.
    """

    _suffixes = (".csv", ".tsv", ".txt")
    _function = "read_csv"

    def __init__(
        self,
        paths: Paths,
        *,
        schema: pa.Schema | None = None,
        delimiter: str = ",",
        header: bool = True,
        null_values: Sequence[str] | None = None,
        timestamp_formats: Sequence[str] = (),
        newlines_in_values: bool = False,
        on_error: Literal["fail", "skip"] = "fail",
        storage_options: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        super().__init__(paths, schema=schema, on_error=on_error, storage_options=storage_options, columns=columns)
        if len(delimiter) != 1 or ord(delimiter) > 127:
            raise ConfigError(f"read_csv(delimiter) must be one ASCII character, got {delimiter!r}")
        if newlines_in_values and on_error == "skip":
            raise ConfigError('read_csv(newlines_in_values=True) cannot tell where a bad row ends; use on_error="fail"')
        self.delimiter = delimiter
        self.header = header
        self.newlines_in_values = newlines_in_values
        self._null_values = tuple(NULL_VALUES if null_values is None else null_values)
        self._timestamp_formats = tuple(timestamp_formats)

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        if self.newlines_in_values:
            return _StreamReader(self._csv_parser(self.schema()), split, int(position or 0), self.storage_options, ctx)
        return super().reader(split, position, ctx)

    def _splits(self, file: FileInfo, opening: _Opening) -> Iterator[tuple[str, Json]]:
        if not self.newlines_in_values:
            yield from super()._splits(file, opening)
        elif compressed(file.url) or file.nbytes > opening.data_start:
            yield file.url, {"url": file.url, "start": opening.data_start}

    def _opening(self, file: FileInfo) -> _Opening | None:
        binary = open_binary(file.url, self.storage_options)
        try:
            line = binary.readline(lines.BLOCK_BYTES)
        finally:
            binary.close()
        bom = len(_BOM) if line.startswith(_BOM) else 0
        text = line[bom:]
        if not text:
            return None
        try:
            # Without a header only the number of columns is of interest here.
            table = pc.read_csv(
                pa.BufferReader(text.rstrip(b"\r\n") + b"\n"),
                read_options=pc.ReadOptions(use_threads=False, autogenerate_column_names=not self.header),
                parse_options=pc.ParseOptions(delimiter=self.delimiter),
            )
        except pa.ArrowException as error:
            raise DataError(f"read_csv cannot read the first line of {file.url}: {text[:200]!r}: {error}") from error
        names = tuple(table.schema.names)
        if len(set(names)) != len(names):
            raise DataError(f"{file.url} has a column name twice in its header: {', '.join(names)}")
        if not self.header:
            if self._given is not None and len(self._given.names) != len(names):
                raise DataError(
                    f"{file.url} has {len(names)} columns in its first line, but read_csv(schema) has "
                    f"{len(self._given.names)}: {describe(self._given)}"
                )
            return _Opening(tuple(self._given.names) if self._given is not None else names, bom)
        for name in self._given.names if self._given is not None else ():
            if name not in names:
                raise DataError(f"{file.url} has no column {name!r} in its header: {', '.join(names)}")
        return _Opening(names, bom + len(text))

    def _infer(self, block: bytes) -> pa.Schema:
        parser = _CsvParser(
            names=self._names(), schema=None, delimiter=self.delimiter, null_values=self._null_values,
            timestamp_formats=self._timestamp_formats, newlines=self.newlines_in_values,
        )  # fmt: skip
        return parser.infer(block, skip=self.on_error == "skip")

    def _parser(self, schema: pa.Schema) -> Parser:
        return self._csv_parser(schema)

    def _csv_parser(self, schema: pa.Schema) -> _CsvParser:
        return _CsvParser(
            names=self._names(), schema=schema, delimiter=self.delimiter, null_values=self._null_values,
            timestamp_formats=self._timestamp_formats, newlines=self.newlines_in_values,
        )  # fmt: skip

    def _names(self) -> tuple[str, ...]:
        """All columns in the order in which they stand in the files."""
        if "names" not in self._cache:
            found = [opening for file in self._files() if (opening := self._opening(file)) is not None]
            self._cache["names"] = found[0].names if found else tuple(self.schema().names)
        names: tuple[str, ...] = self._cache["names"]
        return names


@dataclass(frozen=True)
class _CsvParser(Parser):
    names: tuple[str, ...]
    schema: pa.Schema | None
    delimiter: str
    null_values: tuple[str, ...]
    timestamp_formats: tuple[str, ...]
    newlines: bool

    @property
    def hint(self) -> str:
        return "mend the line, pass a schema that fits (newlines_in_values=True for quoted newlines)"

    def parse(self, block: bytes) -> pa.RecordBatch:
        assert self.schema is not None
        read, parse, convert = self.options(len(block) + 1)
        table = pc.read_csv(pa.BufferReader(block), read_options=read, parse_options=parse, convert_options=convert)
        return _one_batch(table, self.schema)

    def infer(self, block: bytes, *, skip: bool) -> pa.Schema:
        if not block.strip(b"\r\n"):
            return pa.schema([(name, pa.null()) for name in self.names])
        read, parse, convert = self.options(len(block) + 1)
        if skip:
            parse.invalid_row_handler = lambda row: "skip"
        table = pc.read_csv(pa.BufferReader(block), read_options=read, parse_options=parse, convert_options=convert)
        return table.schema

    def options(self, block_size: int) -> tuple[pc.ReadOptions, pc.ParseOptions, pc.ConvertOptions]:
        schema = self.schema
        return (
            pc.ReadOptions(use_threads=False, block_size=block_size, column_names=list(self.names)),
            pc.ParseOptions(delimiter=self.delimiter, newlines_in_values=self.newlines),
            pc.ConvertOptions(
                column_types=schema,
                include_columns=None if schema is None else schema.names,
                null_values=list(self.null_values),
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                timestamp_parsers=[*self.timestamp_formats, pc.ISO8601],
            ),
        )


class _StreamReader(SplitReader):
    """A CSV file with newlines in its values, from the beginning; positions are rows."""

    def __init__(
        self, parser: _CsvParser, split: Json, position: int, options: Mapping[str, Any], ctx: OperatorContext
    ) -> None:
        self._parser = parser
        self._split = split
        self._skip = position
        self._position = position
        self._options = options
        self._ctx = ctx
        self._file: Any = None
        self._stream: Any = None

    def poll(self) -> Polled:
        url = self._split["url"]
        try:
            if self._stream is None:
                self._file = open_binary(url, self._options)
                self._file.seek(int(self._split["start"]))
                read, parse, convert = self._parser.options(lines.BLOCK_BYTES)
                source = pa.PythonFile(self._file, mode="r")
                self._stream = pc.open_csv(source, read_options=read, parse_options=parse, convert_options=convert)
            batch = self._stream.read_next_batch()
        except StopIteration:
            return Polled(None, self._position, done=True)
        except pa.ArrowException as error:
            if str(error) == "Empty CSV file":
                return Polled(None, self._position, done=True)
            raise DataError(
                f"{self._ctx} cannot read {url} behind row {self._position}: {error}; {self._parser.hint}"
            ) from error
        rest = batch.slice(self._skip)
        self._skip -= batch.num_rows - rest.num_rows
        self._position += rest.num_rows
        return Polled(rest if rest.num_rows else None, self._position)

    def close(self) -> None:
        self._stream = None
        if self._file is not None:
            self._file.close()
            self._file = None


class JsonSource(TextSource):
    """Reads files with one JSON object a line, in parallel by byte ranges; paths as for `CsvSource`.

    Without ``schema`` the first 4 MB decide (texts that are ISO 8601 timestamps become timestamps). Members that the
    schema does not have are left out, missing ones are null.
    """

    _suffixes = (".json", ".jsonl", ".ndjson")
    _function = "read_json"

    def __init__(
        self,
        paths: Paths,
        *,
        schema: pa.Schema | None = None,
        on_error: Literal["fail", "skip"] = "fail",
        storage_options: Mapping[str, Any] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        super().__init__(paths, schema=schema, on_error=on_error, storage_options=storage_options, columns=columns)

    def _opening(self, file: FileInfo) -> _Opening | None:
        binary = open_binary(file.url, self.storage_options)
        try:
            first = binary.read(len(_BOM))
        finally:
            binary.close()
        return _Opening((), len(_BOM) if first == _BOM else 0) if first else None

    def _infer(self, block: bytes) -> pa.Schema:
        if not block.strip():
            raise pa.ArrowInvalid("there are only blank lines")
        return pj.read_json(pa.BufferReader(block), read_options=_json_options(block)).schema

    def _parser(self, schema: pa.Schema) -> Parser:
        return _JsonParser(schema)


@dataclass(frozen=True)
class _JsonParser(Parser):
    schema: pa.Schema

    @property
    def hint(self) -> str:
        return "there must be one JSON object on each line: mend it, pass a schema that fits"

    def parse(self, block: bytes) -> pa.RecordBatch:
        # pyarrow reads no dates from JSON texts; they pass as timestamps.
        read_as = pa.schema(
            [pa.field(f.name, pa.timestamp("s") if pa.types.is_date(f.type) else f.type) for f in self.schema]
        )
        table = pj.read_json(
            pa.BufferReader(block),
            read_options=_json_options(block),
            parse_options=pj.ParseOptions(explicit_schema=read_as, unexpected_field_behavior="ignore"),
        )
        return _one_batch(table.select(self.schema.names).cast(self.schema), self.schema)


def _json_options(block: bytes) -> pj.ReadOptions:
    return pj.ReadOptions(use_threads=False, block_size=len(block) + 64)


def _one_batch(table: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=schema)


def _settled(kind: pa.DataType) -> pa.DataType:
    """The type to hold on to for an inferred one: it must fit what the first block did not show."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _settled(f.type)) for f in kind])
    return kind
