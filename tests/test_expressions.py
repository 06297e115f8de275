"""Expressions give what Python gives for each row, keep nulls, and say what is wrong in one sentence."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.errors import ExpressionError, PlanError
from rayflow.expressions import Expr, as_expr, coalesce, col, lit, when


def batch() -> pa.RecordBatch:
    return pa.record_batch(
        {
            "a": pa.array([7, -7, None, 0], pa.int64()),
            "b": pa.array([2, 2, 2, -3], pa.int32()),
            "x": pa.array([1.5, -2.5, None, 0.25]),
            "s": pa.array(["JFK", " lga ", None, "été"]),
            "p": pa.array([True, False, None, True]),
            "q": pa.array([None, None, None, False], pa.bool_()),
            "t": pa.array([0, -1_500_000, None, 1_372_685_405_123_456], pa.timestamp("us")),
            "d": pa.array([date(2013, 7, 1), date(1969, 12, 31), None, date(2024, 2, 29)]),
            "m": pa.array([Decimal("1.50"), Decimal("-2.25"), None, Decimal("0.00")]),
            "r": pa.array([{"u": 1}, {"u": None}, None, {"u": 4}]),
        }
    )


def values(expr: Expr) -> list[Any]:
    result = expr.evaluate(batch())
    assert isinstance(result, pa.Array)
    assert len(result) == 4
    assert result.type == expr.result_type(batch().schema)
    found: list[Any] = result.to_pylist()
    return found


a, b, x, s, p, q, t, d = (col(name) for name in "abxspqtd")
BIG = lit(2**62)

CASES: list[tuple[Expr, str, list[Any]]] = [
    (a + b, "(col('a') + col('b'))", [9, -5, None, -3]),
    (1 + a, "(1 + col('a'))", [8, -6, None, 1]),
    (a - 1, "(col('a') - 1)", [6, -8, None, -1]),
    (1 - a, "(1 - col('a'))", [-6, 8, None, 1]),
    (a * 2, "(col('a') * 2)", [14, -14, None, 0]),
    (2 * a, "(2 * col('a'))", [14, -14, None, 0]),
    (a / b, "(col('a') / col('b'))", [3.5, -3.5, None, -0.0]),
    (7 / b, "(7 / col('b'))", [3.5, 3.5, 3.5, 7 / -3]),
    (b / a, "(col('b') / col('a'))", [2 / 7, -2 / 7, None, -math.inf]),
    (a / x, "(col('a') / col('x'))", [7 / 1.5, 2.8, None, 0.0]),
    (a // b, "(col('a') // col('b'))", [3, -4, None, 0]),
    (7 // b, "(7 // col('b'))", [3, 3, 3, -3]),
    (x // 1, "(col('x') // 1)", [1.0, -3.0, None, 0.0]),
    (a % b, "(col('a') % col('b'))", [1, 1, None, 0]),
    (7 % b, "(7 % col('b'))", [1, 1, 1, -2]),
    (x % 1, "(col('x') % 1)", [0.5, 0.5, None, 0.25]),
    (b**2, "(col('b') ** 2)", [4, 4, 4, 9]),
    (2**x, "(2 ** col('x'))", [2**1.5, 2**-2.5, None, 2**0.25]),
    (-a, "-col('a')", [-7, 7, None, 0]),
    (abs(a), "col('a').abs()", [7, 7, None, 0]),
    (a > 5, "(col('a') > 5)", [True, False, None, False]),
    (a >= 7, "(col('a') >= 7)", [True, False, None, False]),
    (a < b, "(col('a') < col('b'))", [False, True, None, False]),
    (0 <= a, "(col('a') >= 0)", [True, False, None, True]),  # noqa: SIM300
    (s == "JFK", "(col('s') == 'JFK')", [True, False, None, False]),
    (s != "JFK", "(col('s') != 'JFK')", [False, True, None, True]),
    (s + "!", "(col('s') + '!')", ["JFK!", " lga !", None, "été!"]),
    ("<" + s, "('<' + col('s'))", ["<JFK", "< lga ", None, "<été"]),
    (p & q, "(col('p') & col('q'))", [None, False, None, False]),
    (p | q, "(col('p') | col('q'))", [True, None, None, True]),
    (p ^ True, "(col('p') ^ True)", [False, True, None, False]),
    (~p, "~col('p')", [False, True, None, False]),
    (p & (a > 0), "(col('p') & (col('a') > 0))", [True, False, None, False]),
    (a.is_null(), "col('a').is_null()", [False, False, True, False]),
    (a.is_not_null(), "col('a').is_not_null()", [True, True, False, True]),
    (x.is_nan(), "col('x').is_nan()", [False, False, None, False]),
    (a.fill_null(-1), "col('a').fill_null(-1)", [7, -7, -1, 0]),
    (a.fill_null(b), "col('a').fill_null(col('b'))", [7, -7, 2, 0]),
    (a.is_in([7, 0]), "col('a').is_in(value_set=[7, 0])", [True, False, False, True]),
    (a.is_in([7, None]), "col('a').is_in(value_set=[7, None])", [True, False, True, False]),
    (a.is_in([]), "col('a').is_in(value_set=[])", [False] * 4),
    (a.between(-7, 0), "((col('a') >= -7) & (col('a') <= 0))", [False, True, None, True]),
    (a.cast("string"), "col('a').cast(target_type=string, safe=True)", ["7", "-7", None, "0"]),
    (x.cast(pa.int64(), safe=False), "col('x').cast(target_type=int64, safe=False)", [1, -2, None, 0]),
    (x.round(), "col('x').round(decimals=0)", [2.0, -2.0, None, 0.0]),
    (x.round(1), "col('x').round(decimals=1)", [1.5, -2.5, None, 0.2]),
    (a.round(), "col('a').round(decimals=0)", [7, -7, None, 0]),
    (x.floor(), "col('x').floor()", [1.0, -3.0, None, 0.0]),
    (x.ceil(), "col('x').ceil()", [2.0, -2.0, None, 1.0]),
    (b.floor(), "col('b').floor()", [2, 2, 2, -3]),
    (a.abs().sqrt(), "col('a').abs().sqrt()", [7**0.5, 7**0.5, None, 0.0]),
    (x.exp().log(), "col('x').exp().log()", [1.5, -2.5, None, 0.25]),
    ((2**x).log(2), "(2 ** col('x')).log(2.0)", [1.5, -2.5, None, 0.25]),
    (a.clip(-1, 1), "col('a').clip(-1, 1)", [1, -1, None, 0]),
    (a.clip(lower=1), "col('a').clip(1, None)", [7, 1, None, 1]),
    (a.clip(upper=b), "col('a').clip(None, col('b'))", [2, -7, None, -3]),
    (col("m") + 1, "(col('m') + 1)", [Decimal("2.50"), Decimal("-1.25"), None, Decimal("1.00")]),
    (col("r").field("u"), "col('r').field(indices='u')", [1, None, None, 4]),
    (coalesce("a", "b"), "coalesce(col('a'), col('b'))", [7, -7, 2, 0]),
    (coalesce(x, 9), "coalesce(col('x'), 9)", [1.5, -2.5, 9.0, 0.25]),
    (lit(3), "3", [3, 3, 3, 3]),
    (lit(None), "None", [None] * 4),
    (lit(3) + 4, "(3 + 4)", [7] * 4),
    (s.str.lower(), "col('s').str.lower()", ["jfk", " lga ", None, "été"]),
    (s.str.upper(), "col('s').str.upper()", ["JFK", " LGA ", None, "ÉTÉ"]),
    (s.str.strip(), "col('s').str.strip()", ["JFK", "lga", None, "été"]),
    (s.str.strip("éK"), "col('s').str.strip(characters='éK')", ["JF", " lga ", None, "t"]),
    (
        s.str.contains("f", ignore_case=True),
        "col('s').str.contains(pattern='f', ignore_case=True)",
        [True, False, None, False],
    ),
    (
        s.str.contains("^.t", regex=True),
        "col('s').str.contains(pattern='^.t', ignore_case=False)",
        [False, False, None, True],
    ),
    (
        s.str.starts_with("J"),
        "col('s').str.starts_with(pattern='J', ignore_case=False)",
        [True, False, None, False],
    ),
    (
        s.str.ends_with("é"),
        "col('s').str.ends_with(pattern='é', ignore_case=False)",
        [False, False, None, True],
    ),
    (
        s.str.replace("é", "e"),
        "col('s').str.replace(pattern='é', replacement='e')",
        ["JFK", " lga ", None, "ete"],
    ),
    (
        s.str.replace("é", "e", count=1),
        "col('s').str.replace(pattern='é', replacement='e', max_replacements=1)",
        ["JFK", " lga ", None, "eté"],
    ),
    (
        s.str.replace("[A-K]", "_", regex=True),
        "col('s').str.replace(pattern='[A-K]', replacement='_')",
        ["___", " lga ", None, "été"],
    ),
    (s.str.slice(1), "col('s').str.slice(start=1)", ["FK", "lga ", None, "té"]),
    (s.str.slice(0, -1), "col('s').str.slice(start=0, stop=-1)", ["JF", " lga", None, "ét"]),
    (s.str.len(), "col('s').str.len()", [3, 5, None, 3]),
    (
        s.str.concat(s, "z", separator="-"),
        "col('s').str.concat(col('s'), 'z', separator='-')",
        ["JFK-JFK-z", " lga - lga -z", None, "été-été-z"],
    ),
    (s.str.split_part("t", 1), "col('s').str.split_part(separator='t', index=1)", [None, None, None, "é"]),
    (s.str.split_part("t", 0), "col('s').str.split_part(separator='t', index=0)", ["JFK", " lga ", None, "é"]),
    (s.str.count("é"), "col('s').str.count(pattern='é', ignore_case=False)", [0, 0, None, 2]),
    (
        s.str.count("[a-z]", regex=True),
        "col('s').str.count(pattern='[a-z]', ignore_case=False)",
        [0, 3, None, 1],
    ),
    (
        s.str.extract("(?:J|g)(?P<next>.)"),
        "col('s').str.extract(pattern='(?:J|g)(?P<next>.)')",
        ["F", "a", None, None],
    ),
    (s.str.split("t"), "col('s').str.split(pattern='t')", [["JFK"], [" lga "], None, ["é", "é"]]),
    (t.dt.year(), "col('t').dt.year()", [1970, 1969, None, 2013]),
    (t.dt.month(), "col('t').dt.month()", [1, 12, None, 7]),
    (t.dt.day(), "col('t').dt.day()", [1, 31, None, 1]),
    (t.dt.hour(), "col('t').dt.hour()", [0, 23, None, 13]),
    (t.dt.minute(), "col('t').dt.minute()", [0, 59, None, 30]),
    (t.dt.second(), "col('t').dt.second()", [0, 58, None, 5]),
    (d.dt.day_of_week(), "col('d').dt.day_of_week()", [0, 2, None, 3]),
    (d.dt.day_of_year(), "col('d').dt.day_of_year()", [182, 365, None, 60]),
    (t.dt.epoch(), "col('t').dt.epoch(unit='us')", [0, -1_500_000, None, 1_372_685_405_123_456]),
    (t.dt.epoch("s"), "col('t').dt.epoch(unit='s')", [0, -2, None, 1_372_685_405]),
    (t.dt.epoch("ns"), "col('t').dt.epoch(unit='ns')", [0, -1_500_000_000, None, 1_372_685_405_123_456_000]),
    (d.dt.epoch("s"), "col('d').dt.epoch(unit='s')", [1_372_636_800, -86_400, None, 1_709_164_800]),
    ((a * 2).alias("twice"), "(col('a') * 2).alias('twice')", [14, -14, None, 0]),
]


@pytest.mark.parametrize(("expr", "shown", "expected"), CASES, ids=[case[1] for case in CASES])
def test_each_expression_gives_what_python_gives(expr: Expr, shown: str, expected: list[Any]) -> None:
    found = values(expr)
    approximate = [pytest.approx(v) if isinstance(v, float) else v for v in expected]
    assert found == approximate
    assert [type(v) for v in found] == [type(v) for v in expected]
    assert repr(expr) == str(expr) == shown
    assert values(pickle.loads(pickle.dumps(expr))) == found


SMALL = st.integers(-(2**40), 2**40)


@settings(deadline=None)
@given(st.lists(st.tuples(SMALL, SMALL.filter(bool)), min_size=1))
def test_integer_division_is_pythons(pairs: list[tuple[int, int]]) -> None:
    data = pa.record_batch({"n": [n for n, _ in pairs], "k": [k for _, k in pairs]})
    assert (col("n") // col("k")).evaluate(data).to_pylist() == [n // k for n, k in pairs]
    assert (col("n") % col("k")).evaluate(data).to_pylist() == [n % k for n, k in pairs]
    assert (col("n") / col("k")).evaluate(data).to_pylist() == [n / k for n, k in pairs]


FINITE = st.floats(-1e15, 1e15, allow_subnormal=False)


@settings(deadline=None)
@given(st.lists(st.tuples(FINITE, FINITE.filter(bool)), min_size=1))
def test_float_modulo_is_pythons(pairs: list[tuple[float, float]]) -> None:
    data = pa.record_batch({"n": [n for n, _ in pairs], "k": [k for _, k in pairs]})
    assert (col("n") % col("k")).evaluate(data).to_pylist() == [n % k for n, k in pairs]


@settings(deadline=None)
@given(
    st.lists(st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)), min_size=1),  # noqa: DTZ001
    st.sampled_from([("15m", timedelta(minutes=15)), ("1d", timedelta(days=1)), ("10s", timedelta(seconds=10))]),
)
def test_truncate_floors_from_the_epoch_also_before_it(moments: list[datetime], every: tuple[str, timedelta]) -> None:
    text, step = every
    data = pa.record_batch({"t": pa.array(moments, pa.timestamp("us"))})
    epoch = datetime(1970, 1, 1)  # noqa: DTZ001
    expected = [epoch + (moment - epoch) // step * step for moment in moments]
    assert col("t").dt.truncate(text).evaluate(data).to_pylist() == expected
    assert col("t").dt.date().evaluate(data).to_pylist() == [moment.date() for moment in moments]


def test_truncate_to_calendar_units() -> None:
    assert values(d.dt.truncate("1mo"))[3] == date(2024, 2, 1)
    assert values(d.dt.truncate("1w"))[3] == date(2024, 2, 26)
    assert values(d.dt.truncate("1y"))[1] == date(1969, 1, 1)


def test_date_and_time_operands() -> None:
    assert values(d == date(2024, 2, 29)) == [False, False, None, True]
    assert values(t + timedelta(days=1))[0] == datetime(1970, 1, 2)  # noqa: DTZ001
    assert values(t - t)[3] == timedelta(0)
    assert values(lit("2013-07-01").str.to_datetime("%Y-%m-%d"))[0] == datetime(2013, 7, 1)  # noqa: DTZ001


def test_when_takes_the_first_branch_that_is_true() -> None:
    expr = when(a > 0).then("plus").when(a == 0).then("zero").otherwise("other")
    assert values(expr) == ["plus", "other", "other", "zero"]
    assert repr(expr) == (
        "when((col('a') > 0)).then('plus').otherwise(when((col('a') == 0)).then('zero').otherwise('other'))"
    )
    assert values(when(p).then(a).otherwise(None)) == [7, None, None, 0]
    assert values(when(True).then(a).otherwise(x)) == [7.0, -7.0, None, 0.0]
    assert values(when("p").then(1).otherwise(2)) == [1, 2, 2, 1]
    assert expr.columns() == frozenset({"a"})


def test_when_guards_a_branch_that_fails_elsewhere() -> None:
    data = pa.record_batch({"n": [6, 5, 4, 3], "k": [3, 0, 2, 0], "z": ["1", "x", "3", None]})
    guarded = when(col("k") == 0).then(-1).otherwise(col("n") // col("k"))
    assert guarded.evaluate(data).to_pylist() == [2, -1, 2, -1]
    parsed = when(col("z").str.contains("^[0-9]+$", regex=True)).then(col("z").cast("int64")).otherwise(None)
    assert parsed.evaluate(data).to_pylist() == [1, None, 3, None]
    wrong_guard = when(col("k") == 3).then(-1).otherwise(col("n") // col("k"))
    with pytest.raises(ExpressionError, match="divide by zero"):
        wrong_guard.evaluate(data)


@pytest.mark.parametrize(
    "build",
    [
        lambda: a + when(p).then(1),
        lambda: when(p).otherwise(1),
        lambda: when(p).when(p),
        lambda: when(p).then(1).then(2),
    ],
)
def test_an_unfinished_when_is_refused(build: Callable[[], object]) -> None:
    with pytest.raises(PlanError, match=r"then\("):
        build()


# ---- pyarrow expressions ------------------------------------------------------------------------


def test_an_arrow_expression_is_accepted_everywhere() -> None:
    field = pc.field("a")
    assert values(as_expr(field * 2 > 5)) == [True, False, None, False]
    assert values(as_expr(field) + b) == [9, -5, None, -3]
    assert values(when(field > 0).then(field).otherwise(0)) == [7, 0, 0, 0]
    assert values(coalesce(field, "b")) == [7, -7, 2, 0]
    assert values(as_expr(pc.scalar(1))) == [1] * 4
    assert as_expr(field).columns() is None
    assert (b + field).columns() is None
    assert repr(as_expr(field > 5)) == "arrow((a > 5))"


def test_an_arrow_expression_keeps_the_order_of_many_rows() -> None:
    rows = 300_000
    data = pa.record_batch({"a": pa.array(range(rows))})
    assert as_expr(pc.field("a") + 1).evaluate(data).equals(pa.array(range(1, rows + 1)))


def test_an_arrow_expression_that_fails_is_told() -> None:
    with pytest.raises(PlanError, match=r"arrow\(nope\).*columns a, b, x"):
        as_expr(pc.field("nope")).result_type(batch().schema)
    with pytest.raises(ExpressionError, match="divide by zero"):
        as_expr(pc.divide(pc.field("b"), 0)).evaluate(batch())


# ---- names, columns, types ----------------------------------------------------------------------


def test_as_expr_takes_a_str_as_a_column_and_other_values_as_literals() -> None:
    assert repr(as_expr("a")) == "col('a')"
    assert repr(as_expr(5)) == "5"
    assert as_expr(a) is a


def test_columns_and_output_names() -> None:
    assert (a + b * 2).columns() == frozenset({"a", "b"})
    assert lit(1).columns() == frozenset()
    assert (a + b).output_name() == "a"
    assert (1 + b).output_name() == "b"
    assert lit(1).output_name() == "literal"
    assert (a + b).alias("c").output_name() == "c"
    assert (a + b).alias("c").str.lower().output_name() == "c"
    assert col("r").field("u").output_name() == "u"
    assert when(p).then(0).otherwise(x).output_name() == "x"


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (b.fill_null(0), pa.int32()),
        (b.clip(0, 5), pa.int32()),
        (b / b, pa.float64()),
        (b + 1, pa.int64()),
        (b // 2, pa.int64()),
        (x.cast("float32") / b, pa.float64()),
        (p & q, pa.bool_()),
        (t.dt.date(), pa.date32()),
        (t.dt.truncate("1h"), pa.timestamp("us")),
        (s.str.split(","), pa.list_(pa.string())),
    ],
    ids=str,
)
def test_result_types(expr: Expr, expected: pa.DataType) -> None:
    assert expr.result_type(batch().schema) == expected


def test_large_strings_and_dictionaries_work_as_strings_do() -> None:
    data = pa.record_batch(
        {
            "large": pa.array(["a", None, "b"], pa.large_string()),
            "coded": pa.array(["a", None, "b"]).dictionary_encode(),
        }
    )
    assert (col("large") + "!").evaluate(data).to_pylist() == ["a!", None, "b!"]
    assert (col("large") == "a").evaluate(data).to_pylist() == [True, None, False]
    assert when(col("large") == "a").then("x").otherwise(col("large")).evaluate(data).to_pylist() == ["x", None, "b"]
    assert (col("coded") == "a").evaluate(data).to_pylist() == [True, None, False]
    assert col("coded").is_in(["b"]).evaluate(data).to_pylist() == [False, False, True]
    assert col("coded").is_in([]).evaluate(data).to_pylist() == [False] * 3
    assert col("coded").is_in([None]).evaluate(data).to_pylist() == [False, True, False]


def test_a_batch_without_rows_gives_an_array_without_rows() -> None:
    empty = batch().slice(0, 0)
    for expr in (a + 1, lit(1), lit(None), as_expr(pc.field("a")), when(p).then(1).otherwise(a)):
        assert len(expr.evaluate(empty)) == 0


# ---- mistakes -----------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_its_expression_and_the_nearest_name() -> None:
    schema = pa.schema([("dep_delay", pa.int64()), ("origin", pa.string())])
    with pytest.raises(PlanError) as caught:
        (col("dep_dealy") > 5).result_type(schema)
    assert str(caught.value) == (
        "expression (col('dep_dealy') > 5): column 'dep_dealy' is not in the schema; "
        "did you mean 'dep_delay'? available: dep_delay, origin"
    )
    with pytest.raises(PlanError, match="did you mean 'origin'"):
        col("ORIGIN").evaluate(pa.RecordBatch.from_pylist([], schema))
    with pytest.raises(PlanError, match="not in the schema; available: dep_delay, origin$"):
        col("zzz").result_type(schema)
    with pytest.raises(PlanError, match="more than once"):
        col("a").result_type(pa.schema([("a", pa.int64()), ("a", pa.int64())]))
    with pytest.raises(PlanError, match="c19 and 80 more"):
        col("zzz").result_type(pa.schema([(f"c{i}", pa.int64()) for i in range(100)]))


@pytest.mark.parametrize(
    "expr",
    [s > 5, s * 2, a & p, ~a, a.str.lower(), s.dt.year(), a.dt.epoch(), a.is_in(["x"]), a.fill_null("x"),
     s // 2, s % 2, s.str.concat(a), a.field("u"), col("r").field("nope"), when(a).then(1).otherwise(2),
     when(p).then(1).otherwise("x"), a.fill_null(0.5), t == datetime(2013, 1, 1, tzinfo=UTC)],
    ids=str,
)  # fmt: skip
def test_types_that_do_not_fit_are_found_without_data(expr: Expr) -> None:
    with pytest.raises(PlanError, match=r"expression .* does not fit the schema: ") as caught:
        expr.result_type(batch().schema)
    assert repr(expr) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("expr", "cause"),
    [
        (a * BIG, "overflow; cast to a wider type"),
        (a + lit(2**63 - 1), "overflow"),
        (b // (b - 2), "divide by zero; guard it"),
        (b % (b - 2), "divide by zero"),
        (s.cast("int64"), "Failed to parse string: .*; clean the text"),
        (a.cast("uint8"), "out of bounds|not in range"),
        (x.cast("int64"), "truncated"),
    ],
    ids=str,
)
def test_data_that_cannot_be_processed_names_expression_and_cause(expr: Expr, cause: str) -> None:
    expr.result_type(batch().schema)
    with pytest.raises(ExpressionError, match=cause) as caught:
        (expr.is_null() & True).evaluate(batch())
    assert repr(expr) in str(caught.value)
    assert isinstance(caught.value.__cause__, pa.ArrowException)


def test_the_truth_of_an_expression_is_not_known() -> None:
    with pytest.raises(TypeError, match=r"use & \| ~"):
        bool(a > 5)
    with pytest.raises(TypeError, match=r"\.between\(a, b\)"):
        _ = 1 < a < 5
    with pytest.raises(TypeError, match="is_null"):
        _ = a == None  # noqa: E711


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: lit(object()), "cannot be a value"),
        (lambda: a + object(), "cannot be a value"),
        (lambda: col(5), r"lit\(5\)"),  # type: ignore[arg-type]
        (lambda: a.cast("integer"), "name of a pyarrow type"),
        (lambda: a.is_in("abc"), "list of values"),
        (lambda: a.is_in([1, "x"]), "not of one type"),
        (lambda: t.dt.truncate("15 minutes"), "'15m'"),
        (lambda: t.dt.truncate("0d"), "positive"),
        (lambda: t.dt.epoch("minutes"), "one of s, ms"),  # type: ignore[arg-type]
        (lambda: coalesce(), "at least one"),
        (lambda: s.str.split_part("/", -1), "index -1"),
        (lambda: s.str.extract("(a)"), "one named group"),
        (lambda: s.str.extract("(?P<a>a)(?P<b>b)"), "one named group"),
    ],
)
def test_mistakes_while_building_are_told_at_once(build: Callable[[], object], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        build()


def test_expressions_are_immutable_and_hashable() -> None:
    with pytest.raises(AttributeError):
        a.name = "b"  # type: ignore[attr-defined]
    assert len({a, b, a}) == 2
