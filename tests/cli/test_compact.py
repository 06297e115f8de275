from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from rayflow.cli.main import main
from rayflow.operators.sinks.parquet import ParquetSink
from tests.operators.sinks.contract import batch, committer, prepared, started


def test_compact(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path, manifest=True)
    operator = started(sink)
    for n in (1, 2, 3):
        operator.process(batch(n), 0)
        committer(sink).commit(prepared(operator, n))
    found = CliRunner().invoke(main, ["compact", str(tmp_path), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.output) == {"merged": 3, "written": 1, "removed": 0}
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    again = CliRunner().invoke(main, ["compact", str(tmp_path)])
    assert again.output == "0 files merged into 0; 0 left by earlier calls removed\n"


def test_compact_nothing(tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["compact", str(tmp_path)])
    assert found.exit_code == 1
    assert "only output written with manifest=True can be merged" in found.output
