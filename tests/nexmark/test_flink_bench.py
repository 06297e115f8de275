"""What the comparison with Flink is given: the same queries but three, and the same events."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import duckdb
import pytest

from benchmarks import nexmark_flink
from benchmarks.nexmark_flink_sql import FLINK_SQL
from examples.nexmark.generator import Kind, Nexmark
from examples.nexmark.queries import ALL

CONFIG = Nexmark(events=2_000)


def stand_in(folder: Path, body: str) -> Path:
    """An executable that takes the place of the Python with Flink."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport json, sys\ntask = json.load(sys.stdin)\n{body}\n")
    script.chmod(0o755)
    return script


def measured(
    folder: Path, body: str, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> list[nexmark_flink.FlinkRun]:
    monkeypatch.setattr(nexmark_flink, "environment", lambda: stand_in(folder, body))
    return nexmark_flink.run(names, CONFIG, parallelism=2, interval_ms=1_000, delay_ms=0, folder=folder)


def test_all_queries_are_there_but_three() -> None:
    assert ALL.keys() - FLINK_SQL.keys() == {"q6", "q10", "q13"}
    assert FLINK_SQL.keys() <= ALL.keys()


def test_flink_gets_the_same_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'json.dump(task, open("task.json", "w"))\nprint(json.dumps({"query": "q2", "seconds": 0.5}))'
    assert measured(tmp_path, body, monkeypatch, ["q2"]) == [nexmark_flink.FlinkRun("q2", 0.5)]
    task = json.loads((tmp_path / "task.json").read_text())
    assert list(task["queries"]) == ["warm", "q2"]
    for kind in Kind:
        files = task["tables"][kind.value]["files"]
        rows = CONFIG.table(kind)
        con = duckdb.connect()
        con.register("expected", rows)
        names = ", ".join(f"'column{i}': 'varchar'" for i in range(rows.num_columns))
        con.execute(
            f"create table got as from read_csv('{files}/*.csv', header = false, columns = {{{names}}})"
        ).fetchall()
        assert con.sql("select count(*) from got").fetchall() == [(rows.num_rows,)]
        found = con.sql("select sum(column0::bigint)::bigint from got").fetchall()
        assert found == con.sql(f"select sum({rows.column_names[0]})::bigint from expected").fetchall()


def test_a_query_that_fails_is_told_and_the_others_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """print(json.dumps({"query": "q0", "seconds": 1.5}))
print(json.dumps({"query": "q1", "error": "no"}))
sys.exit(3)"""
    first, second, third = measured(tmp_path, body, monkeypatch, ["q0", "q1", "q6", "q2"])
    assert first == nexmark_flink.FlinkRun("q0", 1.5)
    assert second == nexmark_flink.FlinkRun("q1", None, "no")
    assert third.seconds is None
    assert "exit code 3" in third.error


def test_times_are_quoted_and_nothing_else() -> None:
    assert nexmark_flink._quoted("q0") == "select auction, bidder, price, `dateTime`, extra from bid"
    assert "bid_dateTime" in nexmark_flink._quoted("q9")
