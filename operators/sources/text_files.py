"""What CSV and JSON sources have in common: byte ranges as splits, byte offsets of lines as positions, one schema.

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

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.base import OperatorContext, SplitReader
from rayflow.operators.sources import lines
from rayflow.operators.sources.lines import LineBlocks, LineReader, Parser, compressed, open_binary
from rayflow.operators.sources.paths import FileInfo, Paths, find_files, normalise
from rayflow.operators.sources.schemas import describe, plain
from rayflow.operators.sources.watching import Seen, WatchedSource, check_interval, is_gone, visible_files

BOM = b"\xef\xbb\xbf"
_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst", ".zip")
_HEADER_THREADS = 16


@dataclass(frozen=True)
class Opening:
    """How a file begins."""

    names: tuple[str, ...]
    data_start: int


class TextSource(WatchedSource):
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
        watch_s: float | None,
    ) -> None:
        if on_error not in ("fail", "skip"):
            raise ConfigError(f'{self._function}(on_error) must be "fail" or "skip", got {on_error!r}')
        check_interval(watch_s, function=self._function)
        if watch_s is not None and schema is None:
            raise ConfigError(
                f"{self._function}(watch) needs schema=: types inferred from the files that happen to be there may not "
                f"fit those that come"
            )
        self.watch_s = watch_s
        self.paths = normalise(paths)
        self.storage_options: Mapping[str, Any] = dict(storage_options or {})
        self.on_error: Literal["fail", "skip"] = on_error
        self.columns = None if columns is None else tuple(columns)
        self._given = None if schema is None else plain(schema)
        self._cache: dict[str, Any] = {}
        self._seen = Seen()
        self._watched: list[tuple[str, Json]] = []

    def project(self, columns: Sequence[str]) -> Self:
        """The same source, giving only these columns; itself where they cannot be left out.

        With ``on_error="skip"`` every column is read, because leaving one out would change which rows are bad.
        """
        if self.on_error == "skip" or not columns:
            return self
        other = copy.copy(self)
        other.columns = tuple(columns)
        other._cache, other._seen, other._watched = {}, Seen(), []
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

    def declared_schema(self) -> pa.Schema | None:
        """The schema that was given; None when only the files tell."""
        return None if self._given is None else self.schema()

    def discover(self) -> Sequence[tuple[str, Json]]:
        """Byte ranges of about 64 MB; one for a compressed or watched file. Raises `DataError` when headers differ."""
        if self.watch_s is not None:
            return self._discover_new()
        files = self._files()
        self.schema()
        splits: list[tuple[str, Json]] = []
        for file, opening in zip(files, self._openings(files), strict=True):
            if opening is not None:
                splits += self._splits(file, opening)
        return splits

    def _discover_new(self) -> Sequence[tuple[str, Json]]:
        """All splits of files seen so far in this process; only what is new is opened. A split knows the columns of its
        file, because the first file may not be there any more when it is read."""
        new = self._seen.new(self._files(), function=self._function)
        for file, opening in zip(new, self._openings(new) if new else (), strict=True):
            if opening is None:
                continue
            self._seen.add(file)
            end = None if compressed(file.url) else file.nbytes
            split = {"url": file.url, "start": opening.data_start, "end": end, "nbytes": end, "at_line": True}
            self._watched.append((file.url, {**split, "names": list(opening.names)}))
        return list(self._watched)

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return LineReader(split, position, self._parser(self.schema(), split), self.storage_options, self.on_error, ctx)

    @abstractmethod
    def _infer(self, block: bytes) -> pa.Schema:
        """Raises `pyarrow.ArrowException`."""

    @abstractmethod
    def _opening(self, file: FileInfo) -> Opening | None:
        """None for a file without anything in it."""

    @abstractmethod
    def _parser(self, schema: pa.Schema, split: Json) -> Parser: ...

    def _files(self) -> tuple[FileInfo, ...]:
        find = find_files if self.watch_s is None else visible_files
        return find(self.paths, self.storage_options, tuple(s + c for s in self._suffixes for c in _COMPRESSED))

    def _openings(self, files: Sequence[FileInfo]) -> list[Opening | None]:
        with ThreadPoolExecutor(min(_HEADER_THREADS, len(files))) as pool:
            found = list(pool.map(self._opening_of, files))
        if self.watch_s is not None:
            return found
        known = [(file, opening) for file, opening in zip(files, found, strict=True) if opening is not None]
        for file, opening in known[1:]:
            if opening.names != known[0][1].names:
                raise DataError(
                    f"{file.url} has another header than {known[0][0].url}: expected "
                    f"{', '.join(known[0][1].names)}, got {', '.join(opening.names)}"
                )
        return found

    def _opening_of(self, file: FileInfo) -> Opening | None:
        try:
            return self._opening(file)
        except DataError as error:
            if self.watch_s is not None and is_gone(error):
                return None
            raise

    def _splits(self, file: FileInfo, opening: Opening) -> Iterator[tuple[str, Json]]:
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


def one_batch(table: pa.Table, schema: pa.Schema) -> pa.RecordBatch:
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
