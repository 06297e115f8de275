"""Fused operators: one chain is called as nested functions, a batch at a time, on the loop thread of its subtask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.errors import RayflowError, UserCodeError
from rayflow.operators.base import (
    MAIN,
    FrozenState,
    Operator,
    OperatorContext,
    Output,
    RestoredState,
)
from rayflow.plan import PlannedOperator

EmitBatch = Callable[[pa.RecordBatch, str], None]


class _Blame:
    """Around every call of an operator: what is not an error of rayflow's own leaves it under the operator's name.

    An error travels up through the calls of all operators before it, and the innermost name stays.
    """

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, RayflowError):
            raise UserCodeError(f"{self._where} raised {type(error).__name__}: {error}") from error


class _Link:
    """The output of one operator: the input of the next, or for side outputs and the last one the exchange."""

    __slots__ = ("_emit", "_following")

    def __init__(self, following: tuple[_Blame, Operator] | None, emit: EmitBatch) -> None:
        self._following = following
        self._emit = emit

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
        if batch.num_rows == 0:
            return
        if self._following is None or tag != MAIN:
            self._emit(batch, tag)
            return
        blame, operator = self._following
        with blame:
            operator.process(batch, 0)


class ChainRunner:
    """The operators of one subtask. Emits what leaves the chain through ``emit(batch, tag)``."""

    def __init__(
        self, planned: Sequence[PlannedOperator], contexts: Mapping[str, OperatorContext], emit: EmitBatch
    ) -> None:
        self._planned = tuple(planned)
        self._contexts = contexts
        self._emit = emit
        self._operators: list[Operator] = []
        self._guarded: list[tuple[_Blame, Operator]] = []
        self._bounded: list[Operator] = []
        """Those that may be full."""
        self._head: Output | None = None
        self.watermark = MIN_WATERMARK

    def open(self, states: Mapping[str, Sequence[RestoredState]]) -> None:
        """Build, open and restore every operator, the last one first, so that none emits into a closed one."""
        self._operators = [p.factory.build() for p in self._planned]
        self._bounded = [o for o in self._operators if type(o).full is not Operator.full]
        blames = [_Blame(str(self._contexts[p.id])) for p in self._planned]
        self._guarded = list(zip(blames, self._operators, strict=True))
        following: tuple[_Blame, Operator] | None = None
        for planned, (blame, operator) in reversed(list(zip(self._planned, self._guarded, strict=True))):
            with blame:
                operator.open(self._contexts[planned.id], _Link(following, self._emit))
                operator.restore(states.get(planned.id, ()))
            following = (blame, operator)
        self._head = _Link(following, self._emit)

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if input_index == 0 or not self._operators:
            assert self._head is not None
            self._head.emit(batch, MAIN)
            return
        blame, first = self._guarded[0]
        with blame:
            first.process(batch, input_index)

    def advance(self, time: int) -> int:
        """Event time has reached ``time`` at the head; returns the watermark behind the last operator (rule W1)."""
        for blame, operator in self._guarded:
            with blame:
                time = operator.on_watermark(time)
        self.watermark = max(self.watermark, time)
        return self.watermark

    def idle(self, inputs_idle: bool) -> bool:
        """Whether nothing will leave the chain for now."""
        for blame, operator in self._guarded:
            with blame:
                inputs_idle = operator.on_idle(inputs_idle)
        return inputs_idle

    @property
    def full(self) -> bool:
        """Whether an operator wants no more input for now."""
        return any(operator.full() for operator in self._bounded)

    def next_timer(self) -> float | None:
        """The earliest wall time any operator wants to be called at."""
        return min((t for o in self._operators if (t := o.next_timer()) is not None), default=None)

    def on_time(self, now: float) -> None:
        """Call every operator whose time has come (Unix seconds)."""
        for blame, operator in self._guarded:
            due = operator.next_timer()
            if due is not None and due <= now:
                with blame:
                    operator.on_time(now)

    def end(self) -> None:
        for blame, operator in self._guarded:
            with blame:
                operator.on_end()

    def snapshot(self, checkpoint: CheckpointId) -> list[tuple[str, FrozenState]]:
        """What every stateful operator gives to the checkpoint, in chain order (sync phase, rule A3)."""
        frozen = [(p.id, o.snapshot(checkpoint)) for p, o in zip(self._planned, self._operators, strict=True)]
        return [(operator, state) for operator, state in frozen if state is not None]

    def close(self) -> None:
        for operator in self._operators:
            operator.close()
        self._operators, self._guarded, self._bounded = [], [], []

    def counters(self) -> dict[str, float]:
        """Numbers operators keep for people (late rows, skipped rows), by name."""
        found: dict[str, float] = {}
        for operator in self._operators:
            for name in ("late_rows", "skipped_rows"):
                value = getattr(operator, name, None)
                if value:
                    found[name] = found.get(name, 0.0) + float(value)
        return found
