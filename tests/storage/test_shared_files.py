"""Files in ``shared/``: deleted when no kept manifest names them, whole while one does, wherever a crash falls (C7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pyarrow as pa
import pytest

from rayflow.core.ids import CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest, StateHandle, SubtaskSnapshot
from rayflow.errors import CorruptCheckpointError
from rayflow.operators.base import FrozenState, FrozenTable, Piece
from rayflow.storage.checkpoints import CheckpointStore, Incarnation
from rayflow.storage.faults import flipped
from rayflow.storage.layout import parse_shared
from rayflow.storage.reuse import Reuse
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore, Store
from tests.storage.fakes import Crash, coordinator, crash_at, make_manifest

ROWS = 20_000


def piece(number: int) -> Piece:
    """Larger than what goes into the pack."""
    return Piece(f"piece-{number}", (pa.record_batch({"n": pa.array(range(number * ROWS, (number + 1) * ROWS))}),))


def written(
    store: Store, checkpoint: int, numbers: Sequence[int], before: Sequence[StateHandle] = ()
) -> tuple[StateHandle, ...]:
    """Handles of a state of these pieces; those in ``before`` are named again."""
    frozen = FrozenState((FrozenTable("s", pieces=tuple(piece(n) for n in numbers)),))
    snapshots = SnapshotStore(store, 8, 0)
    return snapshots.write(checkpoint, SubtaskId("chain", 0), 1, [("step", frozen)], Reuse.of(before)).handles


class Line:
    """Checkpoints one after the other of one state whose pieces come and go."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.mine = coordinator(store)
        self.incarnation = self.mine.claim()
        self.handles: tuple[StateHandle, ...] = ()

    def upload(self, checkpoint: int, *numbers: int) -> Manifest:
        handles = written(self.store, checkpoint, numbers, self.handles)
        manifest = make_manifest(self.store, self.incarnation, checkpoint)
        return replace(manifest, subtasks=(SubtaskSnapshot(SubtaskId("chain", 0), handles),))

    def complete(self, checkpoint: int, *numbers: int) -> None:
        manifest = self.upload(checkpoint, *numbers)
        self.mine.commit(manifest)
        self.handles = manifest.subtasks[0].states


def shared(store: Store) -> list[str]:
    return [path.removeprefix("shared/").removesuffix(".arrow") for path, _ in store.list("shared/")]


