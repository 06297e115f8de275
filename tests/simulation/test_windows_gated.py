"""P2: tumbling windows and a failure that is gated on a confirmed checkpoint; every (key, window) exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.operators.aggregates import count
from rayflow.operators.aggregates import sum as sum_of
from rayflow.operators.windows import tumbling
from rayflow.stream import Stream
from tests.simulation.run import play
from tests.simulation.scenario import SCHEMA, SECOND, table_of
from tests.simulation.scripted import Stage, finish, scripted

KEYS, CALLS, SIZE = 5, 60, 7


def gated(stage: Stage) -> tuple[Stream, list[int]]:
    """Call k emits a row of each key at event time k; half-way it fails once, after a confirmed later checkpoint."""
    failed: list[int] = []

    def generate(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for k in range(position // KEYS, CALLS):
            while k == CALLS // 2 and not failed:
                begun = [s.position or 0 for m in stage.observer.ever.values() for x in m.subtasks for s in x.splits]
                if any(p >= KEYS * CALLS // 4 for p in begun):
                    failed.append(k)
                    raise RuntimeError("half-way")
                yield None
            yield table_of([(key, k * SECOND, key + k) for key in range(KEYS)]).to_batches()[0]

    return rf.from_generator(generate, schema=SCHEMA, event_time="t", max_delay="0s", parallelism=1), failed


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("combine", [True, False], ids=["combiner", "plain"])
@pytest.mark.parametrize("inline_max_bytes", [0, 1 << 20], ids=["files", "inline"])
@pytest.mark.parametrize("seed", [1, 2])
def test_each_window_of_each_key_fires_once_with_the_closed_form_sum(
    parallelism: int, combine: bool, inline_max_bytes: int, seed: int
) -> None:
    stage = Stage.new(seed)
    stream, failed = gated(stage)
    result: Stream = stream.key_by("k").window(tumbling(SIZE)).agg(n=count(), s=sum_of("v"))
    if not combine:
        result = Stream(replace(result._node, combiner=None))
    expected = Counter(
        (key, start * SECOND, (start + SIZE) * SECOND, len(inside), sum(key + k for k in inside))
        for key in range(KEYS)
        for start in range(0, CALLS, SIZE)
        for inside in [range(start, min(start + SIZE, CALLS))]
    )
    target = stage.target()
    job = scripted([(result, target, expected)], parallelism=parallelism, inline_max_bytes=inline_max_bytes)
    world = stage.world(job)
    play(world)
    finish(world, job)
    assert failed == [CALLS // 2], "the failure must have happened, once"
    assert world.coordinator.machine.restarts == 1
