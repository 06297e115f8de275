"""Output on S3: the pre-commit uploads the parts of a multipart upload, the commit completes it.

An object of an open multipart upload cannot be seen by any reader, and completing one is atomic. Each upload carries a
random token as object metadata, so that an object found under the final key is known to be ours or not: ETags depend on
the server and its encryption, sizes can be equal by chance.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, DataError, StorageError
from rayflow.operators.base import Committer, OperatorContext
from rayflow.operators.sinks import committed
from rayflow.operators.sinks.files import Target
from rayflow.operators.sinks.spool import Spool
from rayflow.operators.sources.paths import open_fs

PART_BYTES = 16 * 1024 * 1024
"""S3 wants at least 5 MiB in all parts but the last, and at most 10,000 parts."""
_PARTS_MAX = 10_000
_TOKEN = "rayflow"


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket and a prefix in it, through the S3 client of s3fs (which retries what can be retried)."""

    url: str
    options: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        return self.url.partition("://")[2].partition("/")[0]

    def key(self, name: str) -> str:
        prefix = self.url.partition("://")[2].partition("/")[2].strip("/")
        return f"{prefix}/{name}" if prefix else name

    def call(self, method: str, **arguments: Any) -> Any:
        """Raises `FileNotFoundError` for what is not there (its cause tells what) and `StorageError` for the rest."""
        fs, _ = open_fs(self.url, self.options)
        try:
            return fs.call_s3(method, Bucket=self.name, **arguments)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise StorageError(f"there is no bucket {self.name!r}; create it before the job starts") from error
            raise
        except Exception as error:  # botocore's own errors have no common base with OSError
            raise StorageError(
                f"S3 {method} on {self.url} failed: {type(error).__name__}: {error}; nothing committed is lost, "
                f"check the credentials and endpoint in storage_options"
            ) from error

    def read(self, key: str) -> bytes:
        fs, _ = open_fs(self.url, self.options)
        try:
            return bytes(fs.cat_file(f"{self.name}/{key}"))
        except Exception as error:
            raise StorageError(f"cannot read s3://{self.name}/{key}: {type(error).__name__}: {error}") from error

    def head(self, key: str) -> tuple[int, str] | None:
        """Size and token of the object, None when there is none."""
        try:
            found = self.call("head_object", Key=key)
        except FileNotFoundError:
            return None
        return int(found["ContentLength"]), str(found.get("Metadata", {}).get(_TOKEN, ""))

    def uploads(self, name: str = "part-") -> list[tuple[str, str]]:
        """(key, upload id) of the first open multipart uploads of this sink, up to 1,000.

        ``name``: how keys begin behind the prefix. There is no second page: SeaweedFS truncates without saying where to
        go on. Abort these and ask again.
        """
        page = self.call("list_multipart_uploads", Prefix=self.key(name))
        return [(upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", [])]

    def objects(self, name: str | None = None) -> Iterator[str]:
        """Keys directly below the prefix; or all that begin with ``name`` behind it, however deep."""
        where = {"Prefix": self.key(""), "Delimiter": "/"} if name is None else {"Prefix": self.key(name)}
        markers: dict[str, str] = {}
        while True:
            page = self.call("list_objects_v2", **where, **markers)
            for found in page.get("Contents", []):
                yield found["Key"]
            if not page.get("IsTruncated"):
                return
            markers = {"ContinuationToken": page["NextContinuationToken"]}

    def is_open(self, key: str, upload_id: str) -> bool:
        try:
            self.call("list_parts", Key=key, UploadId=upload_id)
        except FileNotFoundError as error:
            if _code(error) != "NoSuchUpload":
                raise
            return False
        return True

    def abort(self, key: str, upload_id: str) -> None:
        try:
            self.call("abort_multipart_upload", Key=key, UploadId=upload_id)
        except FileNotFoundError as error:
            if _code(error) != "NoSuchUpload":
                raise


class S3Target(Target):
    """Spools files in a temporary folder of this machine and uploads them when they are complete."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._spool: Spool | None = None

    def new_path(self, ctx: OperatorContext, seq: int, suffix: str) -> str:
        if self._spool is None:
            self._spool = Spool()
        return os.path.join(self._spool.path, f"{ctx.attempt}-{ctx.subtask}-{seq}{suffix}")

    def prepare(self, path: str, final: str, rows: int) -> Json:
        key, token, nbytes = self._bucket.key(final), uuid.uuid4().hex, os.path.getsize(path)
        upload_id = str(self._bucket.call("create_multipart_upload", Key=key, Metadata={_TOKEN: token})["UploadId"])
        part_bytes = max(PART_BYTES, -(-nbytes // _PARTS_MAX))
        parts: list[str] = []
        with open(path, "rb") as file:
            while (data := file.read(part_bytes)) or not parts:
                number = len(parts) + 1
                done = self._bucket.call("upload_part", Key=key, UploadId=upload_id, PartNumber=number, Body=data)
                parts.append(done["ETag"])
        os.unlink(path)
        return {
            "bucket": self._bucket.name,
            "key": key,
            "upload_id": upload_id,
            "parts": parts,
            "token": token,
            "rows": rows,
            "nbytes": nbytes,
        }

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None


@dataclass(slots=True)
class S3Committer(Committer):
    bucket: Bucket
    suffixes: tuple[str, ...]
    refuse_existing: bool
    below: str = ""
    """How the names of folders behind the prefix begin, where the output has folders."""
    manifest: bool = False

    def commit(self, committables: Sequence[Json]) -> None:
        self._commit(committables, frozenset())

    def _commit(self, committables: Sequence[Json], merged: frozenset[str]) -> None:
        """``merged``: files that have been merged into others since."""
        start = len(self.bucket.key(""))
        for committable in committables:
            if committable["key"][start:] not in merged:
                self._complete(committable)
        if self.manifest:
            found = committed.records((str(c["key"])[start:], c) for c in committables)
            for name, content in found.items():
                self.bucket.call("put_object", Key=self.bucket.key(f"{committed.FOLDER}/{name}"), Body=content)

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        if fresh and self.refuse_existing:
            self._refuse_other_output()
        self._commit(committables, self._merged())
        self.finish()

    def finish(self) -> None:
        # What was committed is no upload any more, so whatever is still open belongs to no checkpoint.
        for name in ("part-", self.below) if self.below else ("part-",):
            aborted: set[tuple[str, str]] = set()
            while found := [upload for upload in self.bucket.uploads(name) if upload not in aborted]:
                for key, upload_id in found:
                    self.bucket.abort(key, upload_id)
                aborted.update(found)

    def _complete(self, committable: Json) -> None:
        key = str(committable["key"])
        if self._is_there(committable):
            return
        parts = [{"PartNumber": i, "ETag": etag} for i, etag in enumerate(committable["parts"], start=1)]
        try:
            self.bucket.call(
                "complete_multipart_upload",
                Key=key,
                UploadId=committable["upload_id"],
                MultipartUpload={"Parts": parts},
            )
        except (FileNotFoundError, StorageError) as error:
            # Another process (a subtask that was thought dead) may have completed it since we looked.
            if self._is_there(committable):
                return
            if isinstance(error, StorageError) and self.bucket.is_open(key, committable["upload_id"]):
                raise
            if key[len(self.bucket.key("")) :] in self._merged():
                return
            raise CommitLostError(
                f"s3://{self.bucket.name}/{key} ({committable['rows']} rows) was prepared for a complete checkpoint, "
                f"but its multipart upload is gone and the object is not there; look for a lifecycle rule that aborts "
                f"uploads, then go back to an earlier checkpoint with an empty output prefix"
            ) from error

    def _merged(self) -> frozenset[str]:
        if not self.manifest:
            return frozenset()
        keys = self.bucket.objects(f"{committed.FOLDER}/{committed.MERGE}")
        return committed.merged_away(self.bucket.read(key) for key in keys)

    def _is_there(self, committable: Json) -> bool:
        key = str(committable["key"])
        found = self.bucket.head(key)
        if found is None:
            return False
        if found != (int(committable["nbytes"]), committable["token"]):
            raise StorageError(
                f"s3://{self.bucket.name}/{key} exists and is not ours; move it away, it will not be overwritten"
            )
        return True

    def _refuse_other_output(self) -> None:
        keys = chain(
            (key for key in self.bucket.objects() if key.rpartition("/")[2][:1] not in "._"),
            self.bucket.objects(self.below) if self.below else (),
        )
        found = next((key for key in keys if key.endswith(self.suffixes)), None)
        if found is None and self.manifest:
            found = next(self.bucket.objects(f"{committed.FOLDER}/"), None)
        if found is not None:
            raise DataError(
                f"output {self.bucket.url!r} already holds files of another run (such as "
                f'{found[len(self.bucket.key("")) :]}); empty it, write elsewhere, or use mode="append"'
            )


def _code(error: BaseException) -> str:
    """The S3 error code behind an exception that s3fs translated."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