def content(store: Store, manifest: Manifest) -> list[int]:
    """Numbers of the pieces of a manifest, read back."""
    snapshots = SnapshotStore(store, 8)
    handles = [h for s in manifest.subtasks for h in s.states]
    return [int(snapshots.read(h).table["n"][0].as_py()) // ROWS for h in handles]


def all_whole(store: Store) -> dict[int, list[int]]:
    """Every manifest that is left and counts, with its pieces; raises if one is not whole."""
    reader = coordinator(store)
    left = [info.checkpoint for info in reader.list() if info.counts and not info.problem]
    for checkpoint in left:
        assert reader.verify(checkpoint) == []
    return {int(n): content(store, reader.read(n)) for n in left}


def test_a_piece_is_written_once_and_goes_with_the_last_manifest_that_names_it() -> None:
    store = MemoryStore()
    line = Line(store)
    line.complete(1, 1, 2)
    line.complete(2, 2, 3)
    line.complete(3, 3)
    assert shared(store) == ["00000001-step-0.s-0", "00000001-step-0.s-1", "00000002-step-0.s-1"]
    line.mine.retain(CheckpointId(2), 1)
    assert shared(store) == ["00000001-step-0.s-1", "00000002-step-0.s-1"]
    line.mine.retain(CheckpointId(3), 1)
    assert shared(store) == ["00000002-step-0.s-1"]
    assert all_whole(store) == {3: [3]}


def test_a_checkpoint_under_way_keeps_what_it_has_written_and_what_it_names() -> None:
    store = MemoryStore()
    line = Line(store)
    line.complete(1, 1)
    under_way = line.upload(2, 1, 2)
    line.mine.retain(CheckpointId(1), 1)
    line.mine.commit(under_way)
    assert all_whole(store) == {1: [1], 2: [1, 2]}


def test_an_aborted_checkpoint_takes_its_own_files_and_no_others() -> None:
    store = MemoryStore()
    line = Line(store)
    line.complete(1, 1)
    line.upload(2, 1, 2)
    line.mine.discard(CheckpointId(2))
    assert shared(store) == ["00000001-step-0.s-0"]
    line.complete(3, 1, 2)
    assert all_whole(store) == {1: [1], 3: [1, 2]}


def test_what_a_late_writer_left_of_an_aborted_checkpoint_goes_with_the_next_retention() -> None:
    store = MemoryStore()
    line = Line(store)
    line.complete(1, 1)
    line.mine.discard(CheckpointId(2))
    line.upload(2, 1, 2)  # arrives only now
    line.complete(3, 1, 3)
    line.mine.retain(CheckpointId(3), 2)
    assert shared(store) == ["00000001-step-0.s-0", "00000003-step-0.s-1"]


def test_sweep_leaves_only_what_is_named_and_nothing_of_later_coordinators_is_touched() -> None:
    store = MemoryStore()
    line = Line(store)
    line.complete(1, 1)
    line.complete(2, 1, 2)
    line.upload(3, 1, 2, 3)
    line.upload(150, 4)  # above what this coordinator has reserved
    line.mine.sweep(1)
    assert {parse_shared(f"shared/{name}.arrow") for name in shared(store)} == {1, 2, 150}
    assert all_whole(store) == {2: [1, 2]}


def test_nothing_shared_goes_while_a_manifest_cannot_be_read() -> None:
    store = MemoryStore()
    line = Line(store)
    for n in (1, 2, 3):
        line.complete(n, n)
    store.put("chk-00000002/manifest.json", b"{")
    before = shared(store)
    line.mine._retention._cache.clear()
    line.mine.retain(CheckpointId(3), 2)
    assert shared(store) == before


def test_a_shared_file_that_is_missing_or_cut_is_found_before_anything_is_restored() -> None:
    store = MemoryStore()
    line = Line(store)
    line.complete(1, 1)
    line.complete(2, 1, 2)
    path = "shared/00000002-step-0.s-1.arrow"
    data = store.get(path)
    store.put(path, flipped(data))
    (problem,) = line.mine.verify(CheckpointId(2))
    assert (problem.path, "checksum" in problem.what) == (path, True)
    store.put(path, data[:-1])
    with pytest.raises(CorruptCheckpointError, match=f"{path}.*is checkpoint 1: name it"):
        coordinator(store).claim()
    store.delete(path)
    with pytest.raises(CorruptCheckpointError, match=f"{path}.*is missing.*is checkpoint 1: name it"):
        coordinator(store).claim()


def test_files_of_another_root_are_neither_looked_for_here_nor_deleted() -> None:
    store, theirs = MemoryStore(), MemoryStore()
    line = Line(store)
    (handle,) = written(theirs, 1, [1])
    assert handle.file is not None
    path = handle.file.path
    store.put(path, b"of the same name, and of nobody")
    rooted = replace(handle, file=replace(handle.file, root="memory://savepoint"))
    manifest = make_manifest(store, line.incarnation, 5)
    line.mine.commit(replace(manifest, subtasks=(SubtaskSnapshot(SubtaskId("chain", 0), (rooted,)),)))
    found = CheckpointStore(store, "job", open_root=lambda url: theirs)
    assert found.claim().manifest is not None
    assert found.verify(CheckpointId(5)) == []
    found.sweep(1)
    assert not store.exists(path)
    assert theirs.exists(path)
    theirs.delete(path)
    (problem,) = found.verify(CheckpointId(5))
    assert (problem.path, problem.what) == (f"memory://savepoint/{path}", "is missing")


# ------------------------------------------------------------------------------------------ a crash at every operation


def _ready(store: Store) -> Line:
    line = Line(store)
    line.complete(1, 1, 2)
    line.complete(2, 2, 3)
    line.upload(3, 2, 3, 4)  # aborted, not discarded
    line.complete(4, 3, 5)
    line.complete(5, 3, 5, 6)
    return line


ACTS: dict[str, Callable[[CheckpointStore, Incarnation], object]] = {
    "retain": lambda mine, _: mine.retain(CheckpointId(5), 1),
    "retain two": lambda mine, _: mine.retain(CheckpointId(5), 2),
    "sweep": lambda mine, _: mine.sweep(1),
    "discard": lambda mine, _: mine.discard(CheckpointId(3)),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_crash_at_any_operation_leaves_every_manifest_whole_and_the_rerun_finishes(act: str) -> None:
    for k in range(100):
        ended = False
        for done in (False, True):
            store = MemoryStore()
            line = _ready(store)
            line.mine._store = line.mine._retention._store = crash_at(store, k, done=done)
            try:
                ACTS[act](line.mine, line.incarnation)
                ended = True
            except Crash:
                left = all_whole(store)
                assert left[5] == [3, 5, 6]
            again = coordinator(store)
            again.claim()
            again.sweep(1)
            assert all_whole(store) == {5: [3, 5, 6]}
            assert shared(store) == ["00000002-step-0.s-1", "00000004-step-0.s-1", "00000005-step-0.s-2"]
        if ended:
            assert k >= 4
            return
    raise AssertionError("it never ended")


def test_files_before_manifests_are_caught() -> None:
    """The broken variant: with the files deleted first a crash leaves a manifest that lacks some."""
    store = MemoryStore()
    line = _ready(store)
    retention = line.mine._retention
    retention._delete_manifests = lambda judged: None  # type: ignore[method-assign]
    retention._delete_folders = lambda *_: None  # type: ignore[method-assign]
    line.mine.retain(CheckpointId(5), 1)
    with pytest.raises(AssertionError):
        all_whole(store)


def test_names_by_content_are_caught() -> None:
    """The broken variant: a name by content is deleted for an old checkpoint while a new one counts on having it."""

    def life(name_by_content: bool) -> dict[int, list[int]]:
        store = MemoryStore()
        line = Line(store)
        line.complete(1, 1)
        line.complete(2, 2)
        line.handles = ()
        manifest = line.upload(3, 1)  # the same rows again
        if name_by_content:  # then it would have found the file of 1 there, and have named that
            (old,) = written(MemoryStore(), 1, [1])
            manifest = replace(manifest, subtasks=(SubtaskSnapshot(SubtaskId("chain", 0), (old,)),))
        line.mine.retain(CheckpointId(2), 1)
        line.mine.commit(manifest)
        return all_whole(store)

    assert life(name_by_content=False) == {2: [2], 3: [1]}
    with pytest.raises(AssertionError):
        life(name_by_content=True)
