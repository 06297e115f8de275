"""Storage of a simulated job: durable objects below, an observer that knows what is durable, drawn faults above."""

from __future__ import annotations

from collections.abc import Callable

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import FileRef, Manifest, decode
from rayflow.errors import CorruptCheckpointError, StorageError
from rayflow.storage.catalog import VOID_MARK
from rayflow.storage.faults import FaultyStore
from rayflow.storage.fencing import counts, understand
from rayflow.storage.layout import Decision, manifest_path, parse_manifest, parse_shared
from rayflow.storage.snapshots import mismatch
from rayflow.storage.store import MemoryStore, PutOutcome
from tests.simulation.faults import Crash, Faults, Violation


class Observer(MemoryStore):
    """The durable truth. Raises `Violation` when a rule about files is broken (C5, C7)."""

    def __init__(self) -> None:
        super().__init__()
        self.manifests: dict[CheckpointId, Manifest] = {}
        """Whole manifests that are there now."""
        self.ever: dict[CheckpointId, Manifest] = {}
        """Whole manifests that were ever there."""
        self.reused = 0
        """How often a manifest has named a file in ``shared/`` that an earlier checkpoint has written."""
        self._tokens: dict[str, list[CheckpointId]] = {}
        self._bodies: dict[CheckpointId, bytes] = {}

    def names_token(self, token: str) -> bool:
        """Whether a manifest that counts has named the token."""
        decisions = self._decisions()
        return any(
            counts(c, self.ever[c].incarnation, decisions) for c in self._tokens.get(token, ()) if c in self.ever
        )

    def _decisions(self) -> tuple[Decision, ...]:
        return understand(self.list("coordinators/")).decisions

    def put(self, path: str, data: bytes) -> None:
        checkpoint = parse_manifest(path)
        if checkpoint in self.manifests and data != self._bodies.get(checkpoint):
            raise Violation(f"C5: manifest {checkpoint} is replaced")
        super().put(path, data)
        self._look(path, data)

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        outcome = super().put_if_absent(path, data)
        if outcome is PutOutcome.CREATED:
            self._look(path, data)
        return outcome

    def _look(self, path: str, data: bytes) -> None:
        checkpoint = parse_manifest(path)
        if checkpoint is None or data == VOID_MARK:
            return
        try:
            manifest = decode(data, path=path)
        except CorruptCheckpointError:
            return  # torn by a fault: it must never be restored
        if not counts(checkpoint, manifest.incarnation, self._decisions()):
            return  # a late write of a coordinator that was fenced meanwhile (C8)
        for file in manifest.files():
            if problem := self.problem(file):
                raise Violation(f"C5: manifest {checkpoint} names {file.path}, which {problem}")
            self.reused += (parse_shared(file.path) or checkpoint) < checkpoint
        if checkpoint in self.ever and self._bodies[checkpoint] != data:
            raise Violation(f"C4: checkpoint id {checkpoint} has a second manifest")
        self.manifests[checkpoint] = self.ever[checkpoint] = manifest
        self._bodies[checkpoint] = data
        for token in (str(c.payload) for s in manifest.subtasks for c in s.committables):
            self._tokens.setdefault(token, []).append(checkpoint)

    def problem(self, file: FileRef) -> str:
        """What is wrong with a state file now, or "" when it is durable and whole."""
        try:
            return mismatch(self.get(file.path), file)
        except FileNotFoundError:
            return "is missing"

    def delete(self, path: str) -> None:
        self._check_delete(lambda p: p == path)
        super().delete(path)

    def delete_prefix(self, prefix: str) -> None:
        self._check_delete(lambda p: p.startswith(prefix))
        super().delete_prefix(prefix)

    def _check_delete(self, hit: Callable[[str], bool]) -> None:
        for checkpoint in [c for c in self.manifests if hit(manifest_path(c))]:
            del self.manifests[checkpoint]
        decisions = self._decisions()
        for checkpoint, manifest in self.manifests.items():
            for file in manifest.files():
                if hit(file.path) and counts(checkpoint, manifest.incarnation, decisions):
                    raise Violation(f"C7: {file.path} is deleted although manifest {checkpoint} names it")

    def strays(self) -> list[str]:
        """State files and manifests that no whole manifest accounts for."""
        named = {f.path for m in self.manifests.values() for f in m.files()}
        named |= {manifest_path(c) for c in self.manifests}
        return [path for path, _ in self.list() if path.startswith(("chk-", "shared/")) and path not in named]


class SimStore(FaultyStore):
    """What the engine is given. Every operation may crash the caller before or after it is done."""

    def __init__(self, observer: Observer, faults: Faults, late: Callable[[str, Callable[[], None]], None]) -> None:
        super().__init__(observer, faults.storage)
        self._observer = observer
        self._faults = faults
        self._late = late

    def put(self, path: str, data: bytes) -> None:
        self._faults.port()
        super().put(path, data)
        self._faults.port()

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        if parse_manifest(path) is not None and self._faults.late_write():
            # The request left this process and arrives some time, whatever becomes of the process.
            self._late(f"late write of {path}", lambda: (self._observer.put_if_absent(path, data), None)[1])
            if self._faults.rng.random() < 0.5:
                self._faults.count("crash")
                raise Crash
            raise StorageError(f"cannot write {path}: timed out (it will arrive later)")
        self._faults.port()
        outcome = super().put_if_absent(path, data)
        self._faults.port()
        return outcome

    def get(self, path: str) -> bytes:
        self._faults.port()
        return super().get(path)

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        self._faults.port()
        return super().list(prefix, after=after)

    def exists(self, path: str) -> bool:
        self._faults.port()
        return super().exists(path)

    def delete(self, path: str) -> None:
        self._faults.port()
        super().delete(path)
        self._faults.port()

    def delete_prefix(self, prefix: str) -> None:
        self._faults.port()
        super().delete_prefix(prefix)
        self._faults.port()
