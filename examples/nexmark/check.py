"""DuckDB over the same events: what a query must give, how long DuckDB takes for it, and whether a flow gives it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from examples.nexmark.generator import Kind, Nexmark, schema
from examples.nexmark.query import Query

GROUP_ROWS = 250_000


def write_tables(config: Nexmark, folder: Path) -> dict[Kind, Path]:
    """The events as a Parquet file for each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{kind.value}.parquet" for kind in Kind}
    for kind, path in paths.items():
        with pq.ParquetWriter(path, schema(kind)) as writer:
            for batch in _stretches(config, kind):
                writer.write_batch(batch)
    return paths


def _stretches(config: Nexmark, kind: Kind) -> Iterator[pa.RecordBatch]:
    rows = config.count(kind)
    for first in range(0, rows, GROUP_ROWS):
        yield config.batch(kind, first, min(GROUP_ROWS, rows - first))


@dataclass(frozen=True, slots=True)
class Difference:
    """Between what a flow gave and what DuckDB gives; both as bags of rows."""

    expected: int
    got: int
    too_many: int
    missing: int

    def __bool__(self) -> bool:
        return self.too_many > 0 or self.missing > 0

    def __str__(self) -> str:
        if not self:
            return f"equal, {self.expected:,} rows"
        return f"{self.too_many:,} rows too many, {self.missing:,} missing, of {self.expected:,}"


class Oracle:
    """The events as tables of DuckDB: in memory, or in Parquet files (`write_tables`)."""

    def __init__(self, config: Nexmark, *, files: dict[Kind, Path] | None = None, threads: int = 2) -> None:
        self._con = duckdb.connect()
        self._run(f"set threads = {threads}")
        self._run("set timezone = 'UTC'")
        for kind in Kind:
            if files is None:
                self._con.register(kind.value, config.table(kind))
            else:
                self._run(f"create view {kind.value} as from read_parquet({_quoted(files[kind])})")

    def seconds(self, query: Query, target: Path) -> float:
        """That DuckDB takes to write the result as Parquet."""
        began = time.perf_counter()
        self._run(f"copy ({query.sql}) to {_quoted(target)} (format parquet)")
        return time.perf_counter() - began

    def expected(self, query: Query) -> pa.Table:
        """What DuckDB gives."""
        return self._con.sql(query.sql).to_arrow_table()

    def difference(self, query: Query, output: pa.Table | Path) -> Difference:
        """``output``: the rows of the flow, or the folder of its Parquet files."""
        if isinstance(output, Path):
            self._run(f"create or replace temp view output as from read_parquet({_quoted(output)} || '/*.parquet')")
        else:
            self._con.register("output", output)
        columns = ", ".join(f'"{column[0]}"' for column in self._con.sql(query.sql).description)
        try:
            self._run(f"create or replace temp table expected as {query.sql}")
            self._run(f"create or replace temp table got as select {columns} from ({query.reading})")
        finally:
            if not isinstance(output, Path):
                self._con.unregister("output")
        found = self._run(
            """select (select count(*) from expected), (select count(*) from got),
                      (select count(*) from (from got except all from expected)),
                      (select count(*) from (from expected except all from got))"""
        )
        return Difference(*found[0])

    def _run(self, sql: str) -> list[tuple[Any, ...]]:
        """Fetches all, because an unfinished result keeps the connection busy."""
        return self._con.execute(sql).fetchall()  # type: ignore[no-any-return]


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"
