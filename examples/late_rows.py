"""Rows that come too late are neither lost nor mixed in: they come out at the side.

A sensor reports every second, but one report in fifty is delayed on its way by minutes. Windows of ten seconds wait
five seconds for stragglers (``max_delay``); what comes later still goes to ``.late``, with all its columns. In the end
every row is in exactly one of the two outputs.

    python examples/late_rows.py
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pyarrow as pa

import rayflow as rf

REPORTS = 1_000
START = datetime(2024, 5, 1, tzinfo=UTC)


def reports() -> pa.Table:
    """In the order of arrival: most at once, every fiftieth two minutes after it was made."""
    arrivals = sorted((second + (120 if second % 50 == 0 else 0), second) for second in range(REPORTS))
    made = [second for _, second in arrivals]
    return pa.table(
        {
            "sensor": [f"s{second % 3}" for second in made],
            "id": made,
            "time": pa.array([START + timedelta(seconds=s) for s in made], pa.timestamp("us", tz="UTC")),
        }
    )


def main() -> None:
    counted = (
        rf.from_arrow(reports(), batch_rows=20, event_time="time", max_delay="5s")
        .key_by("sensor")
        .window(rf.tumbling("10s"))
        .agg(n=rf.count())
    )
    flow = rf.Flow("late rows", counted.collect(name="in time"), counted.late.collect(name="late"))
    # Event time is told every 100 ms by default, and then nothing here would be late: all is read before.
    result = flow.run(local=True, config=rf.JobConfig(watermark_interval="0s"))
    in_time = sum(result.table("in time").column("n").to_pylist())
    late = sorted(result.table("late").column("id").to_pylist())
    print(f"{REPORTS} reports: {in_time} in windows, {len(late)} late: {late[:5]} ...")
    assert in_time + len(late) == REPORTS
    assert late
    assert all(second % 50 == 0 for second in late)
    print("every report is in exactly one of the two outputs")


if __name__ == "__main__":
    main()
