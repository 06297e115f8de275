"""Running top n: the rows that are among the best n of their key at the moment they come, with their rank.

What goes out of a stream cannot be taken back, so a ranking that changes is given as what enters it. Every row that is
among the best n in the end has entered on the way, hence the ranking at any moment is the top n of the rows emitted so
far: few against all, because the better the ranking the fewer rows get in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayflow.errors import ConfigError, PlanError
from rayflow.operators.base import MAIN, Operator
from rayflow.operators.grouping import Int64Array, flat, plain, plain_type
from rayflow.operators.keyed.cells import BoolArray, integers_of, is_number, numbers_of, store
from rayflow.operators.keyed.keyed_operator import KeyedOperator, key_schema
from rayflow.operators.keyed.segments import Numbers, Segments
from rayflow.operators.state.table import StateTable

STATE: Final = "top"
RANK: Final = "rank"
MOST: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Top:
    """Factory. Schema out: the columns of the input and ``rank`` (int64, 1 is the best).

    A row goes out if fewer than ``n`` earlier rows of its key are as good or better; so among equal values the earlier
    row ranks first. ``by`` is any column with an order; NaN is the largest number; a row with null there is never
    ranked. What goes out depends on the order of the rows of each key alone. The state holds ``n`` values a key:
    ``top.1`` is the best.

    ``emit="batch"``: a row goes out if it is among the best ``n`` when the batch with which it came is done, with its
    rank then. Which rows these are depends on how the stream happens to be cut; the top ``n`` of all that have gone
    out does not.
    """

    keys: tuple[str, ...]
    n: int
    by: str
    descending: bool = True
    emit: Literal["every", "batch"] = "every"

    def __post_init__(self) -> None:
        if self.emit not in ("every", "batch"):
            raise ConfigError(f'top(emit) must be "every" or "batch", got {self.emit!r}')
        if isinstance(self.n, bool) or not isinstance(self.n, int) or not 1 <= self.n <= MOST:
            raise PlanError(f"top(n) must be a whole number from 1 to {MOST}, got {self.n!r}")
        if not isinstance(self.by, str):
            raise PlanError(f"top(by) must be the name of a column, got {self.by!r}; add one by with_columns")

    @property
    def stateful(self) -> bool:
        return True

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Raises `PlanError` for a missing column, one without an order, and an input that has a column ``rank``."""
        if schema is None:
            return None
        self.columns(schema)
        return pa.schema([*((f.name, f.type) for f in schema), (RANK, pa.int64())])

    def state_schemas(self, schema: pa.Schema | None) -> Mapping[str, pa.Schema] | None:
        if schema is None:
            return None
        keys, values = self.columns(schema)
        return {STATE: pa.schema([*keys, *values])}

    def columns(self, schema: pa.Schema) -> tuple[pa.Schema, pa.Schema]:
        """(keys, values) of the state."""
        if schema.names.count(self.by) != 1:
            raise PlanError(f"top(by={self.by!r}) needs a column of that name, got {schema.names}; name one of them")
        if RANK in schema.names:
            raise PlanError(f"top adds a column {RANK!r}, but the input has one already; rename it before")
        kind = plain_type(schema.field(self.by).type)
        if pa.types.is_nested(kind) or pa.types.is_interval(kind) or pa.types.is_null(kind):
            raise PlanError(f"top(by={self.by!r}) needs values that have an order, got {kind}; choose another column")
        keys = key_schema(schema, self.keys)
        return keys, pa.schema([(f"top.{rank}", kind) for rank in range(1, self.n + 1)])

    def build(self) -> Operator:
        return TopOperator(self)


