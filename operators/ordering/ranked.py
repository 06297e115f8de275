"""The best rows of each key and window, when the window closes: top n, and the first or last row.

A plan of `rayflow.operators.windows` whose partial results are rows: merging keeps the best ``n`` of each key and
window, which is associative, so everything else (panes, runs, local disk, checkpoints, late rows) is as with
aggregates. Rows W1, W3 and A3 are kept there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Final, Literal

import numpy as np
import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.errors import PlanError, StateSchemaError
from rayflow.operators.aggregates import Aggregate
from rayflow.operators.base import FrozenState, Operator, RestoredState
from rayflow.operators.event_time import check_event_time, event_times_us, timestamp_type
from rayflow.operators.grouping import Ask, Column, Combining, Int64Array, flat, group, plain, plain_key, plain_type
from rayflow.operators.ordering.order import first_of_runs, has_order, order_of, scores
from rayflow.operators.preaggregate import WINDOW_END, WINDOW_START, Preaggregation
from rayflow.operators.windows import PROGRESS, WindowAggregate, WindowOperator
from rayflow.partition import check_key_type

RANK: Final = "rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Which rows of a key and window are the best."""

    n: int
    time: str
    """Column of the event time."""
    by: str | None = None
    """Column that ranks; None: event time does. Rows with null there are not ranked."""
    descending: bool = True
    """Whether the highest value (without ``by``: the latest event time) is the best."""
    ranked: bool = True
    """Whether the output has a column ``rank``."""

    def check(self, schema: pa.Schema, keys: Sequence[str]) -> pa.DataType:
        """The type of the event time; raises `PlanError` for rows that cannot be ranked so."""
        kind = check_event_time(schema, self.time, step="window")
        for key in keys:
            if schema.names.count(key) != 1:
                raise PlanError(f"the key column {key!r} is not among the columns {schema.names}; key by one of them")
            check_key_type(key, schema.field(key).type)
        added = [WINDOW_START, WINDOW_END, *([RANK] if self.ranked else [])]
        taken = [name for name in added if name in schema.names]
        if taken:
            raise PlanError(f"the result has columns {added}, but the input has {taken} already; rename them before")
        if len(set(schema.names)) != len(schema.names):
            raise PlanError(f"rows are kept by the names of their columns, and these are not unique: {schema.names}")
        if self.by is not None:
            if self.by not in schema.names:
                raise PlanError(f"top(by={self.by!r}) needs a column of that name, got {schema.names}")
            if not has_order(schema.field(self.by).type):
                raise PlanError(
                    f"top(by={self.by!r}) needs values that have an order, got {schema.field(self.by).type}; choose "
                    "another column"
                )
        return kind


@dataclass(frozen=True, slots=True)
class RankPlan(Preaggregation):
    """Ranking bound to types. The schema of the state: keys, window_start, the other columns of the rows."""

    ranking: Ranking

    @staticmethod
    def of_input(keys: Sequence[str], ranking: Ranking, schema: pa.Schema) -> RankPlan:
        """For rows of ``schema``. Raises `PlanError`."""
        time_type = ranking.check(schema, keys)
        fields = [pa.field(key, plain_type(schema.field(key).type)) for key in keys]
        fields.append(pa.field(WINDOW_START, timestamp_type(time_type)))
        fields += [pa.field(each.name, plain_type(each.type)) for each in schema if each.name not in keys]
        return RankPlan(tuple(keys), (), (), pa.schema(fields), ranking)

    @property
    def output_schema(self) -> pa.Schema:
        fields = list(self.schema)
        fields.insert(len(self.keys) + 1, pa.field(WINDOW_END, self.window_type))
        return pa.schema([*fields, *([pa.field(RANK, pa.int64())] if self.ranking.ranked else [])])

    def combine_rows(self, batch: pa.RecordBatch, times_us: pa.Array, starts: Int64Array | int) -> pa.Table:
        """The best rows of a batch by key and window start."""
        return self.merge(self.singles(batch, times_us, starts), starts if isinstance(starts, int) else None)

    def singles(self, batch: pa.RecordBatch, times_us: pa.Array, starts: Int64Array | int) -> pa.Table:
        """All rows that can be ranked."""
        columns: list[Column] = [plain_key(batch.column(key)) for key in self.keys]
        columns.append(self._start_column(starts, batch.num_rows))
        columns += [plain(batch.column(each.name)) for each in list(self.schema)[len(columns) :]]
        rows = pa.Table.from_arrays(columns, schema=self.schema)
        by = self.ranking.by
        return rows if by is None or not batch.column(by).null_count else rows.filter(rows.column(by).is_valid())

    def merge(self, partials: pa.Table, start: int | None) -> pa.Table:
        order, ranks = self._ranks(partials, by_start=start is None)
        kept = ranks <= self.ranking.n
        return partials if kept.all() else partials.take(pa.array(np.sort(order[kept])))

    def finalise(self, partials: pa.Table, size: int | Callable[[Int64Array], Int64Array]) -> pa.Table:
        """Output rows: by window, in each the rows of a key together, from the best on."""
        order, ranks = self._ranks(partials, by_start=True)
        rows = partials.take(pa.array(order))
        starts: Int64Array = flat(rows.column(WINDOW_START)).view(pa.int64()).to_numpy()
        ends = pa.array(starts + size if isinstance(size, int) else size(starts)).view(self.window_type)
        rows = rows.add_column(len(self.keys) + 1, pa.field(WINDOW_END, self.window_type), ends)
        return rows.append_column(pa.field(RANK, pa.int64()), pa.array(ranks)) if self.ranking.ranked else rows

    def _ranks(self, rows: pa.Table, *, by_start: bool) -> tuple[Int64Array, Int64Array]:
        """(row numbers, groups together and the best of each first; the rank of each of these rows)."""
        if not rows.num_rows:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        by: list[Column] = [rows.column(key) for key in self.keys]
        if by_start or not by:
            by.append(rows.column(WINDOW_START))
        _, answers = group(by, [_group_ids()])
        ids: Int64Array = answers[0][0].to_numpy()
        times: Int64Array = event_times_us(rows.column(self.ranking.time)).to_numpy()
        ranking = self.ranking
        if ranking.by is None:
            numbers = [ids, ~times if ranking.descending else times]
        else:
            numbers = [ids, scores(rows.column(ranking.by), descending=ranking.descending), times]
        order = order_of(rows, numbers, ())
        return order, np.arange(1, len(order) + 1) - first_of_runs(ids[order])


