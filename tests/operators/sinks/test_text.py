"""CSV and JSON lines to a local folder: what every sink must do, and what other readers make of the files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.csv as pc
import pytest

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.base import SinkFactory
from rayflow.operators.sinks.output import FileSink
from rayflow.operators.sinks.text import CsvSink, JsonSink
from rayflow.operators.sources.csv_files import CsvSource
from rayflow.operators.sources.json_files import JsonSource
from tests.operators.sinks.contract import SinkContract, batch, committer, prepared, started
from tests.operators.sources.contract import read_all


class LocalText(SinkContract):
    out: Path

    def names(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("[!_]*"))

    def leftovers(self) -> Sequence[object]:
        return list(self.out.glob("_*"))

    def lose(self, committable: Json) -> None:
        (self.out / "_rayflow" / committable["pending"]).unlink()


class TestCsv(LocalText):
    suffix = ".csv"

    @pytest.fixture
    def factory(self, tmp_path: Path) -> SinkFactory:
        self.out = tmp_path / "deep" / "out"
        return CsvSink(self.out)

    def visible(self) -> list[int]:
        return sorted(read_all(CsvSource(self.out))["x"].to_pylist())


class TestJson(LocalText):
    suffix = ".jsonl.gz"

    @pytest.fixture
    def factory(self, tmp_path: Path) -> SinkFactory:
        self.out = tmp_path / "deep" / "out"
        return JsonSink(self.out, compression="gzip")

    def visible(self) -> list[int]:
        return sorted(read_all(JsonSource(self.out))["x"].to_pylist())


TABLE = pa.table(
    {
        "i": pa.array([1, None, 3], pa.int32()),
        "f": pa.array([0.1, None, 1e300]),
        "s": pa.array(['a "b", c', None, "line\nbreak"]),
        "e": pa.array(["", None, "null"]),
        "b": pa.array([True, None, False]),
        "t": pa.array(
            [datetime(2026, 11, 1, 12, tzinfo=UTC), None, datetime(1969, 1, 1, tzinfo=UTC)], pa.timestamp("us", "UTC")
        ),
        "d": pa.array([date(2026, 11, 1), None, date(1, 1, 1)]),
        "n": pa.array([Decimal("1.50"), None, Decimal("-0.01")]),
    }
)


def write(sink: FileSink, table: pa.Table) -> None:
    operator = started(sink)
    for piece in table.to_batches():
        operator.process(piece, 0)
    committer(sink).commit(prepared(operator, 1))


def test_csv_types_come_back_and_null_is_not_an_empty_text(tmp_path: Path) -> None:
    write(CsvSink(tmp_path), TABLE)
    assert read_all(CsvSource(tmp_path, schema=TABLE.schema, newlines_in_values=True)).equals(TABLE)
    with duckdb.connect() as db:
        seen = db.sql(f"select i, s, e from read_csv('{tmp_path}/*.csv', header=true)").fetchall()
    assert [(i, s) for i, s, _ in seen] == [(1, 'a "b", c'), (None, None), (3, "line\nbreak")]


def test_json_types_come_back(tmp_path: Path) -> None:
    table = TABLE.append_column("l", pa.array([[1, 2], None, []])).append_column(
        "o", pa.array([{"a": "x"}, None, {"a": None}])
    )
    write(JsonSink(tmp_path), table)
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["s"] == 'a "b", c'
    assert rows[0]["l"] == [1, 2]
    assert set(rows[1].values()) == {None}
    plain = table.drop_columns(["n"])
    assert read_all(JsonSource(tmp_path, schema=plain.schema)).equals(plain)
    with duckdb.connect() as db:
        found = db.sql(f"select i, s, l, o.a from read_json('{tmp_path}/*.jsonl')").fetchall()
    assert found == [(1, 'a "b", c', [1, 2], "x"), (None, None, None, None), (3, "line\nbreak", [], None)]


@pytest.mark.parametrize("make", [CsvSink, JsonSink])
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_files_are_what_their_names_say(tmp_path: Path, make: type[FileSink], compression: str) -> None:
    sink = make(tmp_path, compression=compression, max_file_rows=4)
    write(sink, pa.Table.from_batches([batch(*range(10))]))
    files = sorted(tmp_path.glob("part*"))
    assert len(files) == 3
    assert {file.name.split(".", 1)[1] for file in files} == {sink.format().suffix[1:]}
    with pa.input_stream(str(files[0]), compression=compression) as stream:
        text = stream.read()
    if compression == "gzip":
        assert gzip.decompress(files[0].read_bytes()) == text
    lines = text.decode().splitlines()
    assert lines[-1] in ('3,"text 3"', '{"x":3,"s":"text 3"}')
    read = CsvSource if make is CsvSink else JsonSource
    assert sorted(read_all(read(tmp_path))["x"].to_pylist()) == list(range(10))
    reader = "read_csv" if make is CsvSink else "read_json"
    with duckdb.connect() as db:
        assert db.sql(f"select sum(x), count(*) from {reader}('{tmp_path}/part*')").fetchall() == [(45, 10)]


def test_every_csv_file_has_a_header_and_the_delimiter(tmp_path: Path) -> None:
    write(CsvSink(tmp_path, delimiter=";", max_file_rows=2), pa.Table.from_batches([batch(1, 2, 3)]))
    texts = [file.read_text() for file in sorted(tmp_path.glob("*.csv"))]
    assert texts == ['"x";"s"\n1;"text 1"\n2;"text 2"\n', '"x";"s"\n3;"text 3"\n']


def test_no_header(tmp_path: Path) -> None:
    write(CsvSink(tmp_path, header=False), pa.Table.from_batches([batch(1)]))
    (file,) = tmp_path.glob("*.csv")
    assert file.read_text() == '1,"text 1"\n'
    assert pc.read_csv(file, read_options=pc.ReadOptions(column_names=["x", "s"]))["x"].to_pylist() == [1]


def test_other_output_is_refused_whatever_its_compression(tmp_path: Path) -> None:
    write(CsvSink(tmp_path, compression="gzip"), pa.Table.from_batches([batch(1)]))
    with pytest.raises(DataError, match=r"another run \(such as part-00000-00000001-0000.csv.gz"):
        committer(CsvSink(tmp_path)).recover([], fresh=True)
    committer(JsonSink(tmp_path)).recover([], fresh=True)


def test_bad_options_and_columns() -> None:
    with pytest.raises(ConfigError, match="write_csv.compression. must be one of none, gzip, zstd, got 'snappy'"):
        CsvSink("out", compression="snappy")
    with pytest.raises(ConfigError, match="delimiter"):
        CsvSink("out", delimiter='"')
    for kind in (pa.binary(), pa.list_(pa.int64()), pa.struct([("a", pa.int64())])):
        with pytest.raises(PlanError, match="write_csv cannot write column 'x'"):
            CsvSink("out").output_schema(pa.schema([("x", kind)]))
    with pytest.raises(PlanError, match="write_json cannot write column 'x'"):
        JsonSink("out").output_schema(pa.schema([("x", pa.map_(pa.string(), pa.int64()))]))
