"""`rayflow run` as a user calls it: another process, real Ray, code in a file that no worker can import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FLOW = """
import pyarrow as pa
import rayflow as rf
from neighbour import plus_one

rows = pa.table({"v": list(range(1000))})

class Changed:
    def __call__(self, batch):
        print("noise of a worker")
        return {"v": [plus_one(2 * v) for v in batch.column("v").to_pylist()]}

flow = rf.Flow("on ray", rf.from_arrow(rows, splits=4, batch_rows=100).map_batches(Changed).collect())
"""


@pytest.mark.ray
def test_a_flow_in_a_file_runs_on_ray_with_the_modules_beside_it(tmp_path: Path) -> None:
    code, elsewhere = tmp_path / "code", tmp_path / "elsewhere"
    code.mkdir()
    elsewhere.mkdir()
    (code / "flow.py").write_text(FLOW)
    (code / "neighbour.py").write_text("def plus_one(x):\n    return x + 1\n")
    done = subprocess.run(
        [sys.executable, "-c", "from rayflow.cli.main import main; main()", "run", str(code / "flow.py"), "-p", "2",
         "--checkpoints", str(tmp_path / "checkpoints"), "--json"],
        cwd=elsewhere, env={**os.environ, "RAY_ADDRESS": "local"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)  # alone there: what the workers print goes to standard error
    assert sorted(row["v"] for row in found["tables"]["collect-1"]) == [2 * v + 1 for v in range(1000)]
    assert found["status"] == "finished"
