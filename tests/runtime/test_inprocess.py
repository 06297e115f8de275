"""The in-process world: what a death takes with it, and that a small job is exact whoever dies, and when (rule R3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.core.events import CoordinatorEvent, JobState, SubtaskDied, Tick
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.messages import CommandEnvelope, Data, Shutdown, Watermark
from rayflow.operators.base import Committer
from rayflow.operators.sinks.local import LocalCommitter
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.coordinator_loop import settings_of
from rayflow.runtime.inprocess import Clock, CoordinatorSide, Slot, SubtaskSide, World
from rayflow.runtime.local import LocalDriver
from rayflow.runtime.ports import ChannelBroken, CreditArrived, ElementArrived, Nothing
from rayflow.runtime.results import collected
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.snapshots import SnapshotStore
from rayflow.storage.store import MemoryStore
from tests.runtime.fakes import batch

N = 300
TIMES = pa.array([i * 1000 for i in range(N)], pa.timestamp("us"))
ROWS = pa.table({"k": [i % 5 for i in range(N)], "v": list(range(N)), "t": TIMES})
CONFIG = rf.JobConfig(batch_rows=16, inflight_bytes=2048, linger="1ms", watermark_interval="2ms")
CHECKPOINTS = rf.CheckpointConfig("unused", interval="4ms")


class Job:
    """Rows to files as they are, and sums by window to `collect`; checkpoints in memory."""

    def __init__(self, out: Path) -> None:
        self.out = out
        rows = rf.from_arrow(ROWS, splits=3, batch_rows=7, event_time="t", max_delay="1ms")
        sums = rows.key_by("k").window(rf.tumbling("100ms")).agg(n=rf.count(), v=rf.sum("v"))
        self.plan = rf.Flow("small", rows.write_parquet(str(out)), sums.collect()).plan(parallelism=2, config=CONFIG)
        self.store = MemoryStore()
        self.snapshots = SnapshotStore(self.store, CONFIG.max_parallelism)

    def world(self) -> World:
        return World(
            self.plan,
            JobSpec(self.plan, CONFIG, True, "run", heartbeat_s=None),
            settings_of(CONFIG, CHECKPOINTS),
            checkpoints=CheckpointStore(self.store, "small"),
            snapshots=self.snapshots,
            retain=2,
        )

    def files(self) -> list[int]:
        found = sorted(self.out.glob("*.parquet"))
        return sorted(v for f in found for v in pq.read_table(f)["v"].to_pylist())

    def sums(self, world: World) -> list[tuple[int, int, int, int]]:
        table = collected(self.plan, world.coordinator.outcome.manifest, self.snapshots)["collect-1"]
        starts = table["window_start"].cast(pa.int64())
        columns = [table["k"].to_pylist(), starts.to_pylist(), table["n"].to_pylist(), table["v"].to_pylist()]
        return sorted(zip(*columns, strict=True))


def expected_sums() -> list[tuple[int, int, int, int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for i in range(N):
        found.setdefault((i % 5, i * 1000 // 100_000 * 100_000), []).append(i)
    return sorted((k, start, len(vs), sum(vs)) for (k, start), vs in found.items())


Fault = Callable[[World], None]


def run_with(job: Job, faults: dict[int, Fault]) -> World:
    """Run to the end; ``faults`` happen after the rounds of these numbers."""
    world, count = job.world(), 0

    def on_round(world: World) -> None:
        nonlocal count
        count += 1
        if count in faults and not world.coordinator.ended:
            faults[count](world)

    LocalDriver(world, on_round=on_round).run()
    world.rounds = count  # type: ignore[attr-defined]
    return world


def is_exact(job: Job, world: World) -> bool:
    return (
        world.coordinator.outcome.state is JobState.FINISHED
        and job.files() == list(range(N))
        and job.sums(world) == expected_sums()
    )


def kill_one(which: int) -> Fault:
    def kill(world: World) -> None:
        if world.slots:
            world.kill_subtask(sorted(world.slots)[which % len(world.slots)], "killed by the test")

    return kill


def kill_coordinator(world: World) -> None:
    world.kill_coordinator()


def test_without_faults_it_is_exact_and_takes_many_rounds_and_checkpoints(tmp_path: Path) -> None:
    job = Job(tmp_path / "out")
    world = run_with(job, {})
    assert is_exact(job, world)
    assert world.rounds > 30  # type: ignore[attr-defined]
    assert world.coordinator.machine.counts.completed >= 4
    assert world.slots == {}
    assert sorted(p.suffix for p in job.out.iterdir() if p.is_dir()) == [], "nothing is left behind"


@pytest.mark.parametrize("when", range(1, 40, 3))
def test_a_subtask_that_dies(when: int, tmp_path: Path) -> None:
    job = Job(tmp_path / "out")
    world = run_with(job, {when: kill_one(when)})
    assert is_exact(job, world)
    assert world.coordinator.machine.restarts <= 1


@pytest.mark.parametrize("when", range(2, 40, 3))
def test_a_coordinator_that_dies(when: int, tmp_path: Path) -> None:
    job = Job(tmp_path / "out")
    assert is_exact(job, run_with(job, {when: kill_coordinator}))


@pytest.mark.parametrize("seed", range(12))
def test_several_deaths(seed: int, tmp_path: Path) -> None:
    dice = Random(seed)
    faults = {
        dice.randrange(1, 60): dice.choice([kill_one(dice.randrange(9)), kill_one(dice.randrange(9)), kill_coordinator])
        for _ in range(4)
    }
    job = Job(tmp_path / "out")
    assert is_exact(job, run_with(job, faults)), f"seed {seed}: {sorted(faults)}"


def test_a_sink_that_commits_what_it_prepares_at_once_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken on purpose (rule C2): output is made visible before the manifest is durable."""
    from rayflow.runtime.uploads import Uploads

    honest = Uploads.upload

    def hasty(self: Uploads, checkpoint, *rest):  # type: ignore[no-untyped-def]
        snapshot = honest(self, checkpoint, *rest)
        self.commit(checkpoint)
        return snapshot

    monkeypatch.setattr(Uploads, "upload", hasty)
    monkeypatch.setattr(LocalCommitter, "_refuse_other_output", lambda self: None)

    def exact(when: int) -> bool:
        job = Job(tmp_path / str(when))
        return is_exact(job, run_with(job, {when: kill_one(when)}))

    assert not all(exact(when) for when in range(10, 40))


