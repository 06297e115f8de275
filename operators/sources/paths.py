"""Which files a source reads: paths, globs, folders and URLs, in one stable order.

A file is named by one text that any process can open again: an absolute local path or a full fsspec URL. Listings are
never cached: what another process has just written must be seen (s3fs caches them by default, for ever).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from rayflow.errors import DataError, PlanError, StorageError

Paths = str | Path | Iterable[str | Path]
StorageOptions = Mapping[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class FileInfo:
    """One input file. ``nbytes`` is the size as stored (compressed, if it is)."""

    url: str
    nbytes: int


def normalise(paths: Paths) -> tuple[str, ...]:
    """The paths as texts that mean the same in every process of this machine (local ones made absolute)."""
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise PlanError("a source needs at least one path, got an empty list")
    for path in given:
        if not isinstance(path, str | Path) or not str(path):
            raise PlanError(f"a path must be a text or a pathlib.Path, got {path!r}")
    return tuple(_absolute(str(path)) for path in given)


def is_local(url: str) -> bool:
    return "://" not in url


def open_fs(url: str, options: StorageOptions) -> tuple[Any, str]:
    """The file system of ``url`` and the path on it, without listings cache.

    Raises `PlanError` for an unknown scheme or an option the scheme does not take.
    """
    extra = {} if is_local(url) or "::" in url else {"use_listings_cache": False}
    try:
        fs, path = fsspec.core.url_to_fs(url, **extra, **options)
    except (ValueError, TypeError, ImportError) as error:
        raise PlanError(f"cannot open {url!r}: {error}; check the URL and storage_options") from error
    except FileNotFoundError as error:
        raise DataError(f"no such file: {url!r}") from error
    except OSError as error:
        raise StorageError(f"cannot open {url!r}: {error}") from error
    return fs, str(path)


def find_files(
    paths: tuple[str, ...], options: StorageOptions, suffixes: tuple[str, ...], *, may_be_empty: bool = False
) -> tuple[FileInfo, ...]:
    """All files meant by ``paths``, sorted by name, each once.

    A folder stands for the files below it whose name ends in one of ``suffixes``; names that begin with ``_`` or ``.``
    are left out there (they are what writers keep for themselves). Raises `DataError` naming the path when a file is
    missing or a glob or folder yields nothing, `StorageError` when the storage refuses. ``may_be_empty``: a glob, a
    folder or, on object storage where there are no empty folders, any path may yield nothing.
    """
    found: set[FileInfo] = set()
    for url in paths:
        try:
            here = set(_find(url, options, suffixes, may_be_empty))
        except FileNotFoundError as error:
            raise DataError(f"no such file: {url!r}") from error
        except (DataError, PlanError, StorageError):
            raise
        except Exception as error:  # fsspec back ends raise whatever their client library raises
            raise StorageError(f"cannot list {url!r}: {type(error).__name__}: {error}") from error
        found |= here
    return tuple(sorted(found))


def _find(url: str, options: StorageOptions, suffixes: tuple[str, ...], may_be_empty: bool) -> Iterable[FileInfo]:
    fs, path = open_fs(url, options)
    if fs.isfile(path):
        return [FileInfo(url, int(fs.size(path)))]
    if any(sign in path for sign in "*?["):
        listed = {k: v for k, v in fs.glob(path, detail=True).items() if v["type"] == "file"}
        if not listed and not may_be_empty:
            raise DataError(f"no file matches {url!r}")
    elif fs.isdir(path):
        everything = fs.find(path, detail=True)
        listed = {k: v for k, v in everything.items() if _wanted(k[len(path) :], suffixes)}
        if not listed and not may_be_empty:
            raise DataError(f"no file ending in {' or '.join(suffixes)} below folder {url!r}")
    elif may_be_empty and not is_local(url):
        listed = {}
    else:
        raise DataError(f"no such file{' or folder' if may_be_empty else ''}: {url!r}")
    return [FileInfo(_url(url, fs, name), int(info["size"])) for name, info in listed.items()]


def _wanted(below: str, suffixes: tuple[str, ...]) -> bool:
    pieces = below.strip("/").split("/")
    return pieces[-1].lower().endswith(suffixes) and not any(p.startswith(("_", ".")) for p in pieces)


def _url(root: str, fs: Any, path: str) -> str:
    """The URL of ``path`` on the file system that ``root`` named; a chained URL keeps its tail."""
    if is_local(root):
        return path
    head, sep, tail = root.partition("::")
    scheme = head.partition("://")[0]
    return f"{scheme}://{str(fs._strip_protocol(path)).lstrip('/') if scheme != 'file' else path}{sep}{tail}"


def _absolute(path: str) -> str:
    if path.startswith(("file://", "local://")) and "::" not in path:
        path = path.partition("://")[2]
    if not is_local(path):
        head, sep, tail = path.partition("::")
        return f"{head}{sep}{_absolute(tail)}" if sep else path
    return os.path.abspath(os.path.expanduser(path))
