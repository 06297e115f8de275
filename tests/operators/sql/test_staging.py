"""Where rows wait for their checkpoint, and what is remembered of those that were given to a function."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from rayflow.operators.base import Staging
from rayflow.operators.sql.function import NOTES_KEPT
from rayflow.operators.sql.sinks import FunctionSink
from rayflow.operators.sql.staging import staging_of
from tests.operators.sql.helpers import interval, opened, started


@pytest.mark.parametrize("operator", [".", "..", "a/b", "ä" * 200, "%2E", "plain.name"])
def test_a_step_of_any_name_has_a_folder_of_its_own(operator: str, tmp_path: Path) -> None:
    root = tmp_path / "staging"
    files = staging_of(Staging(str(root)), operator, "step")
    name, nbytes, sha256 = files.put(pa.table({"x": [1]}))
    (folder,) = root.iterdir()
    assert folder.is_dir()
    assert [each.name for each in folder.iterdir()] == [name]
    assert files.get(name, nbytes, sha256).num_rows == 1


def test_a_function_that_got_many_checkpoints_at_once_is_not_called_again_for_any(tmp_path: Path) -> None:
    """So many were aborted in a row; the coordinator dies before the next one forgets them."""
    calls: list[int] = []
    sink = FunctionSink(lambda checkpoint, subtask, rows: calls.append(checkpoint))
    operator = started(sink, staging=tmp_path)
    found = [each for n in range(1, NOTES_KEPT + 6) for each in interval(operator, n, n)]
    opened(sink, staging=tmp_path).commit(found)
    opened(sink, staging=tmp_path).recover(found, fresh=False)
    assert calls == list(range(1, NOTES_KEPT + 6))
