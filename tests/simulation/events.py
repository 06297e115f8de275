"""Drawn flows of event time: windows, joins, orders, ranks, calls in flight, and chains of them.

What comes out must follow from the input alone. Windows and joins see to that themselves: no drawn row is later than
the watermark. Steps that go by the order in which rows of a key come (count windows, running results, the first of a
key) get a source that has one: all rows of a key are in one split (`Draw.ordered`), or they are sorted before by event
time. A lookup finds what its table has just then: here only what it must never find is looked at, and
`tests.simulation.test_lookup_gated` has the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

import rayflow as rf
from rayflow.expressions import col
from rayflow.operators.joins.columns import How
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing.calendar import CalendarDays
from rayflow.operators.windowing.sliding import Sliding
from rayflow.stream import Stream
from tests.simulation import oracles
from tests.simulation.faults import Violation
from tests.simulation.oracles import InputRow, Windows
from tests.simulation.target import Row

if TYPE_CHECKING:
    from tests.simulation.scenario import Draw

Drawn: TypeAlias = tuple[Stream, list[Row]]
SECOND = 1_000_000
HOWS: tuple[How, ...] = ("inner", "left", "right", "full", "semi", "anti")
ASOF_HOWS: tuple[Literal["inner", "left"], ...] = ("inner", "left")
TOTALS: dict[str, Any] = {"n": rf.count(), "s": rf.sum("v"), "top": rf.max("v")}


def _sides(d: Draw) -> tuple[Stream, list[InputRow], Stream, list[InputRow]]:
    """Two inputs of a join, small and with keys enough that the pairs are few."""
    d.keys, d.sizes = 8, (0, 25, 40, 60)
    left, mine = d.union(2)
    d.words.append("and")
    right, theirs = d.union(2)
    return left, mine, right, theirs


def _window(d: Draw) -> tuple[Tumbling | CalendarDays | Sliding, Windows]:
    if d.rng.random() < 0.4:
        size = d.rng.choice((2, 7, 30))
        d.words.append(f"tumbling {size}s")
        return rf.tumbling(size), oracles.windows(size * SECOND, size * SECOND)
    size, every = d.rng.choice(((4, 2), (9, 3), (20, 2), (7, 2)))
    d.words.append(f"sliding {size}s every {every}s")
    return rf.sliding(size, every=every), oracles.windows(size * SECOND, every * SECOND)


# ----------------------------------------------------------------------------------------------------------- windows


def sliding(d: Draw) -> Drawn:
    stream, rows = d.union()
    spec, of = _window(d)
    combine, lateness = d.rng.random() < 0.5, d.rng.choice((0, 0, 3))
    d.words.append(f"allowed_lateness={lateness}s{', combiner' if combine else ''}")
    result: Stream = stream.key_by("k").window(spec, allowed_lateness=lateness).agg(**TOTALS)
    if not combine:
        result = Stream(replace(result._node, combiner=None), event_time="window_start")
    return result, oracles.totals(rows, of)


def sessions(d: Draw) -> Drawn:
    stream, rows = d.union()
    gap = d.rng.choice((1, 2, 5, 30))
    d.words.append(f"session {gap}s")
    return stream.key_by("k").window(rf.session(gap=gap)).agg(**TOTALS), oracles.sessions(rows, gap * SECOND)


def counts(d: Draw) -> Drawn:
    stream, rows = d.ordered()
    size = d.rng.choice((1, 2, 5, 20))
    d.words.append(f"count_window {size}")
    return stream.key_by("k").window(rf.count_window(size)).agg(**TOTALS), oracles.counted(rows, size)


def window_top(d: Draw) -> Drawn:
    stream, rows = d.union()
    spec, of = _window(d)
    n, descending = d.rng.choice((1, 3)), d.rng.random() < 0.5
    d.words.append(f"top {n} {'highest' if descending else 'lowest'}")
    result = stream.key_by("k").window(spec).top(n, by="v", descending=descending)
    return result, oracles.best(rows, of, n, descending=descending)


def window_deduplicate(d: Draw) -> Drawn:
    stream, rows = d.union()
    spec, of = _window(d)
    keep: Literal["first", "last"] = "first" if d.rng.random() < 0.5 else "last"
    d.words.append(f"deduplicate {keep}")
    result = stream.key_by("k").window(spec).deduplicate(keep=keep)
    return result, oracles.outermost(rows, of, keep=keep)


# ------------------------------------------------------------------------------------------------------------- joins


def interval_join(d: Draw) -> Drawn:
    left, mine, right, theirs = _sides(d)
    low, high = d.rng.choice(((-2, 2), (0, 3), (-5, 0), (-1, 10), (1, 4), (-6, -2)))
    how = d.rng.choice(HOWS)
    if low == -high and d.rng.random() < 0.5:
        d.words.append(f"{how} join, retention {high}s")
        result = left.key_by("k").join(right.key_by("k"), retention=high, how=how)
    else:
        d.words.append(f"{how} join within {low}s to {high}s")
        result = left.key_by("k").join(right.key_by("k"), within=(f"{low}s", f"{high}s"), how=how)

    def match(x: InputRow, y: InputRow) -> bool:
        return x[1] + low * SECOND <= y[1] <= x[1] + high * SECOND

    return result, oracles.joined(mine, theirs, how, match, timed=True)


def whole_join(d: Draw) -> Drawn:
    left, mine, right, theirs = _sides(d)
    how = d.rng.choice(HOWS)
    d.words.append(f"{how} join of all rows")
    result = left.key_by("k").join(right.key_by("k"), how=how)
    return result, oracles.joined(mine, theirs, how, lambda x, y: True, timed=False)


def window_join(d: Draw) -> Drawn:
    left, mine, right, theirs = _sides(d)
    spec, of = _window(d)
    how = d.rng.choice(HOWS)
    d.words.append(f"{how} window join")
    result = left.key_by("k").join(right.key_by("k"), window=spec, how=how)
    return result, oracles.window_joined(mine, theirs, how, of)


def asof_join(d: Draw) -> Drawn:
    """Versions of one key and time say the same."""
    left, mine, right, theirs = _sides(d)
    versions = right.with_columns(v=col("t").cast("int64") + col("k"))
    theirs = [(k, t, t + k) for k, t, _ in theirs]
    how = d.rng.choice(ASOF_HOWS)
    tolerance = d.rng.choice((None, None, 1, 5))
    d.words.append(f"{how} as-of join, tolerance {tolerance}")
    result = left.key_by("k").join_asof(versions.key_by("k"), tolerance=tolerance, how=how)
    return result, oracles.as_of(mine, theirs, how, None if tolerance is None else tolerance * SECOND)


def lookup(d: Draw) -> Drawn:
    left, mine, right, _ = _sides(d)
    table = right.with_columns(said=col("k") + 100).drop("v").rename({"t": "since"})
    d.words.append("lookup")

    def check(batch: pa.RecordBatch) -> pa.RecordBatch:
        wrong = pc.not_equal(batch["said"], pc.add(batch["k"], 100)).fill_null(False)
        if pc.any(wrong).as_py():
            raise Violation("a lookup found the row of another key")
        return batch.select(["k", "t", "v"])

    found = left.lookup(table.key_by("k"), on="k", how="left")
    return found.map_batches(check, schema=left.schema), list(mine)


# -------------------------------------------------------------------------------------------------- orders and ranks


def running(d: Draw) -> Drawn:
    stream, rows = d.ordered()
    d.words.append("running")
    return stream.key_by("k").agg(**TOTALS), oracles.running(rows)


def top(d: Draw) -> Drawn:
    stream, rows = d.ordered()
    n, descending = d.rng.choice((1, 3)), d.rng.random() < 0.5
    d.words.append(f"running top {n} {'highest' if descending else 'lowest'}")
    result = stream.key_by("k").top(n, by="v", descending=descending)
    return result, oracles.entering(rows, n, descending=descending)


def deduplicate_within(d: Draw) -> Drawn:
    stream, rows = d.ordered()
    within = d.rng.choice((1, 5, 30))
    d.words.append(f"deduplicate within {within}s")
    return stream.key_by("k").deduplicate(within=within), oracles.passing(rows, within * SECOND)


def sorted_running(d: Draw) -> Drawn:
    """The running results tell the order in which the rows came out."""
    stream, rows = d.union()
    d.words.append("sort_by_event_time, running")
    rows = sorted(rows, key=lambda row: (row[1], row[2]))
    return stream.key_by("k").sort_by_event_time("v").key_by("k").agg(**TOTALS), oracles.running(rows)


def sorted_deduplicate(d: Draw) -> Drawn:
    stream, rows = d.union()
    within = d.rng.choice((1, 5, 30))
    d.words.append(f"sort_by_event_time, deduplicate within {within}s")
    rows = sorted(rows, key=lambda row: (row[1], row[2]))
    result = stream.key_by("k").sort_by_event_time("v").key_by("k").deduplicate(within=within)
    return result, oracles.passing(rows, within * SECOND)


# ------------------------------------------------------------------------------------------------------ calls, chains


def _called(d: Draw, stream: Stream, rows: list[InputRow]) -> tuple[Stream, list[InputRow]]:
    async def doubled(batch: pa.RecordBatch) -> pa.RecordBatch:
        """Draws nothing: it runs on a thread of its own, and a run would depend on how fast that is."""
        return batch.set_column(2, "v", pc.multiply(batch["v"], 2))

    concurrency, size, ordered = d.rng.choice((1, 2, 8)), d.rng.choice((None, 1, 5)), d.rng.random() < 0.5
    d.words.append(f"async({concurrency}, {size}{', unordered' if not ordered else ''})")
    result = stream.map_batches_async(
        doubled, schema=stream.schema, concurrency=concurrency, batch_size=size, ordered=ordered
    )
    return result, [(k, t, 2 * v) for k, t, v in rows]


def async_map(d: Draw) -> Drawn:
    stream, rows = _called(d, *d.union())
    if d.rng.random() < 0.5:
        return stream, list(rows)
    spec, of = _window(d)
    return stream.key_by("k").window(spec).agg(**TOTALS), oracles.totals(rows, of)


def joined_sessions(d: Draw) -> Drawn:
    """Sessions of what a join gives: its watermark must not be ahead of its results."""
    left, mine, right, theirs = _sides(d)
    apart, gap = d.rng.choice((1, 3)), d.rng.choice((2, 6))
    how = d.rng.choice(ASOF_HOWS)
    d.words.append(f"{how} join within {apart}s, session {gap}s")
    both = left.key_by("k").join(right.key_by("k"), within=apart, how=how)
    pairs = oracles.joined(mine, theirs, how, lambda x, y: abs(x[1] - y[1]) <= apart * SECOND, timed=True)
    result = both.key_by("k").window(rf.session(gap=gap)).agg(**TOTALS)
    return result, oracles.sessions(((p[0], p[5], p[2]) for p in pairs), gap * SECOND)


def best_windows(d: Draw) -> Drawn:
    """The best sliding windows of each tumbling one, by their sums: results of windows are rows with event time."""
    stream, rows = d.union()
    spec, of = _window(d)
    size = d.rng.choice((6, 30))
    d.words.append(f"best of {size}s")
    sums = stream.key_by("k").window(spec).agg(v=rf.sum("v"))
    windowed = sums.rename({"window_start": "t"}).drop("window_end")
    result = windowed.key_by("k").window(rf.tumbling(size)).top(2, by="v")
    found = [(k, start, total) for k, start, _, _, total, _ in oracles.totals(rows, of)]
    return result, oracles.best(found, oracles.windows(size * SECOND, size * SECOND), 2, descending=True)


def _kinds(*kinds: Callable[[Draw], Drawn]) -> dict[str, Callable[[Draw], Drawn]]:
    return {kind.__name__: kind for kind in kinds}


KINDS = _kinds(
    sliding,
    sessions,
    counts,
    window_top,
    window_deduplicate,
    interval_join,
    whole_join,
    window_join,
    asof_join,
    lookup,
    running,
    top,
    deduplicate_within,
    sorted_running,
    sorted_deduplicate,
    async_map,
    joined_sessions,
    best_windows,
)

__all__ = ["KINDS"]
