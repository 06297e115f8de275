"""`rayflow state`: on directories written by hand and by a real run."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from rayflow.cli.main import main
from tests.test_read_checkpoint import by_hand, expected
from tests.written import frozen, write_checkpoint


def rayflow(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["state", *(str(a) for a in arguments)])


def answer(*arguments: str | Path) -> Any:
    result = rayflow(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def url(tmp_path: Path) -> Path:
    by_hand(tmp_path / "job", 1)
    by_hand(tmp_path / "job", 2, v=-5)
    return tmp_path / "job"


def test_list_tells_keys_mode_and_sizes(url: Path) -> None:
    found = answer("list", url)
    assert (found["job"], found["checkpoint"]) == ("by hand", 2)
    values, items = found["states"]
    assert (values["step"], values["state"], values["mode"], values["pieces"]) == ("agg-1", "values", "upsert", 6)
    assert values["key_columns"] == ["k"]
    assert items["subkey_columns"] == ["item"]
    assert items["nbytes"] > 0
    text = rayflow("list", url, "--checkpoint", "1").stdout
    assert "checkpoint 1 of job 'by hand', periodic" in text
    assert "k, [item]" in text


def test_schema(url: Path) -> None:
    assert answer("schema", url, "process-1", "items") == [
        {"name": "k", "type": "int64", "nullable": True, "key": True},
        {"name": "item", "type": "string", "nullable": True, "key": True},
        {"name": "n", "type": "int64", "nullable": True, "key": False},
    ]
    assert "int64" in rayflow("schema", url, "agg-1", "values").stdout


def test_query_without_sql_prints_the_first_rows(url: Path) -> None:
    rows = answer("query", url, "agg-1.values", "--limit", "3", "--checkpoint", "1")
    assert len(rows) == 3
    assert all(expected()[row["k"]] == row["v"] for row in rows)
    assert f"20 of {len(expected()):,} rows" in rayflow("query", url, "agg-1.values").stdout


def test_query_with_sql_sees_the_state_asked_for_and_all_others_by_their_names(url: Path) -> None:
    total = answer("query", url, "agg-1.values", "--checkpoint", "1", "--sql", "select sum(v)::bigint t from state")
    assert total == [{"t": sum(expected().values())}]
    joined = answer(
        "query",
        url,
        "--sql",
        'select count(*) n from "agg-1.values" a join "process-1.items" b on a.k = b.k where b.item = \'a\'',
    )
    assert joined == [{"n": 2}]


def test_a_query_that_duckdb_refuses_names_the_tables(url: Path) -> None:
    for sql in ("select * from nothing", "select * from opened", "selec 1"):
        result = rayflow("query", url, "agg-1.values", "--sql", sql)
        assert result.exit_code == 1
        assert '"agg-1.values"' in result.stderr
        assert "Traceback" not in result.output


def test_query_without_duckdb_says_what_to_install(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "duckdb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    result = rayflow("query", url, "agg-1.values", "--sql", "select 1")
    assert result.exit_code == 1
    assert result.stderr.strip().endswith('pip install "rayflow[sql]"')
    assert rayflow("query", url, "agg-1.values").exit_code == 0


def test_names_that_are_not_there(url: Path) -> None:
    near = rayflow("query", url, "agg-1.valuse")
    assert near.exit_code == 1
    assert "did you mean 'values'" in near.stderr
    assert "there are agg-1.values, process-1.items" in rayflow("query", url, "values").stderr
    assert "did you mean 'agg-1'" in rayflow("schema", url, "agg", "values").stderr
    assert rayflow("query", url).exit_code == 2
    assert rayflow("list", url, "--checkpoint", "last").exit_code == 2
    assert "there are 2, 1" in rayflow("list", url, "--checkpoint", "3").stderr
    assert "holds no checkpoints" in rayflow("list", url.parent / "elsewhere").stderr


def test_names_with_dots(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, [{"a.b": frozen("c.d", [pa.table({"k": [1]})])}])
    assert answer("query", tmp_path, "a.b.c.d") == [{"k": 1}]
    assert answer("query", tmp_path, "--sql", 'select * from "a.b.c.d"') == [{"k": 1}]


def test_diff(url: Path) -> None:
    values, items = answer("diff", url, "1", "2", "--limit", "2")
    changed = sum(v == -1 for v in expected().values())
    assert (values["added"], values["removed"], values["changed"]) == (0, 0, changed)
    assert len(values["rows"]) == 2
    assert values["rows"][0]["before"] == {"v": -1}
    assert values["rows"][0]["after"] == {"v": -5}
    assert items["same"] == 4
    text = rayflow("diff", url, "1", "latest", "--step", "agg-1").stdout
    assert f"agg-1.values: 0 added, 0 removed, {changed} changed" in text
    assert "process-1" not in text


def test_text_in_data_is_no_markup(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, [{"agg-1": frozen("values", [pa.table({"k": ["[bold]x[/nothing]"]})])}])
    assert "[bold]x[/nothing]" in rayflow("query", tmp_path, "agg-1.values").stdout


def test_a_missing_file_is_one_sentence(url: Path) -> None:
    for path in [*url.glob("shared/*"), *url.glob("chk-*/*.arrows")]:
        path.unlink()
    result = rayflow("query", url, "agg-1.values")
    assert result.exit_code == 1
    assert "is missing; use an earlier checkpoint" in result.stderr
    assert "Traceback" not in result.output


def test_a_statement_without_rows_and_one_that_fails_while_it_runs(url: Path) -> None:
    assert "gives no rows" in rayflow("query", url, "agg-1.values", "--sql", "  ").stderr
    failed = rayflow("query", url, "process-1.items", "--sql", "select item::int from state")
    assert failed.exit_code == 1
    assert "DuckDB refused the query: Conversion Error" in failed.stderr
