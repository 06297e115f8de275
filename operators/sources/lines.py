"""Text files read as blocks of whole lines: any byte range can be read alone, any line start is a position.

A line belongs to the range in which its first byte lies. A range that does not begin at the beginning of the file looks
one byte back and skips to behind the next newline; a position is always a line start, so resuming costs one seek.
Compressed files are one range, with positions in the decompressed text.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import fsspec
import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import DataError, RayflowError, StorageError
from rayflow.operators.base import OperatorContext, Polled, SplitReader
from rayflow.operators.sources.paths import is_local, open_fs

BLOCK_BYTES = 4 * 1024 * 1024
"""Parsed at once: some 10 ms of work, and enough rows for pyarrow to be at its best."""
SPLIT_BYTES = 64 * 1024 * 1024
LINE_BYTES_MAX = 256 * 1024 * 1024
_BLANK = re.compile(rb"^[ \t]*\r?\n", re.MULTILINE)
_TEXT_SHOWN = 200


class _Zstd(io.RawIOBase):
    """What is in a zstd file, by pyarrow: fsspec needs a package for it. Goes forward only."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or offset < self._at:
            raise io.UnsupportedOperation("a compressed stream goes forward only")
        while self._at < offset and (data := self._stream.read(min(offset - self._at, BLOCK_BYTES))):
            self._at += len(data)
        return self._at

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()


def _is_zstd(url: str) -> bool:
    return url.partition("::")[0].endswith(".zst")


def compressed(url: str) -> bool:
    return _is_zstd(url) or fsspec.utils.infer_compression(url.partition("::")[0]) is not None


def open_binary(url: str, options: Mapping[str, Any]) -> Any:
    """A seekable binary file, decompressed by its suffix. Raises `DataError` when it is not there."""
    try:
        if is_local(url) and not compressed(url):
            return open(url, "rb")
        fs, path = open_fs(url, options)
        if _is_zstd(url):
            return io.BufferedReader(_Zstd(fs.open(path, "rb")), 1024 * 1024)
        return fs.open(path, "rb", compression="infer") if compressed(url) else fs.open(path, "rb")
    except FileNotFoundError as error:
        raise DataError(f"no such file: {url!r}") from error
    except RayflowError:
        raise
    except Exception as error:  # fsspec back ends raise whatever their client library raises
        raise StorageError(f"cannot read {url!r}: {type(error).__name__}: {error}") from error


class Parser(ABC):
    """Turns a block of whole lines into rows. Immutable."""

    @abstractmethod
    def parse(self, block: bytes) -> pa.RecordBatch:
        """One row for each line that is not blank. Raises `pyarrow.ArrowException` for a line that does not fit."""

    @property
    @abstractmethod
    def hint(self) -> str:
        """What to do about a line that cannot be read."""

    def rows(self, block: bytes) -> pa.RecordBatch:
        """As `parse`, and certain that lines and rows are the same thing.

        A quoted value with a newline in it would make one row of two lines, and be torn where a block ends.
        """
        batch = self.parse(block)
        lines = block.count(b"\n") + (not block.endswith(b"\n"))
        if batch.num_rows != lines and batch.num_rows != lines - len(_BLANK.findall(block)):
            raise pa.ArrowInvalid(f"{lines} lines gave {batch.num_rows} rows")
        last = batch.slice(batch.num_rows - 1).to_pylist()[0].values() if batch.num_rows else ()
        if any(isinstance(cell, str) and cell.endswith("\n") for cell in last):
            raise pa.ArrowInvalid("a quoted value does not end on its line")
        return batch


class LineBlocks:
    """The whole lines that begin in ``[position, end)``, as blocks of about `BLOCK_BYTES`."""

    def __init__(self, file: Any, url: str, start: int, end: int | None, nbytes: int | None, *, at_line: bool) -> None:
        """``nbytes``: where the file ended when it was discovered; what was added since is not read."""
        self._file = file
        self._url = url
        self._end = end
        self._nbytes = nbytes
        self._carry = b""
        self.position = start
        """First byte of the next line."""
        if at_line:
            self._seek(start)
        else:
            self._seek(start - 1)
            self._skip_line()

    def next(self) -> bytes | None:
        """The next block, None at the end of the range."""
        if self._end is not None and self.position >= self._end:
            return None
        block = self._carry
        complete = self._cut(block)
        while complete == 0:
            more = self._read(BLOCK_BYTES)
            block += more
            complete = self._cut(block) if more else len(block)
            if not more:
                break
            if complete == 0 and len(block) > LINE_BYTES_MAX:
                raise DataError(
                    f"{self._url}: the line at byte {self.position} is longer than {LINE_BYTES_MAX} bytes; "
                    f"is this text?"
                )
        self._carry = block[complete:]
        self.position += complete
        return block[:complete] or None

    def _cut(self, block: bytes) -> int:
        """Length of the whole lines in ``block`` that begin in the range; 0 when more must be read to tell."""
        if self._end is not None and self.position + len(block) >= self._end:
            return block.find(b"\n", self._end - 1 - self.position) + 1
        return block.rfind(b"\n") + 1 if len(block) >= BLOCK_BYTES else 0

    def _skip_line(self) -> None:
        at = self._file_at
        while block := self._read(64 * 1024):
            found = block.find(b"\n")
            if found >= 0:
                self._carry = block[found + 1 :]
                self.position = at + found + 1
                return
            at += len(block)
        self.position = at

    def _seek(self, offset: int) -> None:
        self._file.seek(offset)
        self._file_at = offset

    def _read(self, n: int) -> bytes:
        """Up to ``n`` bytes, fewer only at the end."""
        if self._nbytes is not None:
            n = min(n, self._nbytes - self._file_at)
        data = b""
        while len(data) < n and (more := self._file.read(n - len(data))):
            data = data + more if data else more
        if self._nbytes is not None and len(data) < n:
            raise DataError(
                f"{self._url} has {self._file_at + len(data)} bytes, but had {self._nbytes} when it was discovered; "
                f"input files must stay as they are while a job may read them again"
            )
        self._file_at += len(data)
        return data


