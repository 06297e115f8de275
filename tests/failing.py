"""A step that fails once, and what DuckDB says of the same rows: for flows that go through a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

import rayflow as rf


class FailsOnce:
    """For `map_batches`: raises when it has seen so many rows, the first time a flow comes so far."""

    def __init__(self, marker: str, after: int) -> None:
        self._marker, self._left = Path(marker), after

    def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self._left -= batch.num_rows
        if self._left < 0 and not self._marker.exists():
            self._marker.touch()
            raise RuntimeError("once")
        return batch


def rows_of(query: str, data: pa.Table) -> list[dict[str, Any]]:
    """The rows that DuckDB gives for a query over the table ``data``, in an order of their own."""
    with duckdb.connect() as db:
        db.register("data", data)
        found: list[dict[str, Any]] = db.sql(query).to_arrow_table().to_pylist()
    return sorted(found, key=repr)


def run_with_checkpoints(flow: rf.Flow, folder: Path, config: rf.JobConfig) -> list[dict[str, Any]]:
    """What the flow collects in this process at parallelism 2, with checkpoints as often as they go; as `rows_of`.

    The step that fails has left its mark, ``failed``, in the folder.
    """
    checkpoints = rf.CheckpointConfig(str(folder / "checkpoints"), interval="1ms", min_pause="0s")
    result = flow.run(parallelism=2, local=True, progress=False, checkpoints=checkpoints, config=config)
    assert (folder / "failed").exists()
    return sorted(result.table().to_pylist(), key=repr)
