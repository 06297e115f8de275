"""P6: what sinks are told. Every outcome at most once, and a notice that got lost is made up by the next one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.ids import CheckpointId, SubtaskId
from rayflow.core.messages import Abort, CommandEnvelope, Complete
from rayflow.storage.faults import Fault
from rayflow.storage.layout import manifest_path
from tests.simulation.scenario import SCHEMA, SECOND, table_of
from tests.simulation.scripted import Stage, finish, scripted, until
from tests.simulation.target import Target
from tests.simulation.world import SimCoordinatorSide, SimWorld

ROWS = 60


class Told:
    """Keeps what each subtask is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.completed: Counter[tuple[SubtaskId, CheckpointId]] = Counter()
        self.aborted: Counter[tuple[SubtaskId, CheckpointId]] = Counter()
        original = SimCoordinatorSide.send

        def send(side: SimCoordinatorSide, envelope: CommandEnvelope) -> None:
            match envelope.command:
                case Complete(checkpoint):
                    self.completed[envelope.subtask, checkpoint] += 1
                case Abort(checkpoint):
                    self.aborted[envelope.subtask, checkpoint] += 1
                case _:
                    pass
            original(side, envelope)

        monkeypatch.setattr(SimCoordinatorSide, "send", send)


def tokens_of(target: Target, checkpoint: int) -> set[str]:
    return {token for token, of in target.checkpoint_of.items() if of == checkpoint}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("parallelism", [1, 2])
def test_outcomes_are_told_once_and_a_lost_notice_is_made_up(
    seed: int, parallelism: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, told = Stage.new(seed), Told(monkeypatch)
    target = stage.target()
    world: SimWorld

    def slow(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        # A tenth of the rows after each end of a checkpoint, so that every checkpoint has rows of its own.
        for i in range(position, ROWS):
            while world.coordinator.machine.counts.completed + world.coordinator.machine.counts.aborted < i * 6 // ROWS:
                yield None
            yield table_of([(i, i * SECOND, i)]).to_batches()[0]

    stream = rf.from_generator(slow, schema=SCHEMA, parallelism=1).key_by("k")
    expected = Counter((i, i * SECOND, i) for i in range(ROWS))
    job = scripted([(stream, target, expected)], parallelism=parallelism, interval_s=0.01)
    world = stage.world(job)

    failed: list[str] = []

    def script(operation: str, path: str) -> Fault | None:
        if operation == "put_if_absent" and path == manifest_path(1):
            failed.append(path)
            return Fault.FAIL
        if operation == "put" and path.startswith("chk-00000002/") and "sink" in path:
            failed.append(path)
            return Fault.HALF
        return None

    world.store.script = script
    lost: list[Complete] = []

    def lose(complete: Complete) -> Complete:
        if complete.checkpoint == 4:
            lost.append(complete)
            return Complete(CheckpointId(0))
        return complete

    world.on_complete = lose
    world.start()
    until(world, lambda: world.coordinator.machine.last_completed == 5 and not world.coordinator.ended)
    assert len(failed) >= 2, "both failures must have happened"
    assert lost, "the notice must have been lost"
    assert 1 not in stage.observer.ever
    assert 2 not in stage.observer.ever
    assert not tokens_of(target, 4) & target.committed.keys(), "nobody was told of 4 yet"
    assert tokens_of(target, 4), "4 must have rows of its own"
    assert tokens_of(target, 1) | tokens_of(target, 2) <= target.committed.keys(), "3 commits what 1 and 2 prepared"
    finish(world, job)
    assert tokens_of(target, 4) <= target.committed.keys()
    by_five = [call for call in target.commit_calls if tokens_of(target, 4) & set(call)]
    assert all(tokens_of(target, 5) & set(call) or not tokens_of(target, 5) for call in by_five[:1])
    assert max(told.completed.values()) == 1
    assert max(told.aborted.values()) == 1
    assert {checkpoint for _, checkpoint in told.aborted} == {1, 2}
    assert max(Counter(token for call in target.commit_calls for token in call).values()) == 1
