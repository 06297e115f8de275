"""Objects of an S3-compatible store through s3fs, and of fsspec's process-wide ``memory://`` for tests.

What was tried and failed with s3fs as it comes: its cached listings miss what other processes write; leaving
``with fs.open(p, "wb")`` by an exception publishes the part written so far; and its own retries (and botocore's below)
hide whether a conditional write was sent twice. So: no caches, whole objects only, and a client without retries for
all but large uploads; the retrying is `retried`, which knows what was ambiguous.

A store must enforce ``If-None-Match: *`` (tried: SeaweedFS, moto; AWS S3 documents it) and list what was written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import fsspec

from rayflow.errors import StorageError
from rayflow.storage.failures import is_missing, is_taken, is_transient
from rayflow.storage.store import PutOutcome

T = TypeVar("T")

RETRY_DELAYS_S: Final = (0.1, 0.4, 1.6)
_SINGLE_PUT_MAX: Final = 64 * 1024 * 1024
"""Larger objects go up in parts, which are invisible until the upload is completed."""
_DELETE_BATCH: Final = 1000


def retried(operation: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> tuple[T, bool]:
    """The result, and whether an earlier try failed in a way that leaves open whether it was done.

    Only what `is_transient` is tried again, four times in all; then its last error is raised.
    """
    ambiguous = False
    for delay in RETRY_DELAYS_S:
        try:
            return operation(), ambiguous
        except Exception as error:
            if not is_transient(error):
                raise
            ambiguous = True
            sleep(delay)
    return operation(), ambiguous


class S3Driver:
    """Object operations below ``bucket/prefix``. Raises what s3fs raises; `ObjectStore` gives it words."""

    def __init__(self, root: str, options: dict[str, Any]) -> None:
        bucket, _, prefix = root.partition("/")
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._options = options
        self._clients: dict[int, Any] = {}
        self._conditions_hold = False
        self._lock = threading.Lock()

    def put(self, path: str, data: bytes) -> None:
        key = self._prefix + path
        if len(data) <= _SINGLE_PUT_MAX:
            retried(lambda: self._call("put_object", Key=key, Body=data))
        else:
            self._client(retries=4).pipe_file(f"{self._bucket}/{key}", data, chunksize=_SINGLE_PUT_MAX // 2)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        key = self._prefix + path

        def attempt() -> PutOutcome:
            try:
                self._call("put_object", Key=key, Body=data, IfNoneMatch="*")
            except OSError as error:
                if is_taken(error):
                    return PutOutcome.EXISTS
                raise
            return PutOutcome.CREATED

        outcome, ambiguous = retried(attempt)
        if outcome is PutOutcome.CREATED and not self._conditions_hold:
            self._check_conditions(key, data)
        if outcome is PutOutcome.EXISTS and ambiguous and self.get(path) == data:
            # Our own earlier try, whose answer got lost. Writers who must tell themselves apart put a nonce in.
            return PutOutcome.CREATED
        return outcome

    def _check_conditions(self, key: str, data: bytes) -> None:
        """The same object again must be refused: some servers take the header and ignore it. Asked once a process."""
        try:
            self._call("put_object", Key=key, Body=data, IfNoneMatch="*")
        except Exception as error:
            self._conditions_hold = is_taken(error)  # else nothing was learnt; the next one asks again
            return
        raise OSError(
            "the server ignores If-None-Match, so two runs could overwrite each other's checkpoints; use a store that "
            "honours conditional writes (docs/storage.md)"
        )

    def get(self, path: str) -> bytes:
        return retried(lambda: self._cat(path))[0]

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        if start == stop:
            return b"" if self.exists(path) else self.get(path)
        try:
            return retried(lambda: self._cat(path, start=start, end=stop))[0]
        except OSError as error:
            if "InvalidRange" in repr(error.__cause__):  # it begins behind the end
                return b""
            raise

    def exists(self, path: str) -> bool:
        try:
            retried(lambda: self._call("head_object", Key=self._prefix + path))
        except OSError as error:
            if is_missing(error):
                return False
            raise
        return True

    def list(self, prefix: str, after: str = "") -> list[tuple[str, int]]:
        return sorted(self._pages(prefix, after))

    def delete(self, path: str) -> None:
        retried(lambda: self._call("delete_object", Key=self._prefix + path))

    def delete_prefix(self, prefix: str) -> None:
        keys = [self._prefix + path for path, _ in self.list(prefix)]
        for begin in range(0, len(keys), _DELETE_BATCH):
            objects = {"Objects": [{"Key": key} for key in keys[begin : begin + _DELETE_BATCH]], "Quiet": True}
            answer, _ = retried(lambda objects=objects: self._call("delete_objects", Delete=objects))  # type: ignore[misc]
            refused = answer.get("Errors")
            if refused:
                raise OSError(f"{len(refused)} objects were not deleted, the first: {refused[0]}")

    def _pages(self, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        more = {"StartAfter": self._prefix + after} if after else {}
        while True:
            full = self._prefix + prefix
            page, _ = retried(lambda more=more, full=full: self._call("list_objects_v2", Prefix=full, **more))  # type: ignore[misc]
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # "folders" that consoles make
                    yield item["Key"][len(self._prefix) :], int(item["Size"])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _cat(self, path: str, **limits: int) -> bytes:
        # One stream: with more, s3fs asks for the size first, which doubles the cost of small objects.
        client = self._client(retries=1)
        return bytes(client.cat_file(f"{self._bucket}/{self._prefix}{path}", max_concurrency=1, **limits))

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._client(retries=1).call_s3(method, Bucket=self._bucket, **arguments)

    def _client(self, *, retries: int) -> Any:
        with self._lock:
            if retries not in self._clients:
                config = {"retries": {"max_attempts": retries - 1}, **self._options.get("config_kwargs", {})}
                options = {
                    **self._options,
                    "config_kwargs": config,
                    "use_listings_cache": False,
                    "skip_instance_cache": True,
                }
                try:
                    client = fsspec.filesystem("s3", **options)
                except ImportError as error:
                    raise StorageError(f's3:// needs s3fs: pip install "rayflow[s3]" ({error})') from error
                client.retries = retries
                self._clients[retries] = client
            return self._clients[retries]


_MEMORY_LOCK = threading.Lock()


class FsspecMemoryDriver:
    """fsspec's ``memory://``: one tree for the whole process, shared with every other user of fsspec in it."""

    def __init__(self, root: str) -> None:
        self._fs = fsspec.filesystem("memory")
        self._root = "/" + root.strip("/") if root.strip("/") else ""

    def put(self, path: str, data: bytes) -> None:
        with _MEMORY_LOCK:
            self._fs.pipe_file(f"{self._root}/{path}", data)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        with _MEMORY_LOCK:
            if self._fs.isfile(f"{self._root}/{path}"):
                return PutOutcome.EXISTS
            self._fs.pipe_file(f"{self._root}/{path}", data)
            return PutOutcome.CREATED

    def get(self, path: str) -> bytes:
        with _MEMORY_LOCK:
            return bytes(self._fs.cat_file(f"{self._root}/{path}"))

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        return self.get(path)[start:stop]

    def exists(self, path: str) -> bool:
        with _MEMORY_LOCK:
            return bool(self._fs.isfile(f"{self._root}/{path}"))

    def list(self, prefix: str, after: str = "") -> list[tuple[str, int]]:
        with _MEMORY_LOCK:
            found = self._fs.find(self._root or "/", detail=True)
        begin = len(self._root) + 1
        pairs = ((name[begin:], int(info["size"])) for name, info in found.items())
        return sorted(pair for pair in pairs if pair[0].startswith(prefix) and pair[0] > after)

    def delete(self, path: str) -> None:
        with _MEMORY_LOCK:
            if self._fs.isfile(f"{self._root}/{path}"):
                self._fs.rm_file(f"{self._root}/{path}")

    def delete_prefix(self, prefix: str) -> None:
        for path, _ in self.list(prefix):
            self.delete(path)
