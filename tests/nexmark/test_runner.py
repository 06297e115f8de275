"""``python -m examples.nexmark``: a line a query, and an exit code that says whether the results are equal."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples.nexmark.__main__ import main
from examples.nexmark.check import Oracle, write_tables
from examples.nexmark.generator import Kind, Nexmark
from examples.nexmark.queries import ALL, MISSING

SMALL = ["--local", "--events", "3000", "--rate", "100", "--out-of-order", "5s"]


def test_a_json_line_a_query(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--query", "q2", "--query", "q12", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == ["q2", "q12"]
    for line in lines:
        assert line["equal"] is True
        assert line["rows"] == Nexmark(events=3000).count(Kind.BID)
        assert line["rows_per_s"] > 0
        assert line["killed"] is None


def test_a_table_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--query", "q1"]) == 0
    assert "equal" in capsys.readouterr().out


def test_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[:-1]] == list(ALL)
    assert told[-1] == f"missing: {', '.join(MISSING) or 'none'}"


def test_kills_need_processes() -> None:
    with pytest.raises(SystemExit):
        main(["--local", "--kill"])


def test_files_and_memory_give_duckdb_the_same_tables(tmp_path: Path) -> None:
    config = Nexmark(events=3_000, rate=100.0)
    files = write_tables(config, tmp_path / "events")
    for kind in Kind:
        assert pq.read_table(files[kind]).equals(config.table(kind))
    out = tmp_path / "out"
    out.mkdir()
    bids = config.table(Kind.BID).select(["auction", "price"])
    pq.write_table(bids, out / "a.parquet")
    by_file, by_memory = (oracle.difference(ALL["q2"], out) for oracle in (Oracle(config, files=files), Oracle(config)))
    assert by_file == by_memory
    assert by_file.too_many == bids.num_rows - by_file.expected
    assert by_file.missing == 0
