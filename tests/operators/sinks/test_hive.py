"""Folders by values: what other readers make of them, exactly once, and bounds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, DataError, PlanError
from rayflow.operators.base import SinkFactory
from rayflow.operators.sinks import files
from rayflow.operators.sinks.committed import committed_files
from rayflow.operators.sinks.hive import HiveFolders
from rayflow.operators.sinks.parquet import ParquetSink
from rayflow.operators.sinks.text import JsonSink
from tests.operators.sinks.contract import SinkContract, committer, prepared, started

NASTY = ["a/b", "..", "../../etc", None, "", "x y", "é", "%41", "a=b", "\\", "a\nb", "~", "part-1.parquet"]


class TestContract(SinkContract):
    """All rows of one value of ``s`` a folder; the names are those in the folders."""

    out: Path

    @pytest.fixture
    def factory(self, tmp_path: Path) -> SinkFactory:
        self.out = tmp_path / "out"
        return ParquetSink(self.out, partition_by=["s"])

    def visible(self) -> list[int]:
        found = ds.dataset(self.out, partitioning="hive").to_table()
        assert [f"text {x}" for x in found["x"].to_pylist()] == found["s"].to_pylist()
        return sorted(found["x"].to_pylist())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("s=*/*"))

    def leftovers(self) -> Sequence[object]:
        return list(self.out.glob("_*"))

    def lose(self, committable: Json) -> None:
        (self.out / "_rayflow" / committable["pending"]).unlink()

    def test_an_interval_without_rows_prepares_nothing(self, factory: SinkFactory) -> None:
        super().test_an_interval_without_rows_prepares_nothing(factory)


def write(sink: Any, *batches: pa.RecordBatch) -> list[Json]:
    operator = started(sink)
    for each in batches:
        operator.process(each, 0)
    found = prepared(operator, 1)
    committer(sink).commit(found)
    operator.close()
    return found


def test_values_come_back_from_the_names_by_pyarrow_and_duckdb(tmp_path: Path) -> None:
    rows = pa.record_batch(
        {
            "x": pa.array(range(len(NASTY)), pa.int64()),
            "day": pa.array([date(2026, 11, 1 + i % 3) for i in range(len(NASTY))]),
            "c": pa.array(NASTY, pa.string()),
        }
    )
    write(ParquetSink(tmp_path / "out", partition_by=["c", "day"]), rows)
    expected = sorted(rows.to_pylist(), key=lambda row: row["x"])
    partitioning = ds.partitioning(pa.schema([("c", pa.string()), ("day", pa.date32())]), flavor="hive")
    found = ds.dataset(tmp_path / "out", partitioning=partitioning).to_table().sort_by("x")
    assert found.select(["x", "day", "c"]).to_pylist() == expected
    with duckdb.connect() as db:
        query = f"select x, day, c from read_parquet('{tmp_path}/out/**/*.parquet', hive_partitioning=true) order by x"
        assert db.sql(query).to_arrow_table().to_pylist() == expected
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert (tmp_path / "out" / "c=__HIVE_DEFAULT_PARTITION__" / "day=2026-11-01").is_dir()
    assert pq.read_schema(next((tmp_path / "out").glob("c=*/day=*/*.parquet"))).names == ["x"]


@given(
    st.lists(
        st.tuples(st.none() | st.integers(-3, 3), st.none() | st.booleans(), st.none() | st.sampled_from(["a", "/"])),
        min_size=1,
        max_size=30,
    )
)
def test_split_gives_every_row_once_in_order(rows: list[tuple[Any, Any, Any]]) -> None:
    i, b, s = zip(*rows, strict=True)
    batch = pa.record_batch(
        {
            "x": range(len(rows)),
            "i": pa.array(i, pa.int8()),
            "b": pa.array(b, pa.bool_()),
            "s": pa.array(s, pa.string()),
        }
    )
    seen: dict[str, list[int]] = {}
    for folder, part in HiveFolders(("i", "b", "s")).split(batch):
        assert folder not in seen
        assert part.schema.names == ["x"]
        seen[folder] = part["x"].to_pylist()
    text = {None: "__HIVE_DEFAULT_PARTITION__", True: "true", False: "false", "/": "%2F"}
    for folder, own in seen.items():
        assert own == sorted(own)
        for x in own:
            names = zip("ibs", rows[x], strict=True)
            values = [(n, str(v) if n == "i" and v is not None else text.get(v, v)) for n, v in names]
            assert folder == "/".join(f"{n}={v}" for n, v in values)
    assert sorted(x for own in seen.values() for x in own) == list(range(len(rows)))


def test_many_folders_are_written_with_few_open_files_and_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "OPEN_FILES_MAX", 3)
    monkeypatch.setattr(files, "BUFFERED_BYTES_MAX", 2_000)
    sink = JsonSink(tmp_path, partition_by="p", manifest=True)
    operator = started(sink)
    for i in range(40):
        x = pa.array(range(i * 20, i * 20 + 20), pa.int64())
        operator.process(pa.record_batch({"x": x, "p": pa.array([v % 7 for v in x.to_pylist()], pa.int64())}), 0)
        assert len(operator._writing) <= 3  # type: ignore[attr-defined]
        open_files = operator._open.values()  # type: ignore[attr-defined]
        assert sum(file.opened for file in open_files) <= 3
        assert sum(file.buffered_bytes for file in open_files) == operator._buffered_bytes <= 2_000  # type: ignore[attr-defined]
    committer(sink).commit(prepared(operator, 1))
    assert len(list(tmp_path.glob("p=*"))) == 7
    found = [
        (json.loads(line)["x"], path.parent.name)
        for path in tmp_path.glob("p=*/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sorted(found) == [(x, f"p={x % 7}") for x in range(800)]
    assert sum(file.rows for file in committed_files(str(tmp_path))) == 800
    assert len(committed_files(str(tmp_path))) > 7, "no file was closed early: the bound was not met"


def test_a_run_with_files_in_folders_is_refused_another_output_beside_it_is_not(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, partition_by=["s"])
    write(sink, pa.record_batch({"x": [1], "s": ["a"]}))
    with pytest.raises(DataError, match=r"such as s=a/part-00000-00000001-0000.parquet"):
        committer(sink).recover([], fresh=True)
    committer(ParquetSink(tmp_path, partition_by=["other"])).recover([], fresh=True)


def test_values_that_no_folder_can_tell(tmp_path: Path) -> None:
    operator = started(ParquetSink(tmp_path, partition_by=["s"]))
    with pytest.raises(DataError, match=r"step 'step' subtask 0/2: column 's' has the text __HIVE"):
        operator.process(pa.record_batch({"x": [1], "s": ["__HIVE_DEFAULT_PARTITION__"]}), 0)
    with pytest.raises(DataError, match=r"folder name of 302 bytes \(expected at most 255\)"):
        operator.process(pa.record_batch({"x": [1], "s": ["é" * 50]}), 0)


def test_columns_that_cannot_be() -> None:
    schema = pa.schema([("x", pa.int64()), ("f", pa.float64()), ("s", pa.string())])
    for columns, message in (
        (["y"], "names 'y', but the rows have"),
        (["f"], "names 'f' of type double; expected integers"),
        (["x", "f", "s"], "of type double"),
    ):
        with pytest.raises(PlanError, match=message):
            ParquetSink("out", partition_by=columns).output_schema(schema)
    with pytest.raises(PlanError, match="names all columns"):
        ParquetSink("out", partition_by=["x"]).output_schema(pa.schema([("x", pa.int64())]))
    with pytest.raises(ConfigError, match="leave out folders that begin with"):
        ParquetSink("out", partition_by=["_x"])
    with pytest.raises(ConfigError, match="twice"):
        ParquetSink("out", partition_by=["x", "x"])
