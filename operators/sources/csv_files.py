"""CSV files as a source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv as pc

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError
from rayflow.operators.base import OperatorContext, Polled, SplitReader
from rayflow.operators.sources import lines
from rayflow.operators.sources.lines import Parser, compressed, open_binary
from rayflow.operators.sources.paths import FileInfo, Paths
from rayflow.operators.sources.schemas import describe
from rayflow.operators.sources.text_files import BOM, Opening, TextSource, one_batch

NULL_VALUES = ("", "NA", "N/A", "NULL", "null")
"""Read as null when not in quotes, in columns of every type."""
_HEADER_BYTES = 64 * 1024


class CsvSource(TextSource):
    """Reads CSV files in parallel by byte ranges: any path, glob, folder, list or fsspec URL; also compressed ones.

    Without ``schema`` the header and the first 4 MB decide: integers, floats, booleans, dates, times, ISO 8601
    timestamps (in microseconds, with a zone where the text has one), else strings; a column that is all null there is
    of strings.
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
        watch_s: float | None = None,
    ) -> None:
        super().__init__(
            paths, schema=schema, on_error=on_error, storage_options=storage_options, columns=columns, watch_s=watch_s
        )
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
            return _StreamReader(
                self._csv_parser(self.schema(), split), split, int(position or 0), self.storage_options, ctx
            )
        return super().reader(split, position, ctx)

    def _splits(self, file: FileInfo, opening: Opening) -> Iterator[tuple[str, Json]]:
        if not self.newlines_in_values:
            yield from super()._splits(file, opening)
        elif compressed(file.url) or file.nbytes > opening.data_start:
            yield file.url, {"url": file.url, "start": opening.data_start}

    def _opening(self, file: FileInfo) -> Opening | None:
        binary = open_binary(file.url, self.storage_options)
        try:
            line = _first_line(binary)
        finally:
            binary.close()
        bom = len(BOM) if line.startswith(BOM) else 0
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
            return Opening(tuple(self._given.names) if self._given is not None else names, bom)
        for name in self._given.names if self._given is not None else ():
            if name not in names:
                raise DataError(f"{file.url} has no column {name!r} in its header: {', '.join(names)}")
        return Opening(names, bom + len(text))

    def _infer(self, block: bytes) -> pa.Schema:
        parser = _CsvParser(
            names=self._names(), schema=None, delimiter=self.delimiter, null_values=self._null_values,
            timestamp_formats=self._timestamp_formats, newlines=self.newlines_in_values,
        )  # fmt: skip
        return parser.infer(block, skip=self.on_error == "skip")

    def _parser(self, schema: pa.Schema, split: Json) -> Parser:
        return self._csv_parser(schema, split)

    def _csv_parser(self, schema: pa.Schema, split: Json) -> _CsvParser:
        return _CsvParser(
            names=tuple(split["names"]) if "names" in split else self._names(),
            schema=schema,
            delimiter=self.delimiter,
            null_values=self._null_values,
            timestamp_formats=self._timestamp_formats,
            newlines=self.newlines_in_values,
        )

    def _names(self) -> tuple[str, ...]:
        """All columns in the order in which they stand in the files."""
        if "names" not in self._cache:
            found = [opening for file in self._files() if (opening := self._opening(file)) is not None]
            self._cache["names"] = found[0].names if found else tuple(self.schema().names)
        names: tuple[str, ...] = self._cache["names"]
        return names


def _first_line(binary: Any) -> bytes:
    """With its end. The ``readline`` of fsspec's remote files takes no limit."""
    line: bytes = b""
    while len(line) < lines.BLOCK_BYTES and (more := binary.read(min(_HEADER_BYTES, lines.BLOCK_BYTES - len(line)))):
        line += more
        if b"\n" in more:
            return line[: line.index(b"\n") + 1]
    return line


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
        return one_batch(table, self.schema)

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
