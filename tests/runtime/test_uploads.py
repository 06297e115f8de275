"""What is written, prepared and committed, in which order (rules C1, C2, S1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest

from rayflow.core.ids import CheckpointId, SubtaskId
from rayflow.core.manifest import Json, SnapshotStats, SubtaskSnapshot
from rayflow.errors import StorageError
from rayflow.operators.base import FrozenState, FrozenTable
from rayflow.runtime.uploads import Uploads
from tests.runtime.fakes import KeptCommitter, KeptStates, batch


class Rig:
    uploads_type: type[Uploads] = Uploads

    def __init__(self) -> None:
        self.store = KeptStates()
        self.sink, self.other = KeptCommitter(), KeptCommitter()
        committers = {"sink": self.sink, "other": self.other}
        self.uploads = self.uploads_type(SubtaskId("chain", 1), 2, self.store, committers)
        self.time = 0.0

    def upload(
        self, checkpoint: int, *prepares: Callable[[], Sequence[Json]], rows: int = 0, operator: str = "sink"
    ) -> SubtaskSnapshot:
        frozen = [(operator, FrozenState(prepare=p)) for p in prepares]
        if rows:
            frozen.append(("window", FrozenState((FrozenTable("runs", (batch(*range(rows)),)),))))
        return self.uploads.upload(CheckpointId(checkpoint), frozen, (), SnapshotStats(sync_s=1.0), self.now)

    def now(self) -> float:
        self.time += 1.0
        return self.time

    def commit(self, checkpoint: int) -> None:
        self.uploads.commit(CheckpointId(checkpoint))


def gives(*payloads: Json) -> Callable[[], Sequence[Json]]:
    return lambda: payloads


def payloads(snapshot: SubtaskSnapshot) -> list[Json]:
    return [c.payload for c in snapshot.committables]


def test_a_snapshot_names_states_and_committables_and_what_they_cost() -> None:
    rig = Rig()
    snapshot = rig.upload(1, gives("f1", "f2"), rows=3)
    assert payloads(snapshot) == ["f1", "f2"]
    assert [(h.operator, h.subtask, h.parallelism, h.rows) for h in snapshot.states] == [("window", 1, 2, 3)]
    assert snapshot.stats == SnapshotStats(sync_s=1.0, async_s=1.0, nbytes=15, rows=3, uploaded_bytes=15)


def test_a_commit_takes_everything_up_to_its_checkpoint_and_nothing_later() -> None:
    rig = Rig()
    rig.upload(1, gives("a"))
    rig.upload(2, gives("b"))
    rig.upload(3, gives("c"))
    rig.commit(2)
    assert rig.sink.calls == [["a", "b"]]
    rig.commit(3)
    assert rig.sink.calls == [["a", "b"], ["c"]]


def test_committing_twice_is_a_no_op() -> None:
    rig = Rig()
    rig.upload(1, gives("a"))
    rig.commit(1)
    rig.commit(1)
    assert rig.sink.calls == [["a"]]


def test_each_sink_commits_its_own() -> None:
    rig = Rig()
    rig.upload(1, gives("a"))
    rig.upload(2, gives("b"), operator="other")
    rig.commit(2)
    assert (rig.sink.calls, rig.other.calls) == ([["a"]], [["b"]])


def test_a_commit_that_fails_can_be_tried_again() -> None:
    rig = Rig()
    rig.upload(1, gives("a"))
    rig.sink.error = OSError("full")
    with pytest.raises(OSError, match="full"):
        rig.commit(1)
    rig.sink.error = None
    rig.commit(1)
    assert rig.sink.calls == [["a"]]


def test_what_was_aborted_is_named_and_committed_with_the_next_complete_one() -> None:
    """Its rows have left the operator: dropping them would lose them, naming them only in the aborted one too."""
    rig = Rig()
    rig.upload(1, gives("a"))
    snapshot = rig.upload(2, gives("b"))
    assert payloads(snapshot) == ["a", "b"]
    rig.commit(2)
    assert rig.sink.calls == [["a", "b"]]


def _prepare_that_fails_once(rig: Rig) -> list[Json]:
    """Committables of the checkpoint after one whose prepare has failed."""
    tries: list[int] = []

    def prepare() -> Sequence[Json]:
        tries.append(1)
        if len(tries) == 1:
            raise StorageError("cannot write")
        return ["a"]

    with suppress(StorageError):
        rig.upload(1, prepare)
    return payloads(rig.upload(2, gives("b")))


def test_a_prepare_that_failed_goes_into_the_next_checkpoint() -> None:
    assert _prepare_that_fails_once(Rig()) == ["a", "b"]


def test_of_several_prepares_only_those_that_are_missing_are_tried_again() -> None:
    rig, log = Rig(), []  # type: tuple[Rig, list[str]]

    def prepare(name: str, *, fails: bool) -> Callable[[], Sequence[Json]]:
        def run() -> Sequence[Json]:
            log.append(name)
            if fails and log.count(name) == 1:
                raise StorageError(name)
            return [name]

        return run

    with pytest.raises(StorageError, match="y"):
        rig.upload(1, prepare("x", fails=False), prepare("y", fails=True), prepare("z", fails=False))
    assert payloads(rig.upload(2)) == ["x", "y", "z"]
    assert log == ["x", "y", "y", "z"]


def test_a_state_that_cannot_be_written_fails_the_upload_and_loses_no_committable() -> None:
    rig = Rig()
    rig.store.error = StorageError("full")
    with pytest.raises(StorageError, match="full"):
        rig.upload(1, gives("a"), rows=2)
    rig.store.error = None
    assert payloads(rig.upload(2, rows=2)) == ["a"]


class AcknowledgesFirst(Uploads):
    """Broken on purpose (rule C1): says that all is durable before the sinks have prepared it."""

    def upload(self, checkpoint, frozen, splits, stats, now):  # type: ignore[no-untyped-def]
        bare = [(op, FrozenState(state.tables)) for op, state in frozen]
        snapshot = super().upload(checkpoint, bare, splits, stats, now)
        for _, state in frozen:
            if state.prepare is not None:
                state.prepare()
        return snapshot


def test_uploads_that_acknowledge_before_they_prepare_are_caught() -> None:
    class Broken(Rig):
        uploads_type = AcknowledgesFirst

    rig = Broken()
    assert payloads(rig.upload(1, gives("a"))) != ["a"]


class DropsAborted(Uploads):
    """Broken on purpose: what a failed or aborted checkpoint had prepared goes with it."""

    def upload(self, checkpoint, frozen, splits, stats, now):  # type: ignore[no-untyped-def]
        self._prepared, self._unprepared = [], []
        return super().upload(checkpoint, frozen, splits, stats, now)


def test_uploads_that_drop_what_was_aborted_are_caught() -> None:
    class Broken(Rig):
        uploads_type = DropsAborted

    assert _prepare_that_fails_once(Broken()) != ["a", "b"]
