"""The commit point, recovery, retention: a crash at every storage operation, and storage that lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Manifest, encode
from rayflow.errors import CorruptCheckpointError, FencedError, ProtocolError, StorageError
from rayflow.storage.checkpoints import CheckpointStore, Incarnation
from rayflow.storage.faults import Fault, FaultyStore, flipped
from rayflow.storage.fencing import understand
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import claim_path, job_root, manifest_path, released_path
from rayflow.storage.store import MemoryStore, Store
from tests.servers import S3Server
from tests.storage.fakes import (
    JOB,
    Crash,
    checkpoint_paths,
    coordinator,
    crash_at,
    make_manifest,
    restored_value,
    write_state,
)

STATE = "chk-{:08d}/step-0.arrows"


def started(store: Store, *checkpoints: int) -> tuple[CheckpointStore, Incarnation]:
    """A coordinator that has committed these."""
    mine = coordinator(store)
    incarnation = mine.claim()
    for n in checkpoints:
        mine.commit(make_manifest(store, incarnation, n))
    return mine, incarnation


def ids(store: Store) -> list[int]:
    return [info.checkpoint for info in coordinator(store).list() if info.counts and not info.problem]


# ---------------------------------------------------------------------------------------------------- the normal course


def test_a_fresh_directory() -> None:
    _, incarnation = started(MemoryStore())
    assert incarnation.number == 1
    assert incarnation.manifest is None
    assert incarnation.next_checkpoint == 1
    assert incarnation.next_attempt == 10_000


def test_the_next_coordinator_goes_on_from_the_newest() -> None:
    store = MemoryStore()
    _, first = started(store, 1, 2, 3)
    second = coordinator(store).claim()
    assert second.manifest is not None
    assert second.manifest.checkpoint == 3
    assert restored_value(store, second.manifest) == 3
    assert second.number == 2
    assert second.run_id == first.run_id
    assert second.next_attempt > first.next_attempt


def test_the_run_id_is_of_the_directory_even_if_nothing_was_committed() -> None:
    store = MemoryStore()
    assert {coordinator(store).claim().run_id for _ in range(3)} == {coordinator(store).claim().run_id}


def test_ids_are_never_used_twice_even_those_that_left_no_trace() -> None:
    """Rule C4: a checkpoint may have been triggered, and die with its coordinator before it wrote anything."""
    store = MemoryStore()
    used: list[int] = []
    for _ in range(4):
        mine, incarnation = started(store)
        n = incarnation.next_checkpoint
        assert n not in used
        used += range(n, n + 50)  # triggered; only two of them leave a file
        write_state(store, n + 10)
        mine.commit(make_manifest(store, incarnation, n + 20))
    assert ids(store) == [321, 221, 121, 21]


def test_a_long_life_reserves_more_ids_in_time() -> None:
    store = MemoryStore()
    mine, incarnation = started(store, 1, 60, 200)
    (decision,) = [d for d in understand(store.list()).decisions if d == understand(store.list()).reserved(1)]
    assert decision.ids_until > 250
    assert coordinator(store).claim().next_checkpoint >= decision.ids_until
    with pytest.raises(FencedError):
        mine.commit(make_manifest(store, incarnation, 201))


def test_what_people_see() -> None:
    store = MemoryStore()
    started(store, 1, 2)
    newest, oldest = coordinator(store).list()
    assert (newest.checkpoint, newest.kind, newest.path, newest.counts, newest.problem) == (
        2,
        "periodic",
        manifest_path(2),
        True,
        "",
    )
    assert newest.nbytes == sum(size for _, size in store.list("chk-00000002/"))
    assert coordinator(store).verify(oldest.checkpoint) == []
    assert coordinator(store).read(CheckpointId(1)).checkpoint == 1


def test_commit_is_idempotent() -> None:
    store = MemoryStore()
    mine, incarnation = started(store)
    manifest = make_manifest(store, incarnation, 1)
    mine.commit(manifest)
    mine.commit(manifest)
    assert ids(store) == [1]


def test_a_manifest_of_other_contents_is_never_replaced() -> None:
    store = MemoryStore()
    mine, incarnation = started(store, 1)
    other = replace(make_manifest(store, incarnation, 1), created_at=2.0)
    with pytest.raises(FencedError, match="two runs use this checkpoint directory"):
        mine.commit(other)
    assert coordinator(store).read(CheckpointId(1)).created_at == 1.0


def test_who_has_not_claimed_may_do_nothing() -> None:
    store = MemoryStore()
    _, incarnation = started(store, 1)
    stranger = coordinator(store)
    with pytest.raises(ProtocolError, match="C8"):
        stranger.commit(make_manifest(store, incarnation, 2))
    with pytest.raises(ProtocolError, match="C8"):
        stranger.retain(CheckpointId(1), 1)
    with pytest.raises(ProtocolError, match="C8"):
        stranger.sweep(1)


def test_one_that_slept_while_its_successors_claim_was_pruned_is_fenced() -> None:
    """Rule C8: the third coordinator prunes the claims of the first two; the first must not think itself alone."""
    store = MemoryStore()
    asleep, incarnation = started(store, 1)
    for _ in range(2):
        later = coordinator(store)
        found = later.claim()
        later.commit(make_manifest(store, found, found.next_checkpoint))
        later.retain(found.next_checkpoint, 1)
    assert not store.exists(claim_path(2)), "pruned, or this test shows nothing"
    with pytest.raises(FencedError, match="later run took over"):
        asleep.commit(make_manifest(store, incarnation, 2))


def test_the_fenced_one_changes_nothing_more() -> None:
    store = MemoryStore()
    mine, incarnation = started(store, 1, 2)
    coordinator(store).claim()
    before = store.list("chk-")
    calls: list[Callable[[], object]] = [
        lambda: mine.retain(CheckpointId(2), 1),
        lambda: mine.sweep(1),
        lambda: mine.discard(CheckpointId(9)),
        lambda: mine.latest(incarnation),
        lambda: mine.commit(make_manifest(MemoryStore(), incarnation, 3)),
    ]
    for call in calls:
        with pytest.raises(FencedError, match="later run took over.*'job'"):
            call()
    assert store.list("chk-00000001/") + store.list("chk-00000002/") == before
    with pytest.raises(FencedError):
        mine.claim()  # or the two would take turns for ever
    assert understand(store.list()).claims == (1, 2)
    assert coordinator(store).claim().manifest == coordinator(store).read(CheckpointId(2)), "the late 3 does not count"


def test_a_manifest_of_another_job_is_refused() -> None:
    store = MemoryStore()
    mine, incarnation = started(store, 1)
    with pytest.raises(ProtocolError, match="other"):
        mine.commit(replace(make_manifest(store, incarnation, 2), job="other"))
    with pytest.raises(CorruptCheckpointError, match="copied"):
        CheckpointStore(store, "other").read(CheckpointId(1))


# -------------------------------------------------------------------------------------------------- corrupt and missing


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [torn, flipped, lambda data: b""])
def test_a_damaged_manifest_is_named_and_the_one_before_offered(damage: Callable[[bytes], bytes]) -> None:
    store = MemoryStore()
    started(store, 1, 2, 3)
    store.put(manifest_path(3), damage(store.get(manifest_path(3))))
    with pytest.raises(CorruptCheckpointError, match="chk-00000003/manifest.json.*is checkpoint 2: name it"):
        coordinator(store).claim()
    assert coordinator(store).verify(CheckpointId(3))[0].path == manifest_path(3)
    assert "chk-00000003" in coordinator(store).list()[0].problem
    chosen = coordinator(store).claim(start_from=CheckpointId(2))
    assert chosen.manifest is not None
    assert chosen.manifest.checkpoint == 2
    again = coordinator(store).claim()
    assert again.manifest is not None
    assert again.manifest.checkpoint == 2, "the choice stands: the damaged one is void now"
    assert again.next_checkpoint > 3


@pytest.mark.parametrize("damage", [torn, flipped, None])
def test_a_damaged_state_file_is_found_and_named(damage: Callable[[bytes], bytes] | None) -> None:
    store = MemoryStore()
    started(store, 1, 2)
    path = STATE.format(2)
    if damage is None:
        store.delete(path)
    else:
        store.put(path, damage(store.get(path)))
    (problem,) = coordinator(store).verify(CheckpointId(2))
    assert problem.path == path

    def recover() -> None:
        found = coordinator(store).claim().manifest  # missing and torn: found here, by the listing
        assert found is not None
        restored_value(store, found)  # flipped: found here, by the checksum

    with pytest.raises(CorruptCheckpointError, match=path):
        recover()
    assert coordinator(store).verify(CheckpointId(1)) == []


def test_the_only_checkpoint_damaged_is_never_an_empty_start() -> None:
    store = MemoryStore()
    started(store, 1)
    store.put(manifest_path(1), b"{")
    with pytest.raises(CorruptCheckpointError, match="no whole one before it"):
        coordinator(store).claim()


def test_a_checkpoint_that_is_not_there_cannot_be_chosen() -> None:
    store = MemoryStore()
    started(store, 1)
    with pytest.raises(CorruptCheckpointError, match="chk-00000007"):
        coordinator(store).claim(start_from=CheckpointId(7))


# -------------------------------------------------------------------------------------------- writes of unknown outcome


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.FAIL_AFTER, Fault.HALF])
def test_a_failed_commit_is_decided_before_anything_is_restored(fault: Fault) -> None:
    inner = MemoryStore()
    script: list[Fault] = [fault]

    def once(operation: str, path: str) -> Fault | None:
        return script.pop() if script and operation == "put_if_absent" and path == manifest_path(2) else None

    mine = coordinator(FaultyStore(inner, once))
    incarnation = mine.claim()
    mine.commit(make_manifest(inner, incarnation, 1))
    second = make_manifest(inner, incarnation, 2)
    with pytest.raises(StorageError):
        mine.commit(second)
    found = mine.latest(incarnation)
    assert found.manifest is not None
    landed = fault is Fault.FAIL_AFTER
    assert found.manifest.checkpoint == (2 if landed else 1)
    assert found.next_checkpoint == 3
    assert found.next_attempt > incarnation.next_attempt
    # A write that was still on its way arrives only now: it must not change what was decided.
    inner.put_if_absent(manifest_path(2), encode(second))
    later = coordinator(inner).claim().manifest
    assert later is not None
    assert later.checkpoint == found.manifest.checkpoint


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.FAIL_AFTER, Fault.HALF])
def test_a_failed_commit_that_a_later_one_superseded_is_not_asked_for_again(fault: Fault) -> None:
    """Its place may be out of order for ever: the recovery of a job that has gone on since must not wait for it."""
    inner = MemoryStore()
    script: list[Fault] = [fault]

    def broken(operation: str, path: str) -> Fault | None:
        if path != manifest_path(2) or not operation.startswith("put"):
            return None
        return script.pop() if script else Fault.FAIL

    mine = coordinator(FaultyStore(inner, broken))
    incarnation = mine.claim()
    mine.commit(make_manifest(inner, incarnation, 1))
    with pytest.raises(StorageError):
        mine.commit(make_manifest(inner, incarnation, 2))
    mine.commit(make_manifest(inner, incarnation, 3))
    found = mine.latest(incarnation)
    assert found.manifest is not None
    assert found.manifest.checkpoint == 3
    mine.retain(CheckpointId(3), 1)
    assert checkpoint_paths(inner) == [manifest_path(3), STATE.format(3)]


def test_what_was_given_up_cannot_be_committed_later() -> None:
    inner = MemoryStore()
    mine, incarnation = started(inner, 1)
    found = mine.latest(incarnation, unresolved=[CheckpointId(2)])
    assert found.manifest is not None
    assert found.manifest.checkpoint == 1
    with pytest.raises(StorageError, match="given up"):
        mine.commit(make_manifest(inner, incarnation, 2))
    with pytest.raises(CorruptCheckpointError, match="given up"):
        mine.read(CheckpointId(2))
    mine.commit(make_manifest(inner, incarnation, 3))
    mine.retain(CheckpointId(3), 1)
    assert checkpoint_paths(inner) == [manifest_path(3), STATE.format(3)]


def test_a_lost_write_never_costs_the_older_checkpoints() -> None:
    inner = MemoryStore()

    def loses(operation: str, path: str) -> Fault | None:
        return Fault.LOSE if path == manifest_path(3) and operation == "put_if_absent" else None

    mine, incarnation = started(FaultyStore(inner, loses), 1, 2)
    mine.commit(make_manifest(inner, incarnation, 3))
    with pytest.raises(CorruptCheckpointError, match="not there.*older checkpoints are kept"):
        mine.retain(CheckpointId(3), 1)
    assert ids(inner) == [2, 1]


# ------------------------------------------------------------------------------------------------------------ retention


def test_retain_keeps_the_newest_and_their_files() -> None:
    store = MemoryStore()
    mine, _ = started(store, 1, 2, 3)
    write_state(store, 4)  # under way
    mine.retain(CheckpointId(3), 2)
    assert ids(store) == [3, 2]
    assert checkpoint_paths(store) == [
        manifest_path(2),
        STATE.format(2),
        manifest_path(3),
        STATE.format(3),
        STATE.format(4),
    ]
    assert coordinator(store).verify(CheckpointId(2)) == []


def test_retain_collects_what_aborts_and_dead_coordinators_left() -> None:
    store = MemoryStore()
    mine, incarnation = started(store, 1)
    write_state(store, 2)
    mine, incarnation = started(store)
    n = incarnation.next_checkpoint
    mine.commit(make_manifest(store, incarnation, n))
    mine.retain(n, 1)
    assert checkpoint_paths(store) == [manifest_path(n), STATE.format(n)]
    assert understand(store.list()).claims == (2,), "the claim of the first decides nothing any more"
    assert coordinator(store).claim().number == 3


def test_savepoints_are_the_users_own() -> None:
    store = MemoryStore()
    mine, incarnation = started(store)
    for n, kind in ((1, "savepoint"), (2, "periodic"), (3, "stop"), (4, "savepoint"), (5, "periodic")):
        mine.commit(make_manifest(store, incarnation, n, kind))
    store.put("savepoints/mine/manifest.json", b"x")
    mine.retain(CheckpointId(5), 1)
    assert ids(store) == [5, 4, 1]
    mine.sweep(1)
    assert ids(store) == [5, 4, 1]
    assert store.exists("savepoints/mine/manifest.json")
    assert all(coordinator(store).verify(CheckpointId(n)) == [] for n in (1, 4, 5))


def test_a_savepoint_that_was_released_is_kept_like_any_other() -> None:
    store = MemoryStore()
    mine, incarnation = started(store)
    for n, kind in ((1, "savepoint"), (2, "savepoint"), (3, "periodic")):
        mine.commit(make_manifest(store, incarnation, n, kind))
    mine.release(CheckpointId(1))
    mine.release(CheckpointId(2))
    mine.sweep(2)
    assert ids(store) == [3, 2]
    assert store.exists(released_path(2)), "the mark is no junk while its checkpoint is kept"
    mine.commit(make_manifest(store, incarnation, 4))
    mine.retain(CheckpointId(4), 2)
    assert ids(store) == [4, 3]
    assert store.list("chk-00000001/") + store.list("chk-00000002/") == []


def test_a_file_that_a_retained_manifest_names_stays_wherever_it_lies() -> None:
    """Rule C7, for incremental state: checkpoint 2 names a file of checkpoint 1's folder, and one that is shared."""
    store = MemoryStore()
    mine, incarnation = started(store, 1)
    first = make_manifest(store, incarnation, 1)
    store.put("shared/00000001-abc.arrow", store.get(STATE.format(1)))
    store.put("shared/00000001-old.arrow", b"nobody's")
    (subtask,) = first.subtasks
    (handle,) = subtask.states
    assert handle.file is not None
    shared = replace(handle, name="shared", file=replace(handle.file, path="shared/00000001-abc.arrow"))
    second = replace(make_manifest(store, incarnation, 2), subtasks=(replace(subtask, states=(handle, shared)),))
    mine.commit(second)
    mine.retain(CheckpointId(2), 1)
    assert mine.verify(CheckpointId(2)) == []
    assert checkpoint_paths(store) == [STATE.format(1), manifest_path(2), STATE.format(2)]
    mine.sweep(1)
    assert mine.verify(CheckpointId(2)) == []
    assert checkpoint_paths(store) == [STATE.format(1), manifest_path(2)]
    assert [p for p, _ in store.list("shared/")] == ["shared/00000001-abc.arrow"]


