"""Folders that are watched: each file is one split, picked up once, when it is there.

The id of its split is the file's name, and the job's checkpoints hold every id: a file is read once, whatever fails. So
files must be written atomically (renamed into place, or put on S3) and must not change. One that is seen with another
size than before is an error; after a restart of the job only a file that was not read to its end is looked at again.
Names that begin with ``_`` or ``.``, and empty files, are not there yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from rayflow.errors import ConfigError, DataError
from rayflow.operators.base import Source
from rayflow.operators.sources.paths import FileInfo, Paths, StorageOptions, find_files


class WatchedSource(Source):
    """Files, read one after another; for ever where they are watched."""

    watch_s: float | None
    """How often to look for new ones; None: those of the beginning are all."""

    @property
    def bounded(self) -> bool:
        return self.watch_s is None

    @property
    def in_turns(self) -> bool:
        return False

    @property
    def discovery_interval_s(self) -> float | None:
        return self.watch_s


def check_interval(watch_s: float | None, *, function: str) -> None:
    if watch_s is not None and watch_s <= 0:
        raise ConfigError(f"{function}(watch) must be longer than nothing, got {watch_s} s")


def visible_files(paths: tuple[str, ...], options: StorageOptions, suffixes: tuple[str, ...]) -> tuple[FileInfo, ...]:
    """As `find_files`, of files that are there by now; there may be none. Raises as it does, but for empty places."""
    return tuple(
        file
        for file in find_files(paths, options, suffixes, may_be_empty=True)
        if file.nbytes and not file.url.rpartition("/")[2].startswith(("_", "."))
    )


class Seen:
    """The files that a source in this process has seen, by URL, so that only new ones are opened."""

    def __init__(self) -> None:
        self._nbytes: dict[str, int] = {}

    def new(self, files: Sequence[FileInfo], *, function: str) -> list[FileInfo]:
        """Those of ``files`` that were not `add`-ed. Raises `DataError` for one that has changed since."""
        for file in files:
            before = self._nbytes.get(file.url, file.nbytes)
            if before != file.nbytes:
                raise DataError(
                    f"{function}(watch): {file.url} had {before} bytes when it was seen first and has {file.nbytes} "
                    f"now; files must be complete when they appear (write them elsewhere and move them there) and must "
                    f"stay as they are"
                )
        return [file for file in files if file.url not in self._nbytes]

    def add(self, file: FileInfo) -> None:
        self._nbytes[file.url] = file.nbytes


def is_gone(error: DataError) -> bool:
    """Whether a file that was listed is not there any more."""
    return isinstance(error.__cause__, FileNotFoundError)


def none_yet(paths: Paths, *, function: str) -> DataError:
    return DataError(f"{function} found no file yet at {paths}; with watch= pass schema= to start without one")
