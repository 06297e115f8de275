"""P7: storage that lies. Nothing that is not whole is ever restored; what is wrong is named, and the job stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

import rayflow as rf
from rayflow.core.events import JobState
from rayflow.core.ids import CheckpointId
from rayflow.operators.aggregates import count
from rayflow.operators.aggregates import sum as sum_of
from rayflow.operators.windows import tumbling
from rayflow.storage.faults import flipped
from rayflow.storage.layout import manifest_path
from tests.simulation.scenario import SECOND, table_of
from tests.simulation.scripted import Stage, scripted, until
from tests.simulation.storage import Observer

ROWS, SIZE = 200, 20

Damage = Callable[[Observer, str], None]


def flip(store: Observer, path: str) -> None:
    """One bit; of a state file one in rows, because what nobody reads (a footer, padding) cannot do harm."""
    data = store._objects[path]
    begin, end = 0, len(data)
    for handle in (h for s in store.manifests[newest(store)].subtasks for h in s.states):
        if handle.file is not None and handle.file.path == path and handle.rows and handle.section is not None:
            begin, end = handle.section.offset, handle.section.offset + handle.section.nbytes
            if handle.blocks:
                begin += handle.blocks[-1].offset
                end = begin + handle.blocks[-1].nbytes
            break
    store._objects[path] = data[:begin] + flipped(data[begin:end]) + data[end:]


def tear(store: Observer, path: str) -> None:
    store._objects[path] = store._objects[path][: len(store._objects[path]) // 2]


def lose(store: Observer, path: str) -> None:
    del store._objects[path]


def newest(store: Observer) -> CheckpointId:
    return max(store.manifests)


def state_file(store: Observer) -> str:
    return store.manifests[max(store.manifests)].files()[0].path


def manifest_file(store: Observer) -> str:
    return manifest_path(newest(store))


@pytest.mark.parametrize("victim", ["subtask", "coordinator"])
@pytest.mark.parametrize(
    ("find", "damage"),
    [(state_file, flip), (state_file, tear), (state_file, lose), (manifest_file, flip), (manifest_file, tear)],
)
@pytest.mark.parametrize("seed", range(3))
def test_damage_is_found_named_and_ends_the_job(
    find: Callable[[Observer], str], damage: Damage, victim: str, seed: int
) -> None:
    stage = Stage.new(seed)
    rows = [(i % 4, i * SECOND, i) for i in range(ROWS)]
    stream = rf.from_arrow(table_of(rows), batch_rows=1, event_time="t", max_delay="0s")
    result = stream.key_by("k").window(tumbling(SIZE)).agg(n=count(), s=sum_of("v"))
    groups: dict[tuple[int, int], list[int]] = {}
    for k, t, v in rows:
        groups.setdefault((k, t // (SIZE * SECOND) * SIZE * SECOND), []).append(v)
    expected = Counter((k, t, t + SIZE * SECOND, len(v), sum(v)) for (k, t), v in groups.items())
    target = stage.target()
    job = scripted([(result, target, expected)], parallelism=2)
    world = stage.world(job)
    world.start()
    until(world, lambda: stage.observer.manifests and stage.observer.manifests[newest(stage.observer)].files())
    until(world, lambda: world.coordinator.machine.pending is None)
    path = find(stage.observer)
    damage(stage.observer, path)
    world.crash_subtask(next(iter(world.slots.values()))) if victim == "subtask" else world.crash_coordinator()
    for _ in range(200_000):
        if world.coordinator.ended and not world.coordinator_down:
            break
        world.step()
    ended = world.coordinator.outcome
    assert ended.state is JobState.FAILED
    assert ended.cause is not None
    assert ended.cause.kind == "CorruptCheckpointError"
    assert path in ended.cause.message
    assert target.rows() <= expected, "what was committed stays right"
