"""Windows as users write them, run in this process: against DuckDB, through parallelism and the combiner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.operators.tumbling import Tumbling
from rayflow.operators.windowing.sliding import Sliding

ROWS = 3_000


@pytest.fixture(scope="module")
def events() -> pa.Table:
    """Rows up to 3 s out of order; gaps of 20 s every 100 s."""
    times = [(i // 7) * 1_000_000 + (i // 700) * 20_000_000 - (i * 7919 % 3_000_000) for i in range(ROWS)]
    return pa.table(
        {
            "k": [f"k{i * 31 % 5}" for i in range(ROWS)],
            "t": pa.array(times, pa.timestamp("us", "UTC")),
            "v": [i * 37 % 101 for i in range(ROWS)],
        }
    )


def ran(stream: rf.Stream, *, parallelism: int) -> list[tuple[Any, ...]]:
    config = rf.JobConfig(batch_rows=64, watermark_interval="1ms")
    table = rf.Flow("windows", stream.collect()).run(local=True, parallelism=parallelism, config=config).table()
    return sorted(tuple(row.values()) for row in table.to_pylist())


def keyed(events: pa.Table) -> rf.KeyedStream:
    return rf.from_arrow(events, batch_rows=50, event_time="t", max_delay="4s").key_by("k")


def duck(events: pa.Table, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect() as db:
        db.execute("set timezone = 'UTC'")
        db.register("events", events)
        return sorted(tuple(row.values()) for row in db.sql(sql).to_arrow_table().to_pylist())


def same(found: Sequence[tuple[Any, ...]], expected: Sequence[tuple[Any, ...]]) -> bool:
    return [tuple(map(str, row)) for row in found] == [tuple(map(str, row)) for row in expected]


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("late_too", [False, True])
def test_sliding_windows_equal_duckdb(events: pa.Table, parallelism: int, late_too: bool) -> None:
    """Also without the combiner: it is left out where the late rows are used."""
    counted = keyed(events).window(rf.sliding("10s", every="4s", offset="1s")).agg(n=rf.count(), total=rf.sum("v"))
    expected = duck(
        events,
        """select k, s as window_start, s + interval 10 seconds as window_end, count(*) n, sum(v)::bigint total
           from (select *, unnest(range(0, 3)) i from events),
           lateral (select time_bucket(interval 4 seconds, t, timestamptz '1970-01-01 00:00:01Z')
                           - i * interval 4 seconds as s)
           where t < s + interval 10 seconds group by all""",
    )
    if late_too:
        config = rf.JobConfig(batch_rows=64)
        result = rf.Flow("both", counted.collect(name="main"), counted.late.collect(name="late")).run(
            local=True, parallelism=parallelism, config=config
        )
        assert result.table("late").num_rows == 0
        found = sorted(tuple(row.values()) for row in result.table("main").to_pylist())
    else:
        found = ran(counted, parallelism=parallelism)
    assert same(found, expected)


def test_windows_of_sliding_windows_lose_nothing(events: pa.Table) -> None:
    first = keyed(events).window(rf.sliding("10s", every="5s")).agg(n=rf.count())
    again = first.key_by("k").window(rf.tumbling("20s")).agg(total=rf.sum("n"))
    assert sum(row[-1] for row in ran(again, parallelism=2)) == 2 * ROWS


@pytest.mark.parametrize("parallelism", [1, 2, 4])
def test_sessions_equal_duckdb(events: pa.Table, parallelism: int) -> None:
    found = ran(
        keyed(events).window(rf.session(gap="2s")).agg(n=rf.count(), total=rf.sum("v")), parallelism=parallelism
    )
    expected = duck(
        events,
        """select k, min(t) as window_start, max(t) + interval 2 seconds as window_end, count(*) n, sum(v)::bigint total
           from (select *, sum(cut::int) over (partition by k order by t rows unbounded preceding) as number
                 from (select *, coalesce(t - lag(t) over (partition by k order by t) >= interval 2 seconds, true) cut
                       from events)) group by k, number""",
    )
    assert len(expected) > 50
    assert same(found, expected)


def test_windows_of_sessions_lose_nothing(events: pa.Table) -> None:
    """A session's result has its start as event time, which lies far behind its end."""
    first = keyed(events).window(rf.session(gap="5s")).agg(n=rf.count())
    again = first.key_by("k").window(rf.tumbling("1s")).agg(total=rf.sum("n"))
    assert sum(row[-1] for row in ran(again, parallelism=2)) == ROWS


