"""Fused operators: one chain is called as nested functions, a batch at a time, on the loop thread of its subtask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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


class _Link:
    """The output of one operator: the input of the next, or for side outputs and the last one the exchange."""

    __slots__ = ("_emit", "_guard", "_next")

    def __init__(self, following: Operator | None, guard: Callable[[Exception], Exception], emit: EmitBatch) -> None:
        self._next = following
        self._guard = guard
        self._emit = emit

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
        if batch.num_rows == 0:
            return
        if self._next is None or tag != MAIN:
            self._emit(batch, tag)
            return
        try:
            self._next.process(batch, 0)
        except RayflowError:
            raise
        except Exception as error:
            raise self._guard(error) from error


class ChainRunner:
    """The operators of one subtask. Emits what leaves the chain through ``emit(batch, tag)``."""

    def __init__(
        self, planned: Sequence[PlannedOperator], contexts: Mapping[str, OperatorContext], emit: EmitBatch
    ) -> None:
        self._planned = tuple(planned)
        self._contexts = contexts
        self._emit = emit
        self._operators: list[Operator] = []
        self._head: Output | None = None
        self.watermark = MIN_WATERMARK

    def open(self, states: Mapping[str, Sequence[RestoredState]]) -> None:
        """Build, open and restore every operator, the last one first, so that none emits into a closed one."""
        self._operators = [p.factory.build() for p in self._planned]
        following: Operator | None = None
        for planned, operator in reversed(list(zip(self._planned, self._operators, strict=True))):
            guard = self._guard_of(None if following is None else self._after(planned))
            try:
                operator.open(self._contexts[planned.id], _Link(following, guard, self._emit))
                operator.restore(states.get(planned.id, ()))
            except RayflowError:
                raise
            except Exception as error:
                raise self._guard_of(planned)(error) from error
            following = operator
        first = self._planned[0] if self._planned else None
        self._head = _Link(following, self._guard_of(first), self._emit)

    def _after(self, planned: PlannedOperator) -> PlannedOperator:
        return self._planned[self._planned.index(planned) + 1]

    def _guard_of(self, planned: PlannedOperator | None) -> Callable[[Exception], Exception]:
        def guard(error: Exception) -> Exception:
            where = str(self._contexts[planned.id]) if planned is not None else "the exchange"
            return UserCodeError(f"{where} raised {type(error).__name__}: {error}")

        return guard

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if input_index == 0 or not self._operators:
            assert self._head is not None
            self._head.emit(batch, MAIN)
            return
        try:
            self._operators[0].process(batch, input_index)
        except RayflowError:
            raise
        except Exception as error:
            raise self._guard_of(self._planned[0])(error) from error

    def advance(self, time: int) -> int:
        """Event time has reached ``time`` at the head; returns the watermark behind the last operator (rule W1)."""
        for planned, operator in zip(self._planned, self._operators, strict=True):
            try:
                time = operator.on_watermark(time)
            except RayflowError:
                raise
            except Exception as error:
                raise self._guard_of(planned)(error) from error
        self.watermark = max(self.watermark, time)
        return self.watermark

    def end(self) -> None:
        for planned, operator in zip(self._planned, self._operators, strict=True):
            try:
                operator.on_end()
            except RayflowError:
                raise
            except Exception as error:
                raise self._guard_of(planned)(error) from error

    def snapshot(self, checkpoint: CheckpointId) -> list[tuple[str, FrozenState]]:
        """What every stateful operator gives to the checkpoint, in chain order (sync phase, rule A3)."""
        frozen = [(p.id, o.snapshot(checkpoint)) for p, o in zip(self._planned, self._operators, strict=True)]
        return [(operator, state) for operator, state in frozen if state is not None]

    def close(self) -> None:
        for operator in self._operators:
            operator.close()
        self._operators = []

    def counters(self) -> dict[str, float]:
        """Numbers operators keep for people (late rows, skipped rows), by name."""
        found: dict[str, float] = {}
        for operator in self._operators:
            for name in ("late_rows", "skipped_rows"):
                value = getattr(operator, name, None)
                if value:
                    found[name] = found.get(name, 0.0) + float(value)
        return found
