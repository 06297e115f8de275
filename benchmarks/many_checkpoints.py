"""What a checkpoint costs the coordinator when thousands are kept: requests and time, beside a directory of two.

`python -m benchmarks.many_checkpoints [--kept 5000] [--checkpoints 200] [--url s3://bucket/prefix]`. Requests are those
that S3 would get: a listing is one for each thousand objects. Without ``--url`` objects are files of a temporary
folder; credentials for another place come from the environment.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.figures import emit
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest, SubtaskSnapshot, encode
from rayflow.storage.checkpoints import LISTED_A_REQUEST, CheckpointStore, Incarnation
from rayflow.storage.filesystem import ObjectStore
from rayflow.storage.layout import manifest_path
from rayflow.storage.store import PutOutcome

KEPT, CHECKPOINTS, FEW = 5_000, 200, 2
REQUESTS_MAX = 16
JOB = "many"


class CountingStore(ObjectStore):
    """Counts what S3 would be asked."""

    requests = 0

    def put_if_absent(self, path: str, data: bytes) -> PutOutcome:
        self.requests += 1
        return super().put_if_absent(path, data)

    def get(self, path: str) -> bytes:
        self.requests += 1
        return super().get(path)

    def list(self, prefix: str = "", *, after: str = "") -> list[tuple[str, int]]:
        found = super().list(prefix, after=after)
        self.requests += 1 + len(found) // LISTED_A_REQUEST
        return found

    def delete(self, path: str) -> None:
        self.requests += 1
        super().delete(path)

    def delete_prefix(self, prefix: str) -> None:
        self.requests += 2
        super().delete_prefix(prefix)


@dataclass(frozen=True, slots=True)
class Cost:
    start_requests: int
    start_s: float
    requests: float
    """A checkpoint, once the coordinator knows what is there."""
    seconds: float


def manifest_of(incarnation: Incarnation) -> Manifest:
    return Manifest(
        job=JOB,
        checkpoint=incarnation.next_checkpoint,
        kind="periodic",
        attempt=incarnation.next_attempt,
        incarnation=incarnation.number,
        run_id=incarnation.run_id,
        created_at=time.time(),
        max_parallelism=128,
        parallelism={"chain": 4},
        operators={"step": "a step"},
        subtasks=tuple(SubtaskSnapshot(SubtaskId("chain", i)) for i in range(4)),
    )


def measure(url: str, kept: int, checkpoints: int) -> Cost:
    store = CountingStore(url)
    writer = CheckpointStore(store, JOB).claim()
    old = replace(manifest_of(writer), attempt=Attempt(1))
    first = writer.next_checkpoint
    with ThreadPoolExecutor(16) as pool:
        for _ in pool.map(
            lambda n: ObjectStore.put(store, manifest_path(n), encode(replace(old, checkpoint=CheckpointId(n)))),
            range(first, first + kept),
        ):
            pass
    before, began = store.requests, time.perf_counter()
    mine = CheckpointStore(store, JOB)
    incarnation = mine.claim()
    start_requests, start_s = store.requests - before, time.perf_counter() - began
    manifest, n = manifest_of(incarnation), incarnation.next_checkpoint
    for measured in (False, True):
        before, began = store.requests, time.perf_counter()
        for _ in range(checkpoints):
            mine.commit(replace(manifest, checkpoint=n))
            mine.retain(n, kept)
            n = CheckpointId(n + 1)
        if measured:
            requests, seconds = store.requests - before, time.perf_counter() - began
    return Cost(start_requests, start_s, requests / checkpoints, seconds / checkpoints)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.many_checkpoints", description=__doc__)
    parser.add_argument("--kept", type=int, default=KEPT)
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    parser.add_argument("--url")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        place = f"{given.url or Path(folder)}/{uuid.uuid4().hex}"
        few = measure(f"{place}/few", FEW, given.checkpoints)
        many = measure(f"{place}/many", given.kept, given.checkpoints)
    emit("requests_a_checkpoint_few", few.requests, "requests", f"<= {REQUESTS_MAX}", few.requests <= REQUESTS_MAX)
    emit("requests_a_checkpoint_many", many.requests, "requests", f"<= {REQUESTS_MAX}", many.requests <= REQUESTS_MAX)
    emit("checkpoint_time_few", few.seconds * 1e3, "ms")
    emit("checkpoint_time_many", many.seconds * 1e3, "ms")
    pages = 20 + 2 * given.kept // LISTED_A_REQUEST
    emit("requests_at_start_many", float(many.start_requests), "requests", f"<= {pages}", many.start_requests <= pages)
    emit("start_time_many", many.start_s * 1e3, "ms")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
