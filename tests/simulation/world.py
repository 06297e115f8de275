"""A `World` whose every next step is drawn: a message of one wire, a handler, a task, a tick, a while of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from rayflow.core.coordinator import CoordinatorSettings
from rayflow.core.events import CancelRequested, CheckpointRequested, CoordinatorEvent, JobState, TakeSnapshot
from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.messages import CheckpointKind, CommandEnvelope, Complete, Data, Element, ReportEnvelope
from rayflow.plan import Plan
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.coordinator_loop import CoordinatorRuntime
from rayflow.runtime.inprocess import CoordinatorSide, Slot, SubtaskSide, World
from rayflow.runtime.ports import SnapshotStore as SnapshotPort
from rayflow.runtime.ports import SubtaskEvent
from rayflow.runtime.subtask_loop import SubtaskRuntime
from rayflow.storage.checkpoints import CheckpointStore
from rayflow.storage.snapshots import SnapshotStore
from tests.simulation.faults import Crash, Faults, Violation
from tests.simulation.monitors import Monitors
from tests.simulation.storage import Observer, SimStore
from tests.simulation.target import Target

Label = tuple[Any, ...]
Deliver = Callable[[], None]

KINDS = ("element", "credit", "command", "report", "news", "late")


class Wires:
    """Messages on their way: those of one key keep their order, the rest may overtake each other at will."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._wires: dict[object, deque[tuple[Label, Deliver]]] = {}
        self._keys: dict[str, list[object]] = {kind: [] for kind in KINDS}

    def put(self, kind: str, key: object, label: Label, deliver: Deliver) -> None:
        wire = self._wires.get(key)
        if wire is None:
            wire = self._wires[key] = deque()
            self._keys[kind].append(key)
        wire.append((label, deliver))

    def take(self, kind: str) -> tuple[Label, Deliver] | None:
        keys = self._keys[kind]
        if not keys:
            return None
        at = int(self._rng.random() * len(keys))
        key = keys[at]
        wire = self._wires[key]
        message = wire.popleft()
        if not wire:
            del self._wires[key]
            keys[at] = keys[-1]
            keys.pop()
        return message

    def coordinator_died(self) -> None:
        """What it was told of deaths is gone with its process: the next one numbers its processes anew."""
        for key in self._keys["news"]:
            del self._wires[key]
        self._keys["news"].clear()

    def sender_died(self, subtask: SubtaskId) -> None:
        """What a dead process had sent: of each stream a drawn prefix arrives, of its reports a drawn part."""
        for key in list(self._keys["element"]):
            assert isinstance(key, tuple)
            if key[1].source == subtask and self._rng.random() < 0.5:
                wire = self._wires[key]
                for _ in range(self._rng.randint(0, len(wire))):
                    wire.pop()
                if not wire:
                    del self._wires[key]
                    self._keys["element"].remove(key)
        for key in list(self._keys["report"]):
            label = self._wires[key][0][0]
            if label[1] == subtask and self._rng.random() < 0.3:
                del self._wires[key]
                self._keys["report"].remove(key)


