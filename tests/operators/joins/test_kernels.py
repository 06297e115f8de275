"""Finding pairs, against loops over rows; different keys with one hash; keys of every type."""

from __future__ import annotations

import bisect
import datetime
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.operators.joins import kernels
from rayflow.operators.joins.columns import decode, decoded_schema
from rayflow.operators.joins.kernels import (
    SortedRows,
    latest,
    mark_matched,
    merged,
    pairs,
    sort_rows,
    stable_argsort,
)

KEYED = st.lists(st.tuples(st.integers(0, 5), st.integers(-20, 20)), max_size=30)


def _sorted(rows: list[tuple[int, int]], *, ties: bool = False) -> SortedRows:
    batch = pa.RecordBatch.from_pydict(
        {
            "k": pa.array([k for k, _ in rows], pa.int64()),
            "t": pa.array([t for _, t in rows], pa.int64()),
            "row": pa.array(range(len(rows)), pa.int64()),
        }
    )
    return sort_rows(batch, ["k"], batch.column("t").to_numpy(), ties=ties)


def _collide(patch: pytest.MonkeyPatch, collide: bool) -> None:
    """Few hashes for many keys."""
    if collide:
        patch.setattr(kernels, "hash_columns", lambda columns: (columns[0].to_numpy() % 2).astype(np.uint64))


@settings(max_examples=80, deadline=None)
@given(KEYED, KEYED, st.integers(-9, 9), st.integers(0, 9), st.booleans(), st.integers(1, 30))
def test_pairs_are_those_of_a_loop(left: Any, right: Any, low: int, more: int, collide: bool, at_a_time: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _collide(patch, collide)
        patch.setattr(kernels, "PAIRS", at_a_time)
        a, b = _sorted(left), _sorted(right)
        found: list[tuple[int, int]] = []
        for mine, theirs in pairs(a, b, a.times + low, a.times + low + more):
            found += zip(_rows(a, mine), _rows(b, theirs), strict=True)
        matched = np.zeros(len(a), bool)
        mark_matched(matched, a, b, a.times + low, a.times + low + more)
    wanted = [
        (i, j)
        for i, (k, t) in enumerate(left)
        for j, (other, time) in enumerate(right)
        if k == other and t + low <= time <= t + low + more
    ]
    assert sorted(found) == wanted
    assert set(_rows(a, np.flatnonzero(matched))) == {i for i, _ in wanted}


def _rows(rows: SortedRows, at: Any) -> list[int]:
    found: list[int] = rows.rows.column("row").take(pa.array(at)).to_pylist()
    return found


@settings(max_examples=80, deadline=None)
@given(KEYED, KEYED, st.booleans())
def test_the_latest_is_that_of_a_loop(left: Any, right: Any, collide: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _collide(patch, collide)
        a, b = _sorted(left), _sorted(right, ties=True)
        found = latest(a, b)
    for at, row in enumerate(_rows(a, np.arange(len(a)))):
        k, t = left[row]
        times = [time for other, time in right if other == k and time <= t]
        assert (found[at] >= 0) == bool(times)
        if times:
            assert right[_rows(b, found[at : at + 1])[0]] == (k, max(times))


@settings(max_examples=60, deadline=None)
@given(st.lists(KEYED, min_size=1, max_size=4), st.booleans())
def test_merged_rows_are_sorted(parts: Any, ties: bool) -> None:
    whole = merged([_sorted(part, ties=ties) for part in parts])
    tie = np.zeros(len(whole), np.uint64) if whole.ties is None else whole.ties
    order = list(zip(whole.hashes.tolist(), whole.times.tolist(), tie.tolist(), strict=True))
    assert order == sorted(order)
    got = zip(whole.rows.column("k").to_pylist(), whole.times.tolist(), strict=True)
    assert sorted(got) == sorted(row for part in parts for row in part)
    assert whole.keys[0].equals(whole.rows.column("k"))


@given(st.lists(st.integers(0, 4) | st.integers(0, 2**64 - 1), max_size=50))
def test_the_fast_sort_is_stable(values: list[int]) -> None:
    array = np.array(values, np.uint64)
    assert stable_argsort(array).tolist() == np.argsort(array, kind="stable").tolist()


@given(
    st.lists(st.integers(0, 9), max_size=20), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5)
)
def test_bisect_is_that_of_the_standard_library(times: list[int], spans: list[tuple[int, int]]) -> None:
    times.sort()
    spans = [(min(a, b, len(times)), min(max(a, b), len(times))) for a, b in spans]
    begin, end = (np.array([span[i] for span in spans], np.int64) for i in (0, 1))
    wanted = np.arange(len(spans)) * 2
    for right, reference in ((False, bisect.bisect_left), (True, bisect.bisect_right)):
        found = kernels.bisect(np.array(times, np.int64), begin, end, wanted, right=right)
        assert found.tolist() == [reference(times, w, *span) for w, span in zip(wanted.tolist(), spans, strict=True)]


NAN = float("nan")
DAY = datetime.date(1969, 7, 20)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.int8(), [1, -1]),
        (pa.bool_(), [True, False]),
        (pa.float64(), [NAN, 1.5]),
        (pa.float64(), [0.0, NAN]),
        (pa.string(), ["", "ä"]),
        (pa.large_string(), ["x", "y"]),
        (pa.string_view(), ["x", "y" * 40]),
        (pa.binary(2), [b"ab", b"cd"]),
        (pa.date32(), [DAY, datetime.date(2020, 1, 1)]),
        (pa.timestamp("ns", "Europe/Paris"), [-(10**18), 10**18]),
        (pa.duration("s"), [datetime.timedelta(1), datetime.timedelta(-1)]),
        (pa.decimal128(5, 2), [decimal.Decimal("1.50"), decimal.Decimal("-1.50")]),
    ],
    ids=str,
)
def test_keys_of_every_type_are_found(kind: Any, values: list[Any]) -> None:
    raw = pa.RecordBatch.from_pydict({"k": pa.array(values, kind)})
    rows = decode(raw, decoded_schema(raw.schema))
    a, b = (sort_rows(batch, ["k"], np.zeros(batch.num_rows, np.int64)) for batch in (rows, rows.slice(0, 1)))
    ((mine, theirs),) = pairs(a, b, None, None)
    assert len(mine) == len(theirs) == 1
    assert repr(a.rows.column("k")[int(mine[0])]) == repr(rows.column("k")[0])


def test_minus_zero_is_zero() -> None:
    a, b = (
        sort_rows(pa.RecordBatch.from_pydict({"k": pa.array([zero])}), ["k"], np.zeros(1, np.int64))
        for zero in (0.0, -0.0)
    )
    assert len(list(pairs(a, b, None, None))) == 1
