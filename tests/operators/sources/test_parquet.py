from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.base import OperatorContext, Source, SplitReader
from rayflow.operators.sources import parquet
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.operators.sources.paths import Paths
from tests.operators.sources.contract import SourceContract, context, read, read_all, rows


def table(n: int, first: int = 0) -> pa.Table:
    return pa.table({"a": pa.array(range(first, first + n)), "b": [f"row {i}" for i in range(first, first + n)]})


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "SPLIT_ROWS", 100)


@pytest.fixture
def folder(tmp_path: Path, small_splits: None) -> Path:
    """Two files in row groups of 30 rows: splits of several row groups, several splits a file."""
    pq.write_table(table(250), tmp_path / "one.parquet", row_group_size=30)
    pq.write_table(table(70, 250), tmp_path / "two.parquet", row_group_size=30)
    return tmp_path


class TestContract(SourceContract):
    @pytest.fixture
    def source(self, folder: Path) -> Source:
        return ParquetSource(folder, batch_rows=17)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return table(320)


class TestContractRemote(SourceContract):
    @pytest.fixture
    def source(self, small_splits: None) -> Iterator[Source]:
        fs = fsspec.filesystem("memory")
        with fs.open("/data/x/one.parquet", "wb") as file:
            pq.write_table(table(250), file, row_group_size=30)
        with fs.open("/data/_temporary/two.parquet", "wb") as file:
            pq.write_table(table(250), file)
        yield ParquetSource("memory://data", batch_rows=17)
        fs.rm("/data", recursive=True)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return table(250)


class OffByOne(ParquetSource):
    """Broken on purpose: resumes one row late."""

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        return super().reader(split, position + 1 if position else position, ctx)


def test_the_contract_catches_a_resume_that_is_off_by_one(folder: Path) -> None:
    with pytest.raises(AssertionError):
        SourceContract().test_every_position_yields_exactly_the_rest(OffByOne(folder, batch_rows=17))


def test_resume_inside_a_batch_of_a_later_row_group(folder: Path) -> None:
    source = ParquetSource(folder, batch_rows=17)
    _, split = source.discover()[0]
    for position in (1, 29, 30, 31, 59, 60, 61, 100, 119):
        assert rows(source, split, position)["a"].to_pylist() == list(range(position, 120))
    assert read(source, split, 120) == []


def test_splits_take_row_groups_together(folder: Path) -> None:
    found = [(s["first"], s["last"], s["rows"]) for _, s in ParquetSource(folder).discover()]
    assert found == [(0, 4, 120), (4, 8, 120), (8, 9, 10), (0, 3, 70)]


def test_reads_only_the_columns_asked_for_in_that_order(folder: Path) -> None:
    source = ParquetSource(folder, columns=["b", "a"])
    assert source.schema().names == ["b", "a"]
    assert read_all(source).equals(table(320).select(["b", "a"]))
    assert read_all(source.project(["b"])).equals(table(320).select(["b"]))


def test_no_columns_still_count_rows(folder: Path) -> None:
    source = ParquetSource(folder).project([])
    assert sum(b.num_rows for _, s in source.discover() for b, _ in read(source, s)) == 320


def test_paths_as_glob_list_and_url(folder: Path) -> None:
    one, two = str(folder / "one.parquet"), str(folder / "two.parquet")
    several: list[Paths] = [f"{folder}/*.parquet", [two, one, one], f"file://{folder}", [folder / "one.parquet", two]]
    for paths in several:
        assert read_all(ParquetSource(paths)).equals(table(320)), paths


def test_folder_leaves_out_hidden_and_foreign_files(folder: Path) -> None:
    for name in ("_rayflow/x.parquet", ".hidden.parquet", "readme.txt", "_SUCCESS"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no parquet")
    assert read_all(ParquetSource(folder)).equals(table(320))


def test_empty_file_has_a_schema_and_no_rows(tmp_path: Path) -> None:
    pq.write_table(table(0), tmp_path / "empty.parquet")
    source = ParquetSource(tmp_path)
    assert source.schema().names == ["a", "b"]
    assert read_all(source).num_rows == 0


def test_dictionaries_are_decoded_and_metadata_dropped(tmp_path: Path) -> None:
    data = pa.table({"a": pa.array(["x", "y", None, "x"]).dictionary_encode()}).replace_schema_metadata(
        {"pandas": "{}"}
    )
    pq.write_table(data, tmp_path / "d.parquet")
    source = ParquetSource(tmp_path)
    assert source.schema().equals(pa.schema([("a", pa.string())]), check_metadata=True)
    assert read_all(source)["a"].to_pylist() == ["x", "y", None, "x"]


@pytest.mark.parametrize("name", ["gone.parquet", "gone*.parquet", "gone"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="gone"):
        ParquetSource(tmp_path / name).schema()
    with pytest.raises(DataError, match="gone"):
        ParquetSource([tmp_path / name]).discover()


def test_folder_without_parquet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file ending in .parquet"):
        ParquetSource(tmp_path).discover()


def test_other_schema_names_file_expected_and_got(folder: Path) -> None:
    pq.write_table(pa.table({"a": [1.5], "b": ["x"]}), folder / "zwei.parquet")
    with pytest.raises(
        DataError, match=r"zwei.parquet.*column 'a' is double, not int64.*expected .a: int64.*got .a: dou"
    ):
        ParquetSource(folder).discover()


def test_unknown_column_and_bad_options(folder: Path) -> None:
    with pytest.raises(PlanError, match="'nope'.*a: int64"):
        ParquetSource(folder, columns=["nope"]).schema()
    with pytest.raises(ConfigError, match="batch_rows"):
        ParquetSource(folder, batch_rows=0)
    with pytest.raises(PlanError, match="at least one path"):
        ParquetSource([])
    with pytest.raises(PlanError, match="nosuch://"):
        ParquetSource("nosuch://x/y").schema()


def test_not_parquet_at_all(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello, this is text")
    with pytest.raises(DataError, match="x.parquet is not a readable Parquet file"):
        ParquetSource(tmp_path).discover()


def test_file_replaced_after_discovery_is_refused(folder: Path) -> None:
    source = ParquetSource(folder)
    _, split = source.discover()[1]
    pq.write_table(table(10), folder / "one.parquet")
    reader = source.reader(split, None, context())
    with pytest.raises(DataError, match="one.parquet has changed since it was discovered"):
        reader.poll()
