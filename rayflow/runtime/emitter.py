"""The output side of a subtask: partition, coalesce, hand to the machine.

Cost on the wire is per message, so small pieces of one channel are put together up to ``batch_rows`` or until they have
waited for the linger time; a piece that is large enough goes out as it is, without a copy. Elements never exceed half
the credit window, so that a sender and its receiver can work at the same time (rule F1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from rayflow.core.ids import ChannelId
from rayflow.core.messages import Data, Element
from rayflow.errors import DataError
from rayflow.partition import (
    BroadcastPartitioner,
    ForwardPartitioner,
    HashPartitioner,
    Partitioner,
    RebalancePartitioner,
)
from rayflow.plan import Edge

Offer = Callable[[ChannelId, Element], None]


def partitioner_of(edge: Edge, channels: int, *, max_parallelism: int, subtask_index: int) -> Partitioner:
    """How one subtask splits its batches over the channels of one edge."""
    match edge.exchange.kind:
        case "hash":
            return HashPartitioner(edge.exchange.keys, channels, max_parallelism)
        case "rebalance":
            return RebalancePartitioner(channels, subtask_index=subtask_index)
        case "broadcast":
            return BroadcastPartitioner(channels)
        case "forward":
            return ForwardPartitioner()


class _Buffer:
    """What waits on one channel to be put together."""

    __slots__ = ("batches", "channel", "rows", "since")

    def __init__(self, channel: ChannelId) -> None:
        self.channel = channel
        self.batches: list[pa.RecordBatch] = []
        self.rows = 0
        self.since = 0.0


class Emitter:
    """Everything that leaves one subtask. Used on the loop thread only."""

    def __init__(
        self,
        outputs: Sequence[tuple[Edge, Sequence[ChannelId], Partitioner]],
        offer: Offer,
        *,
        batch_rows: int,
        linger_s: float,
        credit_bytes: int,
        now: Callable[[], float],
    ) -> None:
        self._offer = offer
        self._batch_rows = batch_rows
        self._linger_s = linger_s
        self._element_bytes = max(1, credit_bytes // 2)
        self._now = now
        self._by_tag: dict[str, list[tuple[list[_Buffer], Partitioner]]] = {}
        self._buffers: list[_Buffer] = []
        self._open: dict[ChannelId, _Buffer] = {}
        """Buffers that hold something; insertion order is age."""
        for edge, channels, partitioner in outputs:
            buffers = [_Buffer(channel) for channel in channels]
            self._buffers += buffers
            self._by_tag.setdefault(edge.tag, []).append((buffers, partitioner))
        self.rows_out = 0

    def emit(self, batch: pa.RecordBatch, tag: str) -> None:
        """A batch leaves the chain; a tag that nobody consumes is dropped."""
        for buffers, partitioner in self._by_tag.get(tag, ()):
            self.rows_out += batch.num_rows
            for buffer, piece in zip(buffers, partitioner.split(batch), strict=True):
                if piece is not None and piece.num_rows:
                    self._add(buffer, piece)

    def _add(self, buffer: _Buffer, piece: pa.RecordBatch) -> None:
        if buffer.batches and not buffer.batches[0].schema.equals(piece.schema):
            self._flush(buffer)
        if not buffer.batches:
            buffer.since = self._now()
            self._open[buffer.channel] = buffer
        buffer.batches.append(piece)
        buffer.rows += piece.num_rows
        # A quarter of the largest batch is where larger messages stop to pay; see ARCHITECTURE.
        if buffer.rows * 4 >= self._batch_rows:
            self._flush(buffer)

    def _flush(self, buffer: _Buffer) -> None:
        if not buffer.batches:
            return
        batches, buffer.batches, buffer.rows = buffer.batches, [], 0
        del self._open[buffer.channel]
        for whole in _together(batches):
            for start in range(0, whole.num_rows, self._batch_rows):
                self._send(buffer.channel, whole.slice(start, self._batch_rows))

    def _send(self, channel: ChannelId, batch: pa.RecordBatch) -> None:
        nbytes = batch.nbytes
        if nbytes > self._element_bytes:
            batch = _compact(batch)
            nbytes = batch.nbytes
        if nbytes > self._element_bytes:
            if batch.num_rows == 1:
                raise DataError(
                    f"one row of {nbytes} bytes on {channel} is larger than half the credit of a channel "
                    f"({self._element_bytes} bytes); raise JobConfig(inflight_bytes)"
                )
            half = batch.num_rows // 2
            self._send(channel, batch.slice(0, half))
            self._send(channel, batch.slice(half))
            return
        self._offer(channel, Data(batch, nbytes))

    def flush(self) -> None:
        """Send everything that waits."""
        for buffer in list(self._open.values()):
            self._flush(buffer)

    def flush_due(self, now: float) -> None:
        """Send what has waited for the linger time."""
        for buffer in list(self._open.values()):
            # As `next_deadline` says it: the difference may round the other way, and then nobody would ever be due.
            if now < buffer.since + self._linger_s:
                break
            self._flush(buffer)

    def next_deadline(self) -> float | None:
        for buffer in self._open.values():
            return buffer.since + self._linger_s
        return None

    def broadcast(self, element: Element) -> None:
        """A control element for every channel, behind all output so far (rules A4, F2)."""
        self.flush()
        for buffer in self._buffers:
            self._offer(buffer.channel, element)


def _together(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """One batch, where that can be: small dictionaries (of pandas, say) may have too many values together."""
    if len(batches) == 1:
        return batches
    try:
        return [pa.concat_batches(batches)]
    except pa.ArrowInvalid:
        return batches


def _compact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows and types, where a slice would otherwise hold (and send) the values of all rows it was cut from:
    views and dictionaries."""
    columns = [_compact_column(column) for column in batch.columns]
    if all(new is old for new, old in zip(columns, batch.columns, strict=True)):
        return batch
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _compact_column(column: pa.Array) -> pa.Array:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return column.dictionary_decode().dictionary_encode().cast(kind)
    if pa.types.is_string_view(kind):
        return column.cast(pa.large_string()).cast(kind)
    if pa.types.is_binary_view(kind):
        return column.cast(pa.large_binary()).cast(kind)
    return column
