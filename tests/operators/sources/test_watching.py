"""Sources that go on looking for files: what is picked up, when, and what is refused."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from rayflow.errors import ConfigError, DataError
from rayflow.operators.base import Source
from rayflow.operators.sources.csv_files import CsvSource
from rayflow.operators.sources.json_files import JsonSource
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.operators.sources.paths import open_fs
from tests.operators.sources.contract import context, rows
from tests.servers import S3Server

SCHEMA = pa.schema([("x", pa.int64())])


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=2)
    return out.getvalue()


def csv(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pc.write_csv(table, out)
    return out.getvalue()


def jsonl(table: pa.Table) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode()


@dataclass(frozen=True)
class Kind:
    """A format: how files of it are written and read."""

    suffix: str
    make: Callable[..., Source]
    encode: Callable[[pa.Table], bytes]

    def content(self, *values: int) -> bytes:
        return self.encode(pa.table({"x": pa.array(values, pa.int64())}))

    def put(self, folder: Path, name: str, *values: int) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        (folder / ".incoming").write_bytes(self.content(*values))
        os.replace(folder / ".incoming", folder / f"{name}{self.suffix}")


def parquet_source(path: Any, schema: pa.Schema | None = SCHEMA, **options: Any) -> Source:
    return ParquetSource(path, file_schema=schema, **options)


KINDS = [Kind(".parquet", parquet_source, parquet), Kind(".csv", CsvSource, csv), Kind(".jsonl", JsonSource, jsonl)]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.suffix)
def kind(request: pytest.FixtureRequest) -> Kind:
    found = request.param
    assert isinstance(found, Kind)
    return found


def watching(kind: Kind, path: Any, **options: Any) -> Source:
    return kind.make(path, **{"schema": SCHEMA, "watch_s": 0.01, **options})


def values(source: Source) -> dict[str, list[int]]:
    return {
        name.rpartition("/")[2].partition(".")[0]: rows(source, split)["x"].to_pylist()
        for name, split in source.discover_again()
    }


def test_it_does_not_end_and_reads_one_file_after_another(kind: Kind, tmp_path: Path) -> None:
    source = watching(kind, tmp_path)
    assert not source.bounded
    assert not source.in_turns
    assert source.discovery_interval_s == 0.01
    assert source.declared_schema() == SCHEMA
    still = kind.make(tmp_path, schema=SCHEMA)
    assert (still.bounded, still.discovery_interval_s) == (True, None)


def test_files_are_picked_up_as_they_come_with_ids_that_stay(kind: Kind, tmp_path: Path) -> None:
    source = watching(kind, tmp_path)
    assert source.discover() == []
    kind.put(tmp_path, "b", 1, 2, 3)
    first = source.discover_again()
    assert [name for name, _ in first] == [f"{tmp_path}/b{kind.suffix}"]
    kind.put(tmp_path, "a", 4)
    kind.put(tmp_path / "deeper", "c", 5)
    assert values(source) == {"a": [4], "b": [1, 2, 3], "c": [5]}
    again = dict(source.discover_again())
    assert dict(first).items() <= again.items()
    other = cloudpickle.loads(cloudpickle.dumps(watching(kind, tmp_path)))
    assert dict(other.discover()) == again, "another process gives the same ids"


def test_a_pickled_source_knows_the_columns_of_files_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,x\n1,2\n")
    source = watching(KINDS[1], tmp_path)
    ((_, split),) = source.discover()
    (tmp_path / "b.csv").write_text("x,y\n3,4\n")
    found = dict(source.discover_again())
    reader = watching(KINDS[1], tmp_path)
    assert [rows(reader, each)["x"].to_pylist() for each in found.values()] == [[2], [3]]
    assert split["names"] == ["y", "x"]


def test_names_of_files_that_are_still_written_and_empty_files_are_not_there_yet(kind: Kind, tmp_path: Path) -> None:
    for path in (tmp_path, f"{tmp_path}/*"):
        source = watching(kind, path)
        for name in ("_tmp", ".tmp", "_temporary/x"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}{kind.suffix}").write_bytes(kind.content(1))
        (tmp_path / f"empty{kind.suffix}").touch()
        assert source.discover() == []


def test_a_file_that_changes_after_it_was_seen_is_refused(kind: Kind, tmp_path: Path) -> None:
    source = watching(kind, tmp_path)
    kind.put(tmp_path, "a", 1)
    ((_, split),) = source.discover()
    kind.put(tmp_path, "a", 1, 2, 3, 4, 5)
    with pytest.raises(DataError, match=rf"a{kind.suffix} had \d+ bytes when it was seen first and has \d+ now"):
        source.discover_again()
    ((name, _),) = watching(kind, tmp_path).discover()
    assert name == f"{tmp_path}/a{kind.suffix}", "a grown file is no new one to a job that has read it"
    if kind.suffix == ".parquet":
        with pytest.raises(DataError, match=r"3 row groups instead of 1"):
            source.reader(split, None, context()).poll()


def test_a_file_that_goes_again_does_no_harm(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = watching(kind, tmp_path)
    kind.put(tmp_path, "a", 1)
    kind.put(tmp_path, "b", 2)
    listed = source._files()  # type: ignore[attr-defined]
    (tmp_path / f"a{kind.suffix}").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "_files", lambda self: listed)
        assert [name for name, _ in source.discover()] == [f"{tmp_path}/b{kind.suffix}"]
    (tmp_path / f"b{kind.suffix}").unlink()
    assert len(source.discover_again()) == 1, "what was found stays found: it may have to be read"


def test_a_wrong_file_is_named(kind: Kind, tmp_path: Path) -> None:
    source = watching(kind, tmp_path)
    if kind.suffix == ".jsonl":
        return  # a JSON line may lack members
    (tmp_path / f"bad{kind.suffix}").write_bytes(kind.encode(pa.table({"other": [1]})))
    with pytest.raises(DataError, match=rf"bad{kind.suffix} has (another schema|no column 'x')"):
        source.discover()


def test_an_empty_place_without_a_schema(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file yet .*pass schema="):
        ParquetSource(tmp_path, watch_s=1.0).schema()
    for text in (CsvSource, JsonSource):
        with pytest.raises(ConfigError, match=r"\(watch\) needs schema="):
            text(tmp_path, watch_s=1.0)
    with pytest.raises(ConfigError, match="longer than nothing"):
        ParquetSource(tmp_path, watch_s=0)


def test_a_local_folder_that_is_not_there_is_a_mistake(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        watching(kind, tmp_path / "nowhere").discover()


def test_without_a_schema_the_first_file_decides(tmp_path: Path) -> None:
    KINDS[0].put(tmp_path, "a", 1)
    source = ParquetSource(tmp_path, watch_s=1.0)
    assert source.declared_schema() is None
    assert source.schema() == SCHEMA
    source.discover()
    pq.write_table(pa.table({"x": ["text"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet has another schema than the first file seen: column 'x' is string"):
        source.discover_again()


def test_objects_of_others_are_seen_on_s3(kind: Kind, s3_server: S3Server) -> None:
    """Broken variant: with the listings cache of s3fs the second file is never seen."""
    url = f"{s3_server.bucket()}/in"
    source = watching(kind, url, storage_options=s3_server.storage_options)
    assert source.discover() == []
    fs, _ = open_fs(url, {**s3_server.storage_options, "skip_instance_cache": True})
    fs.pipe_file(f"{url}/a{kind.suffix}", kind.content(1, 2))
    assert values(source) == {"a": [1, 2]}
    fs.pipe_file(f"{url}/b c=1/b{kind.suffix}", kind.content(3))
    fs.pipe_file(f"{url}/_tmp/x{kind.suffix}", kind.content(4))
    assert values(source) == {"a": [1, 2], "b": [3]}
