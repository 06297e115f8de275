"""Folders on the local disk of a node for state that is larger than memory (``state="rocksdb"``).

    <local_dir>/rayflow-<user>/<job>/<process>/<chain>-<subtask>-<attempt>-<n>-<name>/

Nothing in them outlives an attempt: what counts is in checkpoints. A process holds a lock on its own folder, which the
system takes off when it dies, however it dies; whoever needs a folder first removes those of the same job that nobody
holds, and so does whoever needs none any more. Not the id of the process: it is used again, and in containers that
share a disk all are called 1. Ray ends the processes of a coordinator that has died in its own time: what they have
stays until the next run of the job, if the job has ended before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import os
import shutil
import tempfile
import threading
import uuid
import weakref
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Final

from rayflow.core.ids import Attempt, SubtaskId
from rayflow.errors import ConfigError, StorageError
from rayflow.storage.layout import quote

_LOCK: Final = "lock"
_NUMBERS: Final = count(1)
"""Of folders in this process: in a simulated job one attempt of a subtask may begin several times in it."""
_TRIES: Final = 20
_UNUSABLE: Final = frozenset([errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT])


class ProcessFolder:
    """The folder of this process and one job; removed at the end of the process, and by others after its death."""

    _open: ClassVar[dict[Path, ProcessFolder]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, of_job: Path) -> None:
        remove_abandoned(of_job)
        name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        hidden = of_job / f".{name}"  # until it is locked, or it could be taken for one of the dead
        _make(hidden)
        (hidden / _LOCK).touch()
        self._lock = _locked(hidden)
        self.path = hidden.rename(of_job / name)
        self._remove = weakref.finalize(self, _remove_own, self.path, os.getpid())

    @classmethod
    def make(cls, of_job: Path, name: str) -> Path:
        """A new folder in that of this process. Raises `OSError`."""
        with cls._guard:
            if of_job not in cls._open or not cls._open[of_job].path.is_dir():
                cls._open[of_job] = cls(of_job)
            path = cls._open[of_job].path / name
            path.mkdir()
            return path

    @classmethod
    def leave(cls, of_job: Path) -> None:
        """Remove it if nothing is left in it, and what the dead have left: this may be the last process of the job, and
        one on Ray does not end but is killed."""
        with cls._guard:
            own = cls._open.get(of_job)
            if own is None or (own.path.is_dir() and any(path.name != _LOCK for path in own.path.iterdir())):
                return
            del cls._open[of_job]
            own._remove()
            own._lock.close()
            remove_abandoned(of_job)
            for folder in (of_job, of_job.parent):
                with contextlib.suppress(OSError):  # others are in it
                    folder.rmdir()


class Scratch:
    """The local folders of one attempt of one subtask; none is made before it is asked for.

    ``local_dir`` None: the system's folder for temporary files.
    """

    def __init__(self, local_dir: str | None, job: str, subtask: SubtaskId, attempt: Attempt) -> None:
        self._base = Path(tempfile.gettempdir() if local_dir is None else os.path.expanduser(local_dir)).absolute()
        self._of_job = self._base / f"rayflow-{quote(_user())}" / quote(job)
        self._name = f"{quote(subtask.chain)}-{subtask.index}-{attempt}"
        self._made: list[Path] = []

    @property
    def used(self) -> bool:
        return bool(self._made)

    def folder(self, name: str) -> Path:
        """A new empty folder. Raises `ConfigError` if ``local_dir`` cannot be used, `StorageError` if it is full."""
        try:
            path = ProcessFolder.make(self._of_job, f"{self._name}-{next(_NUMBERS)}-{quote(name)}")
        except OSError as error:
            if error.errno in _UNUSABLE:
                raise ConfigError(
                    f"{self._name}: JobConfig(local_dir) is {str(self._base)!r}, where no folder can be made on this "
                    f"node: {error}; name a folder on a local disk that can be written to on every node"
                ) from error
            raise StorageError(
                f"{self._name}: no folder can be made below {str(self._base)!r} on this node: {error}; make room, or "
                "name another JobConfig(local_dir); nothing committed is lost"
            ) from error
        self._made.append(path)
        return path

    def close(self) -> None:
        """Remove all of them; safe at any time and twice."""
        for path in self._made:
            shutil.rmtree(path, ignore_errors=True)
        if self._made:
            ProcessFolder.leave(self._of_job)
        self._made = []


def remove_abandoned(of_job: Path) -> None:
    """Remove the folders of processes that are dead."""
    for path in of_job.iterdir() if of_job.is_dir() else ():
        if path.name.startswith("."):
            continue
        try:
            lock = _locked(path)
        except OSError:
            continue  # held by a process that lives, or not a folder of ours, or gone meanwhile
        shutil.rmtree(path, ignore_errors=True)
        lock.close()


def _make(folder: Path) -> None:
    for left in reversed(range(_TRIES)):
        try:
            return folder.mkdir(parents=True)
        except FileNotFoundError:  # another process has just removed a parent, which was empty
            if not left:
                raise


def _locked(folder: Path) -> Any:
    """The lock of a folder, held until it is closed or the process is gone. Raises `OSError` if somebody holds it."""
    file = open(folder / _LOCK, "rb+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _remove_own(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not at the end of a process that was forked from this one
        shutil.rmtree(path, ignore_errors=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return str(os.getuid())
