from __future__ import annotations

import gzip
import json
import random
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.base import OperatorContext, Source, SplitReader
from rayflow.operators.sources import lines
from rayflow.operators.sources.lines import LineReader
from rayflow.operators.sources.text import CsvSource, JsonSource
from tests.operators.sources.contract import SourceContract, context, read, read_all

ROWS = 500


def words(i: int) -> str:
    return "word" * (i % 7)


def write_csv(path: Path, first: int, n: int, *, eol: str = "\n", last_eol: bool = True, bom: bool = False) -> None:
    body = eol.join(["a,b", *(f"{i},w{words(i)}" for i in range(first, first + n))])
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + (body + (eol if last_eol else "")).encode())


def expected_table(n: int = ROWS) -> pa.Table:
    return pa.table({"a": pa.array(range(n)), "b": [f"w{words(i)}" for i in range(n)]})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 bytes in ranges of 300: lines are cut everywhere, some are longer than a block."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 64)
    monkeypatch.setattr(lines, "SPLIT_BYTES", 300)


class TestCsv(SourceContract):
    @pytest.fixture(params=[{}, {"eol": "\r\n"}, {"last_eol": False}, {"bom": True, "eol": "\r\n", "last_eol": False}])
    def source(self, tmp_path: Path, tiny: None, request: pytest.FixtureRequest) -> Source:
        write_csv(tmp_path / "1.csv", 0, 200, **request.param)
        write_csv(tmp_path / "2.csv", 200, ROWS - 200, **request.param)
        return CsvSource(tmp_path)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return expected_table()


class TestCsvCompressed(SourceContract):
    @pytest.fixture(params=["gz", "zip", "zst"])
    def source(self, tmp_path: Path, tiny: None, request: pytest.FixtureRequest) -> Source:
        write_csv(tmp_path / "1.csv", 0, ROWS)
        data = (tmp_path / "1.csv").read_bytes()
        if request.param == "gz":
            (tmp_path / "x.csv.gz").write_bytes(gzip.compress(data))
        elif request.param == "zst":
            with pa.CompressedOutputStream(str(tmp_path / "x.csv.zst"), "zstd") as out:
                out.write(data)
        else:
            with zipfile.ZipFile(tmp_path / "x.csv.zip", "w") as archive:
                archive.writestr("inside.csv", data)
        (tmp_path / "1.csv").unlink()
        return CsvSource(tmp_path)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return expected_table()


class TestCsvWithNewlinesInValues(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, tiny: None) -> Source:
        body = "a,b\n" + "".join(f'{i},"one\ntwo, {i}"\n' for i in range(50))
        (tmp_path / "x.csv").write_text(body)
        return CsvSource(tmp_path, newlines_in_values=True)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return pa.table({"a": pa.array(range(50)), "b": [f"one\ntwo, {i}" for i in range(50)]})


class TestJson(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path, tiny: None) -> Source:
        body = "".join(json.dumps({"a": i, "b": f"w{words(i)}"}) + "\n" for i in range(ROWS))
        (tmp_path / "x.jsonl").write_text(body)
        return JsonSource(tmp_path)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return expected_table()


def test_any_cut_into_ranges_gives_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(7)
    for i in range(40):
        values = ["x" * dice.choice([1, 1, 2, 30, 200]) for _ in range(dice.randrange(1, 40))]
        end = dice.choice(["", "\n"])
        (tmp_path / "x.csv").write_text("v\n" + dice.choice(["\n", "\r\n"]).join(values) + end)
        monkeypatch.setattr(lines, "BLOCK_BYTES", dice.choice([1, 2, 7, 50, 1000]))
        monkeypatch.setattr(lines, "SPLIT_BYTES", dice.choice([1, 2, 3, 10, 100, 10_000]))
        source = CsvSource(tmp_path, schema=pa.schema([("v", pa.string())]))
        assert read_all(source)["v"].to_pylist() == values, i


def test_the_contract_catches_a_range_that_keeps_a_torn_first_line(tmp_path: Path, tiny: None) -> None:
    class Torn(CsvSource):
        """Broken on purpose: takes the byte at which a range begins for the beginning of a line."""

        def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
            return super().reader({**split, "at_line": True}, position, ctx)

    write_csv(tmp_path / "1.csv", 0, ROWS)
    with pytest.raises((AssertionError, DataError)):
        SourceContract().test_splits_together_hold_every_row_once(Torn(tmp_path), expected_table())


def csv(path: Path, text: str, **options: Any) -> CsvSource:
    (path / "x.csv").write_text(text, newline="")
    return CsvSource(path / "x.csv", **options)