def test_days_of_a_zone_equal_duckdb(events: pa.Table) -> None:
    hours = events.set_column(1, "t", pa.array([i * 3_600_000_000 for i in range(ROWS)], pa.timestamp("us", "UTC")))
    counted = keyed(hours).window(rf.tumbling("1d", offset="2h", zone="America/New_York")).agg(n=rf.count())
    expected = duck(
        hours,
        """select k, d::timestamp at time zone 'America/New_York', null, n from (
             select k, date_trunc('day', t at time zone 'America/New_York' - interval 2 hours) + interval 2 hours d,
                    count(*) n from events group by all)""",
    )
    found = ran(counted, parallelism=2)
    assert same([(row[0], row[1], row[-1]) for row in found], [(row[0], row[1], row[-1]) for row in expected])


@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize("window", [rf.tumbling("10s"), rf.sliding("10s", every="5s")], ids=str)
def test_late_rows_that_are_allowed_update_the_result(
    events: pa.Table, window: Tumbling | Sliding, parallelism: int
) -> None:
    """The delay is said to be zero, rows come up to 3 s late."""
    late = rf.from_arrow(events, batch_rows=50, event_time="t", max_delay="0s").key_by("k")
    right = ran(keyed(events).window(window).agg(n=rf.count(), total=rf.sum("v")), parallelism=1)
    final = late.window(window, allowed_lateness="4s").agg(n=rf.count(), total=rf.sum("v"))
    assert ran(final, parallelism=parallelism) == right
    updated = late.window(window, allowed_lateness="4s", emit="update", early="3s")
    told = ran(updated.agg(n=rf.count(), total=rf.sum("v")), parallelism=parallelism)
    assert sorted({row[:3]: row for row in told}.values()) == right, "rows are sorted: the last has the highest count"
    assert len(told) > len(right)


def test_options_that_do_not_go_together_are_refused(events: pa.Table) -> None:
    stream = keyed(events)
    with pytest.raises(rf.PlanError, match=r"step 'window' \(test_windows.py:\d+\): early= needs"):
        stream.window(rf.tumbling("10s"), early="1s")
    with pytest.raises(rf.PlanError, match="early= is a period.*every 5 rows"):
        stream.window(rf.tumbling("10s"), emit="update", early=rf.every(rows=5))
    options: list[dict[str, Any]] = [
        {}, {"period": "1s", "rows": 1}, {"rows": 0}, {"rows": 3, "clock": "processing"}, {"period": "0s"},
    ]  # fmt: skip
    for wrong in options:
        with pytest.raises(rf.ConfigError, match="every"):
            rf.every(**wrong)
    with pytest.raises(rf.ConfigError, match="clock"):
        rf.every("1s", clock="wall")  # type: ignore[arg-type]
    with pytest.raises(rf.PlanError, match="session gap 0:00:10 has no early results"):
        stream.window(rf.session(gap="10s"), emit="update", early="1s")
    with pytest.raises(rf.PlanError, match="window count 3 says itself when"):
        stream.window(rf.count_window(3), allowed_lateness="1s")
    with pytest.raises(rf.PlanError, match=r"more than one column named \['retracted'\]"):
        stream.window(rf.session(gap="10s"), emit="update").agg(retracted=rf.count())
    with pytest.raises(rf.PlanError, match="top gives rows when the window closes"):
        stream.window(rf.tumbling("10s"), emit="update").top(1, by="v")
    with pytest.raises(rf.ConfigError, match="allowed_lateness"):
        stream.window(rf.tumbling("10s"), allowed_lateness="soon")
    counted = stream.window(rf.tumbling("10s"), allowed_lateness="1m", emit="update", early="5s").agg(n=rf.count())
    text = rf.Flow("f", counted.collect()).explain()
    assert "tumbling 0:00:10, late by 0:01:00, updates, early every 0:00:05 by k: n" in text


def test_early_results_by_the_clock(events: pa.Table) -> None:
    window = keyed(events).window(rf.tumbling("10s"), emit="update", early=rf.every("1ms", clock="processing"))
    counted = window.agg(n=rf.count(), total=rf.sum("v"))
    assert "early every 0:00:00.001000 of the clock" in rf.Flow("f", counted.collect()).explain()
    right = ran(keyed(events).window(rf.tumbling("10s")).agg(n=rf.count(), total=rf.sum("v")), parallelism=1)
    told = ran(counted, parallelism=2)
    assert sorted({row[:3]: row for row in told}.values()) == right


