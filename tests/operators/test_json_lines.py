from __future__ import annotations

import json
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayflow.errors import PlanError
from rayflow.operators.json_lines import check_json, json_texts

NESTED = pa.struct([("l", pa.list_(pa.string())), ("n", pa.int64())])
SCHEMA = pa.schema(
    [
        ("i", pa.int64()),
        ("f", pa.float64()),
        ("b", pa.bool_()),
        ("s", pa.string()),
        ('q"x', pa.large_string()),
        ("l", pa.list_(pa.int64())),
        ("n", pa.list_(NESTED)),
    ]
)


def nullable(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INTS = st.integers(-(2**63), 2**63 - 1)
ROW = st.fixed_dictionaries(
    {
        "i": nullable(INTS),
        "f": nullable(st.floats(allow_nan=False, allow_infinity=False)),
        "b": nullable(st.booleans()),
        "s": nullable(TEXT),
        'q"x': nullable(TEXT),
        "l": nullable(st.lists(nullable(INTS), max_size=3)),
        "n": nullable(
            st.lists(
                nullable(
                    st.fixed_dictionaries({"l": nullable(st.lists(nullable(TEXT), max_size=2)), "n": nullable(INTS)})
                ),
                max_size=2,
            )
        ),
    }
)


@given(st.lists(ROW, max_size=6), st.integers(0, 3))
def test_every_row_comes_back_from_the_json_of_the_standard_library(rows: list[dict[str, Any]], skip: int) -> None:
    batch = pa.RecordBatch.from_pylist(rows, schema=SCHEMA).slice(skip)
    texts = json_texts(batch, end="\n")
    assert [json.loads(text) for text in texts.to_pylist()] == rows[skip:]
    assert all(text.count("\n") == 1 for text in texts.to_pylist())


def test_types_without_a_form_of_their_own_in_json() -> None:
    batch = pa.record_batch(
        {
            "naive": pa.array([datetime(2026, 11, 1, 12, 30, tzinfo=UTC)], pa.timestamp("us", "UTC")).cast(
                pa.timestamp("us")
            ),
            "zoned": pa.array([datetime(2026, 11, 1, 12, 30, tzinfo=UTC)], pa.timestamp("ms", "Europe/Berlin")),
            "day": pa.array([date(1969, 12, 31)]),
            "time": pa.array([time(1, 2, 3)], pa.time64("us")),
            "decimal": pa.array([Decimal("12345678901234567890.10")]),
            "nan": [float("nan")],
            "infinite": [float("-inf")],
            "nothing": pa.nulls(1),
            "coded": pa.array(["a"]).dictionary_encode(),
            "fixed": pa.array([[1, 2]], pa.list_(pa.int8(), 2)),
            "empty": pa.array([{}], pa.struct([])),
        }
    )
    (text,) = json_texts(batch).to_pylist()
    assert text == (
        '{"naive":"2026-11-01T12:30:00.000000","zoned":"2026-11-01T12:30:00.000Z","day":"1969-12-31",'
        '"time":"01:02:03.000000","decimal":12345678901234567890.10,"nan":null,"infinite":null,"nothing":null,'
        '"coded":"a","fixed":[1,2],"empty":{}}'
    )


def test_no_columns_and_no_rows() -> None:
    assert json_texts(pa.RecordBatch.from_pylist([], schema=SCHEMA)).to_pylist() == []
    assert json_texts(pa.RecordBatch.from_pylist([{}, {}], schema=pa.schema([]))).to_pylist() in ([], ["{}", "{}"])


@pytest.mark.parametrize(
    "kind", [pa.map_(pa.string(), pa.int64()), pa.list_(pa.map_(pa.string(), pa.int64())), pa.month_day_nano_interval()]
)
def test_types_that_json_does_not_have(kind: pa.DataType) -> None:
    with pytest.raises(PlanError, match="write_json cannot write column 'x' of type .* cast it to text"):
        check_json(pa.schema([("x", kind)]), function="write_json")
