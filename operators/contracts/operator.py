"""An operator: who it is, where it emits to, and what is called when. Its life is told in `rayflow.operators.base`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.operators.contracts.cold import ColdStore
from rayflow.operators.contracts.state import FrozenState, RestoredState

MAIN = "main"
"""Tag of an operator's ordinary output; side outputs have other tags (``late``, ``dead_letter``)."""


@dataclass(frozen=True, slots=True)
class StateBackend:
    """What ``JobConfig(state=...)`` means for one subtask. Operators ask for it only through `rayflow.operators.state`
    (keyed state) and `rayflow.operators.runs` (columnar runs)."""

    kind: Literal["memory", "fs", "rocksdb"] = "fs"
    memory_bytes: int = 256 * 1024 * 1024
    """How much an operator instance may keep in memory under ``rocksdb`` before it uses the local disk."""
    scratch: Callable[[str], Path] | None = None
    """Under ``rocksdb``: makes a new empty local folder with this in its name; removed when the attempt is over."""
    open_cold: Callable[[Path, OperatorContext], ColdStore] | None = None
    """Under ``rocksdb``: an empty `ColdStore` in that folder."""


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder beside the checkpoints of the job in which sinks may keep rows until they are committed."""

    url: str
    storage_options: Mapping[str, object] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class OperatorContext:
    """Who and where this operator instance is."""

    job: str
    run_id: str
    operator: str
    """Stable id of the operator in the plan; state is mapped by it on restore."""
    step: str
    """What to call it in messages to people."""
    subtask: int
    parallelism: int
    max_parallelism: int
    attempt: int
    key_groups: range
    now: Callable[[], float]
    """Seconds of a clock that never goes back; injected, so that the simulator can run time."""
    wall_time: Callable[[], float] = lambda: 0.0
    """Unix seconds: for processing-time timers and time to live, which must mean the same after a restart."""
    backend: StateBackend = field(default_factory=lambda: StateBackend())
    staging: Staging | None = None
    """Where a sink may keep rows until they are committed; None without a checkpoint directory."""
    threads: bool = False
    """Whether what an operator does may depend on how fast threads of its own are. Not in the local runtime and the
    simulator: there it waits for them."""

    def __str__(self) -> str:
        return f"step {self.step!r} subtask {self.subtask}/{self.parallelism}"


class Output(Protocol):
    """Where an operator emits to: the next operator of the chain, or the exchange."""

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None: ...


class Operator(ABC):
    """Base of everything in a chain."""

    ctx: OperatorContext
    out: Output

    def open(self, ctx: OperatorContext, out: Output) -> None:
        self.ctx = ctx
        self.out = out

    def restore(self, states: Sequence[RestoredState]) -> None:
        """Take back what `snapshot` gave. The default refuses state: dropping it silently would be data loss."""
        if states:
            raise NotImplementedError(f"{self.ctx} cannot restore state {[s.name for s in states]}")

    @abstractmethod
    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        """One batch. ``input_index`` tells the inputs of a step apart (0 for a single one)."""

    def on_watermark(self, time: int) -> int:
        """Event time has reached ``time`` (us). Emit what is due, then return the watermark to pass on (rule W1)."""
        return time

    def on_idle(self, inputs_idle: bool) -> bool:
        """Asked from time to time: whether nothing more will come out of here for now, so that others need not wait.

        ``inputs_idle``: no rows will come in for now. An operator that then still holds rows which it will emit by
        itself (in flight, or on a timer) must return False: what it emits later could be late.
        """
        return inputs_idle

    def full(self) -> bool:
        """Whether no input should be taken for now, because results are waited for: `on_time` must make that end."""
        return False

    def next_timer(self) -> float | None:
        """The `OperatorContext.wall_time` at which `on_time` should be called next; None: not at all."""
        return None

    def on_time(self, now: float) -> None:
        """The clock has reached ``next_timer()``; ``now`` in Unix seconds. Called between batches, and not while the
        outputs are blocked."""

    def on_end(self) -> None:
        """All inputs have ended; called after ``on_watermark(MAX_WATERMARK)``. Emit what is still held."""

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        """The state behind all batches processed so far and before all later ones (rule A3). None: stateless."""
        return None

    def close(self) -> None:
        """Release resources; must be safe after a failure and when called twice."""


class OperatorFactory(Protocol):
    """Immutable, picklable description of an operator; built once in every subtask, every attempt."""

    def build(self) -> Operator: ...

    @property
    def stateful(self) -> bool: ...

    # Optional: ``state_schemas(input_schema) -> Mapping[str, pa.Schema] | None``, the keyed states by name as they are
    # frozen, so that a dry run of a restore can compare them (`rayflow restore-plan`). ``migrates_state = False`` says
    # that they must be the same: without it the changes that `rayflow.operators.state.evolution` allows are taken over.
