"""The instrument: a two-phase sink whose target outlives every crash and knows when it is used wrongly.

Rows are prepared under a token and become visible when the token is committed. Wrong are: the commit of something that
was never prepared (lost output), a commit before a manifest that names the token is durable (rules C2, S1), a token
used twice, and a fresh start over committed output (rule R3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.errors import CommitLostError
from rayflow.operators.base import Committer, FrozenState, FrozenTable, RestoredState, SinkOperator
from tests.simulation.faults import Crash, Faults, TargetError, Violation

Row = tuple[Any, ...]


class Target:
    """Durable. ``port`` may raise `Crash`; ``named`` tells whether a durable manifest names a token."""

    def __init__(self, faults: Faults, named: Callable[[str], bool]) -> None:
        self.prepared: dict[str, list[Row]] = {}
        self.committed: dict[str, list[Row]] = {}
        self.commit_calls: list[tuple[str, ...]] = []
        self.whole = False
        """The coordinator commits, and each time all that one durable manifest names (`Committer.whole`)."""
        self.named_by: Callable[[Sequence[str]], bool] = lambda tokens: True
        """Whether one durable manifest names exactly these tokens."""
        self.checkpoint_of: dict[str, CheckpointId] = {}
        """Token -> the checkpoint for which its rows were cut off."""
        self.alone = True
        """False: another run may leave behind what it had prepared, to be cleaned up by `Committer.finish`."""
        self._faults = faults
        self._named = named
        self._seen: set[str] = set()

    def _enter(self) -> str | None:
        self._faults.port()
        fault = self._faults.target()
        if fault == "before":
            raise TargetError("the target refused the call")
        return fault

    def _leave(self, fault: str | None) -> None:
        if fault == "after":
            raise TargetError("the answer of the target was lost")
        self._faults.port()

    def prepare(self, token: str, rows: list[Row]) -> None:
        fault = self._enter()
        if token in self.committed:
            raise Violation(f"S1: {token} is prepared again after it was committed")
        if token in self.prepared and self.prepared[token] != rows:
            raise Violation(f"S1: {token} is prepared twice with different rows")
        self.prepared[token] = rows
        self._leave(fault)

    def commit(self, tokens: Sequence[str]) -> None:
        self.commit_calls.append(tuple(tokens))
        for token in tokens:
            fault = self._enter()
            self._publish(token)
            self._leave(fault)

    def _publish(self, token: str) -> None:
        if not self._named(token):
            raise Violation(f"C2: {token} is committed although no durable manifest names it")
        if token in self.committed:
            return
        if token not in self.prepared:
            raise CommitLostError(f"{token} was prepared for a complete checkpoint and is gone")
        self.committed[token] = self.prepared.pop(token)

    def recover(self, tokens: Sequence[str], *, fresh: bool) -> None:
        if fresh and self.committed:
            raise Violation(f"R3: a fresh start over {len(self.committed)} committed transactions")
        self.commit(tokens)
        fault = self._enter()
        keep = set(tokens)
        for token in [t for t in self.prepared if t not in keep]:
            del self.prepared[token]
        self._leave(fault)

    def rows(self) -> Counter[Row]:
        return Counter(row for rows in self.committed.values() for row in rows)

    def new_token(self, token: str, checkpoint: CheckpointId) -> str:
        self.checkpoint_of[token] = checkpoint
        if token in self._seen:
            raise Violation(f"C6: the name {token} is used twice")
        self._seen.add(token)
        return token


@dataclass(frozen=True, eq=False)
class FakeSink:
    """Factory. ``state`` adds an operator state of its own: how many rows have come, to be checked on restore."""

    target: Target
    state: bool = True

    @property
    def stateful(self) -> bool:
        return self.state

    def build(self) -> FakeSinkOperator:
        return FakeSinkOperator(self)

    def committer(self) -> Committer | None:
        return WholeCommitter(self.target) if self.target.whole else FakeCommitter(self.target)


@dataclass(eq=False)
class FakeCommitter(Committer):
    target: Target

    def commit(self, committables: Sequence[Any]) -> None:
        self.target.commit([str(c) for c in committables])

    def recover(self, committables: Sequence[Any], *, fresh: bool) -> None:
        self.target.recover([str(c) for c in committables], fresh=fresh)

    def finish(self) -> None:
        if not self.target.alone:
            self.target.prepared.clear()
        if self.target.prepared:
            raise Violation(f"S1: the job is over and {sorted(self.target.prepared)} are prepared and not committed")


class WholeCommitter(FakeCommitter):
    whole = True

    def commit(self, committables: Sequence[Any]) -> None:
        if not self.target.named_by([str(c) for c in committables]):
            raise Violation(f"S1: {committables} are committed by themselves: no durable manifest names just these")
        super().commit(committables)


def _plain(column: pa.Array) -> pa.Array:
    """Times as microseconds: the oracle knows no other."""
    return column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column


_COUNT = pa.schema([("rows", pa.int64())])


class FakeSinkOperator(SinkOperator):
    def __init__(self, sink: FakeSink) -> None:
        self._target = sink.target
        self._stateful = sink.state
        self._rows: list[Row] = []
        self._seen = 0
        self._parts = 0

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            self._seen += sum(state.table.column("rows").to_pylist())

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._rows += list(zip(*(_plain(column).to_pylist() for column in batch.columns), strict=True))
        self._seen += batch.num_rows

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        rows, self._rows = self._rows, []
        tables: tuple[FrozenTable, ...] = ()
        if self._stateful:
            count = pa.table({"rows": [self._seen]}, schema=_COUNT)
            tables = (FrozenTable("seen", (count,), _COUNT),)
        if not rows:
            return FrozenState(tables)
        self._parts += 1
        ctx, target = self.ctx, self._target
        token = target.new_token(f"{ctx.operator}/{ctx.attempt}-{ctx.subtask}-{self._parts}", checkpoint)

        def prepare() -> Sequence[str]:
            target.prepare(token, rows)
            return [token]

        return FrozenState(tables, prepare)


__all__ = ["Crash", "FakeCommitter", "FakeSink", "FakeSinkOperator", "Row", "Target"]