class SimWorld(World):
    """``trace`` keeps the last steps; all of them with ``keep=None``."""

    def __init__(
        self,
        plan: Plan,
        spec: JobSpec,
        settings: CoordinatorSettings,
        *,
        rng: Random,
        faults: Faults,
        observer: Observer,
        targets: tuple[Target, ...],
        wait_s: float,
        retain: int,
        inline_max_bytes: int | None,
        keep: int | None = 60,
    ) -> None:
        self.rng = rng
        self.faults = faults
        self.observer = observer
        self.targets = targets
        self.wires = Wires(rng)
        self.trace: deque[Label] = deque(maxlen=keep)
        self.steps = 0
        self.monitors = Monitors(
            observer, targets, credit_bytes=spec.config.inflight_bytes, exactly_once=spec.exactly_once
        )
        self.store = SimStore(observer, faults, self._post_late)
        self.coordinator_down = False
        self.on_complete: Callable[[Complete], Complete] = lambda complete: complete
        self.faults_at_run = 0
        self._hung: list[Slot] = []
        self._label: Label = ()
        self._nonces = 0
        self._mean_wait_s = wait_s
        self._slow: frozenset[SubtaskId] = frozenset()
        super().__init__(
            plan,
            spec,
            settings,
            checkpoints=self._open_checkpoints(),
            # Every piece that is not inline is an object of its own here: those are what retention must not lose.
            snapshots=SnapshotStore(
                self.store, plan.max_parallelism, inline_max_bytes=inline_max_bytes, shared_min_bytes=1
            ),
            retain=retain,
        )
        self._draw_schedule()

    def _draw_schedule(self) -> None:
        rng = self.rng
        weight = {name: rng.choice((0.3, 1.0, 1.0, 3.0)) for name in KINDS}
        self._choices: list[tuple[Callable[[], bool], float]] = [
            (self._deliver("element"), 3 * weight["element"]),
            (self._deliver("credit"), 2 * weight["credit"]),
            (self._deliver("command"), weight["command"]),
            (self._deliver("report"), weight["report"]),
            (self._deliver("news"), weight["news"]),
            (self._deliver("late"), 0.02),
            (self._handle, 6.0),
            (self._work, rng.choice((2.0, 4.0))),
            (self._task, rng.choice((0.1, 0.5, 2.0))),
            (self._coordinator_handle, 3.0),
            (self._coordinator_task, rng.choice((0.2, 1.0))),
            (self._coordinator_tick, 0.5),
            (self._restart_coordinator, 0.5),
            (self._request, 0.03),
            (self._pass_time, rng.choice((0.3, 1.0))),
        ]
        total = 0.0
        self._upto: list[float] = []
        for _, share in self._choices:
            total += share
            self._upto.append(total)
        subtasks = self._plan.topology().subtasks
        if rng.random() < 0.5:
            self._slow = frozenset(rng.sample(list(subtasks), rng.randint(1, max(1, len(subtasks) // 3))))

    # ------------------------------------------------------------------------------------------------------ processes

    def _open_checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.store, "sim", wall_time=lambda: 0.0, nonce=self._nonce)

    def _nonce(self) -> str:
        self._nonces += 1
        return f"nonce-{self._nonces}"

    def _new_coordinator(self) -> CoordinatorRuntime:
        return CoordinatorRuntime(
            self._plan,
            self._settings,
            store=self._open_checkpoints(),
            retain=self._retain,
            host=SimCoordinatorSide(self),
        )

    def make_runtime(self, slot: Slot) -> SubtaskRuntime:
        return SimSubtaskRuntime(slot.subtask, self._spec, SimSubtaskSide(self, slot), self._snapshots, self)

    def post(self, key: object, deliver: Deliver) -> None:
        if isinstance(key, tuple):
            self.wires.put(str(key[0]), key, self._label, deliver)
        else:
            label = self._label
            self.wires.put(label[0], key, label, deliver)

    def pending(self) -> CheckpointId | None:
        """The checkpoint that the coordinator waits for."""
        if self.coordinator_down:
            return None
        pending = self.coordinator.machine.pending
        return None if pending is None else pending.checkpoint

    def _post_late(self, what: str, land: Deliver) -> None:
        self.wires.put("late", object(), ("late", what), land)

    def crash_subtask(self, slot: Slot) -> None:
        if self.slots.get(slot.subtask) is slot:
            self.note("CRASH", slot.subtask, slot.incarnation)
            self.wires.sender_died(slot.subtask)
            self._label = ("news", slot.subtask, "died")
            self.kill_subtask(slot.subtask, "crashed")

    def crash_coordinator(self) -> None:
        """Its subtasks go with it; what is on the wires stays on the wires."""
        self.note("CRASH", "coordinator")
        self.faults.count("coordinator crash")
        self.slots.clear()
        self.coordinator_inbox.clear()
        self.coordinator_tasks.clear()
        self.wires.coordinator_died()
        self.coordinator_down = True

    def _in_slot(self, slot: Slot, act: Deliver) -> None:
        try:
            act()
        except Crash:
            self.crash_subtask(slot)
            return
        machine = slot.runtime._machine
        if machine is not None:
            machine.check_invariants()

    def _in_coordinator(self, act: Deliver) -> None:
        try:
            act()
        except Crash:
            self.crash_coordinator()
            return
        machine = self.coordinator.machine
        machine.check_invariants()
        self.faults.calm = machine.state is JobState.CLEANING

    # ---------------------------------------------------------------------------------------------------------- steps

    def start(self) -> None:
        self._in_coordinator(self.coordinator.start)

    def step(self) -> None:
        """One drawn step. Raises `Violation` when nothing can happen although the job has not ended."""
        self.steps += 1
        at, drawn = 0, self.rng.random() * self._upto[-1]
        while self._upto[at] < drawn:
            at += 1
        count = len(self._choices)
        for offset in range(count):
            choice = self._choices[(at + offset) % count][0]
            if offset and choice in (self._pass_time, self._request):
                continue
            if choice():
                return
        if self._work(everybody=True):
            return
        deadline = self.next_deadline()
        if deadline is None or deadline == float("inf"):
            raise Violation(f"stuck: nothing can happen any more, the job is {self.coordinator.machine.state.value}")
        self.note("time", "jump", deadline)
        self.clock.advance_to(deadline)

    def next_deadline(self) -> float | None:
        if self.coordinator_down:
            return None
        if not self._hung:
            return super().next_deadline()
        living = [s.runtime.next_deadline() for s in self.slots.values() if not self._hangs(s)]
        return min((d for d in (*living, self.coordinator.next_deadline()) if d is not None), default=None)

    def note(self, *label: Any) -> None:
        self.trace.append((self.steps, self.clock.now, *label))

    def _deliver(self, kind: str) -> Callable[[], bool]:
        wires = self.wires

        def deliver() -> bool:
            message = wires.take(kind)
            if message is None:
                return False
            label, arrive = message
            self.note("deliver", *label)
            arrive()
            return True

        return deliver

    def _slot_where(self, ready: Callable[[Slot], bool]) -> Slot | None:
        slots = list(self.slots.values())
        count = len(slots)
        first = int(self.rng.random() * count)
        for offset in range(count):
            slot = slots[(first + offset) % count]
            if ready(slot) and not self._hangs(slot):
                return slot
        return None

    def _handle(self) -> bool:
        slot = self._slot_where(lambda s: bool(s.inbox))
        if slot is None:
            return False
        self.note("handle", slot.subtask, slot.inbox[0])
        self._in_slot(slot, slot.deliver_one)
        return True

    def _work(self, *, everybody: bool = False) -> bool:
        now, slow, rng = self.clock.now, self._slow, self.rng

        def ready(slot: Slot) -> bool:
            if slot.subtask in slow and not everybody and rng.random() < 0.95:
                return False
            if slot.runtime.busy:
                return True
            deadline = slot.runtime.next_deadline()
            return deadline is not None and deadline <= now

        slot = self._slot_where(ready)
        if slot is None:
            return False
        self.note("work", slot.subtask)
        self._in_slot(slot, slot.work)
        return True

    def _task(self) -> bool:
        slot = self._slot_where(lambda s: bool(s.tasks))
        if slot is None:
            return False
        self.note("task", slot.subtask)
        self._in_slot(slot, slot.run_task)
        return True

    def _coordinator_handle(self) -> bool:
        if not self.coordinator_inbox or self.coordinator_down:
            return False
        self.note("handle", "coordinator", self.coordinator_inbox[0])
        self._in_coordinator(self.coordinator_deliver_one)
        return True

    def _coordinator_task(self) -> bool:
        if not self.coordinator_tasks or self.coordinator_down:
            return False
        self.note("task", "coordinator", getattr(self.coordinator_tasks[0], "__qualname__", ""))
        self._in_coordinator(self.coordinator_run_task)
        return True

    def _coordinator_tick(self) -> bool:
        deadline = None if self.coordinator_down else self.coordinator.next_deadline()
        if deadline is None or deadline > self.clock.now:
            return False
        self.note("tick", "coordinator")
        self._in_coordinator(lambda: (self.coordinator_tick(), None)[1])
        return True

    def _restart_coordinator(self) -> bool:
        if not self.coordinator_down:
            return False
        self.note("start", "coordinator")
        self.coordinator_down = False
        # Reports to the dead one are gone with its process, except those a new one must recognise as foreign (C6).
        self.coordinator = self._new_coordinator()
        self._in_coordinator(self.coordinator.start)
        return True

    def _request(self) -> bool:
        """A user asks for a checkpoint, a savepoint or a stop."""
        budget = self.faults.budget
        if self.coordinator_down or self.coordinator.machine.state is not JobState.RUNNING:
            return False
        if budget.savepoints > 0:
            budget.savepoints -= 1
            kind = self.rng.choice((CheckpointKind.PERIODIC, CheckpointKind.SAVEPOINT))
        elif budget.stops > 0:
            budget.stops -= 1
            kind = CheckpointKind.STOP
            if self.rng.random() < 0.3:
                self.faults.count("request cancel")
                self.note("request", "cancel")
                self.coordinator_inbox.append(CancelRequested())
                return True
        elif budget.hangs > 0:
            return self._hang()
        else:
            return False
        self.faults.count(f"request {kind.value}")
        self.note("request", kind)
        self.coordinator_inbox.append(CheckpointRequested(kind))
        return True

    def _hangs(self, slot: Slot) -> bool:
        return any(slot is hung for hung in self._hung)

    def _hang(self) -> bool:
        slot = self._slot_where(lambda s: True)
        if slot is None:
            return False
        self.faults.budget.hangs -= 1
        self.faults.count("hang")
        self.note("HANG", slot.subtask, slot.incarnation)
        self._hung.append(slot)
        return True

    def run_again(self, plan: Plan) -> None:
        """The job was stopped; a new run of the same flow, at whatever parallelism, goes on from storage."""
        self.note("RUN AGAIN", plan.topology().parallelism)
        self._plan = plan
        self._spec = replace(self._spec, plan=plan)
        self.slots.clear()
        self.coordinator_inbox.clear()
        self.coordinator_tasks.clear()
        self.wires.coordinator_died()
        self._draw_schedule()
        self.coordinator_down = True

    def _pass_time(self) -> bool:
        self.clock.advance_to(self.clock.now + self.rng.expovariate(1.0) * self._mean_wait_s)
        return True


class SimSubtaskRuntime(SubtaskRuntime):
    """The real one, watched at the moment of its snapshots."""

    def __init__(
        self, subtask: SubtaskId, spec: JobSpec, host: SimSubtaskSide, store: SnapshotPort, world: SimWorld
    ) -> None:
        super().__init__(subtask, spec, host, store)
        self._world = world

    def _take_snapshot(self, action: TakeSnapshot) -> None:
        self._world.monitors.snapshot(self.attempt, self.subtask, CheckpointId(action.checkpoint), self._inputs)
        super()._take_snapshot(action)


class SimSubtaskSide(SubtaskSide):
    """Every call may be the last."""

    def __init__(self, world: SimWorld, slot: Slot) -> None:
        super().__init__(world, slot)
        self._sim = world

    def accept(self, attempt: Attempt, channels: Sequence[ChannelId]) -> None:
        self._sim.faults.port()
        super().accept(attempt, channels)

    def connect(self, attempt: Attempt, addresses: Mapping[ChannelId, str]) -> None:
        self._sim.faults.port()
        super().connect(attempt, addresses)

    def send(self, channel: ChannelId, element: Element) -> None:
        self._sim.faults.port()
        self._sim.monitors.sent(self._attempt, channel, element)
        self._sim._label = ("element", channel, element)
        super().send(channel, element)

    def return_credit(self, channel: ChannelId, nbytes: int) -> None:
        self._sim.faults.port()
        self._sim.monitors.taken(self._attempt, channel, nbytes)
        self._sim._label = ("credit", channel, nbytes)
        super().return_credit(channel, nbytes)

    def report(self, envelope: ReportEnvelope) -> None:
        self._sim.faults.port()
        self._sim.monitors.reported(envelope, self._sim.pending())
        self._sim._label = ("report", envelope.subtask, envelope.attempt, envelope.sequence, envelope.report)
        super().report(envelope)

    def background(self, task: Callable[[], SubtaskEvent]) -> None:
        self._sim.faults.port()
        super().background(task)


class SimCoordinatorSide(CoordinatorSide):
    def __init__(self, world: SimWorld) -> None:
        super().__init__(world)
        self._sim = world

    def start_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        self._sim.faults.port()
        super().start_subtask(subtask, incarnation)

    def stop_subtask(self, subtask: SubtaskId, incarnation: int) -> None:
        self._sim.faults.port()
        self._sim._label = ("news", subtask, "stopped")
        super().stop_subtask(subtask, incarnation)

    def send(self, envelope: CommandEnvelope) -> None:
        self._sim.faults.port()
        command = envelope.command
        self._sim.monitors.commanded(envelope.attempt, command)
        if isinstance(command, Complete):
            command = self._sim.on_complete(command)
            # A notice is lost by telling nothing new, because the numbers of commands may not have a gap.
            ending = self._sim.coordinator.machine._checkpointing.ending is not None
            if not ending and self._sim.faults.lose_notice():
                command = Complete(CheckpointId(0))
            envelope = CommandEnvelope(envelope.attempt, envelope.subtask, envelope.sequence, command)
        self._sim._label = ("command", envelope.subtask, envelope.attempt, envelope.sequence, command)
        super().send(envelope)

    def background(self, task: Callable[[], CoordinatorEvent | None]) -> None:
        self._sim.faults.port()
        super().background(task)


def describe(label: Label) -> str:
    """One line of a trace."""
    step, now, *rest = label
    return f"{step:6d} {now:9.4f}  " + "  ".join(_short(part) for part in rest)


def _short(part: Any) -> str:
    if isinstance(part, Data):
        return f"Data({part.payload.num_rows} rows, {part.nbytes} B)"
    if isinstance(part, float):
        return f"{part:.4f}"
    text = (
        str(part) if not hasattr(part, "element") else f"{type(part).__name__}({part.channel}, {_short(part.element)})"
    )
    return text if len(text) <= 160 else text[:157] + "..."
