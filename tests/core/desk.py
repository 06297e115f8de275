"""Tables of events and actions: a desk with one machine on it, which numbers the reports and sorts the answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rayflow.core.coordinator import CoordinatorMachine, CoordinatorSettings
from rayflow.core.events import (
    CoordinatorAction,
    CoordinatorEvent,
    JobState,
    ManifestWritten,
    Note,
    Recovered,
    Reported,
    SendCommand,
    SinksRecovered,
    Tick,
)
from rayflow.core.ids import Attempt, CheckpointId, SubtaskId
from rayflow.core.manifest import Manifest, SplitState, SubtaskSnapshot
from rayflow.core.messages import (
    Acknowledge,
    Command,
    Committed,
    InputEnded,
    Ready,
    Report,
    ReportEnvelope,
    Running,
)
from rayflow.core.roster import Heard
from rayflow.core.topology import Topology
from tests.core.fakes import small_topology, some_splits

SOURCE_0, SOURCE_1 = SubtaskId("source", 0), SubtaskId("source", 1)
MIDDLE_0, MIDDLE_1 = SubtaskId("middle", 0), SubtaskId("middle", 1)
LAST = SubtaskId("last", 0)
SOURCES = [SOURCE_0, SOURCE_1]
ALL = [SOURCE_0, SOURCE_1, MIDDLE_0, MIDDLE_1, LAST]

SETTINGS = CoordinatorSettings(interval_s=10.0, timeout_s=60.0, hang_timeout_s=30.0, tolerable_failures=2)


def manifest_of(checkpoint: int, *, attempt: int = 1, topology: Topology | None = None, **more: Any) -> Manifest:
    topology = topology or small_topology()
    values: dict[str, Any] = {
        "job": "job",
        "checkpoint": CheckpointId(checkpoint),
        "kind": "periodic",
        "attempt": Attempt(attempt),
        "incarnation": 1,
        "run_id": "run",
        "created_at": 0.0,
        "max_parallelism": topology.max_parallelism,
        "parallelism": dict(topology.parallelism),
        "operators": {},
        "subtasks": tuple(SubtaskSnapshot(s) for s in topology.subtasks),
    }
    return Manifest(**{**values, **more})


class Desk:
    def __init__(self, settings: CoordinatorSettings = SETTINGS, topology: Topology | None = None) -> None:
        self.machine = CoordinatorMachine(topology or small_topology(), settings)
        self.now = 0.0
        self._numbers: Counter[tuple[int, SubtaskId]] = Counter()

    # -------------------------------------------------------------------------------------------------- what is told

    def start(self) -> list[CoordinatorAction]:
        return self._plain(self.machine.start(self.now))

    def tell(self, event: CoordinatorEvent) -> list[CoordinatorAction]:
        actions = self.machine.handle(event, self.now)
        self.machine.check_invariants()
        return self._plain(actions)

    def report(self, subtask: SubtaskId, report: Report, *, attempt: int | None = None) -> list[CoordinatorAction]:
        at = self.machine.attempt if attempt is None else Attempt(attempt)
        number = self._numbers[at, subtask]
        self._numbers[at, subtask] += 1
        return self.tell(Reported(ReportEnvelope(at, subtask, number, report)))

    def all_report(self, *reports: Report) -> list[CoordinatorAction]:
        subtasks = list(self.machine.topology.subtasks)
        return [a for report in reports for subtask in subtasks for a in self.report(subtask, report)]

    def wait(self, seconds: float) -> list[CoordinatorAction]:
        self.now += seconds
        return self.tell(Tick())

    # ---------------------------------------------------------------------------------------------------- short ways

    def recovered(self, manifest: Manifest | None = None, splits: int = 4) -> list[CoordinatorAction]:
        following = CheckpointId(1 if manifest is None else manifest.checkpoint + 1)
        attempt = Attempt(1 if manifest is None else manifest.attempt + 1)
        discovered: tuple[SplitState, ...] = some_splits(splits) if manifest is None else ()
        return self.tell(Recovered(manifest, following, attempt, discovered))

    def to_running(self, manifest: Manifest | None = None, splits: int = 4) -> list[CoordinatorAction]:
        """From RECOVERING; what the last step answered."""
        self.recovered(manifest, splits)
        return self.ready_to_running()

    def ready_to_running(self) -> list[CoordinatorAction]:
        self.all_report(Ready("address"))
        self.tell(SinksRecovered(self.machine.attempt))
        actions = self.all_report(Running())
        assert self.machine.state is JobState.RUNNING, self.machine.state
        return actions

    def acknowledge(self, checkpoint: int, *, but: SubtaskId | None = None) -> list[CoordinatorAction]:
        actions: list[CoordinatorAction] = []
        for subtask in self.machine.topology.subtasks:
            if subtask != but:
                actions += self.ack(subtask, checkpoint)
        return actions

    def ack(self, subtask: SubtaskId, checkpoint: int) -> list[CoordinatorAction]:
        return self.report(subtask, Acknowledge(CheckpointId(checkpoint), SubtaskSnapshot(subtask)))

    def complete(self, checkpoint: int) -> list[CoordinatorAction]:
        self.acknowledge(checkpoint)
        return self.tell(ManifestWritten(CheckpointId(checkpoint)))

    def all_ended(self) -> list[CoordinatorAction]:
        return self.all_report(InputEnded())

    def all_committed(self, checkpoint: int) -> list[CoordinatorAction]:
        return self.all_report(Committed(CheckpointId(checkpoint)))

    def state(self) -> JobState:
        return self.machine.state

    def heard(self, name: str, heard: Heard) -> int:
        return self.machine.heard[name, heard]

    @property
    def notes(self) -> list[str]:
        return [entry.what for entry in self.machine.timeline]

    @staticmethod
    def _plain(actions: list[CoordinatorAction]) -> list[CoordinatorAction]:
        return [a for a in actions if not isinstance(a, Note)]


def running_desk(settings: CoordinatorSettings = SETTINGS, splits: int = 4) -> Desk:
    desk = Desk(settings)
    desk.start()
    desk.to_running(splits=splits)
    return desk


def commands(actions: list[CoordinatorAction], kind: type[Command]) -> dict[SubtaskId, Command]:
    return {a.subtask: a.command for a in actions if isinstance(a, SendCommand) and isinstance(a.command, kind)}


def others(actions: list[CoordinatorAction]) -> list[CoordinatorAction]:
    """All that is not a command."""
    return [a for a in actions if not isinstance(a, SendCommand)]