class TopOperator(KeyedOperator):
    """See `Top`."""

    _table: StateTable
    _output: pa.Schema

    def __init__(self, factory: Top) -> None:
        super().__init__(factory.keys)
        self._factory = factory

    def bind(self, schema: pa.Schema) -> None:
        assert self.state is not None
        keys, values = self._factory.columns(schema)
        self._table = self.state.table(STATE, keys, values)
        self._output = self._factory.output_schema(schema)

    def take(self, batch: pa.RecordBatch) -> Sequence[tuple[pa.RecordBatch, str]]:
        values = flat(plain(batch.column(self._factory.by)))
        keys = self.key_columns(batch)
        rows = np.arange(batch.num_rows)
        if values.null_count:
            rows = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
            if len(rows) == 0:
                return []
            some = pa.array(rows)
            values, keys = values.take(some), [key.take(some) for key in keys]
        slots = self._table.slots(keys, insert=True)
        if self._factory.n == 1 and is_number(values.type):
            best = self._enter(slots, numbers_of(values, 0)[0])
            return self._emitted(batch, rows[best], np.ones(len(best), np.int64))
        worst = self._table.get(slots, f"top.{self._factory.n}")
        good = np.flatnonzero(self._better(values, worst))
        if len(good) == 0:
            return []
        segments = Segments.of(slots[good])
        ranks = self._advance(segments, values.take(pa.array(good[segments.order])))
        ranks = ranks[segments.inverse()]
        entered = ranks <= self._factory.n
        return self._emitted(batch, rows[good[entered]], ranks[entered])

    def _emitted(
        self, batch: pa.RecordBatch, rows: Int64Array, ranks: Int64Array
    ) -> Sequence[tuple[pa.RecordBatch, str]]:
        """These rows, which are in ascending order."""
        some = batch if len(rows) == batch.num_rows else batch.take(pa.array(rows))
        return [(pa.RecordBatch.from_arrays([*some.columns, pa.array(ranks)], schema=self._output), MAIN)]

    def _enter(self, slots: Int64Array, values: Numbers) -> Int64Array:
        """Which rows become the best one of their key, in ascending order; the table then holds it. For n = 1 and
        numbers: there one comparison decides, and nothing is sorted by value."""
        table, descending = self._table, self._factory.descending
        scores = comparable(values, descending)
        good = ~table.valid("top.1")[slots] | (scores > comparable(table.numbers("top.1")[slots], descending))
        rows = np.flatnonzero(good)
        if len(rows) == 0:
            return rows
        segments = Segments.of(slots[rows])
        rising = scores[rows[segments.order]]
        entered: BoolArray = np.ones(len(rows), np.bool_)
        if not segments.distinct:
            best = segments.scan(np.maximum, rising[segments.starts], rising)
            entered[1:] = rising[1:] > best[:-1]
            entered[segments.starts] = True
        last = np.maximum.reduceat(np.where(entered, np.arange(len(rows)), -1), segments.starts)
        winners = rows[segments.order[last]]
        store(table, "top.1", segments.heads, values[winners])
        table.touch(segments.heads)
        if self._factory.emit == "batch":
            return np.sort(winners)
        return rows if entered.all() else np.sort(rows[segments.order[entered]])

    def _better(self, values: pa.Array, others: pa.Array) -> np.ndarray[Any, Any]:
        """Which values are strictly better; everything is better than null."""
        compare = pc.greater if self._factory.descending else pc.less
        found = compare(values, others).fill_null(True)
        if pa.types.is_floating(values.type):
            nan, other = pc.is_nan(values), pc.is_nan(others).fill_null(False)
            up, down = (nan, other) if self._factory.descending else (other, nan)
            found = pc.or_(found, pc.and_(up, pc.invert(down)))
        return np.asarray(found.to_numpy(zero_copy_only=False))

    def _advance(self, segments: Segments, values: pa.Array) -> Int64Array:
        """Rank of each row (sorted) when it comes; the table then holds the new best values.

        The best so far is a running maximum; what it pushes out goes on to the running maximum of second place, and so
        on: n scans, whatever the number of rows of one key.
        """
        n, heads = self._factory.n, segments.heads
        places = [self._table.get(heads, f"top.{rank}") for rank in range(1, n + 1)]
        column = pa.concat_arrays([*places, values])
        seeded = n * len(heads)
        # The better value has the higher score; of equal values the one that came first: those of the state by place.
        age = np.concatenate([np.repeat(np.arange(-n, 0), len(heads)), segments.order])
        # Arrow puts NaN behind the numbers in either direction, so the lowest are sorted as the highest and turned.
        descending = self._factory.descending
        kinds = [("value", "ascending"), ("age", "descending" if descending else "ascending")]
        sorted_rows = pc.sort_indices(pa.table({"value": integers_of(column), "age": age}), sort_keys=kinds).to_numpy()
        by_score = sorted_rows if descending else sorted_rows[::-1]
        score = np.empty(len(column), np.int64)
        score[by_score] = np.arange(len(column))
        score[column.is_null().to_numpy(zero_copy_only=False)] = -1
        rising = score[seeded:]
        ranks = np.full(len(values), n + 1)
        final = np.full(len(values), n + 1)
        for place in range(n):
            before = score[place * len(heads) : (place + 1) * len(heads)]
            best = segments.scan(np.maximum, before, rising)
            held = np.empty_like(best)
            held[1:] = best[:-1]
            held[segments.starts] = before
            # A row that is still its own and better than who holds this place takes it.
            np.minimum(ranks, np.where((rising == score[seeded:]) & (rising > held), place + 1, n + 1), out=ranks)
            last = best[segments.ends]
            chosen = pa.array(by_score[np.maximum(last, 0)].astype(np.int64), mask=last < 0)
            self._table.set(heads, f"top.{place + 1}", column.take(chosen))
            holders = by_score[last[last >= 0]].astype(np.int64) - seeded
            final[holders[holders >= 0]] = place + 1
            rising = np.minimum(rising, held)
        return final if self._factory.emit == "batch" else ranks


def comparable(values: Numbers, descending: bool) -> Int64Array:
    """As int64, of which the larger one is better. NaN is the largest number, and -0.0 is 0.0."""
    scores: Int64Array
    if values.dtype.kind == "f":
        plain = values.astype(np.float64) + 0.0
        plain[np.isnan(plain)] = np.nan
        # The bits of floats are in their order, but those of negative ones are backwards.
        bits = plain.view(np.int64)
        scores = bits ^ ((bits >> 63) & np.iinfo(np.int64).max)
    elif values.dtype == np.uint64:
        scores = (values ^ np.uint64(1 << 63)).view(np.int64)
    else:
        scores = values.astype(np.int64, copy=False)
    return scores if descending else ~scores


__all__ = ["MOST", "RANK", "STATE", "Top", "TopOperator", "comparable"]
