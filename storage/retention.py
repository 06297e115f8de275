"""What may be deleted from a checkpoint directory, and in which order (rule C7).

Manifests go first, and the files they named after them: whatever moment a crash chooses, every manifest that is left
has all its files, and a later run finds what was left over by listing, not by memory.

A file in ``shared/`` goes when the checkpoint that wrote it is not above the newest complete one, and no manifest that
is kept names it. A checkpoint under way may name older files too, but only those that the newest complete one names
(`rayflow.storage.reuse`), and that one is kept.

Savepoints (manifests of kind ``savepoint``, and all below ``savepoints/``) belong to the user and stay; one that was
released (`layout.released_path`) is a checkpoint like any other. Files of other directories, from which a savepoint was
imported, are nobody's here. Ids above a bound belong to somebody else, or to a checkpoint under way, and are never
touched.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from rayflow.core.ids import CheckpointId
from rayflow.errors import CorruptCheckpointError
from rayflow.storage.fencing import Directory, counts, may_count
from rayflow.storage.layout import (
    COORDINATORS,
    SHARED,
    checkpoint_folder,
    claim_path,
    decision_path,
    manifest_path,
    parse_shared,
    released_path,
)
from rayflow.storage.store import TEMPORARY_SUFFIX, Store

PINNED_KIND = "savepoint"

MANIFESTS_READ_MAX = 25
"""One after the other, and at once: a coordinator that takes over thousands learns them little by little."""
READERS = 16
"""Threads, where thousands are needed at once."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What retention needs to know of a manifest; immutable like the manifest itself (rule C5), so it is cached."""

    kind: str
    incarnation: int
    files: frozenset[str]
    """Those of this directory."""


@dataclass(slots=True)
class _Sorted:
    """Every manifest of a directory, judged."""

    kept: dict[CheckpointId, Contents] = field(default_factory=dict)
    unreadable: set[CheckpointId] = field(default_factory=set)
    """Kept too: what cannot be read may name anything, so no file is deleted while one is among the retained."""
    doomed: dict[CheckpointId, Contents | None] = field(default_factory=dict)

    def referred(self) -> set[str]:
        return {path for contents in self.kept.values() for path in contents.files}