def test_discard_deletes_an_aborted_one_and_refuses_one_that_may_be_complete() -> None:
    store = MemoryStore()
    mine, _ = started(store, 1)
    write_state(store, 2)
    mine.discard(CheckpointId(2))
    assert store.list("chk-00000002/") == []
    with pytest.raises(ProtocolError, match="C7"):
        mine.discard(CheckpointId(1))
    assert mine.verify(CheckpointId(1)) == []


def test_sweep_leaves_nothing_unnamed_and_nothing_of_others_touched(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    mine, _ = started(store, 1, 2)
    write_state(store, 3)
    (tmp_path / "chk-00000002" / ".0123.tmp").write_bytes(b"half")
    (tmp_path / "chk-00000004").mkdir()
    (tmp_path / "chk-00000004" / ".4567.tmp").write_bytes(b"half")
    (tmp_path / "coordinators" / ".89ab.tmp").write_bytes(b"half")
    write_state(store, 150)  # above what this coordinator has reserved
    mine.sweep(1)
    assert checkpoint_paths(store) == [manifest_path(2), STATE.format(2), STATE.format(150)]
    assert not (tmp_path / "chk-00000004").exists()
    assert not [p for p, _ in store.list() if p.endswith(".tmp")]
    assert mine.verify(CheckpointId(2)) == []


def test_sweep_removes_the_folder_of_a_writer_that_was_killed_before_it_wrote(tmp_path: Path) -> None:
    """Found by seed 524 of benchmarks/kill_runs.py: an orphan of a killed coordinator had made it and no more."""
    store = ObjectStore(str(tmp_path))
    mine, _ = started(store, 1)
    (tmp_path / "chk-00000002").mkdir()
    mine.sweep(1)
    assert sorted(p.name for p in tmp_path.glob("chk-*")) == ["chk-00000001"]


def test_sweep_without_any_complete_checkpoint_leaves_no_files() -> None:
    store = MemoryStore()
    mine, _ = started(store)
    write_state(store, 1)
    mine.sweep(2)
    assert checkpoint_paths(store) == []


def test_nothing_is_deleted_on_the_word_of_a_manifest_that_cannot_be_read() -> None:
    store = MemoryStore()
    started(store, 1, 2, 3)
    store.put(manifest_path(2), b"{")
    files = set(checkpoint_paths(store))
    mine = coordinator(store)
    mine.claim()
    mine.retain(CheckpointId(3), 2)
    with pytest.raises(CorruptCheckpointError, match="no state file was deleted"):
        mine.sweep(2)
    assert files - set(checkpoint_paths(store)) <= {manifest_path(1)}


# ------------------------------------------------------------------------------------------- a crash at every operation


def check_recovery(store: Store, at_least: int) -> Manifest:
    """From whatever is left: the newest is whole and right, and every manifest that is left has its files."""
    found = coordinator(store).claim().manifest
    assert found is not None
    assert found.checkpoint >= at_least
    assert restored_value(store, found) == found.checkpoint
    for checkpoint in ids(store):
        assert coordinator(store).verify(CheckpointId(checkpoint)) == [], checkpoint
    return found


def crash_everywhere(
    prepare: Callable[[Store], tuple[CheckpointStore, Incarnation]],
    act: Callable[[CheckpointStore, Incarnation, Store], None],
    check: Callable[[Store], None],
) -> int:
    """Run ``act`` with a crash before and after each of its storage operations; how many there were."""
    for k in range(100):
        for done in (False, True):
            store = MemoryStore()
            mine, incarnation = prepare(store)
            mine._store = mine._retention._store = crash_at(store, k, done=done)
            try:
                act(mine, incarnation, store)
            except Crash:
                check(store)
            else:
                assert not done or k > 0
                return k
    raise AssertionError("it never ended")


def test_a_crash_anywhere_in_commit() -> None:
    def act(mine: CheckpointStore, incarnation: Incarnation, store: Store) -> None:
        mine.commit(make_manifest(store, incarnation, 3))

    def check(store: Store) -> None:
        check_recovery(store, 2)

    assert crash_everywhere(lambda store: started(store, 1, 2), act, check) == 2


def test_a_crash_anywhere_in_claim() -> None:
    def act(mine: CheckpointStore, incarnation: Incarnation, store: Store) -> None:
        mine.claim()

    def check(store: Store) -> None:
        assert check_recovery(store, 2).checkpoint == 2

    def prepare(store: Store) -> tuple[CheckpointStore, Incarnation]:
        _, incarnation = started(store, 1, 2)
        return coordinator(store), incarnation

    assert crash_everywhere(prepare, act, check) >= 7


def test_a_crash_anywhere_in_retain_and_the_rerun_finishes() -> None:
    def act(mine: CheckpointStore, incarnation: Incarnation, store: Store) -> None:
        mine.retain(CheckpointId(5), 2)

    def check(store: Store) -> None:
        assert check_recovery(store, 5).checkpoint == 5
        again = coordinator(store)
        again.claim()
        again.retain(CheckpointId(5), 2)
        assert checkpoint_paths(store) == [manifest_path(4), STATE.format(4), manifest_path(5), STATE.format(5)]

    def prepare(store: Store) -> tuple[CheckpointStore, Incarnation]:
        started(store, 1, 2)
        mine, incarnation = started(store)
        for n in (3, 4, 5):
            mine.commit(make_manifest(store, incarnation, n))
        return mine, incarnation

    assert crash_everywhere(prepare, act, check) >= 10


def test_files_before_manifests_would_be_caught() -> None:
    """The broken variant of C7: had the files gone first, a crash in between would leave a manifest without them."""
    store = MemoryStore()
    started(store, 1, 2)
    store.delete(STATE.format(1))
    with pytest.raises(AssertionError):
        check_recovery(store, 2)


def test_a_crash_anywhere_in_sweep() -> None:
    def act(mine: CheckpointStore, incarnation: Incarnation, store: Store) -> None:
        mine.sweep(1)

    def check(store: Store) -> None:
        assert check_recovery(store, 3).checkpoint == 3

    def prepare(store: Store) -> tuple[CheckpointStore, Incarnation]:
        mine, incarnation = started(store, 1, 2, 3)
        write_state(store, 4)
        return mine, incarnation

    assert crash_everywhere(prepare, act, check) >= 8


# ----------------------------------------------------------------------------------------------------------- everywhere


def whole_life(store: Store) -> None:
    _, first = started(store, 1, 2)
    assert first.number == 1
    mine = coordinator(store)
    second = mine.claim()
    assert second.manifest is not None
    assert restored_value(store, second.manifest) == 2
    n = second.next_checkpoint
    mine.commit(make_manifest(store, second, n))
    mine.retain(n, 1)
    write_state(store, n + 1)
    mine.sweep(1)
    assert checkpoint_paths(store) == [manifest_path(n), STATE.format(n)]
    assert store.exists(claim_path(2))
    assert mine.verify(n) == []


def test_a_whole_life_on_a_local_disk_with_awkward_names(tmp_path: Path) -> None:
    whole_life(ObjectStore(job_root(str(tmp_path / "a b%20/ü#?"), "jöb / 50% #1?")))


def test_a_whole_life_on_s3_with_awkward_names(moto_server: S3Server) -> None:
    whole_life(
        ObjectStore(job_root(f"{moto_server.bucket()}/a b%20/ü#?", "jöb / 50% #1?"), moto_server.storage_options)
    )


@pytest.mark.slow
def test_a_whole_life_on_a_real_s3_server(s3_server: S3Server) -> None:
    whole_life(ObjectStore(job_root(f"{s3_server.bucket()}/a b%20/ü#?", "jöb / 50% #1?"), s3_server.storage_options))


def test_a_full_disk_fails_the_checkpoint_and_costs_nothing() -> None:
    inner = MemoryStore()
    full = False

    def script(operation: str, path: str) -> Fault | None:
        if full and operation.startswith("put"):
            raise StorageError("cannot write: disk full: nothing committed is lost")
        return None

    mine = coordinator(FaultyStore(inner, script))
    incarnation = mine.claim()
    mine.commit(make_manifest(inner, incarnation, 1))
    full = True
    with pytest.raises(StorageError, match="disk full"):
        mine.commit(make_manifest(inner, incarnation, 2))
    with pytest.raises(StorageError, match="disk full"):
        mine.latest(incarnation)
    full = False
    found = mine.latest(incarnation)
    assert found.manifest is not None
    assert found.manifest.checkpoint == 1
    mine.commit(make_manifest(inner, incarnation, 3))
    assert ids(inner) == [3, 1]
    assert found.manifest.job == JOB
