"""What the engine asks of storage: a handful of atomic operations on named immutable bytes.

Paths are relative, with forward slashes, below the store's root. The rules every store keeps, and on which rules C5 and
C8 stand (`tests/storage/conformance.py` holds every implementation to them):

- an object is either absent or whole: no reader ever sees a part of a `put`;
- `put_if_absent` has exactly one winner, whoever races;
- what a call has returned is durable, and every later `get`, `exists` and `list` of anyone sees it.

A failure other than "not there" is a `StorageError`. When it comes from a write, the outcome is unknown: the object may
be there or not, or may still appear on a remote store; it will never be there in part.
"""

from __future__ import annotations

import threading
from enum import Enum
from typing import Protocol

from rayflow.errors import StorageError

TEMPORARY_SUFFIX = ".tmp"
"""A writer killed in the middle leaves ``.<random>.tmp`` beside its object on a local disk. Listings show it, so that
sweeps find it; no name that rayflow gives to an object begins with a dot."""


class PutOutcome(Enum):
    CREATED = "created"
    EXISTS = "exists"
    """Somebody's object is there; it was not touched."""


class Store(Protocol):
    """Storage below one root; used by many threads at once. Implementations that cross processes are picklable."""

    def put(self, path: str, data: bytes) -> None:
        """Write the object, replacing one of that name as a whole."""

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        """Write the object unless there is one of that name; one winner among all that race."""

    def get(self, path: str) -> bytes:
        """The whole object. Raises `FileNotFoundError` if there is none."""

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive), cut at the end. Raises `FileNotFoundError` if there is none."""

    def exists(self, path: str) -> bool: ...

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        """(path, size in bytes) of every object whose path begins with ``prefix``, sorted; never from a cache.

        Only those that sort behind ``after``, which then costs no more than they do.
        """

    def delete(self, path: str) -> None:
        """Remove the object; nothing happens if there is none."""

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object whose path begins with ``prefix``; an interrupted call can be repeated."""


def check_path(path: str) -> str:
    """``path`` itself. Raises `ValueError` for one that could leave the root or collide with a temporary file."""
    parts = path.split("/")
    if any(not part or part.startswith(".") for part in parts) or "\\" in path or "\0" in path:
        raise ValueError(f"storage path {path!r} must be relative, without empty or dotted parts or backslashes")
    return path


class MemoryStore:
    """Objects in a dict: for ``state="memory"``, the simulator and tests. Gone with the process."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MemoryStore({len(self._objects)} objects)"

    def __reduce__(self) -> str:
        # A copy in another process would be a second store under one name: two truths about one job.
        raise TypeError("a MemoryStore lives in one process and cannot be pickled; use ObjectStore(url)")

    def put(self, path: str, data: bytes) -> None:
        with self._lock:
            self._objects[check_path(path)] = bytes(data)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        with self._lock:
            if check_path(path) in self._objects:
                return PutOutcome.EXISTS
            self._objects[path] = bytes(data)
            return PutOutcome.CREATED

    def get(self, path: str) -> bytes:
        with self._lock:
            data = self._objects.get(path)
        if data is None:
            raise FileNotFoundError(path)
        return data

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        check_range(path, start, stop)
        return self.get(path)[start:stop]

    def exists(self, path: str) -> bool:
        with self._lock:
            return path in self._objects

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        with self._lock:
            return sorted((p, len(data)) for p, data in self._objects.items() if p.startswith(prefix) and p > after)

    def delete(self, path: str) -> None:
        with self._lock:
            self._objects.pop(path, None)

    def delete_prefix(self, prefix: str) -> None:
        with self._lock:
            for path in [p for p in self._objects if p.startswith(prefix)]:
                del self._objects[path]


def check_range(path: str, start: int, stop: int) -> None:
    if not 0 <= start <= stop:
        raise StorageError(f"bytes {start} to {stop} of {path} are not a range; this is a bug of the caller")
