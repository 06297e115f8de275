"""`Sink`: what a sink of one's own derives from; the engine itself asks for a `rayflow.operators.base.SinkFactory`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pyarrow as pa

from rayflow.operators.base import Committer, Guarantee, SinkOperator


class Sink(ABC):
    """Where rows go: an immutable, picklable description that `Stream.write` takes. Tutorial: docs/custom-sinks.md.

    For every checkpoint, in this order: each subtask's `SinkOperator.snapshot` on its loop thread; the ``prepare`` of
    what that returned, on the background thread of the subtask, which makes the rows durable and hands out committables
    (small JSON); the manifest of the checkpoint, which holds them; `Committer.commit` of them. A crash may come between
    any two of these, and then `Committer.recover` is told what the manifest holds. ``prepare`` is called again when it
    raised; `commit` and `recover` at any time for what is committed already.
    """

    guarantee: Guarantee = "exactly_once"
    """What it makes of exactly-once checkpoints; a flow that asks for more warns or is refused."""

    @abstractmethod
    def build(self) -> SinkOperator:
        """A new writer, for one attempt of one subtask."""

    def committer(self) -> Committer | None:
        """A new committer: one in every subtask, one in the coordinator. None: there is nothing to commit."""
        return None

    def check(self, schema: pa.Schema) -> None:
        """Raise `PlanError` for columns that cannot be written. Called while the flow is built or started, where the
        columns are known by then."""

    @property
    def stateful(self) -> bool:
        """Whether writers keep state of their own in checkpoints (`FrozenState.tables`), for which a restore looks."""
        return False

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Called by the planner with the columns of the rows, if they are known."""
        if schema is not None:
            self.check(schema)
        return schema


__all__ = ["Sink"]
