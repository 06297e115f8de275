"""A store that lies, by script: for the simulator and for the tests of everything that stands on storage.

The real stores publish objects whole or not at all. This one can also tear them, which stands for what a broken disk, a
foreign tool or a bad copy does to them: it must be found by checksum and named, never restored.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from rayflow.errors import StorageError
from rayflow.storage.store import PutOutcome, Store


class Fault(Enum):
    FAIL = "fails and does nothing"
    FAIL_AFTER = "does it, then fails: the answer got lost"
    HALF = "publishes the first half of the object, then fails"
    LOSE = "says it is done, and nothing is done"
    FLIP = "writes, or reads, with one bit turned over"
    STALE = "lists what the listing before it saw"


Script = Callable[[str, str], Fault | None]
"""(name of the `Store` method, path or prefix) -> what happens instead. It may raise an exception of its own."""


class FaultyStore:
    """``inner``, except where ``script`` says otherwise. A fault that makes no sense for a method counts as FAIL."""

    def __init__(self, inner: Store, script: Script) -> None:
        self.inner = inner
        self.script = script
        self._listings: dict[tuple[str, str], list[tuple[str, int]]] = {}

    def put(self, path: str, data: bytes) -> None:
        self._write("put", path, data, self.inner.put)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        outcome = self._write("put_if_absent", path, data, self.inner.put_if_absent)
        return PutOutcome.CREATED if outcome is None else outcome

    def get(self, path: str) -> bytes:
        return self._read("get", path, lambda: self.inner.get(path))

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        return self._read("get_range", path, lambda: self.inner.get_range(path, start, stop))

    def exists(self, path: str) -> bool:
        if self.script("exists", path) is not None:
            raise _failure("exists", path)
        return self.inner.exists(path)

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        fault = self.script("list", prefix)
        if fault is Fault.STALE:
            return self._listings.get((prefix, after), [])
        if fault is not None:
            raise _failure("list", prefix)
        found = self._listings[prefix, after] = self.inner.list(prefix, after=after)
        return list(found)

    def delete(self, path: str) -> None:
        self._remove("delete", path, self.inner.delete)

    def delete_prefix(self, prefix: str) -> None:
        self._remove("delete_prefix", prefix, self.inner.delete_prefix)

    def _write(
        self, operation: str, path: str, data: bytes, write: Callable[[str, bytes], PutOutcome | None]
    ) -> PutOutcome | None:
        match self.script(operation, path):
            case None:
                return write(path, data)
            case Fault.LOSE:
                return None
            case Fault.FLIP:
                return write(path, flipped(data))
            case Fault.HALF:
                write(path, data[: len(data) // 2])
            case Fault.FAIL_AFTER:
                write(path, data)
            case _:
                pass
        raise _failure(operation, path)

    def _read(self, operation: str, path: str, read: Callable[[], bytes]) -> bytes:
        fault = self.script(operation, path)
        if fault is None:
            return read()
        if fault is Fault.FLIP:
            return flipped(read())
        raise _failure(operation, path)

    def _remove(self, operation: str, path: str, remove: Callable[[str], None]) -> None:
        fault = self.script(operation, path)
        if fault is None or fault is Fault.FAIL_AFTER:
            remove(path)
        if fault is not None and fault is not Fault.LOSE:
            raise _failure(operation, path)


def flipped(data: bytes) -> bytes:
    """``data`` with one bit in its middle turned over."""
    if not data:
        return data
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def _failure(operation: str, path: str) -> StorageError:
    return StorageError(f"cannot {operation} {path!r}: the script of this faulty store says so")
