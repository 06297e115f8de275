"""Contracts of operators, sources and sinks. Nothing here knows of Ray, files or the checkpoint protocol.

They stand in `rayflow.operators.contracts`, a file a subject, and are imported from here.

Life of an operator, always in this order and always on the one loop thread of its subtask:

    build() -> open(context, output) -> restore(states)?
            -> { process | on_watermark | on_timer | snapshot }* -> on_end -> close

- `open` may be expensive (a model, a connection); it is called once an attempt.
- `restore` is called before the first batch, with the states of this subtask's key-group range (keyed) or the states
  dealt to this subtask (operator state); not at all on a fresh start.
- `process` must not keep the batch mutable (Arrow is immutable) and emits by calling ``self.out.emit(batch)``.
- `snapshot` runs in the sync phase: it must take O(1) time in the size of the state. What it returns is frozen: later
  changes of the operator must not show in it. Heavy work belongs into `FrozenState.prepare`, which the uploader runs.
- After `on_end` come only snapshots, and then `close`. `close` is also called after a failure, at any point.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from rayflow.core.ids import MIN_WATERMARK
from rayflow.core.manifest import SplitState
from rayflow.operators.contracts.cold import BoolArray, Change, ColdStore, ColdTable, UInt16Array
from rayflow.operators.contracts.operator import (
    MAIN,
    Operator,
    OperatorContext,
    OperatorFactory,
    Output,
    Staging,
    StateBackend,
)
from rayflow.operators.contracts.sink import Committer, CommitterContext, Guarantee, SinkFactory, SinkOperator
from rayflow.operators.contracts.source import EventTime, Polled, Source, SplitReader
from rayflow.operators.contracts.state import (
    DELETED,
    EXPIRES,
    FolderFile,
    FrozenFolder,
    FrozenState,
    FrozenTable,
    Piece,
    RestoredFolder,
    RestoredState,
    Spread,
    new_piece,
)


@dataclass(slots=True)
class Collected:
    """An `Output` that keeps what is emitted, by tag; for operators under test."""

    batches: dict[str, list[pa.RecordBatch]] = field(default_factory=dict)

    def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
        self.batches.setdefault(tag, []).append(batch)

    def table(self, tag: str = MAIN) -> pa.Table | None:
        found = self.batches.get(tag)
        return pa.Table.from_batches(found) if found else None


__all__ = [
    "DELETED",
    "EXPIRES",
    "MAIN",
    "MIN_WATERMARK",
    "BoolArray",
    "Change",
    "ColdStore",
    "ColdTable",
    "Collected",
    "Committer",
    "CommitterContext",
    "EventTime",
    "FolderFile",
    "FrozenFolder",
    "FrozenState",
    "FrozenTable",
    "Guarantee",
    "Operator",
    "OperatorContext",
    "OperatorFactory",
    "Output",
    "Piece",
    "Polled",
    "RestoredFolder",
    "RestoredState",
    "SinkFactory",
    "SinkOperator",
    "Source",
    "SplitReader",
    "SplitState",
    "Spread",
    "Staging",
    "StateBackend",
    "UInt16Array",
    "new_piece",
]