# ------------------------------------------------------------------------------------------------------------ the parts


def started(tmp_path: Path) -> tuple[World, list[SubtaskId]]:
    world = Job(tmp_path / "out").world()
    subtasks = list(world.coordinator.machine.topology.subtasks)
    for subtask in subtasks:
        world.start_subtask(subtask, 1)
    return world, subtasks


def test_a_killed_subtask_takes_its_inbox_and_its_tasks_along_and_the_coordinator_is_told(tmp_path: Path) -> None:
    world, (first, *others) = started(tmp_path)
    world.slots[first].tasks.append(Nothing)
    world.kill_subtask(first, "kill -9")
    assert first not in world.slots
    assert sorted(world.slots) == sorted(others)
    assert list(world.coordinator_inbox) == [SubtaskDied(first, 1, "kill -9")]


def test_stopping_a_process_of_another_incarnation_stops_nothing(tmp_path: Path) -> None:
    world, (first, *_) = started(tmp_path)
    side = CoordinatorSide(world)
    side.stop_subtask(first, 2)
    side.stop_subtask(SubtaskId("nobody", 0), 1)
    assert first in world.slots
    side.stop_subtask(first, 1)
    assert first not in world.slots


def test_commands_to_the_dead_are_lost(tmp_path: Path) -> None:
    world, (first, *_) = started(tmp_path)
    world.kill_subtask(first, "kill -9")
    CoordinatorSide(world).send(CommandEnvelope(Attempt(1), first, 0, Shutdown()))
    assert all(not slot.inbox for slot in world.slots.values())


