"""Parts of a subtask's world, scripted: operators that keep a log, a source, a snapshot store, and a `SubtaskHost`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rayflow.core.ids import Attempt, ChannelId, CheckpointId, SubtaskId
from rayflow.core.manifest import Json, StateHandle
from rayflow.core.messages import Element, Report, ReportEnvelope
from rayflow.operators.base import (
    MAIN,
    Committer,
    FrozenState,
    FrozenTable,
    Operator,
    OperatorContext,
    Output,
    Polled,
    RestoredState,
    Source,
    SplitReader,
)
from rayflow.plan import PlannedOperator
from rayflow.runtime.ports import SubtaskEvent
from rayflow.storage.reuse import Reuse, Written


def batch(*values: int) -> pa.RecordBatch:
    return pa.record_batch({"v": pa.array(values, pa.int64())})


def values(batch: pa.RecordBatch | pa.Table) -> list[Any]:
    found: list[Any] = batch["v"].to_pylist()
    return found


def context(operator: str = "op", step: str = "a step", subtask: int = 0, parallelism: int = 2) -> OperatorContext:
    return OperatorContext(
        job="job",
        run_id="run",
        operator=operator,
        step=step,
        subtask=subtask,
        parallelism=parallelism,
        max_parallelism=8,
        attempt=1,
        key_groups=range(4),
        now=lambda: 0.0,
    )


# ----------------------------------------------------------------------------------------------------------- operators

Log = list[tuple[Any, ...]]


class Logging(Operator):
    """Writes down every call. Passes rows on; ``raises`` maps the name of a method to what it raises."""

    def __init__(self, name: str, log: Log, raises: Mapping[str, Exception]) -> None:
        self.name = name
        self.log = log
        self.raises = raises
        self.late_rows = 0

    def _called(self, method: str, *what: Any) -> None:
        self.log.append((self.name, method, *what))
        if method in self.raises:
            raise self.raises[method]

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        self._called("open")

    def restore(self, states: Sequence[RestoredState]) -> None:
        self._called("restore", *(s.name for s in states))

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._called("process", *values(batch), *([f"input {input_index}"] if input_index else []))
        late = batch.filter(pa.compute.less(batch["v"], 0))
        self.late_rows += late.num_rows
        self.out.emit(late, "late")
        self.out.emit(batch.filter(pa.compute.greater_equal(batch["v"], 0)))

    def on_watermark(self, time: int) -> int:
        self._called("watermark", time)
        return time - 1

    def on_end(self) -> None:
        self._called("end")
        self.out.emit(batch(99))

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        self._called("snapshot", checkpoint)
        return FrozenState((FrozenTable(f"{self.name}'s", (batch(1),)),)) if self.name != "stateless" else None

    def close(self) -> None:
        self._called("close")


@dataclass(frozen=True)
class LoggingFactory:
    name: str
    log: Log = field(default_factory=list)
    raises: Mapping[str, Exception] = field(default_factory=dict)
    stateful = True

    def build(self) -> Operator:
        return Logging(self.name, self.log, self.raises)


def planned(name: str, log: Log, **raises: Exception) -> PlannedOperator:
    return PlannedOperator(f"{name}-1", name, LoggingFactory(name, log, raises))


# ------------------------------------------------------------------------------------------------------------- sources


class ListReader(SplitReader):
    """Values of one split, ``a`` batch a poll; an exception in the list is raised, None is an empty poll."""

    def __init__(self, items: Sequence[Any], position: int, log: Log) -> None:
        self._items = items
        self._position = position
        self._log = log

    def poll(self) -> Polled:
        if self._position >= len(self._items):
            return Polled(done=True)
        item = self._items[self._position]
        if isinstance(item, Exception):
            raise item
        self._position += 1
        if item == "skip":
            self.skipped += 1
            return Polled(None, self._position)
        if item == "last":
            return Polled(batch(1000), self._position, done=True)
        return Polled(None if item is None else batch(*item), self._position)

    def checkpointed(self, position: Json) -> None:
        self._log.append(("checkpointed", position))

    def close(self) -> None:
        self._log.append(("closed",))


@dataclass(frozen=True, eq=False)
class ListSource(Source):
    """Splits of lists of values."""

    splits: Mapping[str, Sequence[Any]]
    log: Log = field(default_factory=list)

    def schema(self) -> pa.Schema:
        return batch().schema

    def discover(self) -> Sequence[tuple[str, Json]]:
        return [(name, name) for name in self.splits]

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        self.log.append(("reader", split, position))
        return ListReader(self.splits[split], position or 0, self.log)


# --------------------------------------------------------------------------------------------------- sinks and storage


class KeptCommitter(Committer):
    """What was committed, and in which calls."""

    def __init__(self) -> None:
        self.calls: list[list[Json]] = []
        self.error: Exception | None = None

    def commit(self, committables: Sequence[Json]) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(list(committables))

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self.calls.append(["recover", *committables])


class KeptStates:
    """A `SnapshotStore` that keeps tables in a dict, by the name of a file."""

    def __init__(self) -> None:
        self.tables: dict[str, FrozenTable] = {}
        self.bytes_read = 0
        self.error: Exception | None = None

    def write(
        self,
        checkpoint: CheckpointId,
        subtask: SubtaskId,
        parallelism: int,
        states: Sequence[tuple[str, FrozenState]],
        reuse: Reuse,
    ) -> Written:
        if self.error is not None:
            raise self.error
        tables = [(operator, table) for operator, state in states for table in state.tables]
        handles = [self.add(checkpoint, operator, subtask.index, parallelism, table) for operator, table in tables]
        return Written(tuple(handles), sum(h.nbytes for h in handles))

    def add(
        self, checkpoint: CheckpointId, operator: str, subtask: int, parallelism: int, frozen: FrozenTable
    ) -> StateHandle:
        key = f"{checkpoint}/{operator}-{subtask}.{frozen.name}"
        self.tables[key] = frozen
        rows = sum(b.num_rows for b in frozen.batches)
        keyed = frozen.key_columns is not None
        return StateHandle(operator, subtask, parallelism, frozen.name, rows, keyed, inline=key)

    def read(self, handle: StateHandle, key_groups: range | None) -> RestoredState:
        if self.error is not None:
            raise self.error
        return RestoredState(handle.name, pa.Table.from_batches(self.tables[str(handle.inline)].batches))


# ---------------------------------------------------------------------------------------------------------------- host


class FakeHost:
    """A `SubtaskHost` whose time stands still until told, and whose background tasks run when told."""

    address, pid, node = "here:1", 7, "node-a"

    def __init__(self) -> None:
        self.time = 100.0
        self.accepted: list[tuple[Attempt, list[ChannelId]]] = []
        self.connected: list[tuple[Attempt, dict[ChannelId, str]]] = []
        self.disconnects = 0
        self.sent: list[tuple[ChannelId, Element]] = []
        self.credit: list[tuple[ChannelId, int]] = []
        self.envelopes: list[ReportEnvelope] = []
        self.tasks: deque[Callable[[], SubtaskEvent]] = deque()

    def now(self) -> float:
        return self.time

    def wall_time(self) -> float:
        return self.time

    def accept(self, attempt: Attempt, channels: Sequence[ChannelId]) -> None:
        self.accepted.append((attempt, list(channels)))

    def connect(self, attempt: Attempt, addresses: Mapping[ChannelId, str]) -> None:
        self.connected.append((attempt, dict(addresses)))

    def disconnect(self) -> None:
        self.disconnects += 1

    def send(self, channel: ChannelId, element: Element) -> None:
        self.sent.append((channel, element))

    def return_credit(self, channel: ChannelId, nbytes: int) -> None:
        self.credit.append((channel, nbytes))

    def report(self, envelope: ReportEnvelope) -> None:
        self.envelopes.append(envelope)

    def background(self, task: Callable[[], SubtaskEvent]) -> None:
        self.tasks.append(task)

    @property
    def reports(self) -> list[Report]:
        return [e.report for e in self.envelopes]


__all__ = ["MAIN", "FakeHost", "KeptCommitter", "KeptStates", "ListSource", "Logging", "LoggingFactory"]
