"""Temporary folders that do not outlive their process by long, even one that is killed.

A folder's owner holds a lock on it, which the kernel releases when the process ends, however it ends: every new spool
first removes the folders nobody holds. A process id would not do: containers that share a folder do not share those.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "rayflow-spool-"
_UNLOCKED = "rayflow-unlocked-"
"""Until it is locked a folder must not look like one that was left behind."""


class Spool:
    """A temporary folder at ``path``. Raises `OSError` when there is no place for one."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        sweep(root)
        made = Path(tempfile.mkdtemp(prefix=_UNLOCKED))
        self._held = _hold(made)
        self.path = str(made.rename(root / made.name.replace(_UNLOCKED, PREFIX)))

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None


def sweep(root: Path) -> None:
    """Remove the spools below ``root`` whose process is gone."""
    for folder in root.glob(f"{PREFIX}*"):
        held = _hold(folder)
        if held is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(held)


def _hold(folder: Path) -> int | None:
    """None when another process holds it, it is another user's, or the file system knows no locks."""
    with contextlib.suppress(OSError):
        held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(held)
        else:
            return held
    return None
