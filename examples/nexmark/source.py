"""The events as streams: one source for each kind over the same numbering, replayable from any position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import Final

import pyarrow as pa

import rayflow as rf
from examples.nexmark.generator import Kind, Nexmark, schema
from rayflow.core.manifest import Json
from rayflow.operators.base import OperatorContext, Polled, SplitReader
from rayflow.stream import Stream

SPLITS: Final = 16
SPLIT_ROWS_MAX: Final = 250_000


@dataclass(frozen=True)
class NexmarkSource(rf.Source):
    """Rows of one kind. Splits are stretches of rows in reading order, positions are rows of a split.

    Event times rise but for `Nexmark.out_of_order`, within a split and from one to the next. Only the columns that a
    flow uses are made (`project`).
    """

    config: Nexmark
    kind: Kind
    columns: tuple[str, ...] | None = None
    split_rows: int = SPLIT_ROWS_MAX
    batch_rows: int = 32_768

    def project(self, columns: Sequence[str]) -> NexmarkSource:
        """The same rows with only these columns."""
        return replace(self, columns=tuple(columns))

    def schema(self) -> pa.Schema:
        return schema(self.kind, self.columns)

    def declared_schema(self) -> pa.Schema:
        return self.schema()

    def discover(self) -> Sequence[tuple[str, Json]]:
        rows = self.config.count(self.kind)
        edges = [*range(0, rows, self.split_rows), rows]
        return [(f"{self.kind.value}-{first}-{last}", [first, last]) for first, last in pairwise(edges)]

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        first, last = (int(edge) for edge in split)
        return _Reader(self, first, last, int(position or 0))


class _Reader(SplitReader):
    def __init__(self, source: NexmarkSource, first: int, last: int, position: int) -> None:
        self._source = source
        self._first = first
        self._rows = last - first
        self._position = position

    def poll(self) -> Polled:
        source = self._source
        count = min(source.batch_rows, self._rows - self._position)
        if count == 0:
            return Polled(None, self._position, done=True)
        batch = source.config.batch(source.kind, self._first + self._position, count, source.columns)
        self._position += count
        return Polled(batch, self._position, done=self._position == self._rows)


@dataclass(frozen=True, slots=True)
class Events:
    """The three streams that queries begin with; one that a query does not use is not read."""

    person: Stream
    auction: Stream
    bid: Stream
    longest_auction: timedelta
    """No auction lasts longer."""


def events(
    config: Nexmark, *, split_rows: int | None = None, batch_rows: int = 32_768, least_batches: int = 1
) -> Events:
    """Streams with event time ``dateTime`` and the watermark delay that `Nexmark.out_of_order` needs.

    Each kind is read in ``least_batches`` batches at least, and without ``split_rows`` in about sixteen splits.
    """

    def stream(kind: Kind) -> Stream:
        rows = config.count(kind)
        source = NexmarkSource(
            config,
            kind,
            split_rows=split_rows or min(max(rows // SPLITS, 1_000), SPLIT_ROWS_MAX),
            batch_rows=min(batch_rows, max(rows // least_batches, 1)),
        )
        return rf.read_source(
            source, event_time="dateTime", max_delay=config.out_of_order, label="nexmark", detail=kind.value
        )

    return Events(stream(Kind.PERSON), stream(Kind.AUCTION), stream(Kind.BID), config.longest_auction)
