"""Keyed state and timers for user code: the class a user derives from, and the factory of the operator that runs it.

>>> import pyarrow as pa
>>> import rayflow as rf
>>> class Total(rf.KeyedProcess):
...     total = rf.ReducingState(pa.int64(), "sum", default=0)
...
...     def process_batch(self, batch, ctx):
...         self.total.add(ctx, batch["v"])
...         ctx.emit({"k": ctx.keys["k"], "total": self.total.get(ctx)})
>>> rows = rf.from_arrow(pa.table({"k": ["a", "b", "a"], "v": [1, 2, 3]}))
>>> rows.key_by("k").process(Total).to_arrow().to_pylist()
[{'k': 'a', 'total': 4}, {'k': 'b', 'total': 2}]
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import pyarrow as pa

from rayflow.errors import PlanError, UserCodeError
from rayflow.operators.base import MAIN, Operator, OperatorContext
from rayflow.operators.event_time import check_event_time
from rayflow.operators.process_context import BatchContext, KeyContext
from rayflow.operators.state.declared import (
    TIMERS,
    BroadcastState,
    check_names,
    declared_states,
    key_schema,
    table_schemas,
)
from rayflow.operators.state.timers import timer_schema

KEYS: Final = "__keys"
"""Operator state without rows: its schema is that of the keys, so that timers can be restored before the first row;
its meta is the next position of list elements."""


class KeyedProcess:
    """Your code with state by key: derive, declare states as class attributes, and write **either**

    - ``process_batch(self, batch, ctx)`` and, for timers, ``on_timers(self, times, ctx)``: whole batches, fast; **or**
    - ``process(self, key, rows, ctx)`` and ``on_timer(self, key, time, ctx)``: one key at a time, convenient.

    ``stream.key_by("k").process(Mine(threshold=3))`` (or ``process(Mine)``): the instance is a description that is
    pickled; every subtask works on a copy, whose declared states are handles to its rows. Attributes that you set in a
    running copy are not part of checkpoints: what must survive a failure belongs into a state.

    A call's state changes, timers and output are in one checkpoint together or not at all.
    """

    output: ClassVar[Any] = None
    """``pa.Schema`` of what `ctx.emit` gives; or a method ``output(self, schema)`` from that of the input (None:
    unknown). None: what is emitted first decides, and all later output must agree."""
    side_outputs: ClassVar[Mapping[str, pa.Schema | None]] = {}
    """Tag -> schema (None: decided by the first rows) of further outputs: ``ctx.emit(..., tag=...)``."""

    def open(self, ctx: OperatorContext) -> None:
        """Called once an attempt in every subtask, before anything else: load a model, connect. No state here."""

    def close(self) -> None:
        """Called at the end and after failures, perhaps twice."""

    def process_batch(self, batch: pa.RecordBatch, ctx: BatchContext) -> None:
        """Rows of any keys of this subtask, in the order in which they came."""
        raise NotImplementedError

    def on_timers(self, times: Any, ctx: BatchContext) -> None:
        """Timers that are due: ``times`` (int64 us, ascending) of the keys at ``ctx.index`` of ``ctx.keys``. They are
        deleted already; those that you set and that are due too come in a next call before the watermark goes on."""
        raise NotImplementedError

    def process(self, key: Any, rows: pa.RecordBatch, ctx: KeyContext) -> None:
        """All rows of a batch with one key, in their order. ``key`` is the value, or a tuple of several columns."""
        raise NotImplementedError

    def on_timer(self, key: Any, time: int, ctx: KeyContext) -> None:
        """A timer of the key is due. It is deleted already; one that you set and that is due too fires next."""
        raise NotImplementedError


class BroadcastProcess(KeyedProcess):
    """A `KeyedProcess` that also sees every row of another stream: ``keyed.connect(rules).process(Mine)``.

    Declare `rf.BroadcastState` for what is remembered of those rows: written in ``process_broadcast``, read everywhere.
    Rows of the two streams meet in any order; of several subtasks that write the other stream, too.
    """

    def process_broadcast(self, rows: pa.RecordBatch, ctx: Any) -> None:
        """Rows of the other stream, in every subtask. ``ctx.emit`` gives rows to the next step (in every subtask, so
        as many times as there are subtasks); there is no key here, so keyed state cannot be used."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Process:
    """Factory. Schema in: rows with the key columns; schema out: what the description declares, or None."""

    keys: tuple[str, ...]
    description: KeyedProcess
    event_time: str | None = None
    schema: pa.Schema | None = None
    """Of the rows, where it is known while building."""
    inputs_differ: ClassVar[bool] = True
    """Inputs need not have the same schema (see `Node.schema`)."""

    def __post_init__(self) -> None:
        check_description(self.description, self.keys)
        if self.schema is not None:
            self.output_schema(self.schema)

    @property
    def stateful(self) -> bool:
        return True

    @property
    def batched(self) -> bool:
        """Whether whole batches are processed, not key by key."""
        return overrides(self.description, "process_batch")

    @property
    def two_inputs(self) -> bool:
        return isinstance(self.description, BroadcastProcess)

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Of the main output; raises `PlanError` where the input does not fit."""
        if schema is not None:
            missing = [key for key in self.keys if key not in schema.names]
            if missing:
                raise PlanError(f"process needs the key columns {missing}; available: {', '.join(schema.names)}")
            if self.event_time is not None and self.event_time in schema.names:
                check_event_time(schema, self.event_time, step="process")
        return declared_output(self.description, schema)

    def side_schema(self, tag: str) -> pa.Schema | None:
        return self.description.side_outputs.get(tag)

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        """States by name as they are frozen; None where the key types are not known."""
        schema = schema if schema is not None else self.schema
        if schema is None or any(key not in schema.names for key in self.keys):
            return None
        keys = key_schema(schema, self.keys)
        tables = table_schemas(type(self.description), keys)
        found = {name: pa.schema([*key, *value]) for name, (key, value, _) in tables.items()}
        declared = declared_states(type(self.description))
        shared = {
            name: pa.schema(state.columns) for name, state in declared.items() if isinstance(state, BroadcastState)
        }
        return found | shared | {TIMERS: timer_schema(keys), KEYS: keys}

    def build(self) -> Operator:
        from rayflow.operators.process_broadcast import BroadcastOperator
        from rayflow.operators.process_operator import ProcessOperator

        try:
            working = copy.deepcopy(self.description)
        except Exception as error:
            raise UserCodeError(
                f"the instance of {type(self.description).__name__} cannot be copied for a subtask: {error}; make what "
                "cannot be copied in open(ctx), not in the constructor"
            ) from error
        kind = BroadcastOperator if self.two_inputs else ProcessOperator
        return kind(self, working)


def overrides(description: KeyedProcess, method: str) -> bool:
    base = BroadcastProcess if method == "process_broadcast" else KeyedProcess
    return getattr(type(description), method) is not getattr(base, method)


def check_description(description: Any, keys: tuple[str, ...]) -> None:
    """Raise `PlanError` for whatever can be seen to be wrong before anything runs."""
    owner = type(description)
    name = owner.__name__
    if not isinstance(description, KeyedProcess):
        raise PlanError(f"process needs an rf.KeyedProcess, the class or an instance, got {description!r}")
    batched, by_key = overrides(description, "process_batch"), overrides(description, "process")
    if batched and by_key:
        raise PlanError(f"{name} has both process_batch and process; keep the one you want to be called")
    if not (batched or by_key):
        raise PlanError(f"{name} has neither process_batch(batch, ctx) nor process(key, rows, ctx); write one of them")
    if batched and overrides(description, "on_timer"):
        raise PlanError(f"{name} has process_batch, whose timers come to on_timers(times, ctx), not to on_timer")
    if by_key and overrides(description, "on_timers"):
        raise PlanError(f"{name} has process, whose timers come to on_timer(key, time, ctx), not to on_timers")
    check_names(owner, keys)
    broadcasts = [n for n, state in declared_states(owner).items() if isinstance(state, BroadcastState)]
    if isinstance(description, BroadcastProcess):
        if not overrides(description, "process_broadcast"):
            raise PlanError(f"{name} has no process_broadcast(rows, ctx), which a BroadcastProcess needs; write it")
    elif broadcasts:
        raise PlanError(f"{name} declares the BroadcastState {broadcasts[0]!r}; derive it from rf.BroadcastProcess")
    sides = owner.side_outputs
    if not isinstance(sides, Mapping) or not all(
        isinstance(tag, str) and tag and (schema is None or isinstance(schema, pa.Schema))
        for tag, schema in sides.items()
    ):
        raise PlanError(f"{name}.side_outputs must map tags to a pyarrow.Schema or None, got {sides!r}")
    if MAIN in sides:
        raise PlanError(f"{name}.side_outputs names {MAIN!r}, which is the main output; declare that as output")
    declared_output(description, None)


def declared_output(description: KeyedProcess, schema: pa.Schema | None) -> pa.Schema | None:
    output = description.output
    name = f"{type(description).__name__}.output"
    if callable(output):
        try:
            output = output(schema)
        except Exception as error:
            raise PlanError(f"{name} raised {type(error).__name__}: {error} for the input {schema}") from error
    if output is not None and not isinstance(output, pa.Schema):
        raise PlanError(f"{name} must be a pyarrow.Schema or None, got {type(output).__name__}")
    return output


__all__ = ["KEYS", "BroadcastProcess", "KeyedProcess", "Process", "check_description", "overrides"]
