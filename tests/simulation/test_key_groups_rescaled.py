"""P3: 42 keys in 13 key groups, parallelism 2 -> 4 -> 2 (and 4 -> 2 -> 4), each time stopped with a savepoint and with
a crash in between; every subtask says who it is, and gives the sums of its own keys and of no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.events import CheckpointRequested, JobState
from rayflow.core.keygroups import owner_of
from rayflow.core.messages import CheckpointKind
from rayflow.operators import runs
from rayflow.operators.aggregates import count
from rayflow.operators.aggregates import sum as sum_of
from rayflow.operators.windows import tumbling
from rayflow.partition import hash_columns, key_groups
from rayflow.plan import build_plan
from rayflow.storage.layout import parse_shared
from rayflow.stream import Stream
from tests.simulation.broken_state import BROKEN_STATE
from tests.simulation.faults import Violation
from tests.simulation.run import play_on
from tests.simulation.scenario import SCHEMA, SECOND, table_of
from tests.simulation.scripted import Stage, finish, scripted, sink, until
from tests.simulation.stateful import I64
from tests.simulation.target import Row
from tests.simulation.tiny import forget_local_files, tiny
from tests.simulation.world import SimWorld

KEYS, GROUPS, CALLS = 42, 13, 30
THIRD = CALLS // 3
WAITS = (THIRD + THIRD // 2, 2 * THIRD + THIRD // 2, CALLS - 2)
"""Where the source waits in each run: a third of the time ends in each of the first two, and in the last its end."""
Flow = Callable[[Stream, tuple[int, ...]], tuple[Stream, Counter[Row]]]


class PerSubtask(rf.KeyedProcess):
    """Sums of each key over a third of the time, with the number of the subtask that gives it."""

    output = pa.schema([("subtask", I64), ("k", I64), ("end", I64), ("s", I64)])
    sums = rf.MapState(I64, I64)

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        for time, value in zip(ctx.timestamps.tolist(), rows["v"].to_pylist(), strict=True):
            end = (time // SECOND // THIRD + 1) * THIRD * SECOND
            self.sums[end] = self.sums.get(end, 0) + value
            ctx.timer(end)

    def on_timer(self, key: int, time: int, ctx: Any) -> None:
        ctx.emit({"subtask": ctx.subtask, "k": key, "end": time, "s": self.sums.pop(time)})


def process(stream: Stream, workers: tuple[int, ...]) -> tuple[Stream, Counter[Row]]:
    groups = key_groups(hash_columns([pa.array(range(KEYS))]), GROUPS)
    expected = Counter(
        (owner_of(int(groups[k]), p, GROUPS), k, (third + 1) * THIRD * SECOND, sum(k + call for call in calls))
        for third, p in enumerate(workers)
        for calls in [range(third * THIRD, (third + 1) * THIRD)]
        for k in range(KEYS)
    )
    return stream.key_by("k").process(PerSubtask()), expected


def window(stream: Stream, workers: tuple[int, ...]) -> tuple[Stream, Counter[Row]]:
    """One window over everything: what is in it at the first stop is there after the last."""
    result = stream.key_by("k").window(tumbling(CALLS)).agg(n=count(), s=sum_of("v"))
    total = sum(range(CALLS))
    return result, Counter((k, 0, CALLS * SECOND, CALLS, CALLS * k + total) for k in range(KEYS))


def running(stream: Stream, workers: tuple[int, ...]) -> tuple[Stream, Counter[Row]]:
    result = stream.key_by("k").agg(n=count(), s=sum_of("v")).select("k", "n", "s")
    return result, Counter(
        (k, n + 1, sum(k + call for call in range(n + 1))) for k in range(KEYS) for n in range(CALLS)
    )


class Gate:
    """The source: call i emits a row of each key at second i; it waits where it is not let through yet."""

    def __init__(self) -> None:
        self.upto = 0

    def stream(self) -> Stream:
        def generate(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
            for call in range(position // KEYS, CALLS):
                while call >= self.upto:
                    yield None
                yield table_of([(k, call * SECOND, k + call) for k in range(KEYS)]).to_batches()[0]

        return rf.from_generator(generate, schema=SCHEMA, event_time="t", max_delay="0s", parallelism=1)


def rescaled(flow: Flow, workers: tuple[int, int, int], seed: int, **state: Any) -> SimWorld:
    """Three runs that stop in the middle of a third of the time; checked against what must come out."""
    stage, gate = Stage.new(seed), Gate()
    target = stage.target()
    result, expected = flow(gate.stream(), workers)
    job = scripted(
        [(result, target, expected)], parallelism=workers[0], max_parallelism=GROUPS, batch_rows=8, interval_s=0.02
    )
    for name, value in state.items():
        object.__setattr__(job.config, name, value)
    plans = [build_plan("sim", [sink(result, target)], parallelism=p, max_parallelism=GROUPS) for p in workers]
    world = stage.world(job)
    world.start()
    for upto, plan in zip(WAITS, (*plans[1:], None), strict=True):
        gate.upto = upto
        _settle(world, stage, gate)
        _crash(world, stage)
        _settle(world, stage, gate)
        if plan is None:
            break
        world.coordinator_inbox.append(CheckpointRequested(CheckpointKind.STOP))
        play_on(world, steps_max=400_000)
        assert world.coordinator.outcome.state is JobState.STOPPED
        world.run_again(plan)
    gate.upto = CALLS
    finish(world, job)
    return world


def _settle(world: SimWorld, stage: Stage, gate: Gate) -> None:
    """All that the source gives out just now lies before two confirmed checkpoints."""
    for _ in range(2):
        before = stage.confirmed

        def behind(before: int = before) -> bool:
            if stage.confirmed == before:
                return False
            newest = stage.observer.ever[max(stage.observer.ever)]
            return any(x.position == gate.upto * KEYS for s in newest.subtasks for x in s.splits)

        until(world, behind, steps_max=400_000)


def _crash(world: SimWorld, stage: Stage) -> None:
    until(world, lambda: len(world.slots) > 1)
    keyed = [slot for slot in world.slots.values() if slot.runtime.subtask.index > 0]
    world.crash_subtask(keyed[0])


FLOWS = {"process": process, "window": window, "running": running}


def reused(world: SimWorld) -> int:
    """How often a manifest of a run names a file that was written at another parallelism."""
    manifests = world.observer.ever
    return sum(
        parse_shared(file.path) in manifests and manifests[parse_shared(file.path)].parallelism != m.parallelism  # type: ignore[index]
        for m in manifests.values()
        for s in m.subtasks
        for h in s.states
        for file in h.files
    )


@pytest.mark.parametrize("workers", [(2, 4, 2), (4, 2, 4)], ids=str)
@pytest.mark.parametrize("state", ["full", "incremental", "rocksdb"])
@pytest.mark.parametrize("flow", sorted(FLOWS))
def test_every_key_is_where_its_group_belongs(flow: str, state: str, workers: tuple[int, int, int]) -> None:
    options: dict[str, Any] = {"state": "rocksdb", "state_memory_bytes": 2_000} if state == "rocksdb" else {}
    bounds: AbstractContextManager[None] = nullcontext() if state == "full" else tiny()
    with bounds:
        rescaled(FLOWS[flow], workers, 1, **options)
    forget_local_files()


@pytest.mark.parametrize(
    ("broken", "flow"),
    [
        ("read_all_key_groups", "window"),
        ("call_a_part_of_a_piece_by_the_name_of_the_whole", "window"),
        ("forget_timers", "process"),
    ],
)
def test_an_engine_that_mixes_up_key_groups_is_caught(broken: str, flow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny():
        monkeypatch.setattr(runs, "PENDING_ROWS", 100_000)  # pieces live through both changes
        monkeypatch.setattr(runs, "SMALL_ROWS", 1)
        world = rescaled(FLOWS[flow], (2, 4, 2), 1)
        assert flow != "window" or reused(world), "files of before the change of parallelism are named after it"
        with BROKEN_STATE[broken](), pytest.raises((Violation, AssertionError)):
            rescaled(FLOWS[flow], (2, 4, 2), 1)
