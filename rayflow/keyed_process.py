"""``KeyedStream.process`` and ``KeyedStream.connect``: from a user's `KeyedProcess` to a step of the graph."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayflow.errors import PlanError
from rayflow.graph import MAIN_TAG, Exchange, Input, Node, caller_location
from rayflow.operators.process import BroadcastProcess, KeyedProcess, Process
from rayflow.stream import Stream

if TYPE_CHECKING:
    from rayflow.keyed import KeyedStream


class ProcessResult(Stream):
    """What `KeyedStream.process` gives: the main output; `side` gives the others."""

    def side(self, tag: str) -> Stream:
        """The rows that the process emits with ``tag=``; declared in its ``side_outputs``."""
        operator = self._node.operator
        known = sorted(operator.description.side_outputs)
        if tag not in known:
            raise PlanError(
                f"{self._node.where()} has no side output {tag!r}, it declares {', '.join(known) or 'none'}; "
                f"name it in {type(operator.description).__name__}.side_outputs"
            )
        return Stream(self._node, tag=tag)


class ConnectedStream:
    """What `KeyedStream.connect` gives; call `process`."""

    def __init__(self, keyed: KeyedStream, other: Stream) -> None:
        self._keyed = keyed
        self._other = other

    def process(
        self,
        process: BroadcastProcess | type[BroadcastProcess],
        *,
        parallelism: int | None = None,
        name: str | None = None,
    ) -> ProcessResult:
        """Keyed rows go to ``process`` as in `KeyedStream.process`, all rows of the other stream to
        ``process_broadcast`` of every subtask."""
        description = described(process)
        if not isinstance(description, BroadcastProcess):
            raise PlanError(
                f"step 'process' ({caller_location()}): connect(...).process needs an rf.BroadcastProcess, got "
                f"{type(description).__name__}; derive it from that class"
            )
        return _step(self._keyed, description, (_broadcast_input(self._other),), parallelism, name)


def process_step(keyed: KeyedStream, process: Any, *, parallelism: int | None, name: str | None) -> ProcessResult:
    description = described(process)
    if isinstance(description, BroadcastProcess):
        raise PlanError(
            f"step 'process' ({caller_location()}): {type(description).__name__} is an rf.BroadcastProcess, which "
            "needs a second stream; write keyed.connect(other).process(...)"
        )
    return _step(keyed, description, (), parallelism, name)


def connect(keyed: KeyedStream, other: Any) -> ConnectedStream:
    if not isinstance(other, Stream):
        raise PlanError(f"step 'connect' ({caller_location()}): expected a stream, got {type(other).__name__}")
    return ConnectedStream(keyed, other)


def described(process: Any) -> KeyedProcess:
    """An instance, of a class made without arguments."""
    where = f"step 'process' ({caller_location()})"
    if inspect.isclass(process) and issubclass(process, KeyedProcess):
        try:
            process = process()
        except TypeError as error:
            raise PlanError(
                f"{where}: {process.__name__} cannot be made without arguments ({error}); pass an instance"
            ) from error
    if not isinstance(process, KeyedProcess):
        raise PlanError(f"{where} needs an rf.KeyedProcess, the class or an instance, got {process!r}")
    return process


def _step(
    keyed: KeyedStream,
    description: KeyedProcess,
    others: tuple[Input, ...],
    parallelism: int | None,
    name: str | None,
) -> ProcessResult:
    upstream = keyed._node
    schema = upstream.schema(look=False) if keyed._tag == MAIN_TAG else upstream.side_schema(keyed._tag)
    try:
        operator = Process(keys=keyed._keys, description=description, event_time=keyed._event_time, schema=schema)
    except PlanError as error:
        raise PlanError(f"step {name or 'process'!r} ({caller_location()}): {error}") from error
    node = Node(
        "process",
        (keyed._input(), *others),
        operator,
        detail=f"{type(description).__name__} by {', '.join(keyed._keys)}",
        name=name,
        parallelism=parallelism,
        location=caller_location(),
    )
    output = node.schema(look=False)
    return ProcessResult(node, event_time=_event_time(keyed._event_time, output))


def _event_time(column: str | None, output: pa.Schema | None) -> str | None:
    """The output has event time if it may have the column of the input's."""
    return column if column is not None and (output is None or column in output.names) else None


def _broadcast_input(other: Stream) -> Input:
    """Every subtask gets every row once; a stream that was broadcast by hand is not broadcast twice."""
    node = other._node
    if node.label == "broadcast" and other._tag == MAIN_TAG and len(node.inputs) == 1:
        return node.inputs[0]
    return Input(node, Exchange("broadcast"), other._tag)


__all__ = ["ConnectedStream", "ProcessResult", "connect", "process_step"]
