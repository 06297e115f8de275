"""A sink that fails once, where it hurts: in the pre-commit, before a commit, behind one that nobody has heard of.

And the small job, in this process, that writes to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa

import rayflow as rf
from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.operators.base import Committer, CommitterContext, FrozenState, SinkOperator
from tests.failing import FailsOnce

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


class SmallJob:
    """A job that reads ``data`` in small batches, with checkpoints as often as they go."""

    data: ClassVar[pa.Table]
    batch_rows: ClassVar[int] = 20
    interval: ClassVar[str] = "4ms"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def its_sink(self) -> Any:
        """What `run` writes to when it is not told."""
        raise NotImplementedError

    def run(
        self,
        sink: Any = None,
        *,
        stream: rf.Stream | None = None,
        parallelism: int = 2,
        restart: Any = None,
        interval: str | None = None,
    ) -> None:
        rows = stream or rf.from_arrow(self.data, batch_rows=self.batch_rows)
        every = interval or self.interval
        rf.Flow("job", rows.rebalance().write(sink or self.its_sink())).run(
            parallelism=parallelism,
            local=True,
            progress=False,
            checkpoints=rf.CheckpointConfig(str(self.folder / "chk"), interval=every, min_pause="0s"),
            config=rf.JobConfig(restart=restart or rf.Restart.fixed(delay="0s")),
        )

    def failing(self, after: int, name: str = "failed", batch_rows: int | None = None) -> rf.Stream:
        """The rows, through a step that fails once behind so many of them; ``name``: of the file that says it has."""
        rows = rf.from_arrow(self.data, batch_rows=batch_rows or self.batch_rows)
        marker = str(self.folder / name)
        return rows.map_batches(FailsOnce, fn_constructor_args=(marker, after), schema=self.data.schema)
