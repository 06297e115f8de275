"""Objects as files of a local (or mounted) folder: atomic by rename and link, durable by fsync.

fsspec's local ``pipe_file`` is open + write: a reader sees half of it, and a crash leaves half of it. So a writer fills
a temporary file beside the target, syncs it, gives it its name in one step (``replace``, or ``link`` which refuses a
taken name), and syncs the folder, without which the name may be gone after a power cut.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from rayflow.storage.store import TEMPORARY_SUFFIX, PutOutcome

_TRIES = 20
"""How often a write starts again because somebody removed the folder (a sweep, a `delete` of its last file)."""


class LocalDriver:
    """File operations below an absolute ``root``. Raises plain `OSError`s; `ObjectStore` gives them words."""

    def __init__(self, root: str) -> None:
        self.root = root

    def put(self, path: str, data: bytes) -> None:
        self._publish(path, data, os.replace)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        if os.path.lexists(self._full(path)):  # spares the loser the writing; the link below decides
            return PutOutcome.EXISTS
        try:
            self._publish(path, data, os.link)
        except FileExistsError:
            if not os.path.lexists(self._full(path)):
                raise  # a part of the path is a file
            return PutOutcome.EXISTS
        return PutOutcome.CREATED

    def get(self, path: str) -> bytes:
        try:
            return Path(self._full(path)).read_bytes()
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(path) from error

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        try:
            with open(self._full(path), "rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(path) from error

    def exists(self, path: str) -> bool:
        try:
            return stat.S_ISREG(os.stat(self._full(path)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def list(self, prefix: str, after: str = "") -> list[tuple[str, int]]:
        folder = prefix.rpartition("/")[0]
        return sorted(found for found in self._walk(folder) if found[0].startswith(prefix) and found[0] > after)

    def delete(self, path: str) -> None:
        try:
            os.unlink(self._full(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        # Synced, because of rule C7: the files of a checkpoint must never be gone while its manifest comes back.
        _sync_folder(os.path.dirname(self._full(path)), missing_ok=True)
        self._remove_empty(path.rpartition("/")[0])

    def delete_prefix(self, prefix: str) -> None:
        if prefix.endswith("/"):  # a whole folder: the usual case, and quicker than file by file
            _remove_tree(self._full(prefix))
            self._remove_empty(prefix.rstrip("/").rpartition("/")[0])
            return
        for path, _ in self.list(prefix):
            self.delete(path)

    def _full(self, path: str) -> str:
        return os.path.join(self.root, path)

    def _publish(self, path: str, data: bytes, give_name: Callable[[str, str], None]) -> None:
        target = self._full(path)
        folder = os.path.dirname(target)
        for left in reversed(range(_TRIES)):
            temporary = os.path.join(folder, f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
            try:
                _make_folder(folder)
                _write_synced(temporary, data)
                give_name(temporary, target)
                if give_name is os.link:
                    _unlink_quietly(temporary)
                _sync_folder(folder)
                return
            except FileNotFoundError:
                if not left:
                    raise
            except BaseException:
                _unlink_quietly(temporary)
                raise

    def _walk(self, folder: str) -> Iterator[tuple[str, int]]:
        try:
            entries = list(os.scandir(self._full(folder) if folder else self.root))
        except FileNotFoundError:
            return
        except NotADirectoryError:
            if not folder:
                raise
            return
        if not entries:
            # A writer was killed before it had filled the folder. It is no object, so only here is it ever seen; a
            # writer that is alive makes it anew.
            self._remove_empty(folder)
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(path)
            else:
                try:
                    yield path, entry.stat().st_size
                except FileNotFoundError:
                    continue  # deleted while we looked

    def _remove_empty(self, folder: str) -> None:
        while folder:
            try:
                os.rmdir(self._full(folder))
            except FileNotFoundError:
                pass
            except OSError:
                return  # not empty
            folder = folder.rpartition("/")[0]


def _write_synced(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_folder(folder: str) -> None:
    """Like ``makedirs``, but the name of each new folder is durable too."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    if parent != folder:
        _make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", folder) from None
    else:
        _sync_folder(parent)


def _sync_folder(folder: str, *, missing_ok: bool = False) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        if missing_ok:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unlink_quietly(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return  # a leftover that sweeps find; what happened before is what counts


def _remove_tree(folder: str) -> None:
    """Like ``rmtree``, but at ease with others who write or remove there at the same time."""
    for left in reversed(range(_TRIES)):
        try:
            for entry in list(os.scandir(folder)):
                if entry.is_dir(follow_symlinks=False):
                    _remove_tree(entry.path)
                else:
                    Path(entry.path).unlink(missing_ok=True)
            os.rmdir(folder)
            return
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                raise
