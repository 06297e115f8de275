"""CSV and JSON lines output, exactly once, to a local folder or to S3; compressed if asked for."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from rayflow.errors import ConfigError, PlanError
from rayflow.operators.json_lines import check_json, json_texts
from rayflow.operators.sinks.files import FileWriter
from rayflow.operators.sinks.output import FileSink

COMPRESSIONS = ("none", "gzip", "zstd")
_ENDINGS = {"none": "", "gzip": ".gz", "zstd": ".zst"}


class _TextWriter(ABC):
    """Text into a local file, through a compressor where there is one."""

    def __init__(self, path: str, compression: str) -> None:
        self._file = pa.OSFile(path, "wb")
        self._out = self._file if compression == "none" else pa.CompressedOutputStream(self._file, compression)

    @property
    def nbytes(self) -> int:
        return int(self._file.tell())

    @abstractmethod
    def write(self, batches: Sequence[pa.RecordBatch]) -> None: ...

    def finish(self) -> None:
        self._out.close()
        self._file.close()

    def abandon(self) -> None:
        # What this would complain about (a full disk) has been raised already by whoever abandons the file.
        for stream in (self._out, self._file):
            with contextlib.suppress(Exception):
                stream.close()


class _CsvWriter(_TextWriter):
    def __init__(self, path: str, schema: pa.Schema, form: CsvFormat) -> None:
        super().__init__(path, form.compression)
        try:
            options = pc.WriteOptions(include_header=form.header, delimiter=form.delimiter, batch_size=16_384)
            self._writer = pc.CSVWriter(self._out, schema, write_options=options)
        except BaseException:
            self.abandon()
            raise

    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        for batch in batches:
            self._writer.write_batch(batch)

    def finish(self) -> None:
        self._writer.close()
        super().finish()


class _JsonWriter(_TextWriter):
    def write(self, batches: Sequence[pa.RecordBatch]) -> None:
        for batch in batches:
            texts = json_texts(batch, end="\n")
            _, offsets, data = texts.buffers()
            ends = np.frombuffer(offsets, np.int64)
            first, last = int(ends[texts.offset]), int(ends[texts.offset + len(texts)])
            self._out.write(data.slice(first, last - first))


@dataclass(frozen=True, slots=True)
class CsvFormat:
    compression: str = "none"
    delimiter: str = ","
    header: bool = True

    @property
    def suffix(self) -> str:
        return f".csv{_ENDINGS[self.compression]}"

    def create(self, path: str, schema: pa.Schema) -> FileWriter:
        return _CsvWriter(path, schema, self)


@dataclass(frozen=True, slots=True)
class JsonFormat:
    compression: str = "none"

    @property
    def suffix(self) -> str:
        return f".jsonl{_ENDINGS[self.compression]}"

    def create(self, path: str, schema: pa.Schema) -> FileWriter:
        return _JsonWriter(path, self.compression)


@dataclass(frozen=True)
class CsvSink(FileSink):
    """`FileSink` of CSV files: texts in quotes, a null is nothing at all (an empty text is ``""``), timestamps and
    dates as ISO 8601; each file begins with a header, unless ``header=False``."""

    delimiter: str = field(default=",", kw_only=True)
    header: bool = field(default=True, kw_only=True)

    function: ClassVar[str] = "write_csv"
    suffixes: ClassVar[tuple[str, ...]] = tuple(f".csv{end}" for end in _ENDINGS.values())
    compressions: ClassVar[tuple[str, ...]] = COMPRESSIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1 or ord(self.delimiter) > 127 or self.delimiter in '"\r\n':
            raise ConfigError(f"write_csv(delimiter) must be one ASCII character, got {self.delimiter!r}")

    def format(self) -> CsvFormat:
        return CsvFormat(self.compression, self.delimiter, self.header)

    def check(self, schema: pa.Schema) -> None:
        for each in schema:
            # Bytes would be written as they are, whatever they are, and read as something else.
            if _is_binary(each.type) or not _writable(each):
                raise PlanError(
                    f"write_csv cannot write column {each.name!r} of type {each.type}; expected numbers, booleans, "
                    f"texts, dates and times: cast it to text or drop it"
                )


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _writable(column: pa.Field) -> bool:
    schema = pa.schema([column])
    try:
        with pc.CSVWriter(pa.BufferOutputStream(), schema) as writer:
            writer.write_table(schema.empty_table())
    except pa.ArrowException:
        return False
    return True


@dataclass(frozen=True)
class JsonSink(FileSink):
    """`FileSink` of files with one JSON object a line, see `rayflow.operators.json_lines`."""

    function: ClassVar[str] = "write_json"
    suffixes: ClassVar[tuple[str, ...]] = tuple(f".jsonl{end}" for end in _ENDINGS.values())
    compressions: ClassVar[tuple[str, ...]] = COMPRESSIONS

    def format(self) -> JsonFormat:
        return JsonFormat(self.compression)

    def check(self, schema: pa.Schema) -> None:
        check_json(schema, function=self.function)
