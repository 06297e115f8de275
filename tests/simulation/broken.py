"""Engines that break one rule each. If the simulator calls one of them clean, the simulator proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import Any

from rayflow.core.alignment import Aligner
from rayflow.core.checkpointing import Checkpointing
from rayflow.core.credits import OutputAccount
from rayflow.core.events import ManifestWritten, ReturnCredit, SubtaskAction, WriteManifest
from rayflow.core.ids import ChannelId, CheckpointId
from rayflow.core.messages import Element
from rayflow.core.subtask import SubtaskMachine
from rayflow.runtime.coordinator_loop import CoordinatorRuntime
from rayflow.runtime.emitter import Emitter
from rayflow.runtime.uploads import Uploads
from rayflow.storage.catalog import CheckpointReader
from rayflow.storage.snapshots import SnapshotStore


@contextmanager
def replaced(owner: type, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """``owner.name`` is ``make(original)`` for a while."""
    original = owner.__dict__[name]
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def skip_alignment() -> Iterator[None]:
    """A2: no channel is ever blocked, and the mode still calls itself exactly-once."""
    with replaced(Aligner, "blocked", lambda _: lambda self, channel: False):
        yield


@contextmanager
def commit_before_manifest() -> Iterator[None]:
    """C2: subtasks are told Complete when the write of the manifest begins."""

    def make(original: Any) -> Any:
        def perform(self: CoordinatorRuntime, actions: Sequence[Any]) -> None:
            for action in actions:
                original(self, [action])
                if isinstance(action, WriteManifest):
                    self._perform(self.machine.handle(ManifestWritten(action.checkpoint), self._host.now()))

        return perform

    with replaced(CoordinatorRuntime, "_perform", make):
        yield


@contextmanager
def acknowledge_before_upload() -> Iterator[None]:
    """C1: states are handed over as written although the store has not got them yet."""
    deferred: list[Callable[[], Any]] = []

    def make(original: Any) -> Any:
        def write(self: SnapshotStore, *args: Any) -> Any:
            real, kept = self._store, []

            class Deferred:
                def put(self, path: str, data: bytes) -> None:
                    kept.append((path, data))

            self._store = Deferred()  # type: ignore[assignment]
            try:
                handle = original(self, *args)
            finally:
                self._store = real
            deferred.append(lambda: list(starmap(real.put, kept)))
            if len(deferred) > 3:
                deferred.pop(0)()
            return handle

        return write

    with replaced(SnapshotStore, "write", make):
        yield


@contextmanager
def forget_a_credit() -> Iterator[None]:
    """F1: one batch in five is taken and its credit never returned."""

    def make(original: Any) -> Any:
        taken = 0

        def take_input(self: SubtaskMachine, now: Any) -> list[SubtaskAction]:
            nonlocal taken
            actions: list[SubtaskAction] = original(self, now)
            if any(isinstance(action, ReturnCredit) for action in actions):
                taken += 1
                if taken % 5 == 0:
                    return [action for action in actions if not isinstance(action, ReturnCredit)]
            return actions

        return take_input

    with replaced(SubtaskMachine, "take_input", make):
        yield


@contextmanager
def reuse_a_checkpoint_id() -> Iterator[None]:
    """C4: an aborted checkpoint gives its id back."""

    def make(original: Any) -> Any:
        def abort(self: Checkpointing, *args: Any, **options: Any) -> None:
            pending = self.pending
            original(self, *args, **options)
            if pending is not None:
                self.next_id = pending.checkpoint

        return abort

    with replaced(Checkpointing, "_abort", make):
        yield


@contextmanager
def barrier_before_output() -> Iterator[None]:
    """A4, F2: control elements overtake the output that waits to be put together."""

    def make(original: Any) -> Any:
        def broadcast(self: Emitter, element: Element) -> None:
            for buffer in self._buffers:
                self._offer(buffer.channel, element)
            self.flush()

        return broadcast

    with replaced(Emitter, "broadcast", make):
        yield


@contextmanager
def restore_an_older_manifest() -> Iterator[None]:
    """R1: recovery goes on from the newest but one."""

    def make(original: Any) -> Any:
        def choose(self: CheckpointReader, directory: Any, start_from: CheckpointId | None) -> Any:
            newest = original(self, directory, start_from)
            older = [c for c in directory.manifests if newest is not None and c < newest.checkpoint]
            return original(self, directory, older[0]) if older else newest

        return choose

    with replaced(CheckpointReader, "choose", make):
        yield


@contextmanager
def drop_aborted_committables() -> Iterator[None]:
    """S1: what a sink prepared for a checkpoint that was aborted is not named by the next one."""

    def make(original: Any) -> Any:
        def upload(self: Uploads, checkpoint: CheckpointId, *args: Any) -> Any:
            self._prepared = []
            return original(self, checkpoint, *args)

        return upload

    with replaced(Uploads, "upload", make):
        yield


@contextmanager
def overrun_credit() -> Iterator[None]:
    """F1: nobody waits for credit."""

    def make(original: Any) -> Any:
        def offer(self: OutputAccount, element: Element) -> list[Element]:
            self._sent += getattr(element, "nbytes", 0)
            return [element]

        return offer

    with replaced(OutputAccount, "offer", make):
        yield


@contextmanager
def snapshot_at_first_barrier() -> Iterator[None]:
    """A3: the snapshot is taken when the first channel has its barrier."""

    def make(original: Any) -> Any:
        def on_barrier(self: Aligner, channel: ChannelId, barrier: Any, now: Any) -> Any:
            found = original(self, channel, barrier, now)
            if found or self._barrier is None:
                return found
            self._arrived = set(self._channels) - self._ended
            return self._completed(now)

        return on_barrier

    with replaced(Aligner, "on_barrier", make):
        yield


BROKEN = {
    f.__name__: f
    for f in (
        skip_alignment,
        snapshot_at_first_barrier,
        commit_before_manifest,
        acknowledge_before_upload,
        forget_a_credit,
        overrun_credit,
        reuse_a_checkpoint_id,
        barrier_before_output,
        restore_an_older_manifest,
        drop_aborted_committables,
    )
}

__all__ = ["BROKEN"]
