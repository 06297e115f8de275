"""The logical graph: what the user builds. Immutable nodes that know their inputs; nothing here runs or reads data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rayflow.errors import PlanError

if TYPE_CHECKING:
    import pyarrow as pa

ExchangeKind = Literal["forward", "hash", "rebalance", "broadcast"]
MAIN_TAG = "main"


@dataclass(frozen=True, slots=True)
class Exchange:
    """How rows get from the subtasks of one step to those of the next."""

    kind: ExchangeKind = "forward"
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"hash({', '.join(self.keys)})" if self.kind == "hash" else self.kind


FORWARD = Exchange()


@dataclass(frozen=True, slots=True)
class Input:
    node: Node
    exchange: Exchange = FORWARD
    tag: str = MAIN_TAG


@dataclass(frozen=True, eq=False)
class Node:
    """One step. ``operator`` is an operator factory (None for sources), ``source`` a source description.

    ``combiner`` may be put in front of the hash exchange when nothing but the main output is used; the operator is then
    replaced by ``combined``, which takes what the combiner emits.
    """

    label: str
    inputs: tuple[Input, ...] = ()
    operator: Any = None
    source: Any = None
    event_time: Any = None
    combiner: Any = None
    combined: Any = None
    detail: str = ""
    name: str | None = None
    parallelism: int | None = None
    location: str = ""
    _schema: list[pa.Schema | None] = field(default_factory=list, repr=False)

    @property
    def is_sink(self) -> bool:
        return hasattr(self.operator, "committer")

    @property
    def title(self) -> str:
        return self.name or self.label

    def schema(self, *, look: bool) -> pa.Schema | None:
        """Schema of the main output, None when unknown. Only with ``look`` may a source look into its input.

        Raises `PlanError` naming the step and where it was written.
        """
        if self._schema:
            return self._schema[0]
        upstream = self.input_schemas(look=look)
        try:
            if self.source is not None:
                result = self.source.schema() if look else self.source.declared_schema()
            elif hasattr(self.operator, "output_schema_of"):
                result = self.operator.output_schema_of(upstream)
            elif hasattr(self.operator, "output_schema"):
                if len(upstream) > 1 and not getattr(self.operator, "inputs_differ", False):
                    _check_same(upstream)
                result = self.operator.output_schema(upstream[0])
            else:
                result = upstream[0] if upstream else None
        except PlanError as error:
            raise PlanError(f"{self.where()}: {error}") from error
        if look or result is not None:
            self._schema.append(result)
        return result

    def input_schemas(self, *, look: bool) -> list[pa.Schema | None]:
        """Schemas of the rows of its inputs, None where unknown."""
        return [i.node.schema(look=look) if i.tag == MAIN_TAG else i.node.side_schema(i.tag) for i in self.inputs]

    def input_schema(self) -> pa.Schema | None:
        """Schema of the rows of its first input, None when unknown; never looks."""
        return next(iter(self.input_schemas(look=False)), None)

    def side_schema(self, tag: str) -> pa.Schema | None:
        """Schema of a side output: what the operator says; late and dead-letter rows have the columns of its input."""
        declared = getattr(self.operator, "side_schema", None)
        if declared is None:
            return self.input_schema()
        schema: pa.Schema | None = declared(tag)
        return schema

    def where(self) -> str:
        return f"step {self.title!r}" + (f" ({self.location})" if self.location else "")


def _check_same(schemas: Sequence[pa.Schema | None]) -> None:
    known = [s for s in schemas if s is not None]
    for other in known[1:]:
        if not other.equals(known[0]):
            raise PlanError(
                f"the inputs have different schemas: expected {_brief(known[0])}, got {_brief(other)}; "
                "select or rename columns so that they agree"
            )


def _brief(schema: pa.Schema) -> str:
    return "(" + ", ".join(f"{f.name}: {f.type}" for f in schema) + ")"


def caller_location() -> str:
    """``file.py:line`` of the nearest caller outside rayflow, for messages."""
    package = str(Path(__file__).resolve().parent)
    frame = sys._getframe(1)
    while frame is not None and str(Path(frame.f_code.co_filename).resolve()).startswith(package):
        back = frame.f_back
        if back is None:
            return ""
        frame = back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def topological(sinks: Iterable[Node]) -> list[Node]:
    """All nodes above the sinks, inputs before consumers, in an order that depends on the graph alone."""
    done: dict[int, Node] = {}
    order: list[Node] = []

    def visit(node: Node) -> None:
        if id(node) in done:
            return
        done[id(node)] = node
        for each in node.inputs:
            visit(each.node)
        order.append(node)

    for sink in sinks:
        visit(sink)
    return order
