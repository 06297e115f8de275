"""`CheckpointStore.adopt`: a manifest from elsewhere becomes the newest checkpoint (C4, C8)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import FileRef, Manifest, StateHandle, SubtaskSnapshot
from rayflow.errors import FencedError
from rayflow.storage.checkpoints import CheckpointStore, Incarnation, origin_of
from rayflow.storage.store import MemoryStore, PutOutcome

ELSEWHERE = Manifest(
    job="other",
    checkpoint=CheckpointId(740),
    kind="savepoint",
    attempt=Attempt(50_003),
    incarnation=5,
    run_id="of the other",
    created_at=1.0,
    max_parallelism=128,
    parallelism={"src": 1},
    operators={},
    subtasks=(
        SubtaskSnapshot(
            SubtaskId("src", 0),
            (StateHandle("op", 0, 1, "s", 1, False, FileRef("state/x.arrow", 10, "sha256:0", "memory://there")),),
        ),
    ),
)


def commit(store: CheckpointStore, life: Incarnation, checkpoint: int) -> None:
    subtasks = (SubtaskSnapshot(SubtaskId("src", 0)),)
    own = replace(ELSEWHERE, job="job", kind="periodic", checkpoint=CheckpointId(checkpoint), subtasks=subtasks)
    store.commit(replace(own, incarnation=life.number))


def test_the_next_coordinator_goes_on_from_what_was_adopted() -> None:
    memory = MemoryStore()
    old = CheckpointStore(memory, "job")
    life = old.claim()
    commit(old, life, life.next_checkpoint)
    adopted = CheckpointStore(memory, "job").adopt(ELSEWHERE, "import")
    assert adopted == 741, "above the id it had, and above all that were here"
    with pytest.raises(FencedError):
        commit(old, life, life.next_checkpoint + 1)
    new = CheckpointStore(memory, "job").claim()
    assert new.manifest is not None
    assert (new.manifest.checkpoint, new.manifest.kind, new.manifest.job) == (741, "import", "job")
    assert new.next_checkpoint > 741
    assert new.next_attempt > new.manifest.attempt
    assert new.manifest.subtasks == ELSEWHERE.subtasks


def test_ids_go_on_from_a_directory_that_is_ahead() -> None:
    memory = MemoryStore()
    old = CheckpointStore(memory, "job")
    life = old.claim()
    commit(old, life, 2_000)
    assert CheckpointStore(memory, "job").adopt(ELSEWHERE, "import") > 2_000


def test_a_crash_before_the_manifest_changes_nothing() -> None:
    """Unlike going back to an older checkpoint, adopting voids none: there is no moment with nothing to go on from."""

    class Dies(MemoryStore):
        dead = False

        def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
            if self.dead and path.endswith("manifest.json"):
                raise KeyboardInterrupt
            return super().put_if_absent(path, data)

    memory = Dies()
    old = CheckpointStore(memory, "job")
    life = old.claim()
    commit(old, life, life.next_checkpoint)
    memory.dead = True
    with pytest.raises(KeyboardInterrupt):
        CheckpointStore(memory, "job").adopt(ELSEWHERE, "import")
    memory.dead = False
    new = CheckpointStore(memory, "job").claim()
    assert new.manifest is not None
    assert new.manifest.checkpoint == life.next_checkpoint


def test_what_the_import_names_elsewhere_is_never_deleted_here() -> None:
    memory = MemoryStore()
    CheckpointStore(memory, "job").adopt(ELSEWHERE, "import")
    memory.put("state/x.arrow", b"of somebody else, under the same path")
    store = CheckpointStore(memory, "job")
    life = store.claim()
    for n in range(3):
        commit(store, life, life.next_checkpoint + n)
        store.retain(CheckpointId(life.next_checkpoint + n), 1)
    store.sweep(1)
    assert [info.checkpoint for info in store.list()] == [life.next_checkpoint + 2]
    assert memory.exists("state/x.arrow")


def test_what_begins_elsewhere_keeps_its_origin_and_has_a_life_of_its_own() -> None:
    """Or its output would be taken for that of the job that goes on from the same checkpoint."""
    first = CheckpointStore(MemoryStore(), "job", nonce=lambda: "first").claim()
    assert (first.run_id, first.life) == ("first", "first")
    second, nonces = MemoryStore(), iter(["a", "second", "b", "c"])
    taken = replace(ELSEWHERE, run_id="first")
    CheckpointStore(second, "job", nonce=lambda: next(nonces)).adopt(taken, "import")
    again = CheckpointStore(second, "job").claim()
    assert (again.run_id, again.life) == ("first.second", "second")
    third = MemoryStore()
    CheckpointStore(third, "job").adopt(replace(ELSEWHERE, run_id=again.run_id), "import")
    found = CheckpointStore(third, "job").claim()
    assert origin_of(found.run_id) == "first"
    assert found.life not in ("first", "second")


def test_a_directory_has_one_life_whatever_it_imports() -> None:
    memory = MemoryStore()
    own = CheckpointStore(memory, "job", nonce=lambda: "own").claim()
    assert own.life == "own"
    CheckpointStore(memory, "job").adopt(replace(ELSEWHERE, run_id="other"), "import")
    assert CheckpointStore(memory, "job").claim().run_id == "other.own"
    CheckpointStore(memory, "job").adopt(replace(ELSEWHERE, run_id="own"), "import")
    assert CheckpointStore(memory, "job").claim().run_id == "own", "its own savepoint, at another parallelism"
