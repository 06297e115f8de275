"""A whole job inside one process: the world in which the local runtime and the deterministic simulator run.

Nothing here runs by itself. The world holds subtasks with their inboxes and background tasks, and the coordinator
with its own; a driver decides what happens next: the local runtime goes round in a fixed order, the simulator draws
from a seed. Time is virtual and moves only when the driver says so, so that a run is the same every time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rayflow.core.coordinator import CoordinatorSettings
from rayflow.core.events import CoordinatorEvent, Reported, SubtaskDied, Tick
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.messages import CommandEnvelope, Element, Failed, ReportEnvelope
from rayflow.plan import Plan
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.coordinator_loop import CoordinatorRuntime
from rayflow.runtime.ports import (
    ChannelBroken,
    CommandArrived,
    CreditArrived,
    ElementArrived,
    SnapshotStore,
    SubtaskEvent,
)
from rayflow.runtime.subtask_loop import SubtaskRuntime
from rayflow.storage.checkpoints import CheckpointStore


class Clock:
    """Virtual seconds."""

    def __init__(self, start: float = 0.0) -> None:
        self.now = start

    def advance_to(self, time: float) -> None:
        self.now = max(self.now, time)


@dataclass(slots=True)
class Slot:
    """One process of a subtask: dead ones are replaced by a new slot."""

    subtask: SubtaskId
    incarnation: int
    inbox: deque[SubtaskEvent] = field(default_factory=deque)
    tasks: deque[Callable[[], SubtaskEvent]] = field(default_factory=deque)
    taken: dict[ChannelId, int] = field(default_factory=dict)
    """Bytes taken from each input channel in this attempt; credit is cumulative."""
    runtime: SubtaskRuntime = field(init=False)

    @property
    def address(self) -> str:
        return f"in-process://{self.subtask}/{self.incarnation}"

    def deliver_one(self) -> None:
        self.runtime.handle(self.inbox.popleft())

    def run_task(self) -> None:
        self.inbox.append(self.tasks.popleft()())

    def work(self) -> None:
        self.runtime.work()


class World:
    """Subtasks, coordinator and what travels between them."""

    def __init__(
        self,
        plan: Plan,
        spec: JobSpec,
        settings: CoordinatorSettings,
        *,
        checkpoints: CheckpointStore,
        snapshots: SnapshotStore,
        retain: int = 1,
        memory_bound: int | None = None,
        clock: Clock | None = None,
        wall_time: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.clock = clock or Clock()
        self.slots: dict[SubtaskId, Slot] = {}
        self.coordinator_inbox: deque[CoordinatorEvent] = deque()
        self.coordinator_tasks: deque[Callable[[], CoordinatorEvent | None]] = deque()
        self._plan = plan
        self._spec = spec
        self._settings = settings
        self._checkpoints = checkpoints
        self._snapshots = snapshots
        self._retain = retain
        self._memory_bound = memory_bound
        self._epoch = wall_time() - self.clock.now
        self.last_error: Exception | None = None
        """The last exception that a subtask raised, for chaining."""
        self.coordinator = self._new_coordinator()

    def _new_coordinator(self) -> CoordinatorRuntime:
        return CoordinatorRuntime(
            self._plan,
            self._settings,
            store=self._checkpoints,
            retain=self._retain,
            host=CoordinatorSide(self),
            memory_bound=self._memory_bound,
            staging=self._spec.staging,
        )

    # ------------------------------------------------------------------------------- what travels (simulators override)

    def post(self, key: object, deliver: Callable[[], None]) -> None:
        """Something leaves for somewhere; messages of one key keep their order. Here it arrives at once."""
        deliver()

    def now(self) -> float:
        return self.clock.now

    def wall_time(self) -> float:
        return self._epoch + self.clock.now

    def make_runtime(self, slot: Slot) -> SubtaskRuntime:
        return SubtaskRuntime(slot.subtask, self._spec, SubtaskSide(self, slot), self._snapshots)

    # ------------------------------------------------------------------------------------------------ life of processes

    def start_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        slot = Slot(subtask, incarnation)
        slot.runtime = self.make_runtime(slot)
        self.slots[subtask] = slot

    def kill_subtask(self, subtask: SubtaskId, reason: str) -> None:
        """The process is gone at once, with its inbox and whatever it was uploading; the news travels."""
        slot = self.slots.pop(subtask)
        died = SubtaskDied(subtask, slot.incarnation, reason)
        self.post(object(), lambda: self.coordinator_inbox.append(died))

    def retire_subtask(self, subtask: SubtaskId) -> None:
        """The coordinator stops the process: its resources are released."""
        self.slots[subtask].runtime.close()
        self.kill_subtask(subtask, "stopped")

    def kill_coordinator(self) -> None:
        """The coordinator dies, and with it the subtasks it owns; a new one begins from storage alone."""
        self.slots.clear()
        self.coordinator_inbox.clear()
        self.coordinator_tasks.clear()
        self.coordinator = self._new_coordinator()
        self.coordinator.start()

    # ------------------------------------------------------------------------------------------------ coordinator steps

    def coordinator_deliver_one(self) -> None:
        self.coordinator.handle(self.coordinator_inbox.popleft())

    def coordinator_run_task(self) -> None:
        event = self.coordinator_tasks.popleft()()
        if event is not None:
            self.coordinator_inbox.append(event)

    def coordinator_tick(self) -> bool:
        """Tell the coordinator the time if it has asked for it; whether it had."""
        deadline = self.coordinator.next_deadline()
        if deadline is None or deadline > self.clock.now:
            return False
        self.coordinator.handle(Tick())
        return True

    def next_deadline(self) -> float | None:
        """When something happens by itself although nothing travels."""
        deadlines = [slot.runtime.next_deadline() for slot in self.slots.values()]
        deadlines.append(self.coordinator.next_deadline())
        return min((d for d in deadlines if d is not None), default=None)


class SubtaskSide:
    """The `SubtaskHost` of one slot."""

    def __init__(self, world: World, slot: Slot) -> None:
        self._world = world
        self._slot = slot
        self._attempt = Attempt(-1)
        self._addresses: dict[ChannelId, str] = {}

    @property
    def address(self) -> str:
        return self._slot.address

    @property
    def pid(self) -> int:
        return self._slot.incarnation

    @property
    def node(self) -> str:
        return "in-process"

    def now(self) -> float:
        return self._world.now()

    def wall_time(self) -> float:
        return self._world.wall_time()

    def accept(self, attempt: Attempt, channels: Sequence[ChannelId]) -> None:
        self._attempt = attempt
        self._slot.taken = dict.fromkeys(channels, 0)

    def connect(self, attempt: Attempt, addresses: Mapping[ChannelId, str]) -> None:
        self._addresses = dict(addresses)

    def disconnect(self) -> None:
        self._addresses = {}

    def send(self, channel: ChannelId, element: Element) -> None:
        attempt, address, world, sender = self._attempt, self._addresses[channel], self._world, self._slot

        def deliver() -> None:
            target = world.slots.get(channel.target)
            if target is not None and target.address == address:
                target.inbox.append(ElementArrived(attempt, channel, element))
            else:
                sender.inbox.append(ChannelBroken(attempt, channel, f"{channel.target} is gone"))

        world.post(("element", channel, attempt), deliver)

    def return_credit(self, channel: ChannelId, nbytes: int) -> None:
        self._slot.taken[channel] += nbytes
        attempt, taken, world = self._attempt, self._slot.taken[channel], self._world

        def deliver() -> None:
            source = world.slots.get(channel.source)
            if source is not None:
                source.inbox.append(CreditArrived(attempt, channel, taken))

        world.post(("credit", channel, attempt), deliver)

    def report(self, envelope: ReportEnvelope) -> None:
        world = self._world
        if isinstance(envelope.report, Failed):
            world.last_error = self._slot.runtime.last_error
        world.post(object(), lambda: world.coordinator_inbox.append(Reported(envelope)))

    def background(self, task: Callable[[], SubtaskEvent]) -> None:
        self._slot.tasks.append(task)


class CoordinatorSide:
    """The `CoordinatorHost` of the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> float:
        return self._world.now()

    def wall_time(self) -> float:
        return self._world.wall_time()

    def start_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        self._world.start_subtask(subtask, incarnation)

    def stop_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        slot = self._world.slots.get(subtask)
        if slot is not None and slot.incarnation == incarnation:
            self._world.retire_subtask(subtask)

    def send(self, envelope: CommandEnvelope) -> None:
        world = self._world

        def deliver() -> None:
            slot = world.slots.get(envelope.subtask)
            if slot is not None:
                slot.inbox.append(CommandArrived(envelope))

        world.post(object(), deliver)

    def background(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        self._world.coordinator_tasks.append(task)

    def look(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        self.background(task)
