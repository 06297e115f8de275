"""Pieces through uploads: written once, named again only when that is safe, handed on by restores and rescales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import Manifest, SnapshotStats, StateHandle, SubtaskSnapshot
from rayflow.core.restore import clip, states_for
from rayflow.errors import CorruptCheckpointError, ProtocolError, StorageError
from rayflow.operators.base import (
    FolderFile,
    FrozenFolder,
    FrozenState,
    FrozenTable,
    Piece,
    RestoredState,
    Spread,
    new_piece,
)
from rayflow.partition import hash_columns, key_groups
from rayflow.runtime.assembly import JobSpec, Parts
from rayflow.runtime.ports import Nothing
from rayflow.runtime.uploads import Uploads
from rayflow.storage.layout import parse_checkpoint, parse_shared, shared_prefix
from rayflow.storage.reuse import Reuse
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore

G = 128
OP = "op"


def rows(start: int, n: int = 20_000) -> pa.RecordBatch:
    return pa.record_batch({"k": np.arange(start, start + n), "v": np.random.default_rng(start).random(n)})


def piece(start: int, n: int = 20_000) -> Piece:
    return new_piece([rows(start, n)], transient=True)


class Subtask:
    """One subtask that uploads to real storage."""

    uploads_type: type[Uploads] = Uploads

    def __init__(self, store: MemoryStore, index: int = 0, n: int = 1, restored: Sequence[StateHandle] = ()) -> None:
        self.store = store
        self.uploads = self.uploads_type(SubtaskId("chain", index), n, SnapshotStore(store, G, 0), {}, restored)

    def upload(self, checkpoint: int, *pieces: Piece) -> SubtaskSnapshot:
        now: Callable[[], float] = lambda: 0.0  # noqa: E731
        return self.uploads.upload(CheckpointId(checkpoint), [(OP, keyed_state(pieces))], (), SnapshotStats(), now)

    def complete(self, checkpoint: int) -> None:
        self.uploads.commit(CheckpointId(checkpoint))


def writers(snapshot: SubtaskSnapshot) -> list[str]:
    """Which checkpoint wrote each piece."""
    paths = [h.file.path for h in snapshot.states if h.file is not None]
    return [str(parse_shared(path) or parse_checkpoint(path)) for path in paths]


def test_the_second_checkpoint_uploads_only_what_is_new() -> None:
    me, a, b = Subtask(MemoryStore()), piece(0), piece(100_000, 5_000)
    first = me.upload(1, a)
    assert first.stats.uploaded_bytes == first.stats.nbytes
    me.complete(1)
    second = me.upload(2, a, b)
    assert writers(second) == ["1", "2"]
    assert second.stats.rows == 25_000
    assert second.stats.nbytes == first.stats.nbytes + second.stats.uploaded_bytes
    assert second.stats.uploaded_bytes < first.stats.uploaded_bytes / 3


def test_rows_are_let_go_when_a_complete_checkpoint_has_them_and_not_before() -> None:
    me, a = Subtask(MemoryStore()), piece(0)
    kept = new_piece([rows(50_000)])
    me.upload(1, a, kept)
    assert a.batches
    me.complete(1)
    assert a.batches == ()
    assert kept.batches, "only transient ones"
    assert writers(me.upload(2, a, kept)) == ["1", "1"]


def test_what_is_not_known_to_be_complete_is_written_again() -> None:
    """Checkpoint 1 may have been aborted and its files deleted."""
    me, a, b = Subtask(MemoryStore()), piece(0), piece(100_000)
    me.upload(1, a)
    assert writers(me.upload(2, a)) == ["2"]
    me.complete(2)
    me.upload(3, a, b)  # is aborted
    assert writers(me.upload(4, a, b)) == ["2", "4"]
    me.complete(4)
    assert writers(me.upload(5, a, b)) == ["2", "4"]


def late_news(me: Subtask) -> list[str]:
    """The news of 1 comes after the upload of 2, which has written the piece again; 2 may be complete by now."""
    a = piece(0)
    me.upload(1, a)
    me.upload(2, a)
    me.complete(1)
    return writers(me.upload(3, a))


def test_an_old_file_is_not_named_when_a_later_checkpoint_has_written_the_piece_again() -> None:
    """If 2 is complete, retention has deleted the file of 1, which 2 does not name."""
    assert late_news(Subtask(MemoryStore())) == ["3"]


def test_asking_only_the_newest_that_is_known_to_be_complete_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reuse, "agreed", lambda self, later: self)
    assert late_news(Subtask(MemoryStore())) == ["1"]


def test_late_news_does_not_cost_the_rows() -> None:
    me, a = Subtask(MemoryStore()), piece(0)
    me.upload(1, a)
    me.upload(2, a)
    me.complete(1)
    assert a.batches, "the next checkpoint may have to write them again"
    assert writers(me.upload(3, a)) == ["3"]
    me.complete(3)
    assert a.batches == ()
    assert writers(me.upload(4, a)) == ["3"]


def test_rows_that_are_gone_without_a_file_that_is_known_end_the_job() -> None:
    with pytest.raises(ProtocolError, match="would be lost"):
        Subtask(MemoryStore()).upload(1, Piece("x", (), transient=True))


class NamesWhatMayBeAborted(Uploads):
    """Broken on purpose (rule C7): takes what it has written for complete."""

    def upload(self, checkpoint, frozen, splits, stats, now):  # type: ignore[no-untyped-def]
        snapshot = super().upload(checkpoint, frozen, splits, stats, now)
        self._complete = Reuse.of(snapshot.states)
        return snapshot


def rows_after_an_abort(uploads_type: type[Uploads]) -> int:
    """Checkpoint 2 of three is aborted, and its files are deleted."""

    class Mine(Subtask):
        pass

    Mine.uploads_type = uploads_type
    me, a, b = Mine(MemoryStore()), piece(0), piece(100_000)
    me.upload(1, a)
    me.complete(1)
    me.upload(2, a, b)
    me.store.delete_prefix(shared_prefix(2))
    third = me.upload(3, a, b)
    return sum(SnapshotStore(me.store, G).read(handle).table.num_rows for handle in third.states)


def test_an_aborted_checkpoint_in_between_costs_nothing() -> None:
    assert rows_after_an_abort(Uploads) == 40_000


def test_naming_what_may_be_aborted_is_caught() -> None:
    with pytest.raises(CorruptCheckpointError, match="shared/00000002-.* is missing"):
        rows_after_an_abort(NamesWhatMayBeAborted)


# -------------------------------------------------------------------------------------------- restoring and rescaling


class Job:
    """The keyed chain of a real plan at some parallelism, on storage that outlives it."""

    def __init__(self, store: MemoryStore, parallelism: int, restored: Manifest | None) -> None:
        numbers = rf.from_arrow(pa.table({"k": [1], "t": pa.array([1], pa.timestamp("us"))}), event_time="t")
        counts = numbers.key_by("k").window(rf.tumbling("1s")).agg(n=rf.count())
        config = rf.JobConfig(max_parallelism=G)
        self.plan = rf.Flow("job", counts.collect()).plan(parallelism=parallelism, config=config)
        topology = self.plan.topology()
        (self.operator,) = topology.keyed_operators
        chain = topology.chain_of(self.operator)
        assert chain is not None
        self.store = SnapshotStore(store, G, 0)
        spec = JobSpec(self.plan, config, True, "run")
        handles = states_for(restored, topology)
        self.subtasks = [SubtaskId(chain, i) for i in range(parallelism)]
        self.parallelism = {c.id: c.parallelism for c in self.plan.chains}
        self.parts = [
            Parts(spec, s, Attempt(1), run_id="run", now=lambda: 0.0, wall_time=lambda: 0.0) for s in self.subtasks
        ]
        self.restored = [p.states(handles[s], self.store) for p, s in zip(self.parts, self.subtasks, strict=True)]
        self.uploads = [p.uploads(self.store, handles[s]) for p, s in zip(self.parts, self.subtasks, strict=True)]

    def states(self, index: int) -> list[RestoredState]:
        return self.restored[index].get(self.operator, [])

    def checkpoint(self, number: int, states: Sequence[FrozenState]) -> Manifest:
        """A complete checkpoint; ``states`` by subtask."""
        snapshots = [
            uploads.upload(CheckpointId(number), [(self.operator, state)], (), SnapshotStats(), lambda: 0.0)
            for uploads, state in zip(self.uploads, states, strict=True)
        ]
        for uploads in self.uploads:
            uploads.commit(CheckpointId(number))
        return Manifest(
            job="job",
            checkpoint=CheckpointId(number),
            kind="periodic",
            attempt=Attempt(1),
            incarnation=1,
            run_id="run",
            created_at=0.0,
            max_parallelism=G,
            parallelism=self.parallelism,
            operators={self.operator: "counts"},
            subtasks=tuple(snapshots),
        )


def keyed_state(pieces: Sequence[Piece]) -> FrozenState:
    return FrozenState((FrozenTable("s", (), rows(0, 1).schema, ("k",), pieces=tuple(pieces), mode="upsert"),))


def own_rows(start: int, n: int, index: int, parallelism: int) -> Piece:
    """Those of the rows whose keys belong to the subtask."""
    batch = rows(start, n)
    groups = key_groups(hash_columns([batch.column("k")], ["k"]), G)
    own = key_group_range(index, parallelism, G)
    return new_piece([batch.filter(pa.array((groups >= own.start) & (groups < own.stop)))], transient=True)


def go_on(job: Job, number: int, start: int) -> tuple[Manifest, int]:
    """Freeze again what was restored, rows let go, with something new; (the manifest, bytes uploaded)."""
    n = len(job.subtasks)
    states = [
        keyed_state([*(Piece(s.piece, (), transient=True) for s in job.states(i)), own_rows(start, 2_000, i, n)])
        for i in range(n)
    ]
    manifest = job.checkpoint(number, states)
    return manifest, sum(s.stats.uploaded_bytes for s in manifest.subtasks)


def keys(job: Job) -> list[int]:
    found = []
    for index in range(len(job.subtasks)):
        own = key_group_range(index, len(job.subtasks), G)
        mine = [k for s in job.states(index) for k in s.table["k"].to_pylist()]
        assert all(g in own for g in key_groups(hash_columns([pa.array(mine)], ["k"]), G).tolist()), "rule K3"
        found += mine
    return sorted(found)


def test_two_to_four_to_two_subtasks_keep_every_key_once_and_upload_only_what_is_new() -> None:
    store, n = MemoryStore(), 60_000
    first = Job(store, 2, None)
    manifest = first.checkpoint(1, [keyed_state([own_rows(0, n, i, 2)]) for i in range(2)])
    full = sum(s.stats.uploaded_bytes for s in manifest.subtasks)
    expected = n
    for number, parallelism in ((2, 2), (3, 4), (4, 2), (5, 3), (6, 1)):
        job = Job(store, parallelism, manifest)
        assert keys(job) == list(range(expected)), f"each key exactly once at parallelism {parallelism}"
        pieces = [s.piece for i in range(parallelism) for s in job.states(i)]
        assert "" not in pieces
        for i in range(parallelism):
            own = [s.piece for s in job.states(i)]
            assert len(own) == len(set(own)), "two pieces of one name in one subtask"
        manifest, uploaded = go_on(job, number, expected)
        expected += 2_000
        assert uploaded < full / 4
        assert sum(s.stats.rows for s in manifest.subtasks) == expected
    assert keys(Job(store, 5, manifest)) == list(range(expected))


def test_parts_of_one_piece_that_kept_its_name_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant: two subtasks call their halves the same; after they are one again, one half is lost."""
    whole = clip

    def keeps_the_name(handle: StateHandle, key_groups: range, max_parallelism: int) -> StateHandle:
        return replace(whole(handle, key_groups, max_parallelism), piece=handle.piece)

    for module in ("rayflow.runtime.assembly", "rayflow.storage.snapshots"):
        monkeypatch.setattr(f"{module}.clip", keeps_the_name)
    with pytest.raises(AssertionError):
        test_two_to_four_to_two_subtasks_keep_every_key_once_and_upload_only_what_is_new()


