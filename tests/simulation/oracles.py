"""What comes out of windows, joins and orders, from rows in plain Python, row by row; no part of the engine has a hand
in it. Rows are (key, event time in us, value); None stands for null."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from tests.simulation.target import Row

InputRow: TypeAlias = tuple[int, int, int]
Windows: TypeAlias = Callable[[int], Iterable[tuple[int, int]]]
"""The windows (start, end) that a time lies in."""


def windows(size: int, every: int) -> Windows:
    """Sliding ones; tumbling if both are the same."""

    def of(time: int) -> Iterator[tuple[int, int]]:
        start = time // every * every
        while start > time - size:
            yield start, start + size
            start -= every

    return of


def in_windows(rows: Iterable[InputRow], of: Windows) -> dict[tuple[int, int, int], list[InputRow]]:
    """Rows by (key, start, end)."""
    found: dict[tuple[int, int, int], list[InputRow]] = defaultdict(list)
    for row in rows:
        for start, end in of(row[1]):
            found[row[0], start, end].append(row)
    return found


def totals(rows: Iterable[InputRow], of: Windows) -> list[Row]:
    """(key, start, end, count, sum, maximum) of each key and window."""
    return [(*at, *_total(inside)) for at, inside in in_windows(rows, of).items()]


def _total(rows: list[InputRow]) -> Row:
    values = [v for _, _, v in rows]
    return len(values), sum(values), max(values)


def by_key(rows: Iterable[InputRow]) -> dict[int, list[InputRow]]:
    found: dict[int, list[InputRow]] = defaultdict(list)
    for row in rows:
        found[row[0]].append(row)
    return found


def sessions(rows: Iterable[InputRow], gap: int) -> list[Row]:
    """As `totals`."""
    found: list[Row] = []
    for key, mine in by_key(rows).items():
        mine.sort(key=lambda row: row[1])
        first = 0
        for i in range(1, len(mine) + 1):
            if i == len(mine) or mine[i][1] >= mine[i - 1][1] + gap:
                found.append((key, mine[first][1], mine[i - 1][1] + gap, *_total(mine[first:i])))
                first = i
    return found


def counted(rows: Iterable[InputRow], size: int) -> list[Row]:
    """(key, earliest and latest time, count, sum, maximum) of every ``size`` rows of a key, in their order."""
    found: list[Row] = []
    for key, mine in by_key(rows).items():
        for first in range(0, len(mine) - size + 1, size):
            some = mine[first : first + size]
            found.append((key, min(t for _, t, _ in some), max(t for _, t, _ in some), *_total(some)))
    return found


def best(rows: Iterable[InputRow], of: Windows, n: int, *, descending: bool) -> list[Row]:
    """(key, start, end, time, value, rank) of the best of each key and window."""
    found: list[Row] = []
    for at, inside in in_windows(rows, of).items():
        inside.sort(key=lambda row: (-row[2] if descending else row[2], row[1]))
        found += [(*at, t, v, rank) for rank, (_, t, v) in enumerate(inside[:n], 1)]
    return found


def outermost(rows: Iterable[InputRow], of: Windows, *, keep: str) -> list[Row]:
    """(key, start, end, time, value) of the first or last row of each key and window; of equal times the smaller."""
    sign = 1 if keep == "first" else -1
    return [
        (*at, *min(inside, key=lambda row: (sign * row[1], row))[1:]) for at, inside in in_windows(rows, of).items()
    ]


def running(rows: Iterable[InputRow]) -> list[Row]:
    """(key, time, count, sum, maximum) up to each row of a key, in their order."""
    return [(key, mine[i][1], *_total(mine[: i + 1])) for key, mine in by_key(rows).items() for i in range(len(mine))]


def entering(rows: Iterable[InputRow], n: int, *, descending: bool) -> list[Row]:
    """(key, time, value, rank) of the rows that are among the best of their key when they come, in their order."""
    found: list[Row] = []
    for mine in by_key(rows).values():
        for i, (k, t, v) in enumerate(mine):
            rank = 1 + sum(w >= v if descending else w <= v for _, _, w in mine[:i])
            if rank <= n:
                found.append((k, t, v, rank))
    return found


def passing(rows: Iterable[InputRow], within: int) -> list[Row]:
    """Rows that come so much later in event time than the last of their key that passed, in their order."""
    found: list[Row] = []
    for mine in by_key(rows).values():
        last: int | None = None
        for row in mine:
            if last is None or row[1] >= last + within:
                last = row[1]
                found.append(row)
    return found


def joined(
    left: Iterable[InputRow],
    right: Iterable[InputRow],
    how: str,
    match: Callable[[InputRow, InputRow], bool],
    *,
    timed: bool,
) -> list[Row]:
    """Left columns, right ones without the key, and the later of both times if ``timed``."""
    left, others = list(left), by_key(right)
    mine = by_key(left)
    if how in ("semi", "anti"):
        return [x for x in left if any(match(x, y) for y in others[x[0]]) == (how == "semi")]

    def row(k: int, x: Row, y: Row, time: int) -> Row:
        return (k, *x, *y, time) if timed else (k, *x, *y)

    found: list[Row] = []
    for x in left:
        partners = [y for y in others[x[0]] if match(x, y)]
        found += [row(x[0], x[1:], y[1:], max(x[1], y[1])) for y in partners]
        if not partners and how in ("left", "full"):
            found.append(row(x[0], x[1:], (None, None), x[1]))
    if how in ("right", "full"):
        alone = (y for ys in others.values() for y in ys if not any(match(x, y) for x in mine[y[0]]))
        found += [row(y[0], (None, None), y[1:], y[1]) for y in alone]
    return found


def window_joined(left: Iterable[InputRow], right: Iterable[InputRow], how: str, of: Windows) -> list[Row]:
    """Left columns, right ones without the key, start and end of the window."""
    mine, theirs = in_windows(left, of), in_windows(right, of)
    found: list[Row] = []
    for at in mine.keys() | theirs.keys():
        xs, ys = mine.get(at, []), theirs.get(at, [])
        k, bounds = at[0], at[1:]
        if how in ("semi", "anti"):
            found += [(*x, *bounds) for x in xs if bool(ys) == (how == "semi")]
            continue
        found += [(*x, *y[1:], *bounds) for x in xs for y in ys]
        if how in ("left", "full") and not ys:
            found += [(*x, None, None, *bounds) for x in xs]
        if how in ("right", "full") and not xs:
            found += [(k, None, None, *y[1:], *bounds) for y in ys]
    return found


def as_of(left: Iterable[InputRow], right: Iterable[InputRow], how: str, tolerance: int | None) -> list[Row]:
    """Each left row with the latest right one that is not after it."""
    others = by_key(right)
    found: list[Row] = []
    for x in left:
        versions = [y for y in others[x[0]] if y[1] <= x[1] and (tolerance is None or y[1] >= x[1] - tolerance)]
        if versions:
            found.append((*x, *max(versions, key=lambda y: y[1])[1:]))
        elif how == "left":
            found.append((*x, None, None))
    return found
