"""Reads one partition from an offset on. A position is the next offset to read.

R2: the same position gives the same rows. Offsets may have gaps (compaction, marks of transactions, aborted records),
so the end of a bounded read is told by the broker, not counted, and a position moves over a gap at the end of the log
even though no row comes: else retention could take what was read long ago and call it lost.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import DataError
from rayflow.operators.base import OperatorContext, Polled, SplitReader
from rayflow.operators.kafka.columns import TYPES, column
from rayflow.operators.kafka.consumer import Feed, SharedConsumer
from rayflow.operators.kafka.dead_letters import DeadLetters
from rayflow.operators.kafka.formats import Decoded, Format, Malformed

OnError = Literal["fail", "skip", "dead_letter"]
_TEXT_SHOWN = 200


class PartitionReader(SplitReader):
    """``stop`` None: for ever. ``metadata``: the columns of `columns` behind those of the format.

    A message without a value (a tombstone) is a row whose payload is null where its key is told (``_key``) or the
    format is raw; else it tells nothing, and is left out and counted.
    """

    def __init__(
        self,
        consumer: SharedConsumer,
        feed: Feed,
        *,
        stop: int | None,
        format: Format,
        metadata: tuple[str, ...],
        keep_tombstones: bool,
        on_error: OnError,
        dead_letters: DeadLetters | None,
        ctx: OperatorContext,
        on_close: Callable[[], None],
    ) -> None:
        self.skipped = 0
        self._consumer = consumer
        self._feed = feed
        self._position = feed.position
        self._stop = stop
        self._format = format
        self._metadata = metadata
        self._keep_tombstones = keep_tombstones
        self._on_error = on_error
        self._dead_letters = dead_letters
        self._ctx = ctx
        self._on_close = on_close
        self._held: Polled | None = None
        """Decoded, and not to be seen before its dead letters are with the broker."""
        fields = [*format.schema, *(pa.field(name, TYPES[name]) for name in metadata)]
        self._schema = pa.schema(fields)
        self._empty = pa.RecordBatch.from_pylist([], schema=self._schema)

    def poll(self) -> Polled:
        if self._held is None:
            self._held = self._next()
        if self._dead_letters is not None and not self._dead_letters.confirmed():
            return Polled()
        found, self._held = self._held, None
        return found

    def checkpointed(self, position: Json) -> None:
        if position is not None:
            self._consumer.commit(self._feed.partition, int(position))

    def close(self) -> None:
        if self._dead_letters is not None:
            self._dead_letters.close()
        self._on_close()

    # --------------------------------------------------------------------------------------------------------- reading

    def _next(self) -> Polled:
        stop = self._stop
        if stop is not None and self._position >= stop:
            return Polled(None, self._position, done=True)
        messages = self._consumer.take(self._feed, self._format.messages_max)
        if not messages:
            return self._at_the_end()
        self._position = messages[-1].offset() + 1
        done = stop is not None and self._position >= stop
        if stop is not None and self._position > stop:
            self._position = stop
            messages = messages[: bisect_left(messages, stop, key=_offset)]
        batch = self._rows(messages) if messages else self._empty
        return Polled(batch, self._position, done)

    def _at_the_end(self) -> Polled:
        end = self._feed.end
        if end <= self._position or self._feed.waiting:
            return Polled()
        self._position = end if self._stop is None else min(end, self._stop)
        return Polled(self._empty, self._position, done=self._stop is not None and self._position >= self._stop)

    def _rows(self, messages: Sequence[Any]) -> pa.RecordBatch:
        values = list(map(type(messages[0]).value, messages))
        if None in values:
            return self._rows_and_tombstones(messages, values)
        try:
            return self._with_metadata(self._format.decode(values), messages)
        except Malformed:
            return self._salvaged(messages, values)

    def _rows_and_tombstones(self, messages: Sequence[Any], values: Sequence[bytes | None]) -> pa.RecordBatch:
        pieces: list[pa.RecordBatch] = []
        there = np.fromiter((value is not None for value in values), np.bool_, len(values))
        edges = [0, *(np.flatnonzero(np.diff(there)) + 1).tolist(), len(values)]
        for first, last in pairwise(edges):
            piece = messages[first:last]
            if there[first]:
                pieces.append(self._rows(piece))
            elif self._keep_tombstones:
                payload = [pa.nulls(len(piece), field.type) for field in self._format.schema]
                nulls = pa.RecordBatch.from_arrays(payload, schema=self._format.schema)
                pieces.append(self._with_metadata(Decoded(nulls), piece))
            else:
                self.skipped += len(piece)
        return pa.concat_batches(pieces) if pieces else self._empty

    def _with_metadata(self, decoded: Decoded, messages: Sequence[Any]) -> pa.RecordBatch:
        if not self._metadata:
            return decoded.batch
        columns = [column(name, messages) for name in self._metadata]
        if decoded.rows is not None:
            each = pa.array(np.repeat(np.arange(len(messages)), decoded.rows))
            columns = [values.take(each) for values in columns]
        return pa.RecordBatch.from_arrays([*decoded.batch.columns, *columns], schema=self._schema)

    # ------------------------------------------------------------------------------------------------------- malformed

    def _salvaged(self, messages: Sequence[Any], values: Sequence[bytes]) -> pa.RecordBatch:
        """The rows of the messages that can be read, found by halving."""
        try:
            return self._with_metadata(self._format.decode(values), messages)
        except Malformed as error:
            if len(values) == 1:
                self._malformed(messages[0], values[0], str(error))
                return self._empty
        half = len(values) // 2
        first = self._salvaged(messages[:half], values[:half])
        return pa.concat_batches([first, self._salvaged(messages[half:], values[half:])])

    def _malformed(self, message: Any, value: bytes, reason: str) -> None:
        if self._on_error == "fail":
            text = value[:_TEXT_SHOWN].decode("utf-8", "replace")
            raise DataError(
                f"{self._ctx} cannot read offset {message.offset()} of {self._feed.partition}: {text!r}: {reason}; "
                'pass a schema that fits, or use on_error="skip" or "dead_letter"'
            )
        if self._dead_letters is not None:
            self._dead_letters.send(message, reason)
        self.skipped += 1


def _offset(message: Any) -> int:
    return int(message.offset())
