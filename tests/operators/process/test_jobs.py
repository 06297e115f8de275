"""Whole jobs with a `KeyedProcess`: parallelisms, back ends, failures, rescaling, and crashes in the simulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.errors import JobFailedError
from rayflow.stream import Stream
from tests.operators.process.buckets import (
    OUT,
    SCHEMA,
    WIDTH,
    BatchedBuckets,
    BucketsByKey,
    expected,
    found_in,
    rows_of,
)
from tests.simulation.run import play
from tests.simulation.scripted import Stage, finish, scripted

BOTH = pytest.mark.parametrize("process", [BatchedBuckets, BucketsByKey], ids=["batched", "by key"])
Backend = Literal["memory", "fs", "rocksdb"]


def failing(rows: pa.Table, at: int, times: int) -> Stream:
    """One split, so that event time advances while rows come; raises on the batch with row ``at``, so many times."""
    failed: list[int] = []

    def fail(batch: pa.RecordBatch) -> pa.RecordBatch:
        if len(failed) < times and at in batch["v"].to_pylist():
            failed.append(at)
            raise RuntimeError("as told")
        return batch

    stream = rf.from_arrow(rows, splits=1, batch_rows=50, event_time="t", max_delay="1ms")
    return stream.map_batches(fail, schema=SCHEMA)


@BOTH
@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("state", ["memory", "fs", "rocksdb"])
def test_exact_through_a_failure(
    process: type[rf.KeyedProcess], parallelism: int, state: Backend, tmp_path: Path
) -> None:
    rows = rows_of(3000, 17)
    flow = rf.Flow("buckets", failing(rows, 2500, 1).key_by("k").process(process).collect())
    result = flow.run(
        local=True,
        parallelism=parallelism,
        checkpoints=rf.CheckpointConfig(str(tmp_path), interval="5ms"),
        config=rf.JobConfig(
            state=state,
            inflight_bytes=8192,
            batch_rows=100,
            watermark_interval="1ms",
            local_dir=str(tmp_path / "local"),
        ),
    )
    assert result.restarts == 1
    assert found_in(result.table()) == expected(rows)


@BOTH
@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 4), (4, 1), (3, 2)])
@pytest.mark.parametrize("state", ["fs", "rocksdb"])
def test_exact_when_the_parallelism_changes(
    process: type[rf.KeyedProcess], before: int, after: int, state: Backend, tmp_path: Path
) -> None:
    rows = rows_of(3000, 17)
    flow = rf.Flow("buckets", failing(rows, 2500, 1).key_by("k").process(process).collect())
    checkpoints = rf.CheckpointConfig(str(tmp_path / "chk"), interval="5ms")
    config = rf.JobConfig(
        state=state,
        inflight_bytes=8192,
        batch_rows=100,
        watermark_interval="1ms",
        restart=rf.Restart.none(),
        local_dir=str(tmp_path / "local"),
    )
    with pytest.raises(JobFailedError, match="as told"):
        flow.run(local=True, parallelism=before, checkpoints=checkpoints, config=config)
    result = flow.run(local=True, parallelism=after, checkpoints=checkpoints, config=config)
    assert result.timeline, "the second run did something"
    assert found_in(result.table()) == expected(rows)


def gated(stage: Stage) -> tuple[Stream, pa.Table, list[int]]:
    """Rows in calls of a few; half-way it fails once, when a checkpoint of a good part of them is confirmed."""
    rows, size, failed = rows_of(160, 5), 4, list[int]()

    def generate(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for begin in range(position, len(rows), size):
            while begin >= len(rows) // 2 and not failed:
                begun = [s.position or 0 for m in stage.observer.ever.values() for x in m.subtasks for s in x.splits]
                if any(p >= len(rows) // 4 for p in begun):
                    failed.append(begin)
                    raise RuntimeError("half-way")
                yield None
            yield rows.slice(begin, size).combine_chunks().to_batches()[0]

    stream = rf.from_generator(generate, schema=SCHEMA, event_time="t", max_delay="1ms", parallelism=1)
    return stream, rows, failed


@BOTH
@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("seed", [1, 2])
def test_timers_fire_exactly_once_through_a_crash_in_the_simulator(
    process: type[rf.KeyedProcess], parallelism: int, seed: int
) -> None:
    stage = Stage.new(seed)
    stream, rows, failed = gated(stage)
    target = stage.target()
    job = scripted([(stream.key_by("k").process(process), target, Counter(expected(rows)))], parallelism=parallelism)
    world = stage.world(job)
    play(world)
    finish(world, job)
    assert len(failed) == 1
    assert world.coordinator.machine.restarts == 1


class Forgetful(BucketsByKey):
    """Keeps in an attribute what belongs into a state: the number of timers that have fired."""

    def open(self, ctx: Any) -> None:
        self.fired: Counter[int] = Counter()

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        bucket = time // WIDTH - 1
        ctx.emit({"k": key, "bucket": bucket, "n": self.n[bucket], "sum": 0, "number": self.fired[key]})
        self.fired[key] += 1


def test_the_judge_sees_what_is_not_in_a_state(tmp_path: Path) -> None:
    """The tests above can fail: numbers that are kept beside the state begin anew after a failure."""
    rows = rows_of(3000, 17)
    flow = rf.Flow("buckets", failing(rows, 2500, 1).key_by("k").process(Forgetful).collect())
    checkpoints = rf.CheckpointConfig(str(tmp_path), interval="5ms")
    result = flow.run(
        local=True,
        checkpoints=checkpoints,
        config=rf.JobConfig(inflight_bytes=8192, batch_rows=100, watermark_interval="1ms"),
    )
    numbers = [(k, b, number) for k, b, _, _, number in found_in(result.table())]
    assert numbers != [(k, b, number) for k, b, _, _, number in expected(rows)]


def test_side_outputs_and_event_time_go_on() -> None:
    class Splits(rf.KeyedProcess):
        output = SCHEMA
        side_outputs = {"odd": SCHEMA}  # noqa: RUF012

        def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
            odd = pa.array(batch["v"].to_numpy() % 2 == 1)
            ctx.emit(batch.filter(odd), tag="odd")
            ctx.emit(batch.filter(pa.array(~odd.to_numpy(zero_copy_only=False))))

    rows = rows_of(500, 3)
    found = rf.from_arrow(rows, event_time="t", max_delay="1ms").key_by("k").process(Splits)
    counted = found.key_by("k").window(rf.tumbling("1ms")).agg(n=rf.count())
    flow = rf.Flow("sides", found.side("odd").collect(name="odd"), counted.collect(name="even"))
    result = flow.run(local=True, parallelism=2)
    assert sorted(result.table("odd")["v"].to_pylist()) == [v for v in range(500) if v % 2]
    assert sum(result.table("even")["n"].to_pylist()) == 250


def test_the_plan_knows_schema_keys_and_state() -> None:
    stream = rf.from_arrow(rows_of(10, 2), event_time="t").key_by("k").process(BatchedBuckets(), name="buckets")
    assert stream.schema == OUT
    flow = rf.Flow("plan", stream.collect())
    assert "state, keyed by k" in flow.explain()
    assert "buckets" in flow.plan().topology().keyed_operators
