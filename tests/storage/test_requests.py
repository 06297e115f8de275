"""What checkpoints cost in requests to the store: the same however many are kept, and however often the job started."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Manifest, encode
from rayflow.storage import checkpoints, retention
from rayflow.storage.checkpoints import CheckpointStore, Incarnation
from rayflow.storage.garbage import collect_garbage
from rayflow.storage.layout import Decision, claim_path, decision_path, manifest_path
from rayflow.storage.store import MemoryStore, PutOutcome
from tests.storage.fakes import JOB, make_manifest

PAGE = 12
"""Objects that one listing tells: fewer than S3's 1,000, so that hundreds of checkpoints are as thousands."""
FEW, MANY = 4, 120


class CountingStore(MemoryStore):
    """Counts requests as S3 does: a listing is one for each page."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = 0

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        self.requests += 1
        return super().put_if_absent(path, data)

    def get(self, path: str) -> bytes:
        self.requests += 1
        return super().get(path)

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        found = super().list(prefix, after=after)
        self.requests += 1 + len(found) // PAGE
        return found

    def delete(self, path: str) -> None:
        self.requests += 1
        super().delete(path)

    def delete_prefix(self, prefix: str) -> None:
        self.requests += 2
        super().delete_prefix(prefix)


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LISTED_A_REQUEST", PAGE)
    monkeypatch.setattr(retention, "MANIFESTS_READ_MAX", 5)


def filled(number: int, *, starts: int = 0) -> CountingStore:
    """A directory with so many checkpoints; ``starts``: of coordinators since a savepoint that the user keeps there."""
    store = CountingStore()
    for start in range(1, starts + 1):
        store.put(claim_path(start), b"{}")
        restored = CheckpointId(1) if start > 1 else None
        store.put(decision_path(Decision(start, restored, start * 100, start * 100 + 100)), b"{}")
    mine = CheckpointStore(store, JOB)
    incarnation = mine.claim()
    manifest = make_manifest(store, incarnation, 2)
    if starts:
        put(store, replace(manifest, kind="savepoint", incarnation=1), 1)
    first = incarnation.next_checkpoint
    for n in range(first, first + number):
        put(store, manifest, n)
    return store


def put(store: CountingStore, manifest: Manifest, checkpoint: int) -> None:
    store.put(manifest_path(checkpoint), encode(replace(manifest, checkpoint=CheckpointId(checkpoint))))


class Job:
    """A coordinator that goes on in the directory."""

    def __init__(self, store: CountingStore, keep: int) -> None:
        self.store, self.keep = store, keep
        before = store.requests
        self.mine = CheckpointStore(store, JOB)
        self.incarnation: Incarnation = self.mine.claim()
        self.start_cost = store.requests - before
        self.next = self.incarnation.next_checkpoint
        self.manifest = make_manifest(store, self.incarnation, self.next)

    def cost(self, number: int = MANY) -> float:
        """Of so many checkpoints: requests a checkpoint, of commit and retention."""
        before = self.store.requests
        for n in map(CheckpointId, range(self.next, self.next + number)):
            self.mine.commit(replace(self.manifest, checkpoint=n))
            self.mine.retain(n, self.keep)
        self.next = CheckpointId(self.next + number)
        return (self.store.requests - before) / number


COMMITTED = 2
"""The manifest, and a look for later coordinators."""
AT_MOST = COMMITTED + 10
"""Four listings, and four requests that delete one checkpoint; now and then ids are reserved."""


@pytest.mark.parametrize("kept", [FEW, MANY])
def test_a_checkpoint_costs_the_same_however_many_are_kept(kept: int) -> None:
    job = Job(filled(kept), kept)
    job.cost()  # learns what is there
    assert job.cost() <= AT_MOST
    left = len(job.mine.survey().manifests)
    pages = len(job.mine.survey().files) // PAGE
    assert kept <= left <= kept + pages, "what is kept for longer than asked is bounded too"


def test_a_coordinator_that_takes_over_many_learns_them_little_by_little() -> None:
    job = Job(filled(MANY), 1)
    assert job.start_cost <= 2 * MANY / PAGE + 10, "pages of listings, and one manifest"
    assert all(job.cost(1) <= AT_MOST + retention.MANIFESTS_READ_MAX + 2 * MANY / PAGE for _ in range(3))
    job.cost()
    assert len(job.mine.survey().manifests) == 1, "what need not be kept is gone at last"


def test_at_the_end_and_from_outside_all_are_known_at_once() -> None:
    job = Job(filled(MANY), 1)
    unneeded = collect_garbage(job.store, JOB, keep=1)
    assert len([path for path, _ in unneeded.files if path.endswith("manifest.json")]) == MANY - 1
    assert len(job.mine.list()) == MANY, "nothing was asked to be deleted"
    job.mine.sweep(1)
    assert len(job.mine.survey().manifests) == 1


def test_broken_looking_at_everything_each_time_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "LISTED_A_REQUEST", 1 << 40)
    few, many = Job(filled(FEW), FEW), Job(filled(MANY), MANY)
    many.cost()
    assert few.cost() <= AT_MOST < many.cost(), "or the tests above say nothing"


def test_a_commit_costs_the_same_however_often_the_job_was_started() -> None:
    job = Job(filled(FEW, starts=MANY), 2)
    before = job.store.requests
    job.mine.commit(job.manifest)
    assert job.store.requests - before == COMMITTED
    job.next = CheckpointId(job.next + 1)
    assert job.cost() <= AT_MOST
