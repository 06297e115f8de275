"""`ObjectStore`: the one door to storage that outlives a process, on a local folder, ``s3://`` or ``memory://``.

It holds only what it was constructed from, so it can be pickled into any actor; clients and connections are made where
they are used. Every failure leaves it as a `StorageError` that says what, where, why and what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from rayflow.errors import ConfigError, StorageError
from rayflow.storage.failures import is_missing, storage_error
from rayflow.storage.local import LocalDriver
from rayflow.storage.remote import FsspecMemoryDriver, S3Driver
from rayflow.storage.store import MemoryStore, PutOutcome, Store, check_path, check_range

T = TypeVar("T")


class _Driver(Protocol):
    def put(self, path: str, data: bytes) -> None: ...
    def put_if_absent(self, path: str, data: bytes) -> PutOutcome: ...
    def get(self, path: str) -> bytes: ...
    def get_range(self, path: str, start: int, stop: int) -> bytes: ...
    def exists(self, path: str) -> bool: ...
    def list(self, prefix: str, after: str = "") -> list[tuple[str, int]]: ...
    def delete(self, path: str) -> None: ...
    def delete_prefix(self, prefix: str) -> None: ...


class ObjectStore:
    """A `Store` below ``url``: a local path, ``file://``, ``s3://bucket/prefix`` or ``memory://name``.

    A relative local path is made absolute here, because the processes it is sent to have other working directories.
    ``storage_options`` go to fsspec (``key``, ``secret``, ``endpoint_url`` …) and are never shown. Raises `ConfigError`
    for a kind of URL on which an atomic create-if-absent is not known.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        scheme, separator, rest = url.partition("://")
        if not separator or scheme in ("file", "local"):
            self.url = os.path.abspath(os.path.expanduser(rest if separator else url))
            self._scheme, self._root = "file", self.url
        elif scheme in ("s3", "s3a", "memory"):
            self.url, self._scheme, self._root = url, scheme, rest
            if scheme != "memory" and not rest.strip("/"):
                raise ConfigError(f"{url!r} names no bucket; write s3://bucket/prefix")
        else:
            raise ConfigError(
                f"checkpoints cannot be kept at {url!r}: {scheme}:// is not known to create an object only if it is "
                "absent, on which exactly-once stands; use a local folder or s3://"
            )
        self._options = dict(storage_options or {})
        self._made: _Driver | None = None

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str, dict[str, Any]]]:
        return ObjectStore, (self.url, self._options)

    def elsewhere(self, url: str) -> ObjectStore:
        """The store of another URL with the same options."""
        return ObjectStore(url, self._options)

    def put(self, path: str, data: bytes) -> None:
        check_path(path)
        self._do("write", path, lambda driver: driver.put(path, data))

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        check_path(path)
        return self._do("write", path, lambda driver: driver.put_if_absent(path, data))

    def get(self, path: str) -> bytes:
        return self._do("read", path, lambda driver: driver.get(path), missing=True)

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        check_range(path, start, stop)
        return self._do("read", path, lambda driver: driver.get_range(path, start, stop), missing=True)

    def exists(self, path: str) -> bool:
        return self._do("look for", path, lambda driver: driver.exists(path))

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        return self._do("list", prefix, lambda driver: driver.list(prefix, after))

    def delete(self, path: str) -> None:
        self._do("delete", path, lambda driver: driver.delete(path))

    def delete_prefix(self, prefix: str) -> None:
        if not prefix.strip("/"):
            raise ValueError("delete_prefix needs a prefix: an empty one would delete everything below the root")
        self._do("delete", prefix, lambda driver: driver.delete_prefix(prefix))

    def _do(self, action: str, path: str, call: Callable[[_Driver], T], *, missing: bool = False) -> T:
        try:
            return call(self._driver())
        except StorageError:
            raise
        except Exception as error:
            if missing and is_missing(error):
                raise FileNotFoundError(f"{path} in {self.url}") from error
            raise storage_error(action, self.url, path, error) from error

    def _driver(self) -> _Driver:
        if self._made is None:  # two threads may both make one; nothing is shared in them but cost
            if self._scheme == "file":
                self._made = LocalDriver(self._root)
            elif self._scheme == "memory":
                self._made = FsspecMemoryDriver(self._root)
            else:
                self._made = S3Driver(self._root, self._options)
        return self._made


def opener_of(store: Store) -> Callable[[str], Store]:
    """Opens other directories as ``store`` was opened."""
    return store.elsewhere if isinstance(store, ObjectStore) else ObjectStore


__all__ = ["MemoryStore", "ObjectStore", "PutOutcome", "Store", "opener_of"]