def _group_ids() -> Combining:
    grouped = yield Ask(ids=True)
    return [pa.array(grouped.ids)]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WindowRank(WindowAggregate):
    """Factory. Schema in: rows with the keys and the event time column. Schema out: keys, window_start and window_end
    (timestamp[us] in the zone of the event time), the other columns, and ``rank`` (int64, 1 is the best) if asked for.
    Side output "late": the late rows as they came.

    Among equal values the earlier event time ranks first, among equal times the row that is smaller, compared column
    by column.
    """

    ranking: Ranking
    aggregates: Mapping[str, Aggregate] = field(default_factory=dict)

    migrates_state: ClassVar[bool] = False
    """A column that is new would be missing in rows of open windows."""

    def __post_init__(self) -> None:
        n = self.ranking.n
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise PlanError(f"top(n) must be a whole number, 1 or more, got {n!r}")
        if self.ranking.by is not None and not isinstance(self.ranking.by, str):
            raise PlanError(f"top(by) must be the name of a column, got {self.ranking.by!r}; add one by with_columns")
        if self.schema is not None:
            self.output_schema(self.schema)

    def plan(self, schema: pa.Schema) -> RankPlan:
        return RankPlan.of_input(self.keys, self.ranking, schema)

    def plan_of_state(self, schema: pa.Schema) -> RankPlan:
        by = self.ranking.by
        needed = [*self.keys, WINDOW_START, self.ranking.time, *([by] if by is not None else [])]
        missing = [name for name in needed if name not in schema.names]
        if missing:
            raise PlanError(f"rows of the checkpoint have the columns {schema.names} and not {missing}")
        return RankPlan(self.keys, (), (), schema, self.ranking)

    def build(self) -> Operator:
        return WindowRankOperator(self)

    def description(self) -> dict[str, str | int | bool | None]:
        """What must be as it was when state is restored: rows that did not rank then are gone."""
        ranking = self.ranking
        return {"n": ranking.n, "by": ranking.by, "descending": ranking.descending}


class WindowRankOperator(WindowOperator):
    """See `WindowRank`."""

    def __init__(self, factory: WindowRank) -> None:
        super().__init__(factory)
        self._rank = factory

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState:
        frozen = WindowOperator.snapshot(self, checkpoint)
        tables = [
            replace(table, meta={**(table.meta or {}), "best": self._rank.description()})
            if table.name == PROGRESS
            else table
            for table in frozen.tables
        ]
        return replace(frozen, tables=tuple(tables))

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            was = (state.meta or {}).get("best") if state.name == PROGRESS else None
            if state.name == PROGRESS and was != self._rank.description():
                raise StateSchemaError(
                    f"{self.ctx} keeps the best rows by {self._rank.description()}, its checkpoint those by {was}: "
                    "rows that it needs may be gone; give the step another name= to begin without its state, or rank "
                    "as it did"
                )
        WindowOperator.restore(self, states)


Keep = Literal["first", "last"]

__all__ = ["RANK", "Keep", "RankPlan", "Ranking", "WindowRank", "WindowRankOperator"]
