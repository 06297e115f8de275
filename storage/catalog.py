"""Reading the checkpoints of one job: what there is, whether it is whole, and what a coordinator goes on from (R1)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import FileRef, Manifest, decode
from rayflow.errors import CorruptCheckpointError
from rayflow.storage.fencing import Directory, counts, may_count, understand
from rayflow.storage.filesystem import opener_of
from rayflow.storage.layout import CHECKPOINTS, COORDINATORS, SHARED, manifest_path
from rayflow.storage.snapshots import mismatch
from rayflow.storage.store import Store

VOID_MARK = b'{"void": "the outcome of writing this manifest was unknown when the job recovered; it does not count"}\n'

OFFER = "whole one before it"
"""In every message that says what else could be restored."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint, for people. With a ``problem`` its manifest cannot be read, and the rest is unknown."""

    checkpoint: CheckpointId
    path: str
    kind: str = ""
    created_at: float = 0.0
    """Unix seconds."""
    nbytes: int = 0
    """Of the manifest and all files it names, whoever wrote them."""
    uploaded_bytes: int = 0
    """What was written for it, by its own word: an incremental one less than ``nbytes``."""
    counts: bool = False
    """False: a later coordinator has gone on from an older one, so this is never restored."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    path: str
    what: str


READERS = 16
"""Threads that read manifests, where there are more."""

OpenRoot = Callable[[str], Store]
Infos = list[CheckpointInfo]  # inside the class, `list` is a method
Problems = list[Problem]


class CheckpointReader:
    """The checkpoints of ``job`` below the root of ``store`` (see `layout.job_root`); changes nothing there.

    ``open_root`` opens the directory of a savepoint that was imported, by its URL; None: the same kind of storage with
    the same options as ``store``. All methods raise `StorageError` if storage fails.
    """

    def __init__(self, store: Store, job: str, *, open_root: OpenRoot | None = None) -> None:
        self._store = store
        self._job = job
        self._open_root = open_root or opener_of(store)

    def list(self) -> Infos:
        """Every checkpoint with a manifest, newest first."""
        directory = self.survey()
        if len(directory.manifests) <= READERS:
            infos = [self._info(checkpoint, directory) for checkpoint in directory.manifests]
        else:
            with ThreadPoolExecutor(READERS) as pool:
                infos = list(pool.map(lambda checkpoint: self._info(checkpoint, directory), directory.manifests))
        return [info for info in infos if info is not None]

    def _info(self, checkpoint: CheckpointId, directory: Directory) -> CheckpointInfo | None:
        """None for a void mark."""
        path = manifest_path(checkpoint)
        try:
            manifest = self.load(checkpoint)
        except CorruptCheckpointError as error:
            return CheckpointInfo(checkpoint, path, problem=str(error))
        if manifest is None:
            return None
        nbytes = directory.files[path] + sum(file.nbytes for file in manifest.files())
        live = counts(checkpoint, manifest.incarnation, directory.decisions)
        uploaded = sum(part.stats.uploaded_bytes for part in manifest.subtasks)
        return CheckpointInfo(checkpoint, path, manifest.kind, manifest.created_at, nbytes, uploaded, live)

    def read(self, checkpoint: CheckpointId) -> Manifest:
        """Raises `CorruptCheckpointError` if there is no such checkpoint or its manifest is not whole."""
        manifest = self.load(checkpoint)
        if manifest is None:
            raise CorruptCheckpointError(f"checkpoint {checkpoint} was given up while it was written; choose another")
        return manifest

    def newest(self) -> Manifest | None:
        """The newest that counts and can be read; None if there is none."""
        directory = self.survey()
        for checkpoint in directory.manifests:
            try:
                manifest = self.load(checkpoint)
            except CorruptCheckpointError:
                continue
            if manifest is not None and counts(checkpoint, manifest.incarnation, directory.decisions):
                return manifest
        return None

    def verify(self, checkpoint: CheckpointId) -> Problems:
        """Read every byte the checkpoint stands on; what is missing or wrong. Empty: it can be restored."""
        try:
            manifest = self.read(checkpoint)
        except CorruptCheckpointError as error:
            return [Problem(manifest_path(checkpoint), str(error))]
        problems = []
        for file in manifest.files():
            try:
                what = mismatch(self._store_of(file).get(file.path), file)
            except FileNotFoundError:
                what = "is missing"
            if what:
                problems.append(Problem(file.path if file.root is None else f"{file.root}/{file.path}", what))
        return problems

    def _store_of(self, file: FileRef) -> Store:
        return self._store if file.root is None else self._open_root(file.root)

    def survey(self) -> Directory:
        """The directory as it is now."""
        # Coordinators last: a decision taken between the two listings is then seen, and it voids what we have listed.
        return understand([*self._store.list(CHECKPOINTS), *self._store.list(SHARED), *self._store.list(COORDINATORS)])

    def fetch(self, path: str) -> bytes:
        try:
            return self._store.get(path)
        except FileNotFoundError as error:
            raise CorruptCheckpointError(f"{path} of job {self._job!r} is missing; use another checkpoint") from error

    def load(self, checkpoint: CheckpointId) -> Manifest | None:
        """None for a void mark."""
        path = manifest_path(checkpoint)
        data = self.fetch(path)
        if data == VOID_MARK:
            return None
        manifest = decode(data, path=path)
        if manifest.job != self._job or manifest.checkpoint != checkpoint:
            raise CorruptCheckpointError(
                f"manifest {path} is that of checkpoint {manifest.checkpoint} of job {manifest.job!r}, expected job "
                f"{self._job!r}: it was copied there; use an earlier checkpoint"
            )
        return manifest

    def choose(self, directory: Directory, start_from: CheckpointId | None) -> Manifest | None:
        """The newest manifest that counts, whole as far as a listing can tell."""
        candidates = directory.manifests if start_from is None else (start_from,)
        for position, checkpoint in enumerate(candidates):
            try:
                manifest = self._whole(checkpoint, directory)
            except CorruptCheckpointError as error:
                if start_from is None and not may_count(checkpoint, directory.decisions):
                    continue
                raise CorruptCheckpointError(
                    f"{error}. {self._offer(candidates[position + 1 :], directory)}"
                ) from error
            if manifest is not None:
                return manifest
        if start_from is not None:
            raise CorruptCheckpointError(f"checkpoint {start_from} does not count: a later run went on from before it")
        return None

    def offer_before(self, checkpoint: CheckpointId) -> str:
        """One sentence on what could be restored in place of ``checkpoint``, which cannot."""
        directory = self.survey()
        return self._offer(tuple(n for n in directory.manifests if n < checkpoint), directory)

    def _whole(self, checkpoint: CheckpointId, directory: Directory) -> Manifest | None:
        """None if it does not count; raises `CorruptCheckpointError` if a file is missing or has another size."""
        manifest = self.load(checkpoint)
        if manifest is None or not counts(checkpoint, manifest.incarnation, directory.decisions):
            return None
        for file in manifest.files():
            if file.root is not None:
                continue  # of another directory, which this listing does not show; found when it is read
            size = directory.files.get(file.path)
            if size != file.nbytes:
                found = "is missing" if size is None else f"has {size} bytes, expected {file.nbytes}"
                raise CorruptCheckpointError(f"state file {file.path} of checkpoint {checkpoint} {found}")
        return manifest

    def _offer(self, candidates: tuple[CheckpointId, ...], directory: Directory) -> str:
        for checkpoint in candidates:
            try:
                if self._whole(checkpoint, directory) is not None:
                    return (
                        f"The last {OFFER} is checkpoint {checkpoint}: name it to go on from there; "
                        "what was committed after it will then be written again"
                    )
            except CorruptCheckpointError:
                continue
        return f"There is no {OFFER}: bring the file back, or start anew in another directory"
