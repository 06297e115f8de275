"""Results of windows that stay: again when late rows change them, and before they are complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from rayflow.operators.grouping import Int64Array, flat
from rayflow.operators.preaggregate import WINDOW_START, Preaggregation
from rayflow.operators.runs import RunStore
from rayflow.operators.state.distinct import distinct
from rayflow.operators.tumbling import WindowSpec


def windows_of(panes: Int64Array, spec: WindowSpec, low: int, high: int) -> list[int]:
    """Starts, ascending, of the windows with one of these panes that start at ``low`` or later and before ``high``."""
    found: list[int] = []
    for pane in np.unique(panes).tolist():
        start = max(low, spec.first_open(pane))
        while start <= pane and start < high:
            found.append(start)
            start = low = spec.next_start(start)
    return found


def current(runs: RunStore, plan: Preaggregation, spec: WindowSpec, starts: Sequence[int]) -> Iterator[pa.Table]:
    """Partial results, as they are now, of all keys of the windows with these starts, one window a table."""
    for start in starts:
        rows = runs.peek(start, _end(spec, start) - 1)
        if rows is not None:
            yield plan.merge(at(rows, start, plan), start)


def updated(
    runs: RunStore, plan: Preaggregation, spec: WindowSpec, new: pa.Table, starts: Sequence[int]
) -> Iterator[pa.Table]:
    """As `current`, of those keys that have rows of ``new`` (partial results) in the window."""
    panes = runs.starts_of(new)
    for start in starts:
        end = _end(spec, start)
        touched = new.filter(pa.array((panes >= start) & (panes < end)))
        rows = runs.peek(start, end - 1)
        if rows is None or not touched.num_rows:
            continue
        if plan.keys:
            both = [pa.concat_arrays([flat(touched.column(key)), flat(rows.column(key))]) for key in plan.keys]
            _, codes = distinct(both)
            wanted = np.zeros(len(codes), np.bool_)
            wanted[codes[: touched.num_rows]] = True
            rows = rows.filter(pa.array(wanted[codes[touched.num_rows :]]))
        yield plan.merge(at(rows, start, plan), start)


def at(table: pa.Table, start: int, plan: Preaggregation) -> pa.Table:
    """The table with one window start in all rows."""
    column = pa.array(np.full(table.num_rows, start, np.int64)).view(plan.window_type)
    return table.set_column(len(plan.keys), plan.schema.field(WINDOW_START), column)


def _end(spec: WindowSpec, start: int) -> int:
    return int(spec.ends_of(np.array([start], np.int64))[0])


__all__ = ["at", "current", "updated", "windows_of"]
