"""Tables of a real server: made, compared, refused; every type comes back; errors blame the right side."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from rayflow.errors import ConfigError, ConnectorError, DataError, PlanError
from rayflow.operators.sql.names import literal, passwords_of, quoted, without_secrets
from rayflow.operators.sql.postgres import PostgresTable
from rayflow.operators.sql.sinks import PostgresSink
from tests.operators.sql.helpers import opened, postgres_sink, prepared, started
from tests.postgres_server import PostgresServer

UTC = dt.UTC
VALUES: dict[str, tuple[pa.Array, Any]] = {
    "bool": (pa.array([True]), True),
    "int8": (pa.array([-1], pa.int8()), -1),
    "uint16": (pa.array([65_535], pa.uint16()), 65_535),
    "uint64": (pa.array([2**64 - 1], pa.uint64()), Decimal(2**64 - 1)),
    "int64": (pa.array([2**62]), 2**62),
    "half": (pa.array([0.5]).cast(pa.float16()), 0.5),
    "float": (pa.array([0.5], pa.float32()), 0.5),
    "double": (pa.array([1e300]), 1e300),
    "text": (pa.array(["it's \\ \" ü"]), "it's \\ \" ü"),
    "large": (pa.array(["x"], pa.large_string()), "x"),
    "view": (pa.array(["x"], pa.string_view()), "x"),
    "dictionary": (pa.array(["x"]).dictionary_encode(), "x"),
    "bytes": (pa.array([b"\0\xff"]), b"\0\xff"),
    "fixed": (pa.array([b"ab"], pa.binary(2)), b"ab"),
    "decimal": (pa.array([Decimal("-12.34")], pa.decimal128(10, 2)), Decimal("-12.34")),
    "date": (pa.array([dt.date(2026, 1, 2)]), dt.date(2026, 1, 2)),
    "date64": (pa.array([dt.date(2026, 1, 2)], pa.date64()), dt.date(2026, 1, 2)),
    "seconds": (pa.array([dt.datetime(2026, 1, 2)], pa.timestamp("s")), dt.datetime(2026, 1, 2)),  # noqa: DTZ001
    "nanos": (pa.array([1_999], pa.timestamp("ns")), dt.datetime(1970, 1, 1, 0, 0, 0, 1)),  # noqa: DTZ001
    "zoned": (pa.array([0], pa.timestamp("ms", "Europe/Berlin")), dt.datetime(1970, 1, 1, tzinfo=UTC)),
    "time": (pa.array([61], pa.time32("s")), dt.time(0, 1, 1)),
    "duration": (pa.array([5], pa.duration("s")), dt.timedelta(seconds=5)),
    "list": (pa.array([[1, 2]]), [1, 2]),
    "nothing": (pa.nulls(1), None),
}


def written(sink: PostgresSink, table: pa.Table) -> None:
    operator = started(sink)
    try:
        for batch in table.to_batches():
            operator.process(batch, 0)
        prepared(operator, 1)
    finally:
        operator.close()


def test_every_type_comes_back(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    rows = pa.table({name: array for name, (array, _) in VALUES.items()})
    written(postgres_sink(postgres, schema, "at_least_once"), rows)
    (found,) = postgres.rows(schema, "t")
    assert dict(zip(VALUES, found, strict=True)) == {name: value for name, (_, value) in VALUES.items()}


@pytest.mark.parametrize(
    ("column", "array", "value"),
    [
        ("float8", pa.array([3]), 3.0),  # as bytes it would be another number, without an error
        ("int4", pa.array([3]), 3),
        ("int8", pa.array([3], pa.int8()), 3),
        ("numeric(10, 2)", pa.array([3]), Decimal(3)),
        ("float4", pa.array([0.1]), 0.1),
        ("varchar(3)", pa.array(["abc"]), "abc"),
        ("jsonb", pa.array(['{"a": [1]}']), {"a": [1]}),
        ("json", pa.array(["[1]"]), [1]),
        ("timestamptz", pa.array([0], pa.timestamp("us")), dt.datetime(1970, 1, 1, tzinfo=UTC)),
        ("timestamp", pa.array([dt.date(2026, 1, 2)]), dt.datetime(2026, 1, 2)),  # noqa: DTZ001
        ("text", pa.nulls(1), None),
        ("int8", pa.nulls(1), None),
    ],
)
def test_rows_are_cast_to_the_columns_of_the_table(
    column: str, array: pa.Array, value: object, postgres: PostgresServer
) -> None:
    schema = postgres.schema()
    postgres.execute(f"CREATE TABLE {schema}.t (other text DEFAULT 'd', x {column})")
    written(postgres_sink(postgres, schema, "at_least_once", create=False), pa.table({"x": array}))
    ((other, found),) = postgres.rows(schema, "t")
    assert other == "d"
    assert found == pytest.approx(value, rel=1e-6) if isinstance(value, float) else found == value


@pytest.mark.parametrize(
    ("column", "array", "match"),
    [
        ("int4", pa.array([2**31]), r"column 'x' holds a value that a column of type int4 cannot take: .*2147483648"),
        ("varchar(3)", pa.array(["abcd"]), r"value too long .*; column 'x' has the value 'abcd'"),
        ("numeric(3, 1)", pa.array([Decimal("1234.5")]), r"numeric field overflow.*column 'x' has the value"),
        ("int8 NOT NULL", pa.array([None], pa.int64()), r'null value in column "x"'),
        ("int8 CHECK (x > 0)", pa.array([0]), r"violates check constraint"),
        ("text", pa.array(["a\0b"]), r"invalid byte sequence .*; column 'x' has the value 'a\\x00b'"),
        ("jsonb", pa.array(["{"]), r"invalid input syntax for type json"),
    ],
)
def test_a_value_that_does_not_fit_is_named(column: str, array: pa.Array, match: str, postgres: PostgresServer) -> None:
    schema = postgres.schema()
    postgres.execute(f"CREATE TABLE {schema}.t (x {column})")
    with pytest.raises(DataError, match=f"^step 'step' subtask 0/2 .*{match}") as caught:
        written(postgres_sink(postgres, schema, "at_least_once"), pa.table({"x": array}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ("y int8", r"it has no column 'x'; expected \{y: int8\}, got \{x: int64\}; select, rename or cast"),
        ("x text", r"column 'x' is text, which does not take int64"),
        ("x bool", r"column 'x' is bool, which does not take int64"),
        ("x jsonb", r"column 'x' is jsonb"),
        ("x inet", r"column 'x' is inet"),
    ],
)
@pytest.mark.parametrize("how", ["two_phase", "at_least_once"])
def test_columns_that_do_not_match_are_told_at_the_start(
    columns: str, match: str, how: Any, postgres: PostgresServer
) -> None:
    schema = postgres.schema()
    postgres.execute(f"CREATE TABLE {schema}.t ({columns})")
    sink = postgres_sink(postgres, schema, how).with_input_schemas([pa.schema({"x": pa.int64()})])
    with pytest.raises(ConfigError, match=f"^step 'step' cannot write to table {schema}.t: {match}"):
        opened(sink).recover([], fresh=True)


def test_a_table_that_must_not_be_made_is_named(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    sink = postgres_sink(postgres, schema, "at_least_once", create=False)
    with pytest.raises(ConfigError, match=f"step 'step' expects a table {schema}.t, which is not there; create it"):
        opened(sink).recover([], fresh=True)
    with pytest.raises(ConfigError, match="schema .*nope.* does not exist"):
        opened(postgres_sink(postgres, "nope", "two_phase")).recover([], fresh=True)


def test_a_key_needs_a_unique_index(postgres: PostgresServer) -> None:
    schema = postgres.schema()
    postgres.execute(f"CREATE TABLE {schema}.t (a int8, b int8, PRIMARY KEY (a))")
    rows = pa.schema({"a": pa.int64(), "b": pa.int64()})
    sink = postgres_sink(postgres, schema, "upsert", key=("b", "a")).with_input_schemas([rows])
    with pytest.raises(ConfigError, match=r"by \(b, a\), which has no primary key or unique index"):
        opened(sink).recover([], fresh=True)
    postgres.execute(f"CREATE UNIQUE INDEX ON {schema}.t (a, b)")
    opened(sink).recover([], fresh=True)


def test_names_are_quoted_and_not_pasted(postgres: PostgresServer) -> None:
    schema, table, column = 'o"dd', 'T "x"; DROP TABLE y', 'a "b" c\\'
    postgres.execute(f"DROP SCHEMA IF EXISTS {quoted(schema)} CASCADE")
    postgres.execute(f"CREATE SCHEMA {quoted(schema)}")
    rows = pa.table({column: [1, 1, 2], "Order": ["a", "b", "c"]})
    for how, key in (("upsert", (column,)), ("at_least_once", ())):
        written(postgres_sink(postgres, schema, how, key=key, table=table + how), rows)  # type: ignore[arg-type]
    found = postgres.execute(f"SELECT * FROM {quoted(schema)}.{quoted(table + 'upsert')} ORDER BY 1")
    assert found == [(1, "b"), (2, "c")]
    assert len(postgres.execute(f"SELECT * FROM {quoted(schema)}.{quoted(table + 'at_least_once')}")) == 3
    assert postgres.execute(f"SELECT {literal('it' + chr(39) + 's ' + chr(92))}") == [("it's \\",)]


@pytest.mark.parametrize("change", ["user", "database"])
def test_wrong_credentials_end_the_job_and_do_not_tell_the_password(change: str, postgres: PostgresServer) -> None:
    url = postgres.url.replace("postgres:@", "nobody:s3cret%21@") if change == "user" else postgres.url
    url = url.replace("/postgres?", "/nodb?") if change == "database" else url
    sink = PostgresSink(PostgresTable("t", url), how="two_phase")
    with pytest.raises(ConfigError, match="step 'step' cannot log in to PostgreSQL: .*does not exist") as caught:
        opened(sink).recover([], fresh=True)
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(sink)


def test_a_server_that_is_away_is_waited_for() -> None:
    sink = PostgresSink(PostgresTable("t", "postgresql://me:s3cret@127.0.0.1:1/db"), how="at_least_once")
    with pytest.raises(ConnectorError, match="step 'step' cannot reach PostgreSQL: .*[Cc]onnection refused") as caught:
        opened(sink).recover([], fresh=True)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:pass%2Fword@host/db",
        "postgresql://host/db?user=me&password=pass%2Fword",
        "host=h password=pass%2Fword dbname=d",
    ],
)
def test_passwords_are_blotted_out_in_every_form(url: str) -> None:
    assert passwords_of(url) == ("pass%2Fword", "pass/word")
    told = without_secrets(f"failed for {url} with pass/word", url)
    assert "pass/" not in told
    assert "pass%" not in told


def test_a_null_in_the_key_is_named(postgres: PostgresServer) -> None:
    sink = postgres_sink(postgres, postgres.schema(), "upsert", key=("k",))
    with pytest.raises(DataError, match="upserts by k, but column 'k' is null in 1 of 2 rows"):
        written(sink, pa.table({"k": [1, None]}))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"how": "upsert"}, "needs key="),
        ({"how": "two_phase", "key": ("x",)}, 'goes with guarantee="upsert" or "wal"'),
        ({"how": "at_least_once", "key": ("x",)}, 'goes with guarantee="upsert" or "wal"'),
        ({"how": "upsert", "key": ("x", "x")}, "names a column twice"),
        ({"how": "maybe"}, "must be one of"),
        ({"how": "wal", "batch_rows": 0}, "at least one row"),
        ({"how": "wal", "table": ""}, "not empty"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, match: str, postgres: PostgresServer) -> None:
    with pytest.raises(ConfigError, match=match):
        postgres_sink(postgres, "s", **options)


def test_columns_without_a_type_and_keys_that_are_not_there_are_refused_while_building() -> None:
    sink = PostgresSink(PostgresTable("t", "postgresql://", key=("k",)), how="wal")
    with pytest.raises(PlanError, match="cannot write column 's' of type struct.* cast it to a string"):
        sink.output_schema(pa.schema({"k": pa.int64(), "s": pa.struct({"a": pa.int64()})}))
    with pytest.raises(PlanError, match="key column 'k', but the rows have only x"):
        sink.output_schema(pa.schema({"x": pa.int64()}))
