"""The combiner: partial results of every batch of rows, before the exchange, so that fewer rows are shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from rayflow.operators.aggregates import Aggregate
from rayflow.operators.base import Operator, OperatorContext, Output
from rayflow.operators.event_time import EventTimeReader, OnNullTime, check_event_time
from rayflow.operators.faults import UNLOCATED, located
from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.preaggregate import Preaggregation, check_names
from rayflow.operators.tumbling import WindowSpec

_BYTES: Final = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalCombine:
    """Factory: turns every batch of rows into partial results, so that the exchange ships fewer rows.

    Keeps nothing from one batch to the next, hence no state. Schema out: see `rayflow.operators.preaggregate`.
    """

    keys: tuple[str, ...]
    spec: WindowSpec
    aggregates: Mapping[str, Aggregate]
    event_time: str
    on_error: OnNullTime = "fail"

    def __post_init__(self) -> None:
        check_names(self.keys, self.aggregates)

    @property
    def stateful(self) -> bool:
        return False

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Schema of the partial results; raises `PlanError` if the rows cannot be aggregated so."""
        return None if schema is None else self.plan(schema).schema

    def plan(self, schema: pa.Schema) -> Preaggregation:
        """For rows of ``schema``; raises `PlanError` for what does not fit."""
        return plan_of_rows(self.keys, self.aggregates, self.event_time, schema)

    def build(self) -> Operator:
        return CombineOperator(self)


def plan_of_rows(
    keys: Sequence[str], aggregates: Mapping[str, Aggregate], event_time: str, schema: pa.Schema
) -> Preaggregation:
    """Bind keys and aggregates to rows of ``schema``; raises `PlanError` for what does not fit."""
    time_type = check_event_time(schema, event_time, step="window")
    return Preaggregation.of_rows(keys, aggregates, schema, time_type)


class Combiner:
    """Rows to partial results. Grouping is skipped for a while when keys hardly repeat within a batch.

    Grouping 65,536 distinct keys costs more than it saves: the receiver has to group them anyway. So when more than
    ``KEPT_ROWS`` of the rows remain, the next ``SKIPPED_BATCHES`` batches are passed on as single-row partial
    results.

    A partial result that holds sets or sketches may be too large for a channel. Then the batch is combined in stretches
    so short that no row passes ``ROW_BYTES``, or a single row of the batch passes it already.

    Which way a batch goes changes nothing in the result.
    """

    KEPT_ROWS: Final = 0.8
    SKIPPED_BATCHES: Final = 15
    ROW_BYTES: Final = 65_536

    def __init__(self, preaggregation: Preaggregation) -> None:
        self._preaggregation = preaggregation
        self._to_skip = 0

    def combine(self, batch: pa.RecordBatch, times_us: pa.Array, starts: Int64Array | int) -> pa.Table:
        if self._to_skip > 0:
            self._to_skip -= 1
            return self._preaggregation.singles(batch, times_us, starts)
        partials = self._preaggregation.combine_rows(batch, times_us, starts)
        if partials.num_rows > self.KEPT_ROWS * batch.num_rows:
            self._to_skip = self.SKIPPED_BATCHES
        return self._narrow(partials, batch, times_us, starts)

    def _narrow(
        self, partials: pa.Table, batch: pa.RecordBatch, times_us: pa.Array, starts: Int64Array | int
    ) -> pa.Table:
        """The partial results of the batch, cut up where a row of them is too large."""
        widest = widest_row(partials) if partials.nbytes > self.ROW_BYTES else 0
        rows = batch.num_rows
        if widest <= self.ROW_BYTES or rows == 1:
            return partials
        length = max(1, min(rows // 2, rows * self.ROW_BYTES // widest))
        parts = []
        for first in range(0, rows, length):
            some = batch.slice(first, length), times_us.slice(first, length)
            begin = starts if isinstance(starts, int) else starts[first : first + length]
            parts.append(self._narrow(self._preaggregation.combine_rows(*some, begin), *some, begin))
        return pa.concat_tables(parts)


def widest_row(table: pa.Table) -> int:
    """Bytes of the largest row in columns of lists, strings and binary: at most, and with values of a list that are all
    as large as their mean."""
    widest = 0
    for column in map(flat, table.columns):
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            values = column.flatten()
            longest = pc.max(pc.list_value_length(column)).as_py() or 0
            widest += longest * values.nbytes // max(1, len(values))
        elif any(check(column.type) for check in _BYTES):
            widest += pc.max(pc.binary_length(column)).as_py() or 0
    return widest


class CombineOperator(Operator):
    """See `LocalCombine`."""

    def __init__(self, factory: LocalCombine) -> None:
        self._factory = factory
        self._combiner: Combiner | None = None

    def open(self, ctx: OperatorContext, out: Output) -> None:
        Operator.open(self, ctx, out)
        self._reader = EventTimeReader(self._factory.event_time, on_error=self._factory.on_error, where=str(ctx))

    @property
    def skipped_rows(self) -> int:
        """Rows dropped for a null event time."""
        return self._reader.skipped_rows

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        batch, times, earliest, latest = self._reader.read(batch)
        if batch.num_rows == 0:
            return
        starts = self._factory.spec.window_starts(times, earliest, latest)
        try:
            if self._combiner is None:
                self._combiner = Combiner(self._factory.plan(batch.schema))
            partials = self._combiner.combine(batch, times, starts)
        except UNLOCATED as error:
            raise located(error, self.ctx) from error
        for partial in partials.to_batches():
            self.out.emit(partial)


__all__ = ["CombineOperator", "Combiner", "LocalCombine", "plan_of_rows"]