def test_types_that_are_found_out(tmp_path: Path) -> None:
    source = csv(
        tmp_path,
        "i,f,b,d,t,z,s,empty,q\n"
        "1,1.5,true,2013-01-01,2013-01-01 05:00:00,2013-01-01T06:00:00Z,x,NA,NA\n"
        'NA,NA,NA,NA,NA,NA,NA,,"NA"\n',
    )
    assert source.schema().types == [
        pa.int64(), pa.float64(), pa.bool_(), pa.date32(), pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.string(),
        pa.string(), pa.string(),
    ]  # fmt: skip
    first, second = read_all(source).to_pylist()
    assert first["t"] == datetime(2013, 1, 1, 5)  # noqa: DTZ001
    assert first["z"] == datetime(2013, 1, 1, 6, tzinfo=UTC)
    assert {name: value for name, value in second.items() if value is not None} == {"q": "NA"}


def test_schema_given_chooses_columns_by_name(tmp_path: Path) -> None:
    source = csv(tmp_path, "a,b,c\n1,2,3\n", schema=pa.schema([("c", pa.string()), ("a", pa.float64())]))
    assert read_all(source).to_pylist() == [{"c": "3", "a": 1.0}]


def test_project(tmp_path: Path) -> None:
    source = csv(tmp_path, "a,b\n1,2\n")
    assert read_all(source.project(["b"])).to_pylist() == [{"b": 2}]
    assert source.project([]) is source
    skipping = CsvSource(tmp_path, on_error="skip")
    assert skipping.project(["b"]) is skipping
    with pytest.raises(PlanError, match="'nope'"):
        source.project(["nope"]).schema()


def test_without_header_other_delimiter_nulls_and_formats(tmp_path: Path) -> None:
    source = csv(
        tmp_path,
        "1;-;31.12.2013 23:59\n",
        header=False,
        delimiter=";",
        null_values=["-"],
        schema=pa.schema([("n", pa.int32()), ("x", pa.string()), ("t", pa.timestamp("us"))]),
        timestamp_formats=["%d.%m.%Y %H:%M"],
    )
    assert read_all(source).to_pylist() == [{"n": 1, "x": None, "t": datetime(2013, 12, 31, 23, 59)}]  # noqa: DTZ001
    assert csv(tmp_path, "1,2\n", header=False).schema().names == ["f0", "f1"]


def test_empty_and_header_only_files(tmp_path: Path) -> None:
    schema = pa.schema([("a", pa.int64())])
    assert read_all(csv(tmp_path, "", schema=schema)).num_rows == 0
    assert read_all(csv(tmp_path, "a\n", schema=schema)).num_rows == 0
    only_header = csv(tmp_path, "a,b")
    assert only_header.schema().types == [pa.string(), pa.string()]
    assert read_all(only_header).num_rows == 0
    with pytest.raises(DataError, match="only empty files.*schema="):
        csv(tmp_path, "").schema()


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    assert read_all(csv(tmp_path, "a,b\n\n1,2\n\r\n\n3,4\n\n")).to_pylist() == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("x7,w", "conversion error to int64: invalid value 'x7'"),
        ("7", "Expected 2 columns, got 1"),
        ("7,w,z", "Expected 2 columns, got 3"),
        ('7,"open', "does not end on its line|lines gave"),
    ],
)
@pytest.mark.parametrize("at", [3, 150, 398])
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, tiny: None, line: str, why: str, at: int) -> None:
    text = ["a,b", *(f"{i},w" for i in range(400))]
    text[at] = line
    source = csv(tmp_path, "\n".join(text), schema=pa.schema([("a", pa.int64()), ("b", pa.string())]))
    with pytest.raises(
        DataError, match=rf"step 'step' subtask 0/1 cannot read line {at + 1} of .*x.csv: .{line}.: .*({why}).*on_error"
    ):
        read_all(source)


def test_bad_lines_are_skipped_and_counted(tmp_path: Path, tiny: None) -> None:
    text = ["a,b", *(f"{i},w" for i in range(400))]
    bad = {3: "x7,w", 4: "7", 150: "7,w,z", 398: '7,"open', 399: "", 400: "99999999999999999999,w"}
    for at, line in bad.items():
        text[at] = line
    schema = pa.schema([("a", pa.int64()), ("b", pa.string())])
    source = csv(tmp_path, "\n".join(text), schema=schema, on_error="skip")
    assert read_all(source)["a"].to_pylist() == [i for i in range(400) if i + 1 not in bad]
    skipped = 0
    for _, split in source.discover():
        reader = source.reader(split, None, context())
        assert isinstance(reader, LineReader)
        while not reader.poll().done:
            pass
        reader.close()
        skipped += reader.skipped
    assert skipped == len(bad) - 1  # a blank line is not a bad one


