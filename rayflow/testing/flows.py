"""Whole flows in this process, in virtual time, that fail at a chosen point behind a chosen number of checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from rayflow.config import CheckpointConfig, JobConfig, Restart
from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import DataError, StorageError
from rayflow.flow import Flow, run_local
from rayflow.operators.base import (
    Committer,
    CommitterContext,
    FrozenState,
    Operator,
    OperatorContext,
    Polled,
    SinkFactory,
    SinkOperator,
    Source,
    SplitReader,
)
from rayflow.runtime.inprocess import World
from rayflow.runtime.results import JobResult

Point = Literal["rows", "prepare", "declined", "before commit", "after commit"]
"""Where a flow fails: with rows written behind the last checkpoint; behind the pre-commit of a subtask; in the upload
of another step, so that a checkpoint is aborted and the attempt goes on; and on either side of the commit."""
POINTS: tuple[Point, ...] = ("rows", "prepare", "declined", "before commit", "after commit")


class InjectedFailure(Exception):
    """What the suites raise in the middle of flows."""


@dataclass(eq=False, slots=True)
class Failure:
    """Strikes once, when so many checkpoints of this run are complete that began behind its first rows."""

    behind: int = 1
    struck: bool = False
    complete: int = -1
    """The first checkpoint that is completed after the first rows may have begun before them: it does not count."""
    rows_came: bool = False
    _newest: int | None = None

    def on_round(self, world: World) -> None:
        manifest = world.coordinator.outcome.manifest
        if manifest is not None and manifest.checkpoint != self._newest:
            self._newest = manifest.checkpoint
            self.complete += self.rows_came

    def due(self) -> bool:
        """True the first time that it is due."""
        if self.struck or (self.behind and self.complete < self.behind):
            return False
        self.struck = True
        return True

    def on_batch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """For `map_batches`."""
        if self.due():
            raise InjectedFailure(f"the process of a subtask died behind {self.behind} checkpoints")
        self.rows_came = True
        return batch

    def check_struck(self) -> None:
        assert self.struck, (
            f"the input was over before {self.behind} checkpoints were complete, so nothing has been shown: "
            "give the suite more batches (more rows, or smaller batches)"
        )


def run(flow: Flow, folder: Path | None, failure: Failure, *, parallelism: int, restart: bool = True) -> JobResult:
    """In this process, with checkpoints as often as they go; in memory without a folder.

    ``restart``: go on after the failure, else raise it.
    """
    restarts = Restart.fixed(delay="0s") if restart else Restart.none()
    config = JobConfig(restart=restarts, state="memory" if folder is None else None)
    url = "-" if folder is None else str(folder / "checkpoints")
    checkpoints = CheckpointConfig(url, interval="2ms", min_pause="0s")
    plan = flow.plan(parallelism=parallelism, config=config)
    return run_local(plan, config, checkpoints, on_round=failure.on_round)


# ------------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, eq=False)
class PacedSource(Source):
    """The same rows with pauses until the failure, so that there is a checkpoint between any two batches."""

    inner: Source
    failure: Failure
    pause: int = 8

    def schema(self) -> pa.Schema | None:
        return self.inner.schema()

    def declared_schema(self) -> pa.Schema | None:
        return self.inner.declared_schema()

    def discover(self) -> Sequence[tuple[str, Json]]:
        return self.inner.discover()

    def discover_again(self) -> Sequence[tuple[str, Json]]:
        return self.inner.discover_again()

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return _PacedReader(self.inner.reader(split, position, ctx), self)

    @property
    def discovery_interval_s(self) -> float | None:
        return self.inner.discovery_interval_s

    @property
    def bounded(self) -> bool:
        return self.inner.bounded

    @property
    def in_turns(self) -> bool:
        return self.inner.in_turns

    @property
    def replayable(self) -> bool:
        return self.inner.replayable


class _PacedReader(SplitReader):
    def __init__(self, inner: SplitReader, pace: PacedSource) -> None:
        self._inner, self._pace, self._asked = inner, pace, 0

    def poll(self) -> Polled:
        self._asked += 1
        if self._asked % self._pace.pause and not self._pace.failure.struck:
            return Polled()
        return self._inner.poll()

    def checkpointed(self, position: Json) -> None:
        self._inner.checkpointed(position)

    def close(self) -> None:
        self._inner.close()


# --------------------------------------------------------------------------------------------------------------- sinks


class FailingSink:
    """The sink, which fails at the point named. All else, also what only some sinks have, is that of the sink."""

    def __init__(self, inner: SinkFactory, point: Point, failure: Failure) -> None:
        self._inner, self._point, self._failure = inner, point, failure

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "with_input_schemas":
            return lambda schemas: FailingSink(found(schemas), self._point, self._failure)
        return found

    @property
    def stateful(self) -> bool:
        return self._inner.stateful

    def build(self) -> SinkOperator:
        operator = self._inner.build()
        assert isinstance(operator, SinkOperator), f"build() must give an rf.SinkOperator, got {type(operator)}"
        process, snapshot = operator.process, operator.snapshot

        def failing_process(batch: pa.RecordBatch, input_index: int) -> None:
            process(batch, input_index)
            if self._point == "rows" and self._failure.due():
                raise InjectedFailure("the process of a subtask died with rows that no checkpoint holds")

        def failing_snapshot(checkpoint: CheckpointId) -> FrozenState | None:
            frozen = snapshot(checkpoint)
            if frozen is None or frozen.prepare is None or self._point != "prepare":
                return frozen
            prepare = frozen.prepare

            def failing_prepare() -> Sequence[Json]:
                made = prepare()
                if self._failure.due():
                    raise DataError("injected: the process of a subtask died behind its pre-commit")
                return made

            return dataclasses.replace(frozen, prepare=failing_prepare)

        operator.process = failing_process  # type: ignore[method-assign]
        operator.snapshot = failing_snapshot  # type: ignore[method-assign]
        return operator

    def committer(self) -> Committer | None:
        inner = self._inner.committer()
        if inner is None or self._point not in ("before commit", "after commit"):
            return inner
        return (_FailingWhole if inner.whole else _FailingCommitter)(inner, self._point, self._failure)


@dataclass(frozen=True, slots=True)
class Declining:
    """A step that passes rows on; where the point is ``declined``, its upload fails once."""

    point: Point
    failure: Failure
    stateful: bool = False

    def build(self) -> Operator:
        return _Declining(self)

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        return schema


class _Declining(Operator):
    def __init__(self, how: Declining) -> None:
        self._how = how

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._how.failure.rows_came = True
        self.out.emit(batch)

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        return FrozenState(prepare=self._prepare) if self._how.point == "declined" else None

    def _prepare(self) -> Sequence[Json]:
        if self._how.failure.due():
            raise StorageError("injected: an upload failed")
        return ()


class _FailingCommitter(Committer):
    def __init__(self, inner: Committer, point: Point, failure: Failure) -> None:
        self._inner, self._point, self._failure = inner, point, failure

    def open(self, ctx: CommitterContext) -> None:
        self._inner.open(ctx)

    def commit(self, committables: Sequence[Json]) -> None:
        self._strike("before commit")
        self._inner.commit(committables)
        self._strike("after commit")

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self._inner.recover(committables, fresh=fresh)

    def finish(self) -> None:
        self._inner.finish()

    def _strike(self, point: Point) -> None:
        if self._point == point and self._failure.due():
            raise StorageError(f"injected: the process of a subtask died {point}")


class _FailingWhole(_FailingCommitter):
    whole = True
