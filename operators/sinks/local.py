"""Output in a local folder: pending files in ``_rayflow/`` below it, committed by a hard link that cannot overwrite.

Readers skip names that begin with an underscore (``*.parquet`` globs, pyarrow datasets, Spark, Hive). One job at a time
writes to a folder: recovery removes every pending file that its checkpoint does not name.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, DataError, StorageError
from rayflow.operators.base import Committer, OperatorContext
from rayflow.operators.sinks import committed
from rayflow.operators.sinks.files import Target

PENDING = "_rayflow"
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
"""What file systems without hard links answer."""


@dataclass(frozen=True, slots=True)
class LocalTarget(Target):
    folder: str

    def new_path(self, ctx: OperatorContext, seq: int, suffix: str) -> str:
        pending = os.path.join(self.folder, PENDING)
        os.makedirs(pending, exist_ok=True)
        return os.path.join(pending, f"{ctx.run_id}-{ctx.attempt}-{ctx.subtask}-{seq}{suffix}")

    def prepare(self, path: str, final: str, rows: int) -> Json:
        sync(path)
        sync(os.path.dirname(path))
        return {"pending": os.path.basename(path), "final": final, "rows": rows, "nbytes": os.path.getsize(path)}


@dataclass(slots=True)
class LocalCommitter(Committer):
    folder: str
    suffixes: tuple[str, ...]
    refuse_existing: bool
    below: str = ""
    """How the names of folders in it begin, where the output has folders."""
    manifest: bool = False

    def commit(self, committables: Sequence[Json]) -> None:
        self._commit(committables, frozenset())

    def _commit(self, committables: Sequence[Json], merged: frozenset[str]) -> None:
        """``merged``: files that have been merged into others since."""
        if not committables:
            return
        try:
            for committable in committables:
                if committable["final"] in merged:
                    continue
                try:
                    self._publish(committable)
                except FileNotFoundError:
                    # Another process (a subtask that was thought dead) may have published it between two of our steps.
                    self._publish(committable)
            for folder in self._folders_of(committables):
                if os.path.isdir(folder):  # not one whose files were all merged away and that somebody removed
                    sync(folder)
            if self.manifest:
                self._record(committables)
        except OSError as error:
            raise StorageError(f"cannot commit to {self.folder!r}: {error}; nothing committed is lost") from error

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
            if fresh and self.refuse_existing:
                self._refuse_other_output()
            self._commit(committables, self._merged())
            with contextlib.suppress(FileNotFoundError):  # no pending folder: nothing was left behind
                shutil.rmtree(self._pending(), ignore_errors=False)
        except OSError as error:
            raise StorageError(f"cannot use {self.folder!r} as output folder: {error}") from error

    def finish(self) -> None:
        shutil.rmtree(self._pending(), ignore_errors=True)

    def _pending(self, *names: str) -> str:
        return os.path.join(self.folder, PENDING, *names)

    def _folders_of(self, committables: Sequence[Json]) -> list[str]:
        """Those that got entries, or may have got them, the deeper ones first."""
        found = {""}
        for committable in committables:
            folder = os.path.dirname(committable["final"])
            while folder:
                found.add(folder)
                folder = os.path.dirname(folder)
        return [os.path.join(self.folder, folder) if folder else self.folder for folder in sorted(found, reverse=True)]

    def _merged(self) -> frozenset[str]:
        if not self.manifest:
            return frozenset()
        found = []
        for path in glob.glob(os.path.join(glob.escape(self.folder), committed.FOLDER, f"{committed.MERGE}*.json")):
            with open(path, "rb") as file:
                found.append(file.read())
        return committed.merged_away(found)

    def _record(self, committables: Sequence[Json]) -> None:
        folder = os.path.join(self.folder, committed.FOLDER)
        os.makedirs(folder, exist_ok=True)
        for name, content in committed.records((c["final"], c) for c in committables).items():
            temporary = os.path.join(folder, f".{uuid.uuid4().hex}")
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, os.path.join(folder, name))
        sync(folder)
        sync(self.folder)

    def _publish(self, committable: Json) -> None:
        pending, final = self._pending(committable["pending"]), os.path.join(self.folder, committable["final"])
        nbytes = int(committable["nbytes"])
        if not os.path.exists(pending):
            if os.path.exists(final) and os.path.getsize(final) == nbytes:
                return  # committed before
            if committable["final"] in self._merged():
                return
            raise CommitLostError(
                f"{committable['final']} ({committable['rows']} rows) was prepared in {self._pending()} for a complete "
                f"checkpoint, but is gone from there and not in {self.folder!r}; restore the file or go back to an "
                f"earlier checkpoint with an empty output folder"
            )
        if os.path.getsize(pending) != nbytes:
            raise CommitLostError(
                f"{pending} was prepared with {nbytes} bytes for a complete checkpoint, but now has "
                f"{os.path.getsize(pending)}; restore the file or go back to an earlier checkpoint"
            )
        if "/" in committable["final"]:
            os.makedirs(os.path.dirname(final), exist_ok=True)
        try:
            os.link(pending, final)
        except FileExistsError:
            # Either a crash between the link and the unlink below, or somebody else's file.
            if not os.path.samefile(pending, final):
                raise StorageError(
                    f"{final!r} exists and is not ours; move it away, it will not be overwritten"
                ) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.exists(final):
                raise StorageError(
                    f"{final!r} exists and is not ours; move it away, it will not be overwritten"
                ) from error
            os.rename(pending, final)
            return
        os.unlink(pending)

    def _refuse_other_output(self) -> None:
        found = list(self._existing())
        if found:
            raise DataError(
                f"output folder {self.folder!r} already holds {len(found)} files of another run (such as {found[0]}); "
                f'empty it, write elsewhere, or use mode="append"'
            )

    def _existing(self) -> Iterator[str]:
        """Files that a reader of the output would take for ours."""
        for name in sorted(os.listdir(self.folder)):
            if name.endswith(self.suffixes) and name[0] not in "._":
                yield name
            elif self.below and name.startswith(self.below):
                for folder, _, names in os.walk(os.path.join(self.folder, name)):
                    inside = os.path.relpath(folder, self.folder)
                    yield from (os.path.join(inside, each) for each in sorted(names) if each.endswith(self.suffixes))
        if self.manifest and os.path.isdir(os.path.join(self.folder, committed.FOLDER)):
            yield from (
                os.path.join(committed.FOLDER, n) for n in os.listdir(os.path.join(self.folder, committed.FOLDER))
            )


def sync(path: str) -> None:
    """Make a file, or the entries of a folder, survive a loss of power."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