def test_quoted_newline_without_the_option_is_an_error_that_tells_the_option(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3 of .*newlines_in_values=True"):
        read_all(csv(tmp_path, 'a,b\n1,x\n2,"y\nz"\n3,w\n'))
    source = csv(tmp_path, 'a,b\n1,x\n2,"y\nz"\nbad,w\n', newlines_in_values=True)
    assert source.schema().types == [pa.string(), pa.string()]
    held = CsvSource(source.paths, newlines_in_values=True, schema=pa.schema([("a", pa.int64()), ("b", pa.string())]))
    with pytest.raises(DataError, match="x.csv behind row 0.*'bad'"):
        read_all(held)


def test_headers_must_agree(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_text("")
    (tmp_path / "3.csv").write_text("b,a\n1,2\n")
    with pytest.raises(DataError, match="3.csv has another header than .*1.csv: expected a, b, got b, a"):
        CsvSource(tmp_path).discover()
    with pytest.raises(DataError, match="1.csv has no column 'c'"):
        CsvSource(tmp_path, schema=pa.schema([("c", pa.int64())])).discover()
    with pytest.raises(DataError, match="twice"):
        csv(tmp_path, "a,a\n1,2\n").schema()
    with pytest.raises(DataError, match="has 2 columns"):
        csv(tmp_path, "1,2\n", header=False, schema=pa.schema([("c", pa.int64())])).discover()


def test_the_type_of_the_first_block_holds(tmp_path: Path, tiny: None) -> None:
    text = "a\n" + "1\n" * 100 + "1.5\n"
    with pytest.raises(DataError, match="line 102 of .*'1.5'.*int64"):
        read_all(csv(tmp_path, text))


def test_file_that_shrank_is_refused_and_what_was_added_is_not_read(tmp_path: Path) -> None:
    source = csv(tmp_path, "a\n1\n2\n")
    _, split = source.discover()[0]
    (tmp_path / "x.csv").write_text("a\n1\n2\n3\n")
    assert [b["a"].to_pylist() for b, _ in read(source, split)] == [[1, 2]]
    (tmp_path / "x.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="x.csv has 4 bytes, but had 6"):
        read(source, split)


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_error"):
        CsvSource("x", on_error="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="delimiter"):
        CsvSource("x", delimiter="::")
    with pytest.raises(ConfigError, match="newlines_in_values"):
        CsvSource("x", newlines_in_values=True, on_error="skip")
    for source in (CsvSource(tmp_path / "gone.csv"), JsonSource(tmp_path / "gone.json")):
        with pytest.raises(DataError, match="no such file.*gone"):
            source.schema()
        with pytest.raises(DataError, match="no such file.*gone"):
            source.discover()


def ndjson(path: Path, text: str, **options: Any) -> JsonSource:
    (path / "x.json").write_text(text)
    return JsonSource(path / "x.json", **options)


def test_json_types(tmp_path: Path) -> None:
    source = ndjson(
        tmp_path,
        '{"t": "2013-01-01 05:00:00", "n": null, "l": [1, null], "s": {"x": 1.5, "y": null}}\n\n'
        '{"t": null, "more": 1, "n": "text"}',
    )
    assert source.schema().field("t").type == pa.timestamp("us")
    assert source.schema().field("n").type == pa.string()
    assert read_all(source).to_pylist() == [
        {"t": datetime(2013, 1, 1, 5), "n": None, "l": [1, None], "s": {"x": 1.5, "y": None}, "more": None},  # noqa: DTZ001
        {"t": None, "n": "text", "l": None, "s": None, "more": 1},
    ]


def test_json_schema_given(tmp_path: Path) -> None:
    schema = pa.schema([("d", pa.date32()), ("z", pa.timestamp("us", "UTC")), ("gone", pa.float64())])
    source = ndjson(tmp_path, '{"z": "2013-01-01T05:00:00Z", "x": 1, "d": "2013-01-02"}\n', schema=schema)
    (row,) = read_all(source).to_pylist()
    assert row["d"].isoformat() == "2013-01-02"
    assert row["z"] == datetime(2013, 1, 1, 5, tzinfo=UTC)
    assert row["gone"] is None
    assert read_all(source.project(["gone"])).to_pylist() == [{"gone": None}]


@pytest.mark.parametrize("line", ['{"a": "x"}', '{"a": 1', "[1]", '{"a": 1} {"a": 2}', "hello"])
def test_json_line_that_does_not_fit(tmp_path: Path, tiny: None, line: str) -> None:
    text = "\n".join([*(f'{{"a": {i}}}' for i in range(50)), line, '{"a": 51}'])
    with pytest.raises(DataError) as caught:
        read_all(ndjson(tmp_path, text))
    assert f"line 51 of {tmp_path / 'x.json'}: {line!r}" in str(caught.value)
    assert read_all(ndjson(tmp_path, text, on_error="skip"))["a"].to_pylist() == [*range(50), 51]


def test_json_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only empty files"):
        ndjson(tmp_path, "").schema()
    with pytest.raises(DataError, match="only blank lines"):
        ndjson(tmp_path, "\n\n").schema()
    assert read_all(ndjson(tmp_path, "\n", schema=pa.schema([("a", pa.int64())]))).num_rows == 0
