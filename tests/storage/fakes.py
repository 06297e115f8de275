"""A store with hooks around every operation, and small manifests with real state files."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest, StateHandle, SubtaskSnapshot
from rayflow.operators.base import FrozenState, FrozenTable
from rayflow.storage.checkpoints import CheckpointStore, Incarnation
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import PutOutcome, Store

T = TypeVar("T")
JOB = "job"


def nothing(operation: str, path: str) -> None:
    """A hook that does nothing."""


class HookedStore:
    """Calls ``before`` and ``after`` with (method, path) around every operation of ``inner``."""

    def __init__(
        self,
        inner: Store,
        before: Callable[[str, str], None] = nothing,
        after: Callable[[str, str], None] = nothing,
    ) -> None:
        self.inner, self.before, self.after = inner, before, after

    def put(self, path: str, data: bytes) -> None:
        self._around("put", path, lambda: self.inner.put(path, data))

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        return self._around("put_if_absent", path, lambda: self.inner.put_if_absent(path, data))

    def get(self, path: str) -> bytes:
        return self._around("get", path, lambda: self.inner.get(path))

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        return self._around("get_range", path, lambda: self.inner.get_range(path, start, stop))

    def exists(self, path: str) -> bool:
        return self._around("exists", path, lambda: self.inner.exists(path))

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        return self._around("list", prefix, lambda: self.inner.list(prefix, after=after))

    def delete(self, path: str) -> None:
        self._around("delete", path, lambda: self.inner.delete(path))

    def delete_prefix(self, prefix: str) -> None:
        self._around("delete_prefix", prefix, lambda: self.inner.delete_prefix(prefix))

    def _around(self, operation: str, path: str, call: Callable[[], T]) -> T:
        self.before(operation, path)
        result = call()
        self.after(operation, path)
        return result


class Crash(BaseException):
    """The process is gone. Not an `Exception`, so that no handler takes it for a failure it can deal with."""


def crash_at(inner: Store, k: int, *, done: bool) -> HookedStore:
    """The process dies at its operation number ``k``: just after it was done, or just before."""
    count = -1

    def before(operation: str, path: str) -> None:
        nonlocal count
        count += 1
        if count > k or (count == k and not done):
            raise Crash

    def after(operation: str, path: str) -> None:
        if count >= k:
            raise Crash

    return HookedStore(inner, before, after)


def write_state(store: Store, checkpoint: int) -> StateHandle:
    """A state file of this checkpoint whose only value is its id."""
    frozen = FrozenTable("value", (pa.record_batch({"checkpoint": [checkpoint]}),))
    states = [("step", FrozenState((frozen,)))]
    (handle,) = SnapshotStore(store, 8, inline_max_bytes=0).write(checkpoint, SubtaskId("step", 0), 1, states).handles
    return handle


def restored_value(store: Store, manifest: Manifest) -> int:
    """What the state file of a manifest says; raises if it cannot be read."""
    ((handle,),) = [s.states for s in manifest.subtasks]
    value: int = SnapshotStore(store, 8).read(handle, None).table["checkpoint"][0].as_py()
    return value


def make_manifest(store: Store, incarnation: Incarnation, checkpoint: int, kind: str = "periodic") -> Manifest:
    """A manifest whose state file has been written to ``store``."""
    return Manifest(
        job=JOB,
        checkpoint=CheckpointId(checkpoint),
        kind=kind,
        attempt=Attempt(incarnation.next_attempt),
        incarnation=incarnation.number,
        run_id=incarnation.run_id,
        created_at=1.0,
        max_parallelism=8,
        parallelism={"chain": 1},
        operators={"step": "a step"},
        subtasks=(SubtaskSnapshot(SubtaskId("chain", 0), states=(write_state(store, checkpoint),)),),
    )


def coordinator(store: Store) -> CheckpointStore:
    """A `CheckpointStore` with a clock that stands still and nonces that differ."""
    return CheckpointStore(store, JOB, wall_time=lambda: 1.0)


def checkpoint_paths(store: Store) -> list[str]:
    return [path for path, _ in store.list("chk-")]
