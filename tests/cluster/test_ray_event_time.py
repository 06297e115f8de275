"""Event time on real Ray: an interval join, sessions of what it gives, and the best rows of sliding windows, while
the coordinator and subtasks are killed at checkpoints that hold rows of all of them; equal to DuckDB."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.cluster.job import Job
from tests.cluster.ray_harness import kill, newest, pid_of, recovered, until, visible

SPLITS, ROWS, SLOW = 2, 1_800, 1_500
"""Rows of each split, and how many of them come before the gate opens: slowly, so that processes die among them."""
SCHEMA = pa.schema([("k", pa.int64()), ("t", pa.timestamp("us")), ("v", pa.int64())])
MS = 1_000
APART, GAP, SIZE, EVERY = 150 * MS, 1_000 * MS, 2_000 * MS, 500 * MS
PRIME = 15_485_863

Values = list[tuple[int | None, ...]]


def numbers(side: int, split: int, begin: int, end: int) -> pa.RecordBatch:
    """20 ms between rows, 2 s between bursts of 150, up to 400 ms out of order; all values of a side differ."""
    j = np.arange(begin, end, dtype=np.int64)
    i = j * SPLITS + split
    time = (j * 20 + j // 150 * 2_000 - i * (7919 + side) % 21 * 20) * MS
    return pa.record_batch(
        [(i + side) * 31 % 7, pa.array(time, pa.timestamp("us")), (i + side) * 7919 % PRIME], schema=SCHEMA
    )


def reading(gate: Path, side: int) -> Callable[[int, int], Iterator[pa.RecordBatch | None]]:
    def read(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        while position < ROWS:
            opened = gate.exists()
            count = min(1_000 if opened else 10, (ROWS if opened else SLOW) - position)
            if count > 0:
                yield numbers(side, split, position, position + count)
                position += count
            if not opened:
                yield None

    return read


def flow(gate: Path, out: Path) -> rf.Flow:
    left, right = (
        rf.from_generator(
            reading(gate, side),
            splits=SPLITS,
            bounded=False,
            schema=SCHEMA,
            event_time="t",
            max_delay="400ms",
            parallelism=1,  # every process costs a second of two processors
            name=name,
        ).key_by("k")
        for side, name in enumerate(("left", "right"))
    )
    pairs = left.join(right, within="150ms", how="left", name="pairs")
    sessions = pairs.key_by("k").window(rf.session(gap="1s"))
    totals = sessions.agg(name="sessions", n=rf.count(), total=rf.sum("v"), total_right=rf.sum("v_right"))
    best = left.window(rf.sliding("2s", every="500ms")).top(2, by="v", name="best")
    return rf.Flow(
        "event-time", *(x.write_parquet(str(out / name)) for name, x in (("sessions", totals), ("best", best)))
    )


PAIRS = f"""
    select l.k, l.t, l.v, r.t t_right, r.v v_right, greatest(l.t, coalesce(r.t, l.t)) join_time
    from left_rows l left join right_rows r
    on l.k = r.k and r.t between l.t - {APART} and l.t + {APART}"""
SESSIONS = f"""
    with begun as (
        select *, coalesce((join_time - lag(join_time) over times >= {GAP})::int, 1) first from ({PAIRS})
        window times as (partition by k order by join_time)),
    numbered as (
        select *, sum(first) over (partition by k order by join_time rows unbounded preceding) number from begun)
    select k, min(join_time), max(join_time) + {GAP}, count(*), sum(v)::bigint, sum(v_right)::bigint
    from numbered group by k, number"""
BEST = f"""
    with cut as (
        select k, t, v, unnest([floor(t / {EVERY})::bigint * {EVERY} - n * {EVERY} for n in range({SIZE // EVERY})]) s
        from left_rows)
    select k, s, s + {SIZE}, t, v, row_number() over (partition by k, s order by v desc) best from cut
    qualify best <= 2"""


def expected(query: str) -> Values:
    with duckdb.connect() as db:
        for side, name in enumerate(("left_rows", "right_rows")):
            rows = pa.Table.from_batches([numbers(side, split, 0, ROWS) for split in range(SPLITS)])
            db.register(name, rows.set_column(1, "t", rows["t"].cast(pa.int64())))
        return sorted(db.sql(query).fetchall(), key=repr)


def written(out: Path) -> Values:
    table = pa.concat_tables([pq.read_table(path) for path in visible(out)])
    columns = [c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in table.columns]
    return sorted(zip(*(column.to_pylist() for column in columns), strict=True), key=repr)


def holds_rows_of_all(job: Job, tmp_path: Path) -> bool:
    """Whether the newest checkpoint has state of the join, of open sessions and of open windows."""
    if not job.checkpoints():
        return False
    handles = [state for each in newest(job, tmp_path).subtasks for state in each.states if state.rows]
    return {"pairs", "sessions", "best"} <= {handle.operator for handle in handles}


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_joins_sessions_and_ranks_are_exact_through_kills(tmp_path: Path, gate: Path) -> None:
    out = tmp_path / "out"
    job = flow(gate, out).submit(
        parallelism=2,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="100ms"),
        config=rf.JobConfig(restart=rf.Restart.exponential(initial="10ms"), watermark_interval="20ms"),
    )

    def with_state() -> int:
        job.checkpoint()
        until(lambda: holds_rows_of_all(job, tmp_path), "a checkpoint holds rows of every step")
        return job.status().attempt

    attempt = with_state()
    kill(job.coordinator().pid)
    recovered(job, attempt)
    attempt = with_state()
    kill(pid_of(job, "pairs"), pid_of(job, "sessions", 1), pid_of(job, "best"))
    recovered(job, attempt)
    with_state()
    gate.touch()
    assert job.wait(120).restarts == 1, "the new coordinator has seen one failure"
    for name, query, least in (("sessions", SESSIONS, 50), ("best", BEST, 1_000)):
        wanted = expected(query)
        assert len(wanted) >= least, name
        assert written(out / name) == wanted, name