class Retention:
    """Deletes. ``contents`` reads a manifest: None for a void mark, `CorruptCheckpointError` if it is not whole."""

    def __init__(self, store: Store, contents: Callable[[CheckpointId], Contents | None]) -> None:
        self._store = store
        self._read = contents
        self._cache: dict[CheckpointId, Contents | None] = {}
        self._unread: list[CheckpointId] = []

    def retain(self, directory: Directory, newest: CheckpointId, keep: int) -> None:
        """Keep ``newest``, the ``keep - 1`` before it, pinned ones, and everything above; delete the other checkpoints.

        Raises `CorruptCheckpointError`, having deleted nothing, if ``newest`` cannot be read back: it might be the
        only reason to delete the others. Deletes nothing while there are many manifests that it has not read: then
        `learn` must be called until there are few, or `learn_all` before.
        """
        unread = self._unread_of(directory)
        if len(unread) > MANIFESTS_READ_MAX:
            self._unread = unread[::-1]
            return
        judged = self._judge(directory, newest, keep)
        if newest not in judged.kept:
            raise CorruptCheckpointError(
                f"manifest {manifest_path(newest)} was just written and is not there, or does not count: older "
                "checkpoints are kept; check the storage"
            )
        self._delete_manifests(judged)
        if judged.unreadable:
            return
        referred = judged.referred()
        # A folder below the newest that has no manifest is that of an aborted checkpoint or of a dead coordinator.
        self._delete_folders(directory, [c for c in directory.folders if c < newest and c not in judged.kept], referred)
        self._delete_files(path for path in _shared(directory, newest) if path not in referred)
        self._prune_coordinators(directory, judged)

    def learn(self) -> bool:
        """Read some of the manifests that `retain` had found too many; False if there is none to be read."""
        if not self._unread:
            return False
        for _ in range(MANIFESTS_READ_MAX):
            if self._unread:
                self._try(self._unread[-1])
                self._unread.pop()
        return True

    def learn_all(self, directory: Directory) -> None:
        """Read now what has not been read; a few are left to be read when they are needed."""
        unread = self._unread_of(directory)
        if len(unread) > MANIFESTS_READ_MAX:
            with ThreadPoolExecutor(READERS) as pool:
                list(pool.map(self._try, unread))

    def _unread_of(self, directory: Directory) -> list[CheckpointId]:
        return [checkpoint for checkpoint in directory.manifests if checkpoint not in self._cache]

    def _try(self, checkpoint: CheckpointId) -> None:
        with contextlib.suppress(CorruptCheckpointError):
            self._contents(checkpoint)

    def sweep(self, directory: Directory, keep: int, upto: CheckpointId, incarnation: int) -> None:
        """No subtask runs any more: leave only what retained manifests name.

        That is below ``chk-*`` and in ``shared/`` what checkpoints up to id ``upto`` have written. Temporary files of
        dead writers go too, unless ids above it, or later claims, show that somebody else is at work.
        """
        self.learn_all(directory)
        newest = next((c for c in directory.manifests if c <= upto and self._counts(c, directory)), None)
        judged = self._judge(directory, CheckpointId(upto) if newest is None else newest, keep)
        self._delete_manifests(judged)
        if judged.unreadable:
            raise CorruptCheckpointError(
                f"checkpoints {sorted(judged.unreadable)} cannot be read, so no state file was deleted; verify them"
            )
        referred = judged.referred()
        mine = [c for c in directory.folders if c <= upto]
        self._delete_folders(directory, [c for c in mine if c not in judged.kept], referred)
        own = {path for c in mine if c in judged.kept for path in (manifest_path(c), released_path(c))}
        strays = [p for c in mine if c in judged.kept for p in directory.folders[c] if p not in own]
        strays += _shared(directory, upto)
        if all(c <= upto for c in directory.folders):
            strays += [p for p in directory.files if p.startswith(SHARED) and p.endswith(TEMPORARY_SUFFIX)]
        if all(claim <= incarnation for claim in directory.claims):
            strays += [p for p in directory.files if p.startswith(COORDINATORS) and p.endswith(TEMPORARY_SUFFIX)]
        self._delete_files(path for path in strays if path not in referred)
        self._prune_coordinators(directory, judged)

    def _judge(self, directory: Directory, newest: CheckpointId, keep: int) -> _Sorted:
        judged = _Sorted()
        periodic = 0
        for checkpoint in directory.manifests:  # newest first
            enough = periodic >= keep
            try:
                contents = self._contents(checkpoint)
            except CorruptCheckpointError:
                if checkpoint <= newest and (enough or not may_count(checkpoint, directory.decisions)):
                    judged.doomed[checkpoint] = None
                else:
                    judged.unreadable.add(checkpoint)
                continue
            if contents is None or not counts(checkpoint, contents.incarnation, directory.decisions):
                if checkpoint < newest:
                    judged.doomed[checkpoint] = contents
                continue
            pinned = contents.kind == PINNED_KIND and released_path(checkpoint) not in directory.files
            if checkpoint > newest or pinned or not enough:
                judged.kept[checkpoint] = contents
                periodic += checkpoint <= newest and not pinned
            else:
                judged.doomed[checkpoint] = contents
        return judged

    def _counts(self, checkpoint: CheckpointId, directory: Directory) -> bool:
        try:
            contents = self._contents(checkpoint)
        except CorruptCheckpointError:
            return False  # `_judge` keeps it among the unreadable, and then nothing is deleted
        return contents is not None and counts(checkpoint, contents.incarnation, directory.decisions)

    def _contents(self, checkpoint: CheckpointId) -> Contents | None:
        if checkpoint not in self._cache:
            contents = self._read(checkpoint)
            if contents is not None:
                # One text for each path, however many manifests name it.
                contents = replace(contents, files=frozenset(map(sys.intern, contents.files)))
            self._cache[checkpoint] = contents
        return self._cache[checkpoint]

    def _delete_manifests(self, judged: _Sorted) -> None:
        for checkpoint in sorted(judged.doomed):
            self._store.delete(manifest_path(checkpoint))
            self._cache.pop(checkpoint, None)

    def _delete_folders(self, directory: Directory, folders: Iterable[CheckpointId], referred: set[str]) -> None:
        for checkpoint in sorted(folders):
            paths = directory.folders[checkpoint]
            if referred.isdisjoint(paths):
                self._store.delete_prefix(checkpoint_folder(checkpoint))
            else:
                self._delete_files(path for path in paths if path not in referred)

    def _delete_files(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._store.delete(path)

    def _prune_coordinators(self, directory: Directory, judged: _Sorted) -> None:
        """Drop claims and decisions older than the writer of the oldest manifest that is left.

        They could only void manifests of still earlier writers. Of those none is left, and if a write that was lost on
        the way turns up, it is void by a later decision or older than what that decision restored: never the newest.
        """
        oldest = min((contents.incarnation for contents in judged.kept.values()), default=0)
        self._delete_files(claim_path(claim) for claim in directory.claims if claim < oldest)
        latest = {d.incarnation: d for d in directory.decisions}  # ascending: the one with the most ids comes last
        self._delete_files(
            decision_path(d) for d in directory.decisions if d.incarnation < oldest or d != latest[d.incarnation]
        )


def _shared(directory: Directory, upto: int) -> list[str]:
    """What checkpoints up to ``upto`` have written to ``shared/``, in order."""
    return [path for path in sorted(directory.files) if (by := parse_shared(path)) is not None and by <= upto]
