"""Output in a local folder: pending files in ``_rayflow/`` below it, committed by a hard link that cannot overwrite.

Readers skip names that begin with an underscore (``*.parquet`` globs, pyarrow datasets, Spark, Hive). One job at a time
writes to a folder: recovery removes every pending file that its checkpoint does not name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, DataError, StorageError
from rayflow.operators.base import Committer, OperatorContext
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
        return os.path.join(pending, f"{ctx.attempt}-{ctx.subtask}-{seq}{suffix}")

    def prepare(self, path: str, final: str, rows: int) -> Json:
        _sync(path)
        _sync(os.path.dirname(path))
        return {"pending": os.path.basename(path), "final": final, "rows": rows, "nbytes": os.path.getsize(path)}


@dataclass(slots=True)
class LocalCommitter(Committer):
    folder: str
    suffix: str
    refuse_existing: bool

    def commit(self, committables: Sequence[Json]) -> None:
        if not committables:
            return
        try:
            for committable in committables:
                try:
                    self._publish(committable)
                except FileNotFoundError:
                    # Another process (a subtask that was thought dead) may have published it between two of our steps.
                    self._publish(committable)
            _sync(self.folder)
        except OSError as error:
            raise StorageError(f"cannot commit to {self.folder!r}: {error}; nothing committed is lost") from error

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
            if fresh and self.refuse_existing:
                self._refuse_other_output()
            self.commit(committables)
            shutil.rmtree(self._pending(), ignore_errors=False)
        except FileNotFoundError:
            pass  # no pending folder: nothing was left behind
        except OSError as error:
            raise StorageError(f"cannot use {self.folder!r} as output folder: {error}") from error

    def finish(self) -> None:
        shutil.rmtree(self._pending(), ignore_errors=True)

    def _pending(self, *names: str) -> str:
        return os.path.join(self.folder, PENDING, *names)

    def _publish(self, committable: Json) -> None:
        pending, final = self._pending(committable["pending"]), os.path.join(self.folder, committable["final"])
        nbytes = int(committable["nbytes"])
        if not os.path.exists(pending):
            if os.path.exists(final) and os.path.getsize(final) == nbytes:
                return  # committed before
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
        found = sorted(name for name in os.listdir(self.folder) if name.endswith(self.suffix) and name[0] not in "._")
        if found:
            raise DataError(
                f"output folder {self.folder!r} already holds {len(found)} files of another run (such as {found[0]}); "
                f'empty it, write elsewhere, or use mode="append"'
            )


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
