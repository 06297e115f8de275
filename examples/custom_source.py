"""A source of one's own: the rows of a SQLite table, read in parallel by ranges of its key, exactly once.

docs/custom-sources.md explains it; tests/test_conformance.py runs the suite `rayflow.testing.SourceConformance` on it.

    python examples/custom_source.py
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

import rayflow as rf

# --8<-- connector
SCHEMA = pa.schema([("id", pa.int64()), ("city", pa.string()), ("amount", pa.int64())])


@dataclass(frozen=True)
class Orders(rf.Source):
    """The table ``orders`` of a SQLite file, which must not change below the ids that are there when the job starts."""

    path: str
    ids_per_split: int = 1_000
    batch_rows: int = 100

    def schema(self) -> pa.Schema:
        return SCHEMA

    def declared_schema(self) -> pa.Schema:
        return SCHEMA

    def discover(self) -> Sequence[tuple[str, Any]]:
        """Ranges of ids with round borders: a table that has grown has more of them, and those there were stay."""
        with closing(sqlite3.connect(self.path)) as db:
            newest = db.execute("SELECT max(id) FROM orders").fetchone()[0] or 0
        starts = range(0, newest + 1, self.ids_per_split)
        return [(f"from-{start}", [start, min(start + self.ids_per_split, newest + 1)]) for start in starts]

    def reader(self, split: Any, position: Any, ctx: rf.OperatorContext) -> rf.SplitReader:
        start, stop = split
        return OrdersReader(self, start if position is None else position, stop)


class OrdersReader(rf.SplitReader):
    """The position is the next id to read."""

    def __init__(self, source: Orders, start: int, stop: int) -> None:
        self._source, self._next, self._stop = source, start, stop
        self._db = sqlite3.connect(source.path)

    def poll(self) -> rf.Polled:
        rows = self._db.execute(
            "SELECT id, city, amount FROM orders WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
            (self._next, self._stop, self._source.batch_rows),
        ).fetchall()
        if not rows:
            return rf.Polled(None, self._next, done=True)
        columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
        self._next = rows[-1][0] + 1
        return rf.Polled(pa.record_batch(columns, schema=SCHEMA), self._next)

    def close(self) -> None:
        self._db.close()


# --8<-- connector


def make_table(path: Path, rows: int) -> None:
    """Every seventh order was deleted, as in real tables."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, city TEXT, amount INTEGER)")
        numbered = ((i, ("Basel", "Oslo", "Turin")[i % 3], i % 100) for i in range(1, rows + 1) if i % 7)
        db.executemany("INSERT INTO orders VALUES (?, ?, ?)", numbered)


raised = False


def fragile(batch: pa.RecordBatch) -> pa.RecordBatch:
    global raised
    if not raised and batch.column("id")[0].as_py() > 3_000:
        raised = True
        raise RuntimeError("the service did not answer")
    return batch


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shop.sqlite"
        make_table(path, 5_000)
        orders = rf.read_source(Orders(str(path)))
        totals = orders.map_batches(fragile).key_by("city").agg(n=rf.count(), total=rf.sum("amount"))
        result = rf.Flow("orders", totals.collect()).run(
            local=True, parallelism=2, checkpoints=rf.CheckpointConfig(f"{folder}/checkpoints", interval="5ms")
        )
        newest = {row["city"]: (row["n"], row["total"]) for row in result.table().to_pylist()}
        with closing(sqlite3.connect(path)) as db:
            rows = db.execute("SELECT city, count(*), sum(amount) FROM orders GROUP BY city").fetchall()
    assert raised
    assert result.restarts == 1
    assert newest == {city: (n, total) for city, n, total in rows}
    print(f"totals of {len(newest)} cities, through a failure, are those of SQLite itself")


if __name__ == "__main__":
    main()