def pair(tmp_path: Path) -> tuple[World, ChannelId, Slot, Slot, SubtaskSide, SubtaskSide]:
    """A channel with both its ends, connected in attempt 3."""
    world, _ = started(tmp_path)
    channel = next(c for c in world.coordinator.machine.topology.channels if c.source != c.target)
    source, target = world.slots[channel.source], world.slots[channel.target]
    sender, receiver = SubtaskSide(world, source), SubtaskSide(world, target)
    for side in (sender, receiver):
        side.accept(Attempt(3), [channel])
    sender.connect(Attempt(3), {channel: receiver.address})
    return world, channel, source, target, sender, receiver


def test_elements_and_credit_carry_the_attempt_and_credit_is_cumulative(tmp_path: Path) -> None:
    _, channel, source, target, sender, receiver = pair(tmp_path)
    data = Data(batch(1), 8)
    sender.send(channel, data)
    sender.send(channel, Watermark(5))
    assert list(target.inbox) == [
        ElementArrived(Attempt(3), channel, data),
        ElementArrived(Attempt(3), channel, Watermark(5)),
    ]
    receiver.return_credit(channel, 8)
    receiver.return_credit(channel, 4)
    assert list(source.inbox) == [CreditArrived(Attempt(3), channel, 8), CreditArrived(Attempt(3), channel, 12)]
    receiver.accept(Attempt(4), [channel])
    receiver.return_credit(channel, 1)
    assert source.inbox[-1] == CreditArrived(Attempt(4), channel, 1), "it counts anew in every attempt"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_channel_to_a_dead_or_replaced_process_is_broken(replaced: bool, tmp_path: Path) -> None:
    """The one that took its place listens elsewhere: what is meant for the dead must not reach it."""
    world, channel, source, _, sender, receiver = pair(tmp_path)
    world.kill_subtask(channel.target, "kill -9")
    if replaced:
        world.start_subtask(channel.target, 2)
    sender.send(channel, Watermark(5))
    (broken,) = source.inbox
    assert isinstance(broken, ChannelBroken)
    assert (broken.attempt, broken.channel) == (3, channel)
    assert not replaced or not world.slots[channel.target].inbox
    world.kill_subtask(channel.source, "kill -9")
    receiver.return_credit(channel, 8)


def test_a_coordinator_that_dies_takes_everything_along_and_begins_from_storage(tmp_path: Path) -> None:
    world, _ = started(tmp_path)
    before = world.coordinator
    world.coordinator_inbox.append(Tick())
    world.kill_coordinator()
    assert world.slots == {}
    assert not world.coordinator_inbox
    assert world.coordinator is not before
    assert len(world.coordinator_tasks) == 1, "it reads storage"


def test_a_background_task_without_an_answer_tells_nothing(tmp_path: Path) -> None:
    world = Job(tmp_path / "out").world()
    answers: list[CoordinatorEvent | None] = [None, Tick()]
    for answer in answers:
        world.coordinator_tasks.append(lambda answer=answer: answer)  # type: ignore[misc]
    world.coordinator_run_task()
    assert not world.coordinator_inbox
    world.coordinator_run_task()
    assert list(world.coordinator_inbox) == [Tick()]


def test_the_clock_goes_forward_only() -> None:
    clock = Clock(5.0)
    clock.advance_to(3.0)
    assert clock.now == 5.0
    clock.advance_to(6.0)
    assert clock.now == 6.0


def test_committers_of_the_small_job_are_the_real_ones(tmp_path: Path) -> None:
    """Else the tests above would show nothing."""
    committers = [p.factory.committer() for p in Job(tmp_path / "out").plan.sinks().values()]
    assert any(isinstance(c, Committer) for c in committers)
