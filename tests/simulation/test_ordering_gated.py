"""Steps that order rows, and asynchronous user code, through a failure that waits for a confirmed checkpoint: every row
that should come out comes out once, under the simulator's schedules."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pyarrow as pa
import pytest

from rayflow.operators.tumbling import tumbling
from rayflow.stream import Stream
from tests.simulation.run import play
from tests.simulation.scenario import SCHEMA, SECOND, InputRow
from tests.simulation.scripted import Stage, finish, scripted
from tests.simulation.target import Row
from tests.simulation.test_windows_gated import CALLS, KEYS, SIZE, gated


def by_window(rows: list[InputRow]) -> dict[tuple[int, int], list[InputRow]]:
    found: dict[tuple[int, int], list[InputRow]] = {}
    for row in rows:
        found.setdefault((row[0], row[1] // (SIZE * SECOND) * SIZE * SECOND), []).append(row)
    return found


def top(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    result = stream.key_by("k").window(tumbling(SIZE)).top(2, by="v", descending=False)
    return result, [
        (k, start, start + SIZE * SECOND, t, v, rank)
        for (k, start), among in by_window(rows).items()
        for rank, (_, t, v) in enumerate(sorted(among, key=lambda row: (row[2], row[1]))[:2], 1)
    ]


def last(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    result = stream.key_by("k").window(tumbling(SIZE)).deduplicate(keep="last")
    return result, [
        (k, start, start + SIZE * SECOND, *max(among, key=lambda row: row[1])[1:])
        for (k, start), among in by_window(rows).items()
    ]


def in_order(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    return stream.key_by("k").sort_by_event_time(), list(rows)


def in_order_without_keys(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    return stream.rebalance().sort_by_event_time("k"), list(rows)


async def same(batch: pa.RecordBatch) -> pa.RecordBatch:
    await asyncio.sleep(0)
    return batch


def asynchronous(stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[Row]]:
    return top(stream.rebalance().map_batches_async(same, schema=SCHEMA, concurrency=3), rows)


FLOWS: dict[str, Callable[[Stream, list[InputRow]], tuple[Stream, list[Row]]]] = {
    f.__name__: f for f in (top, last, in_order, in_order_without_keys, asynchronous)
}


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("flow", FLOWS)
def test_exactly_once_through_a_failure(flow: str, seed: int, parallelism: int) -> None:
    stage = Stage.new(seed)
    stream, failed = gated(stage)
    rows = [(key, call * SECOND, key + call) for call in range(CALLS) for key in range(KEYS)]
    result, expected = FLOWS[flow](stream, rows)
    job = scripted([(result, stage.target(), Counter(expected))], parallelism=parallelism, inline_max_bytes=0)
    world = stage.world(job)
    play(world)
    finish(world, job)
    assert failed == [CALLS // 2], "the failure must have happened, once"
    assert world.coordinator.machine.restarts == 1
