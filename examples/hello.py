"""The first program: a CSV in, one row an airport and day out, as Parquet.

python examples/hello.py          in this process
python examples/hello.py --ray    the same on Ray
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

import rayflow as rf
from rayflow import col

FLIGHTS = """origin,dep_delay,time_hour
JFK,10,2013-01-01T06:00:00Z
EWR,-3,2013-01-01T06:00:00Z
JFK,50,2013-01-01T17:00:00Z
EWR,25,2013-01-01T18:00:00Z
JFK,5,2013-01-02T07:00:00Z
EWR,0,2013-01-02T08:00:00Z
"""


def build(source: str, target: str) -> rf.Flow:
    flights = rf.read_csv(source, event_time="time_hour", max_delay="1h")
    delays = (
        flights.filter(col("dep_delay") > 0)
        .with_columns(hours=col("dep_delay") / 60)
        .key_by("origin")
        .window(rf.tumbling("1d"))
        .agg(n=rf.count(), mean=rf.mean("dep_delay"), worst=rf.max("dep_delay"))
    )
    return rf.Flow("hello", delays.write_parquet(target))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "flights.csv"), Path(folder, "out")
        source.write_text(FLIGHTS)
        flow = build(str(source), str(target))
        print(flow.explain(parallelism=2), end="\n\n")
        flow.run(
            parallelism=2,
            checkpoints=rf.CheckpointConfig(str(Path(folder, "checkpoints")), interval="1s"),
            local="--ray" not in sys.argv[1:],
        )
        rows = pq.read_table(target).sort_by([("window_start", "ascending"), ("origin", "ascending")]).to_pylist()
    for row in rows:
        print(f"{row['window_start']:%Y-%m-%d} {row['origin']} n={row['n']} mean={row['mean']:g} worst={row['worst']}")
    found = [(f"{r['window_start']:%d}", r["origin"], r["n"], r["mean"], r["worst"]) for r in rows]
    assert found == [("01", "EWR", 1, 25.0, 25), ("01", "JFK", 2, 30.0, 50), ("02", "JFK", 1, 5.0, 5)], found
    print("3 rows, as counted by hand")


if __name__ == "__main__":
    main()