def test_state_without_keys_is_dealt_out_as_it_says() -> None:
    store = MemoryStore()

    def frozen(index: int) -> FrozenState:
        def table(name: str, spread: Spread) -> FrozenTable:
            kept = new_piece([pa.record_batch({"x": [10 * index + i for i in range(5)]})])
            return FrozenTable(name, pieces=(kept,), spread=spread)

        return FrozenState((table("mine", "subtask"), table("dealt", "list"), table("all", "union")))

    manifest = Job(store, 2, None).checkpoint(1, [frozen(i) for i in range(2)])

    def restored(parallelism: int) -> list[dict[str, list[int]]]:
        job, found = Job(store, parallelism, manifest), []
        for i in range(parallelism):
            by_name: dict[str, list[int]] = {}
            for s in job.states(i):
                by_name.setdefault(s.name, []).extend(s.table["x"].to_pylist())
                assert (s.piece == "") == (s.name == "dealt" and parallelism != 2), "some rows are not the piece"
            found.append(by_name)
        return found

    zero, one = [0, 1, 2, 3, 4], [10, 11, 12, 13, 14]
    assert restored(2) == [{"mine": m, "dealt": m, "all": zero + one} for m in (zero, one)]
    three = restored(3)
    assert [p.get("mine", []) for p in three] == [zero, one, []]
    assert [p["dealt"] for p in three] == [[0, 3, 10, 13], [1, 4, 11, 14], [2, 12]]
    assert [p["all"] for p in three] == [zero + one] * 3
    assert restored(1) == [{"mine": zero + one, "dealt": zero + one, "all": zero + one}]


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_released_whatever_becomes_of_the_upload() -> None:
    log: list[str] = []

    def frozen(*, fails: bool) -> list[tuple[str, FrozenState]]:
        def finish() -> tuple[dict[str, FolderFile], int]:
            if fails:
                raise StorageError("disk full")
            return {}, 0

        return [(OP, FrozenState(folders=(FrozenFolder("store", None, finish, lambda: log.append("released")),)))]

    uploads = Subtask(MemoryStore()).uploads
    uploads.upload(CheckpointId(1), frozen(fails=False), (), SnapshotStats(), lambda: 0.0)
    assert log == ["released"]
    with pytest.raises(StorageError):
        uploads.upload(CheckpointId(2), frozen(fails=True), (), SnapshotStats(), lambda: 0.0)
    assert log == ["released"] * 2
    task = uploads.upload_task(Attempt(1), CheckpointId(3), frozen(fails=False), (), SnapshotStats(), lambda: 0.0)
    uploads.cancelled = True
    assert isinstance(task(), Nothing)
    assert log == ["released"] * 3


def test_the_back_end_of_a_job_gives_folders_that_go_with_the_attempt(tmp_path: Path) -> None:
    job = Job(MemoryStore(), 1, None)
    config = rf.JobConfig(state="rocksdb", local_dir=str(tmp_path), state_memory_bytes=1 << 20)
    spec = JobSpec(job.plan, config, True, "run")
    parts = Parts(spec, job.subtasks[0], Attempt(7), run_id="run", now=lambda: 0.0, wall_time=lambda: 0.0)
    backend = parts.context(job.operator, "counts").backend
    assert (backend.kind, backend.memory_bytes) == ("rocksdb", 1 << 20)
    assert backend.scratch is not None
    assert backend.open_cold is not None
    assert not list(tmp_path.iterdir()), "nothing is made before it is asked for"
    folder = backend.scratch("store")
    assert folder.is_dir()
    parts.scratch.close()
    assert not folder.exists()
    plain = job.parts[0].context(job.operator, "counts").backend
    assert (plain.kind, plain.scratch, plain.open_cold) == ("fs", None, None)
