"""P2 over back ends, full and incremental, at parallelism 1, 2 and 4: a failure half-way that waits for a checkpoint
past the first quarter, and then every window and every running total comes out exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from rayflow.operators.aggregates import count
from rayflow.operators.aggregates import sum as sum_of
from rayflow.operators.windows import tumbling
from rayflow.stream import Stream
from tests.simulation.run import play
from tests.simulation.scenario import SECOND, InputRow
from tests.simulation.scripted import Stage, finish, scripted
from tests.simulation.stateful import by_hand, distinct, in_batches, running
from tests.simulation.target import Row
from tests.simulation.test_windows_gated import CALLS, KEYS, SIZE, gated
from tests.simulation.tiny import forget_local_files, tiny

Flow = Callable[[Stream, list[InputRow]], tuple[Stream, list[Row]]]


def windows(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    result = stream.key_by("k").window(tumbling(SIZE)).agg(n=count(), s=sum_of("v"))
    found: dict[tuple[int, int], list[int]] = {}
    for k, t, v in rows:
        found.setdefault((k, t // (SIZE * SECOND) * SIZE * SECOND), []).append(v)
    return result, [(k, s, s + SIZE * SECOND, len(vs), sum(vs)) for (k, s), vs in found.items()]


def timers(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    return by_hand(stream, rows, SIZE * SECOND)


FLOWS: dict[str, Flow] = {f.__name__: f for f in (windows, timers, running, in_batches, distinct)}
BACKENDS: dict[str, dict[str, Any]] = {
    "memory": {"inline_max_bytes": None},
    "fs": {"inline_max_bytes": 0},
    "fs incremental": {"inline_max_bytes": 0},
    "rocksdb": {"inline_max_bytes": 0},
}


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flow", FLOWS)
def test_exactly_once_on_every_back_end(flow: str, backend: str, parallelism: int) -> None:
    stage = Stage.new(parallelism)
    stream, failed = gated(stage)
    rows = [(key, call * SECOND, key + call) for call in range(CALLS) for key in range(KEYS)]
    result, expected = FLOWS[flow](stream, rows)
    target = stage.target()
    job = scripted([(result, target, Counter(expected))], parallelism=parallelism, **BACKENDS[backend])
    if backend == "rocksdb":  # so little that all but the rows of a batch are evicted, and every run is a file
        object.__setattr__(job.config, "state", "rocksdb")
        object.__setattr__(job.config, "state_memory_bytes", 64)
    try:
        with nullcontext() if backend in ("memory", "fs") else tiny():
            world = stage.world(job)
            play(world)
            finish(world, job)
    finally:
        forget_local_files()
    assert failed == [CALLS // 2], "the failure must have happened, once"
    assert world.coordinator.machine.restarts == 1
    if backend == "memory":
        assert not any(m.files() for m in stage.observer.ever.values())
    if backend == "fs incremental" and flow != "windows":  # which close, or are merged, before there is another
        assert stage.observer.reused, "a later checkpoint names files of an earlier one"
