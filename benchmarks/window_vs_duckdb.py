"""Tumbling 10 s count/sum/max by auction over Parquet: rayflow on Ray beside DuckDB, same files, same run.

Both read the same files and write their result as Parquet. rayflow: parallelism 2, exactly-once checkpoints every
second to local disk, measured from the launch of the subtasks to the end of the job (the last commit included).
DuckDB: 2 threads. Runs alternate and medians are compared, because absolute figures of shared machines are not
stable. The cost of checkpoints is measured on a longer input, with and without them in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import duckdb

import rayflow as rf
from benchmarks.bids import make_bids
from benchmarks.figures import emit
from rayflow.core import timeline

PARALLELISM = 2


def flow(files: list[Path], out: Path) -> rf.Flow:
    bids = rf.read_parquet([str(f) for f in files], columns=["auction", "price", "ts"], event_time="ts", max_delay="0s")
    windows = (
        bids.key_by("auction")
        .window(rf.tumbling("10s"))
        .agg(n=rf.count(), total=rf.sum("price"), highest=rf.max("price"))
    )
    return rf.Flow("window-bench", windows.write_parquet(str(out)))


def span_s(result: rf.JobResult) -> float:
    """From the launch of the subtasks to the end of the job, by the coordinator's clock."""
    at = {entry.what: entry.at for entry in result.timeline}
    return at[timeline.JOB_ENDED] - at[timeline.LAUNCHED]


def run_rayflow(files: list[Path], folder: Path, *, interval: str | None) -> tuple[float, rf.JobResult]:
    checkpoints = None if interval is None else rf.CheckpointConfig(str(folder / "checkpoints"), interval=interval)
    result = flow(files, folder / "out").run(parallelism=PARALLELISM, checkpoints=checkpoints, progress=False)
    return span_s(result), result


def run_duckdb(files: list[Path], folder: Path) -> float:
    names = ", ".join("'" + str(f).replace("'", "''") + "'" for f in files)
    con = duckdb.connect()
    con.execute(f"set threads={PARALLELISM}")
    began = time.perf_counter()
    con.execute(
        f"""copy (select auction, time_bucket(interval 10 seconds, ts) as window_start,
                         count(*) as n, sum(price)::bigint as total, max(price) as highest
                  from read_parquet([{names}]) group by all)
            to '{folder / "duckdb.parquet"}' (format parquet)"""
    )
    return time.perf_counter() - began


def same(folder: Path) -> bool:
    """Whether both results hold the same rows."""
    ours = f"select auction, window_start, n, total, highest from read_parquet('{folder}/out/*.parquet')"
    theirs = f"select * from read_parquet('{folder}/duckdb.parquet')"
    con = duckdb.connect()
    counted = con.execute(f"select (select count(*) from ({ours})), (select count(*) from ({theirs}))").fetchone()
    differing = con.execute(
        f"select count(*) from (({ours} except all {theirs}) union all ({theirs} except all {ours}))"
    ).fetchone()
    assert counted is not None
    assert differing is not None
    return bool(counted[0] == counted[1] and differing[0] == 0)


def throughput(files: list[Path], rows: int, repeats: int) -> None:
    ours: list[float] = []
    theirs: list[float] = []
    identical = True
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            theirs.append(run_duckdb(files, Path(folder)))
            seconds, _result = run_rayflow(files, Path(folder), interval="1s")
            ours.append(seconds)
            identical = identical and same(Path(folder))
    mine, duck = rows / statistics.median(ours) / 1e6, rows / statistics.median(theirs) / 1e6
    emit("window result identical to DuckDB", float(identical), "bool", 1.0, identical)
    emit("window throughput, checkpoints every 1 s", round(mine, 2), "M rows/s", None, True)
    emit("window throughput of DuckDB, 2 threads", round(duck, 2), "M rows/s", None, True)
    emit("window throughput against DuckDB", round(mine / duck, 3), "ratio", 0.6, mine / duck >= 0.6)


def overhead(files: list[Path], repeats: int) -> None:
    """Cost of a checkpoint a second, and the longest sync phase."""
    ratios: list[float] = []
    longest_sync_s = 0.0
    completed = 0
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
            without, _result = run_rayflow(files, Path(one), interval=None)
            with_them, result = run_rayflow(files, Path(other), interval="1s")
            ratios.append(with_them / without - 1.0)
            longest_sync_s = max(longest_sync_s, result.metrics.get("checkpoint_sync_s_max", 0.0))
            completed += result.checkpoint or 0
    cost = statistics.median(ratios)
    emit("checkpoint overhead, one a second", round(cost * 100, 2), "%", 5.0, cost <= 0.05)
    emit("checkpoints taken in the overhead runs", completed, "checkpoints", None, True)
    emit("longest sync phase", round(longest_sync_s * 1000, 2), "ms", 10.0, longest_sync_s < 0.010)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--long-rows", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "rayflow-bids")
    options = parser.parse_args()
    files = make_bids(options.data, max(options.rows, options.long_rows))
    short = make_bids(options.data, options.rows)
    throughput(short, options.rows, options.repeats)
    overhead(files, max(3, options.repeats - 2))


if __name__ == "__main__":
    main()
