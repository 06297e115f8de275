"""Running top n: a sorted list a key as the oracle."""

from __future__ import annotations

import decimal
import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import PlanError
from rayflow.operators.keyed.top import STATE, Top
from tests.operators.helpers import frozen, opened
from tests.operators.keyed.rig import WAYS, Way, by_key, run, table_of

SCHEMA = pa.schema(
    [("k", pa.int64()), ("v", pa.int32()), ("f", pa.float64()), ("w", pa.string()), ("d", pa.decimal128(5, 1))]
)
ROW = st.tuples(
    st.one_of(st.none(), st.integers(0, 2)),
    st.one_of(st.none(), st.integers(-9, 9)),
    st.sampled_from([None, math.nan, 0.0, 1.5, -math.inf, math.inf, 3.0]),
    st.sampled_from([None, "", "a", "b", "ba"]),
    st.one_of(st.none(), st.integers(0, 30).map(lambda n: decimal.Decimal(n).scaleb(-1))),
)


def _top(**options: Any) -> Top:
    what: dict[str, Any] = {"keys": ("k",), "n": 1, "by": "v"} | options
    return Top(**what)


def _worth(value: Any, descending: bool) -> tuple[int, Any]:
    """Greater is better; NaN is the largest number."""
    if isinstance(value, float):
        value = (1, 0.0) if math.isnan(value) else (0, value)
    return (0, value) if descending else (0, _Less(value))


class _Less:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __gt__(self, other: Any) -> bool:
        return bool(self.value < other.value)

    def __lt__(self, other: Any) -> bool:
        return bool(self.value > other.value)


def _model(data: list[tuple[Any, ...]], n: int, by: str, descending: bool) -> list[dict[str, Any]]:
    ranking: dict[Any, list[Any]] = {}
    found = []
    column = SCHEMA.get_field_index(by)
    for row in data:
        if row[column] is None:
            continue
        best = ranking.setdefault(row[0], [])
        worth = _worth(row[column], descending)[1]
        rank = sum(not worth > other for other in best)
        if rank < n:
            best.insert(rank, worth)
            del best[n:]
            found.append(dict(zip([*SCHEMA.names, "rank"], [*row, rank + 1], strict=True)))
    return found


@settings(max_examples=150, deadline=None)
@given(st.lists(ROW, max_size=50), WAYS, st.integers(1, 4), st.sampled_from(["v", "f", "w", "d"]), st.booleans())
def test_equals_a_sorted_list_whatever_the_way(
    data: list[tuple[Any, ...]], way: Way, n: int, by: str, descending: bool
) -> None:
    factory = Top(keys=("k",), n=n, by=by, descending=descending)
    found = run(factory, table_of(SCHEMA, data), way)
    wanted = _model(data, n, by, descending)
    assert repr(sorted(by_key(found, ("k",)).items())) == repr(sorted(by_key(wanted, ("k",)).items()))
    if way.workers == [1]:
        assert repr(found) == repr(wanted)


def test_the_ranking_at_any_moment_is_the_top_of_what_came_out() -> None:
    values = [(7 * i) % 31 for i in range(60)]
    table = table_of(SCHEMA, [(1, v, None, None, None) for v in values])
    for until in (5, 30, 60):
        found = run(Top(keys=("k",), n=3, by="v"), table.slice(0, until), Way([10, 20]))
        assert sorted(r["v"] for r in found)[-3:] == sorted(values[:until])[-3:]
        assert len(found) < until or until < 10


@settings(max_examples=100, deadline=None)
@given(st.lists(ROW, max_size=50), WAYS, st.integers(1, 4), st.sampled_from(["v", "f", "w", "d"]), st.booleans())
def test_once_a_batch_the_top_of_what_came_out_is_the_same(
    data: list[tuple[Any, ...]], way: Way, n: int, by: str, descending: bool
) -> None:
    table = table_of(SCHEMA, data)
    few = run(Top(keys=("k",), n=n, by=by, descending=descending, emit="batch"), table, way)
    every = run(Top(keys=("k",), n=n, by=by, descending=descending), table, way)
    assert len(few) <= len(every)
    names = SCHEMA.names

    def best(found: list[dict[str, Any]]) -> dict[Any, list[Any]]:
        """Row by row the model takes what came out, by the order of the rows of each key."""
        told = _model([tuple(row[name] for name in names) for row in found], n, by, descending)
        keys = by_key(told, ("k",))
        return {key: sorted(map(repr, _ranking(rows, n, by, descending))) for key, rows in keys.items()}

    assert best(few) == best(every)


