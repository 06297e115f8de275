"""A sink that fails once, where it hurts: in the pre-commit, before a commit, behind one that nobody has heard of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

import rayflow as rf
from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.operators.base import Committer, CommitterContext, FrozenState, SinkOperator

Fault = Literal["in prepare", "before commit", "after commit"]


@dataclass(frozen=True)
class FaultySink:
    """A sink that fails once at the place named, after something has been committed."""

    inner: Any
    fault: Fault
    marker: str

    stateful = False

    @property
    def guarantee(self) -> Any:
        return self.inner.guarantee

    def with_input_schemas(self, schemas: Sequence[pa.Schema | None]) -> FaultySink:
        take = getattr(self.inner, "with_input_schemas", None)
        return self if take is None else dataclasses.replace(self, inner=take(schemas))

    def strike(self) -> None:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            raise RuntimeError(f"fault {self.fault}")

    def build(self) -> SinkOperator:
        operator: SinkOperator = self.inner.build()
        if self.fault == "in prepare":
            snapshot = operator.snapshot

            def faulty(checkpoint: CheckpointId) -> FrozenState | None:
                frozen = snapshot(checkpoint)
                if frozen is None or frozen.prepare is None or checkpoint < 3:
                    return frozen
                prepare = frozen.prepare

                def done_and_dead() -> Sequence[Json]:
                    prepare()
                    self.strike()
                    raise rf.DataError("a subtask that has died does not go on")  # only the second strike comes here

                return dataclasses.replace(frozen, prepare=prepare if Path(self.marker).exists() else done_and_dead)

            operator.snapshot = faulty  # type: ignore[method-assign]
        return operator

    def committer(self) -> Committer:
        inner: Committer = self.inner.committer()
        return (FaultyWhole if inner.whole else FaultyCommitter)(inner, self)


class FaultyCommitter(Committer):
    def __init__(self, inner: Committer, sink: FaultySink) -> None:
        self._inner = inner
        self._sink = sink
        self._commits = 0

    def open(self, ctx: CommitterContext) -> None:
        self._inner.open(ctx)

    def commit(self, committables: Sequence[Json]) -> None:
        self._commits += 1
        if self._commits > 1 and self._sink.fault == "before commit":
            self._sink.strike()
        self._inner.commit(committables)
        if self._commits > 1 and self._sink.fault == "after commit":
            self._sink.strike()

    def recover(self, committables: Sequence[Json], *, fresh: bool) -> None:
        self._inner.recover(committables, fresh=fresh)

    def finish(self) -> None:
        self._inner.finish()


class FaultyWhole(FaultyCommitter):
    whole = True
