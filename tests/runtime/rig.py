"""One subtask of a small job on a `FakeHost`: ``src`` (two subtasks) -> ``mid`` -> ``out`` (a sink)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rayflow.config import JobConfig
from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.manifest import Json, SplitState, StateHandle
from rayflow.core.messages import (
    Assign,
    CheckpointKind,
    Command,
    CommandEnvelope,
    Data,
    Element,
    Launch,
    Report,
    Reset,
    Trigger,
)
from rayflow.graph import Exchange
from rayflow.operators.base import Committer, FrozenState, Operator
from rayflow.plan import Chain, Edge, Plan, PlannedOperator, PlannedSource
from rayflow.runtime.assembly import JobSpec
from rayflow.runtime.ports import CommandArrived, ElementArrived
from rayflow.runtime.subtask_loop import Phase, SubtaskRuntime
from tests.runtime.fakes import FakeHost, KeptCommitter, KeptStates, ListSource, Log, Logging, LoggingFactory, batch

SRC, MID, OUT = SubtaskId("src", 0), SubtaskId("mid", 0), SubtaskId("out", 0)
FIRST, SECOND = (ChannelId(0, SubtaskId("src", i), MID) for i in (0, 1))
ONWARD = ChannelId(1, MID, OUT)


class SinkOperator(Logging):
    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        self._called("snapshot", checkpoint)
        return FrozenState(prepare=lambda: [f"file {checkpoint}"])


@dataclass(frozen=True)
class SinkFactory(LoggingFactory):
    kept: KeptCommitter = field(default_factory=KeptCommitter)

    def build(self) -> Operator:
        return SinkOperator(self.name, self.log, self.raises)

    def committer(self) -> Committer:
        return self.kept


class Rig:
    """Drives the subtask ``which``; commands are numbered as a coordinator would number them."""

    def __init__(
        self,
        which: Literal["src", "mid", "out"] = "mid",
        *,
        splits: Mapping[str, Sequence[Any]] | None = None,
        heartbeat_s: float | None = None,
        raises: Mapping[str, Exception] | None = None,
        inflight_bytes: int = 1024,
    ) -> None:
        self.log: Log = []
        self.committer = KeptCommitter()
        mid = PlannedOperator("mid-op", "mid", LoggingFactory("mid", self.log, raises or {}))
        out = PlannedOperator("sink", "out", SinkFactory("out", self.log, raises or {}, self.committer))
        source = PlannedSource("src", "src", ListSource(splits or {}, self.log))
        plan = Plan(
            "job",
            (Chain("src", 2, source, ()), Chain("mid", 1, None, (mid,)), Chain("out", 1, None, (out,))),
            (Edge(0, "src", "main", "mid", 0, Exchange("rebalance")), Edge(1, "mid", "main", "out", 0, Exchange())),
            8,
        )
        config = JobConfig(linger="10ms", watermark_interval="100ms", inflight_bytes=inflight_bytes, batch_rows=1000)
        self.host, self.store = FakeHost(), KeptStates()
        self.spec = JobSpec(plan, config, True, "run", heartbeat_s)
        self.subtask = SubtaskRuntime(SubtaskId(which, 0), self.spec, self.host, self.store)
        self.attempt = Attempt(0)
        self.sequence = 0

    # ---------------------------------------------------------------------------------------------------- what comes in

    def command(self, command: Command, *, sequence: int | None = None, attempt: int | None = None) -> None:
        number = self.sequence if sequence is None else sequence
        if sequence is None:
            self.sequence += 1
        of = self.attempt if attempt is None else Attempt(attempt)
        self.subtask.handle(CommandArrived(CommandEnvelope(of, self.subtask.subtask, number, command)))

    def reset(self, attempt: int = 1) -> None:
        self.attempt, self.sequence = Attempt(attempt), 0
        self.command(Reset())

    def launch(self, *states: StateHandle, restored_from: int | None = None) -> None:
        checkpoint = None if restored_from is None else CheckpointId(restored_from)
        self.command(Launch({MID: "mid:1", OUT: "out:1"}, states, checkpoint))

    def running(self, attempt: int = 1) -> Rig:
        """Reset and launched; what was said and logged until here is forgotten."""
        self.reset(attempt)
        self.run_tasks()
        self.launch()
        assert self.subtask.phase is Phase.RUNNING, self.host.reports
        self.host.envelopes.clear()
        self.log.clear()
        return self

    def element(self, element: Element, channel: ChannelId = FIRST, *, attempt: int | None = None) -> None:
        of = self.attempt if attempt is None else Attempt(attempt)
        self.subtask.handle(ElementArrived(of, channel, element))

    def rows(self, *values: int, channel: ChannelId = FIRST) -> None:
        one = batch(*values)
        self.element(Data(one, one.nbytes), channel)

    def assign(self, *names: str, no_more: bool = False) -> None:
        splits = tuple(SplitState("src", name, i, name, None) for i, name in enumerate(names))
        self.command(Assign(splits, no_more))

    def trigger(self, checkpoint: int, kind: CheckpointKind = CheckpointKind.PERIODIC) -> None:
        self.command(Trigger(CheckpointId(checkpoint), kind))

    def run_tasks(self) -> None:
        while self.host.tasks:
            self.subtask.handle(self.host.tasks.popleft()())

    def work(self, times: int = 1, *, seconds: float = 0.0) -> None:
        for _ in range(times):
            self.host.time += seconds
            self.subtask.work()

    def work_all(self) -> None:
        while self.subtask.busy:
            self.subtask.work()

    # -------------------------------------------------------------------------------------------------- what comes out

    def phase(self) -> Phase:
        return self.subtask.phase

    def busy(self) -> bool:
        return self.subtask.busy

    def polling(self) -> bool:
        return self.subtask.polling

    def said(self, kind: type[Report]) -> list[Any]:
        return [r for r in self.host.reports if isinstance(r, kind)]

    def sent(self) -> list[Any]:
        """Values of each batch, and control elements as they are."""
        return [e.payload["v"].to_pylist() if isinstance(e, Data) else e for _, e in self.host.sent]

    def committables(self) -> list[Json]:
        return self.committer.calls