@pytest.mark.parametrize("parallelism", [1, 2])
def test_late_rows_that_are_allowed_change_sessions(events: pa.Table, parallelism: int) -> None:
    mixed = events.take(sorted(range(ROWS), key=lambda i: i + i * 7919 % 25))
    late = rf.from_arrow(mixed, batch_rows=50, event_time="t", max_delay="0s").key_by("k")
    right = ran(keyed(events).window(rf.session(gap="1s")).agg(n=rf.count(), total=rf.sum("v")), parallelism=1)
    final = late.window(rf.session(gap="1s"), allowed_lateness="30s").agg(n=rf.count(), total=rf.sum("v"))
    assert ran(final, parallelism=parallelism) == right
    updated = late.window(rf.session(gap="1s"), allowed_lateness="30s", emit="update")
    flow = rf.Flow("f", updated.agg(n=rf.count(), total=rf.sum("v")).collect())
    assert "session gap 0:00:01, late by 0:00:30, updates by k" in flow.explain()
    config = rf.JobConfig(batch_rows=64, watermark_interval="1ms")
    told = flow.run(local=True, parallelism=parallelism, config=config).table().to_pylist()
    last = {(row["k"], row["window_start"]): tuple(row.values()) for row in told}
    assert sorted(row[:-1] for row in last.values() if not row[-1]) == right
    assert any(row["retracted"] for row in told)


@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize("timed", [False, True])
def test_count_windows_take_rows_as_they_come(events: pa.Table, parallelism: int, timed: bool) -> None:
    stream = keyed(events) if timed else rf.from_arrow(events, batch_rows=50).key_by("k")
    found = ran(stream.window(rf.count_window(7)).agg(n=rf.count(), total=rf.sum("v")), parallelism=parallelism)
    expected = duck(
        events,
        """select k, min(t) as window_start, max(t) as window_end, count(*) n, sum(v)::bigint total
           from (select *, (row_number() over (partition by k order by i) - 1) // 7 as w
                 from (select *, row_number() over () as i from events))
           group by k, w having count(*) = 7""",
    )
    assert same(found, expected if timed else sorted((row[0], *row[3:]) for row in expected))


@pytest.mark.parametrize("parallelism", [1, 2])
def test_a_global_window_by_event_time_equals_duckdb(events: pa.Table, parallelism: int) -> None:
    counted = keyed(events).window(rf.global_window(trigger=rf.every("10s"))).agg(n=rf.count(), total=rf.sum("v"))
    expected = duck(
        events,
        """select k, w + interval 10 seconds as window_end, sum(n) over sofar::bigint, sum(total) over sofar::bigint
           from (select k, time_bucket(interval 10 seconds, t, timestamptz '1970-01-01 00:00:00Z') w, count(*) n,
                        sum(v) total from events group by all)
           window sofar as (partition by k order by w)""".replace("over sofar::bigint", "over sofar"),
    )
    assert same(ran(counted, parallelism=parallelism), expected)
    again = counted.key_by("k").window(rf.tumbling("10s")).agg(one=rf.count())
    assert {row[-1] for row in ran(again, parallelism=parallelism)} == {1}, "window_end is its event time"


def test_global_windows_are_built_and_explained(events: pa.Table) -> None:
    untimed = rf.from_arrow(events, batch_rows=50).key_by("k")
    counted = untimed.window(rf.global_window(trigger=rf.every(rows=100))).agg(n=rf.count())
    assert sorted({row[1] for row in ran(counted, parallelism=2)}) == [100, 200, 300, 400, 500, 600]
    assert "global, every 100 rows by k: n" in rf.Flow("f", counted.collect()).explain()
    struck = untimed.window(rf.global_window(trigger=rf.every("1ms", clock="processing"))).agg(n=rf.count())
    assert {row[0]: row[1] for row in ran(struck, parallelism=2)} == {f"k{i}": 600 for i in range(5)}
    with pytest.raises(rf.PlanError, match="no event time"):
        untimed.window(rf.global_window(trigger=rf.every("10s")))
    with pytest.raises(rf.PlanError, match="window global, every 0:00:10 says itself when"):
        keyed(events).window(rf.global_window(trigger=rf.every("10s")), emit="update")
    with pytest.raises(rf.PlanError, match="needs rf.tumbling or rf.sliding"):
        keyed(events).window(rf.global_window(trigger=rf.every("10s"))).top(1, by="v")


def test_what_is_no_window_is_refused(events: pa.Table) -> None:
    with pytest.raises(rf.PlanError, match=r"step 'window' \(test_windows.py:\d+\).*rf.tumbling.*got '10s'"):
        keyed(events).window("10s")  # type: ignore[arg-type]
    with pytest.raises(rf.PlanError, match="no event time"):
        rf.from_arrow(events).key_by("k").window(rf.sliding("10s", every="5s"))
