"""A step that fails once, and what DuckDB says of the same rows: for flows that go through a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa


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
