"""Bids as Parquet files: the input of the window benchmarks. Deterministic, in order of event time.

Columns: auction, bidder, price (int64) and ts (timestamp[us]). Half of the rows are on 100 hot auctions, the others
spread evenly over 10,000; 100,000 rows a second of event time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_A_SECOND = 100_000
HOT = 100
COLD = 10_000
FILE_ROWS = 2_500_000
GROUP_ROWS = 500_000


def make_bids(folder: Path, rows: int) -> list[Path]:
    """Files with ``rows`` bids below ``folder``; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        count = min(FILE_ROWS, rows - start)
        path = folder / f"bids-{number:04d}-{count}.parquet"
        paths.append(path)
        if not path.exists():
            partial = path.with_suffix(".partial")
            pq.write_table(_bids(start, count), partial, row_group_size=GROUP_ROWS)
            partial.rename(path)
    return paths


def _bids(start: int, count: int) -> pa.Table:
    rng = np.random.default_rng(start)
    hot = rng.random(count) < 0.5
    auction = np.where(hot, rng.integers(0, HOT, count), HOT + rng.integers(0, COLD, count))
    ts = (np.arange(start, start + count, dtype=np.int64) * 1_000_000) // ROWS_A_SECOND
    return pa.table(
        {
            "auction": auction,
            "bidder": rng.integers(0, 100_000, count),
            "price": rng.integers(1, 10_000, count),
            "ts": pa.array(ts).cast(pa.timestamp("us")),
        }
    )