class LineReader(SplitReader):
    """Reads one range of lines. ``skipped`` counts the lines left out by ``on_error="skip"``."""

    def __init__(
        self,
        split: Json,
        position: Json,
        parser: Parser,
        options: Mapping[str, Any],
        on_error: Literal["fail", "skip"],
        ctx: OperatorContext,
    ) -> None:
        self.skipped = 0
        self._split = split
        self._url = str(split["url"])
        self._position: int | None = None if position is None else int(position)
        self._parser = parser
        self._options = options
        self._on_error = on_error
        self._ctx = ctx
        self._file: Any = None
        self._blocks: LineBlocks | None = None

    def poll(self) -> Polled:
        if self._blocks is None:
            self._blocks = self._begin()
        at = self._blocks.position
        try:
            block = self._blocks.next()
        except (OSError, EOFError) as error:
            raise StorageError(f"{self._ctx} cannot read {self._url} at byte {at}: {error}") from error
        position = self._blocks.position
        if block is None:
            return Polled(None, position, done=True)
        batch = self._rows(block, at)
        return Polled(batch if batch is not None and batch.num_rows else None, position)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> LineBlocks:
        split = self._split
        self._file = open_binary(self._url, self._options)
        at_line = self._position is not None or bool(split["at_line"])
        start = int(split["start"]) if self._position is None else self._position
        return LineBlocks(self._file, self._url, start, split["end"], split["nbytes"], at_line=at_line)

    def _rows(self, block: bytes, at: int) -> pa.RecordBatch | None:
        if not block.strip(b"\r\n"):
            return None
        try:
            return self._parser.rows(block)
        except pa.ArrowException as error:
            if self._on_error == "fail":
                raise self._unreadable(block, at, error) from error
        found = self._readable(block.split(b"\n"))
        return pa.concat_batches(found) if found else None

    def _readable(self, lines: list[bytes]) -> list[pa.RecordBatch]:
        """The rows of all lines that can be read, found by halving."""
        joined = _joined(lines)
        if not joined.strip(b"\r\n"):
            return []
        try:
            return [self._parser.rows(joined)]
        except pa.ArrowException:
            if len(lines) == 1:
                self.skipped += 1
                return []
            half = len(lines) // 2
            return self._readable(lines[:half]) + self._readable(lines[half:])

    def _unreadable(self, block: bytes, at: int, error: Exception) -> DataError:
        """The error for the first line of the block that cannot be read, found by halving."""
        lines = block.split(b"\n")
        good, bad = 0, len(lines)  # the first ``good`` lines can be read together, the first ``bad`` cannot
        reason: Exception = error
        while bad - good > 1:
            middle = (good + bad) // 2
            head = _joined(lines[:middle])
            try:
                if head.strip(b"\r\n"):
                    self._parser.rows(head)
                good = middle
            except pa.ArrowException as found:
                bad, reason = middle, found
        text = lines[bad - 1].rstrip(b"\r").decode("utf-8", "replace")
        shown = text if len(text) <= _TEXT_SHOWN else text[:_TEXT_SHOWN] + "…"
        number = self._newlines_before(at) + bad
        return DataError(
            f"{self._ctx} cannot read line {number} of {self._url}: {shown!r}: {_without_row(str(reason))}; "
            f'{self._parser.hint}, or use on_error="skip"'
        )

    def _newlines_before(self, offset: int) -> int:
        count, left = 0, offset
        file = open_binary(self._url, self._options)
        try:
            while left and (data := file.read(min(left, BLOCK_BYTES))):
                count += data.count(b"\n")
                left -= len(data)
        finally:
            file.close()
        return count


def _joined(lines: list[bytes]) -> bytes:
    return b"\n".join(lines) + b"\n"


def _without_row(message: str) -> str:
    """pyarrow counts rows from the beginning of the block, which says nothing to anybody."""
    return re.sub(r"Row #\d+: | in row \d+", "", message.splitlines()[0])
