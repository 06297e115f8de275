"""From whatever a file system raises to one sentence: what, where, why, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from rayflow.errors import StorageError

_FULL = frozenset([errno.ENOSPC, errno.EDQUOT])
_DENIED = frozenset([errno.EACCES, errno.EPERM, errno.EROFS])
_TRANSIENT_CODES = frozenset(
    [
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
    ]
)
# By name, so that neither botocore nor aiohttp is needed to run on a local folder.
_TRANSIENT_CLASSES = frozenset(
    [
        "ClientConnectionError",
        "ClientPayloadError",
        "ConnectionError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "ResponseParserError",
        "ResponseStreamingError",
    ]
)


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that caused it (s3fs hides the answer of the server in the cause)."""
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def server_code(error: BaseException) -> tuple[str, int]:
    """The S3 error code and HTTP status somewhere in the chain, or ("", 0)."""
    for link in chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return "", 0


def is_transient(error: BaseException) -> bool:
    """True if the same request may succeed in a moment: the connection broke, or the server says 5xx or slow down."""
    code, status = server_code(error)
    if code:
        return code in _TRANSIENT_CODES or status >= 500
    return any(
        isinstance(link, ConnectionError | TimeoutError)
        or not _TRANSIENT_CLASSES.isdisjoint(cls.__name__ for cls in type(link).__mro__)
        for link in chain(error)
    )


def is_missing(error: BaseException) -> bool:
    """True if the object is not there; a bucket that is not there is a failure."""
    return isinstance(error, FileNotFoundError) and server_code(error)[0] != "NoSuchBucket"


def is_taken(error: BaseException) -> bool:
    """True if a conditional write found an object (moto and AWS say it one way, SeaweedFS another)."""
    return (
        isinstance(error, FileExistsError)
        or server_code(error)[0] == "PreconditionFailed"
        or (server_code(error)[1] == 412)
    )


def storage_error(action: str, url: str, path: str, error: BaseException) -> StorageError:
    """The error to raise, with the cause told in the message; the caller chains it."""
    where = f"{path!r} in {url}" if path else url
    cause = f"{type(error).__name__}: {error}".rstrip(": ")
    return StorageError(f"cannot {action} {where}: {remedy(error)} ({cause})")


def remedy(error: BaseException) -> str:
    code, _ = server_code(error)
    number = error.errno if isinstance(error, OSError) else None
    names = {cls.__name__ for link in chain(error) for cls in type(link).__mro__}
    if number in _FULL:
        return "disk full: free space there or choose another place; nothing committed is lost"
    if not names.isdisjoint({"NoCredentialsError", "PartialCredentialsError"}):
        return (
            'no credentials: pass storage_options={"key": ..., "secret": ...} or set AWS_ACCESS_KEY_ID and '
            "AWS_SECRET_ACCESS_KEY; nothing was written"
        )
    if code == "NoSuchBucket":
        return "the bucket does not exist: create it or correct the URL"
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
        return "the credentials are refused: check the key, the secret and the token in storage_options"
    if isinstance(error, PermissionError) or number in _DENIED:
        return "permission denied: give the user or the credentials read and write access there"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return "a part of the path is a file: choose another folder"
    if is_transient(error):
        return "the store cannot be reached or is failing: check endpoint_url and network; nothing committed is lost"
    return "the store refused; see the cause; nothing committed is lost"