def _ranking(rows: list[dict[str, Any]], n: int, by: str, descending: bool) -> list[Any]:
    ranking: list[Any] = []
    for row in rows:
        ranking.insert(row["rank"] - 1, row[by])
    return ranking[:n]


def test_once_a_batch_ranks_are_those_when_the_batch_is_done() -> None:
    table = table_of(SCHEMA, [(1, v, None, str(at), None) for at, v in enumerate([3, 9, 5, 1, 7, 8])])
    for n, wanted in ((1, [("1", 1)]), (2, [("1", 1), ("2", 2), ("5", 2)])):
        found = run(Top(keys=("k",), n=n, by="v", emit="batch"), table, Way([3]))
        assert [(r["w"], r["rank"]) for r in found] == wanted


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.uint64(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("descending", [True, False])
def test_numbers_of_every_width_are_ranked_as_they_are_sorted(kind: pa.DataType, descending: bool) -> None:
    bits = kind.bit_width
    raw = [0, 1, 2, (1 << (bits - 1)) - 1, (1 << (bits - 1)), (1 << bits) - 1]
    column = pa.Array.from_buffers(
        kind, len(raw), [None, pa.py_buffer(b"".join(r.to_bytes(bits // 8, "little") for r in raw))]
    )
    column = column.filter(pc.invert(pc.is_nan(column))) if pa.types.is_floating(kind) else column
    table = pa.table({"k": pa.nulls(len(column), pa.int8()), "v": column})
    ordered = table.sort_by([("v", "ascending" if descending else "descending")])
    assert len(run(Top(keys=("k",), n=1, by="v", descending=descending), ordered, Way([2, 3]))) >= len(column) - 1
    backwards = table.sort_by([("v", "descending" if descending else "ascending")])
    assert len(run(Top(keys=("k",), n=1, by="v", descending=descending), backwards, Way([2, 3]))) == 1


def test_of_equal_values_the_earlier_row_ranks_first() -> None:
    table = table_of(SCHEMA, [(1, v, None, str(at), None) for at, v in enumerate([5, 5, 5, 6, 5])])
    for cuts in ([], [1, 2, 3, 4]):
        found = run(Top(keys=("k",), n=2, by="v"), table, Way(cuts))
        assert [(r["w"], r["rank"]) for r in found] == [("0", 1), ("1", 2), ("3", 1)]


def test_output_and_state_are_as_declared() -> None:
    factory = Top(keys=("k",), n=2, by="w")
    operator, out = opened(factory)
    operator.process(table_of(SCHEMA, [(1, 1, 1.0, "x", None)]).to_batches()[0], 0)
    table = out.table()
    assert table is not None
    assert table.schema == factory.output_schema(SCHEMA)
    assert {s.name: s.table.schema for s in frozen(operator)} == factory.state_schemas(SCHEMA)
    assert frozen(operator)[0].table.to_pylist()[0] == {"k": 1, "top.1": "x", "top.2": None}
    assert frozen(operator)[0].name == STATE


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 0}, "whole number from 1 to 100, got 0"),
        ({"n": 101}, "whole number from 1 to 100"),
        ({"n": True}, "whole number"),
        ({"by": "nope"}, "needs a column of that name"),
        ({"by": 3}, "must be the name of a column"),
        ({"by": "list"}, "needs values that have an order"),
        ({"keys": ("nope",)}, "'nope' is not among"),
    ],
)
def test_mistakes_are_found_while_building(options: dict[str, Any], match: str) -> None:
    schema = SCHEMA.append(pa.field("list", pa.list_(pa.int8())))
    with pytest.raises(PlanError, match=match):
        _top(**options).output_schema(schema)
    with pytest.raises(PlanError, match="has one already"):
        Top(keys=("k",), n=1, by="v").output_schema(SCHEMA.append(pa.field("rank", pa.int8())))
