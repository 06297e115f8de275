"""P5: bounded inputs. A final checkpoint commits the tail; a branch may end long before another; a job may stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.events import CheckpointRequested, JobState
from rayflow.core.messages import CheckpointKind
from rayflow.core.roster import SubtaskState
from rayflow.operators.aggregates import count
from rayflow.operators.aggregates import sum as sum_of
from rayflow.operators.windows import tumbling
from rayflow.stream import Stream
from tests.simulation.run import play
from tests.simulation.scenario import SCHEMA, SECOND, table_of
from tests.simulation.scripted import Stage, finish, scripted, until
from tests.simulation.target import Row
from tests.simulation.world import SimWorld

SHORT, LONG, SIZE = 4, 80, 10


class Gate:
    """Holds the long branch back at a row until it is opened."""

    def __init__(self) -> None:
        self.open = False
        self.reached = False


def branches(gate: Gate) -> tuple[Stream, Counter[Row]]:
    """A short and a long source into one window step."""

    def long(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for i in range(position, LONG):
            while i >= LONG // 2 and not gate.open:
                gate.reached = True
                yield None
            yield table_of([(i % 3, i * SECOND, i)]).to_batches()[0]

    short_rows = [(i % 3, i * SECOND, 1000) for i in range(SHORT)]
    a = rf.from_arrow(table_of(short_rows), batch_rows=1, event_time="t", max_delay="0s", name="short")
    b = rf.from_generator(long, schema=SCHEMA, event_time="t", max_delay="0s", name="long")
    result = a.union(b).key_by("k").window(tumbling(SIZE)).agg(n=count(), s=sum_of("v"))
    groups: dict[tuple[int, int], list[int]] = {}
    for k, t, v in short_rows + [(i % 3, i * SECOND, i) for i in range(LONG)]:
        groups.setdefault((k, t // (SIZE * SECOND) * SIZE * SECOND), []).append(v)
    return result, Counter((k, t, t + SIZE * SECOND, len(v), sum(v)) for (k, t), v in groups.items())


def short_has_ended(world: SimWorld) -> bool:
    subtasks = world.coordinator.machine.subtasks.values()
    return all(m.state is SubtaskState.ENDED for m in subtasks if m.subtask.chain == "short")


@pytest.mark.parametrize("parallelism", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_without_an_interval_the_final_checkpoint_commits_everything(parallelism: int, seed: int) -> None:
    stage, gate = Stage.new(seed), Gate()
    gate.open = True
    stream, expected = branches(gate)
    job = scripted([(stream, stage.target(), expected)], parallelism=parallelism, interval_s=None)
    world = stage.world(job)
    play(world)
    finish(world, job)
    assert [m.kind for m in stage.observer.ever.values()] == ["final"]


@pytest.mark.parametrize("parallelism", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_checkpoints_complete_long_after_a_branch_has_ended(parallelism: int, seed: int) -> None:
    stage, gate = Stage.new(seed), Gate()
    stream, expected = branches(gate)
    job = scripted([(stream, stage.target(), expected)], parallelism=parallelism)
    world = stage.world(job)
    world.start()
    until(world, lambda: short_has_ended(world))
    before = stage.confirmed
    until(world, lambda: stage.confirmed >= before + 3)
    slot = next(iter(world.slots.values()))
    world.crash_subtask(slot)
    until(world, lambda: world.coordinator.machine.restarts == 1 and short_has_ended(world))
    gate.open = True
    finish(world, job)


@pytest.mark.parametrize("restart_parallelism", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_a_job_that_stops_after_a_branch_has_ended_goes_on_exactly_there(seed: int, restart_parallelism: int) -> None:
    stage, gate = Stage.new(seed), Gate()
    stream, expected = branches(gate)
    target = stage.target()
    job = scripted([(stream, target, expected)], parallelism=2, interval_s=None)
    world = stage.world(job)
    world.start()
    until(world, lambda: short_has_ended(world) and gate.reached)
    world.coordinator_inbox.append(CheckpointRequested(CheckpointKind.STOP))
    until(world, lambda: world.coordinator.ended)
    assert world.coordinator.outcome.state is JobState.STOPPED
    assert target.rows() <= expected
    assert target.rows() != expected
    assert not target.prepared

    gate.open = True
    again = scripted([(stream, target, expected)], parallelism=restart_parallelism, interval_s=None)
    next_world = Stage(stage.rng, stage.faults, stage.observer).world(again)
    play(next_world)
    finish(next_world, again)
    assert [m.kind for m in stage.observer.ever.values()] == ["stop", "final"]


def test_a_source_that_has_stopped_waits_for_the_end_instead_of_asking_to_be_run() -> None:
    stage, gate = Stage.new(0), Gate()
    stream, expected = branches(gate)
    world = stage.world(scripted([(stream, stage.target(), expected)], parallelism=1, interval_s=None))
    world.start()
    until(world, lambda: gate.reached)
    world.coordinator_inbox.append(CheckpointRequested(CheckpointKind.STOP))
    source = next(slot.runtime for slot in world.slots.values() if slot.subtask.chain == "long")
    until(world, lambda: source._machine is not None and source._machine.stopped)
    source.work()
    deadline = source.next_deadline()
    assert deadline is None or deadline > world.clock.now
