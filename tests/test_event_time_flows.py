"""Event time of whole flows in the local runtime: splits, idleness, bounds on the future, sources that drift apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rayflow as rf
from rayflow.errors import JobFailedError, PlanError

SCHEMA = pa.schema({"at": pa.timestamp("s"), "who": pa.string()})
MANY = 2_000
"""More empty polls than any of these flows needs: a test that waits for something else fails then."""


def rows(who: str, *at: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array(at, pa.timestamp("s")), pa.array([who] * len(at))], schema=SCHEMA)


def counts(stream: rf.Stream, *, size: str = "10s") -> Any:
    return stream.key_by("who").window(rf.tumbling(size)).agg(n=rf.count())


def found(table: pa.Table) -> list[tuple[str, int, int]]:
    """(who, start of the window in s, rows)"""
    starts = table["window_start"].cast(pa.timestamp("s")).cast(pa.int64()).to_pylist()
    return sorted(zip(table["who"].to_pylist(), starts, table["n"].to_pylist(), strict=True))


NO_RESTART = rf.JobConfig(restart=rf.Restart.none())


@pytest.fixture(autouse=True)
def _virtual_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """These sources do not wait for the real world, so the local runtime need not sleep for it."""
    monkeypatch.setattr("rayflow.runtime.local.IDLE_SLEEP_S", 0)


def run(flow: rf.Flow, parallelism: int = 1, **options: Any) -> rf.JobResult:
    return flow.run(local=True, parallelism=parallelism, **{"config": NO_RESTART, **options})


# ------------------------------------------------------------------------------------------------- splits and subtasks


class Seen:
    """What has come out of a flow, as the generators in front of it see it."""

    def __init__(self) -> None:
        self.windows: list[tuple[str, int, int]] = []

    def note(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self.windows += found(pa.Table.from_batches([batch]))
        return batch

    def until(self, who: str, start: int) -> Iterator[None]:
        """Nothing, until that window has come out."""
        for _ in range(MANY):
            if any(w[:2] == (who, start) for w in self.windows):
                return
            yield None
        raise AssertionError(f"the window of {who} at {start} never came out: {self.windows}")


def test_subtasks_without_a_split_hold_nothing_back() -> None:
    seen = Seen()

    def fn(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        yield from [rows("a", 1, 2), rows("a", 25)][position and 1 :]
        yield from seen.until("a", 0)

    stream = rf.from_generator(fn, splits=1, schema=SCHEMA).with_event_time("at", max_delay="0s")
    table = run(rf.Flow("x", counts(stream).map_batches(seen.note).collect()), 3).table()
    assert found(table) == [("a", 0, 2), ("a", 20, 1)]


@pytest.mark.parametrize("column", ["at", lambda batch: batch["at"]], ids=["column", "function"])
@pytest.mark.parametrize("parallelism", [1, 2, 3])
def test_splits_that_are_read_in_turns_have_watermarks_of_their_own(parallelism: int, column: Any) -> None:
    """Three splits of different speed and different time, all in order: nothing is late, however they are dealt out."""

    def fn(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for i in range(position, 40):
            yield rows(f"s{split}", i * (1 + 5 * split))
            yield from [None] * (2 - split)

    stream = rf.from_generator(fn, splits=3, schema=SCHEMA, bounded=False).with_event_time(column, max_delay="0s")
    windows = counts(stream, size="20s")
    late = windows.late.collect(name="late")
    result = run(rf.Flow("x", windows.collect(name="counts"), late), parallelism)
    assert result.table("late").num_rows == 0
    expected: dict[tuple[str, int], int] = {}
    for split in range(3):
        for i in range(40):
            key = f"s{split}", i * (1 + 5 * split) // 20 * 20
            expected[key] = expected.get(key, 0) + 1
    assert found(result.table("counts")) == sorted((*key, n) for key, n in expected.items())


def test_one_watermark_for_all_splits_would_make_rows_late() -> None:
    """The same behind another step, where splits cannot be told apart any more: the test above can fail."""

    def fn(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for i in range(position, 40):
            yield rows(f"s{split}", i * (1 + 5 * split))

    stream = rf.from_generator(fn, splits=3, schema=SCHEMA, bounded=False).filter(rf.col("who") != "")
    windows = counts(stream.with_event_time("at", max_delay="0s"))
    result = run(rf.Flow("x", windows.collect(name="counts"), windows.late.collect(name="late")))
    assert result.table("late").num_rows > 0


# ------------------------------------------------------------------------------------------------------------ idleness


def idle_flow(seen: Seen, *, union: bool, idle_timeout: str | None) -> rf.Flow:
    """One stream that goes on, and one that has a row, is silent until the other's window is out, and comes back."""

    def quiet(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        yield rows("quiet", 1)
        yield from seen.until("busy", 10)
        yield rows("quiet", 2)  # older than the watermark by now
        yield rows("quiet", 75)

    def busy(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        yield rows("busy", 5)
        yield rows("busy", 15)
        yield rows("busy", 25)
        yield from seen.until("busy", 10)
        yield rows("busy", 50)

    def both(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        yield from (quiet, busy)[split](split, position)

    def timed(stream: rf.Stream) -> rf.Stream:
        return stream.with_event_time("at", max_delay="0s", idle_timeout=idle_timeout)

    if union:
        first = timed(rf.from_generator(quiet, splits=1, schema=SCHEMA))
        stream = first.union(timed(rf.from_generator(busy, splits=1, schema=SCHEMA)))
    else:
        stream = timed(rf.from_generator(both, splits=2, schema=SCHEMA, bounded=False))
    windows = counts(stream)
    return rf.Flow("x", windows.map_batches(seen.note).collect(name="counts"), windows.late.collect(name="late"))


@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize("union", [True, False])
def test_a_quiet_source_is_left_out_and_comes_back(union: bool, parallelism: int) -> None:
    result = run(idle_flow(Seen(), union=union, idle_timeout="1s"), parallelism)
    late = result.table("late")
    assert late["at"].cast(pa.int64()).to_pylist() == [2], "older than the watermark when it came back"
    assert found(result.table("counts")) == [
        ("busy", 0, 1), ("busy", 10, 1), ("busy", 20, 1), ("busy", 50, 1), ("quiet", 0, 1), ("quiet", 70, 1),
    ]  # fmt: skip


def test_without_a_timeout_a_quiet_source_holds_event_time_back() -> None:
    with pytest.raises(JobFailedError, match="never came out"):
        run(idle_flow(Seen(), union=True, idle_timeout=None))


def test_idleness_passes_steps_and_exchanges() -> None:
    seen = Seen()

    def quiet(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        yield rows("quiet", 1)
        yield from seen.until("busy", 0)

    def busy(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        yield rows("busy", 5)
        yield rows("busy", 15)
        yield from seen.until("busy", 0)

    def timed(fn: Any, timeout: str | None) -> rf.Stream:
        stream = rf.from_generator(fn, splits=1, schema=SCHEMA, parallelism=1)
        return stream.with_event_time("at", max_delay="0s", idle_timeout=timeout)

    far = timed(quiet, "1s").rebalance(parallelism=2).filter(rf.col("who") != "").rebalance(parallelism=3)
    stream = far.union(timed(busy, None))
    assert found(run(rf.Flow("x", counts(stream).map_batches(seen.note).collect()), 2).table()) == [
        ("busy", 0, 1), ("busy", 10, 1), ("quiet", 0, 1),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the future

FUTURE = 4_102_444_800
"""2100-01-01, in s."""


def from_the_future(*, direct: bool = True, **options: Any) -> rf.Stream:
    """Row 1 of the batch at position 1 is from the future; behind it there is time for watermarks to go out."""

    def fn(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        yield from [rows("a", 1), rows("a", 2, FUTURE)]
        yield from [None] * 100
        yield from [rows("a", 13), rows("a", 3)]

    stream = rf.from_generator(fn, splits=1, schema=SCHEMA)
    return (stream if direct else stream.filter(rf.col("who") == "a")).with_event_time("at", max_delay="10s", **options)


def test_rows_from_the_future_fail_the_job_naming_row_and_place() -> None:
    expected = r"more than max_ahead \(3600 s\) ahead.*row 1 of the batch.*2100.*split '0', the batch at position 1"
    with pytest.raises(JobFailedError, match=expected):
        run(rf.Flow("x", counts(from_the_future(max_ahead="1h")).collect()))


@pytest.mark.parametrize("direct", [True, False])
def test_rows_from_the_future_are_skipped_and_counted_and_do_not_advance_event_time(direct: bool) -> None:
    windows = counts(from_the_future(direct=direct, max_ahead="1h", on_ahead="skip"))
    result = run(rf.Flow("x", windows.collect(name="counts"), windows.late.collect(name="late")))
    assert found(result.table("counts")) == [("a", 0, 3), ("a", 10, 1)]
    assert result.table("late").num_rows == 0
    assert result.metrics["skipped_rows"] == 1


def test_without_a_bound_one_row_from_the_future_closes_all_windows_until_then() -> None:
    windows = counts(from_the_future())
    result = run(rf.Flow("x", windows.collect(name="counts"), windows.late.collect(name="late")))
    assert result.table("late")["at"].cast(pa.int64()).to_pylist() == [13, 3]


# -------------------------------------------------------------------------------------------------------------- drift


def drift_flow(read: dict[str, list[int]], max_drift: str | None, fail: Any = None) -> rf.Flow:
    """``fast`` has all its rows at once, ``slow`` one now and then; ``read`` is what each has been asked for."""

    def fn(name: str, pauses: int) -> Any:
        def generate(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
            for at in range(position, 60):
                read[name].append(at)
                read["widest"].append(max(read["fast"], default=0) - max(read["slow"], default=0))
                yield rows(name, at)
                yield from [None] * pauses

        return generate

    streams = [
        rf.from_generator(fn(name, pauses), splits=1, schema=SCHEMA).with_event_time(
            "at", max_delay="0s", max_drift=max_drift
        )
        for name, pauses in (("fast", 0), ("slow", 20))
    ]
    results = counts(streams[0].union(streams[1]))
    return rf.Flow("x", (results if fail is None else results.map_batches(fail)).collect())


@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize("max_drift", ["10s", None])
def test_a_fast_source_waits_for_a_slow_one(max_drift: str | None, parallelism: int) -> None:
    read: dict[str, list[int]] = {"fast": [], "slow": [], "widest": []}
    table = run(drift_flow(read, max_drift), parallelism).table()
    assert found(table) == sorted((who, start, 10) for who in ("fast", "slow") for start in range(0, 60, 10))
    assert max(read["widest"]) <= 12 if max_drift else max(read["widest"]) > 50


def test_sources_that_wait_for_each_other_go_on_after_a_failure(tmp_path: Any) -> None:
    read: dict[str, list[int]] = {"fast": [], "slow": [], "widest": []}
    failures = [1]

    def fail_once(batch: pa.RecordBatch) -> pa.RecordBatch:
        if failures and max(read["slow"]) > 30:
            failures.pop()
            raise RuntimeError("once")
        return batch

    table = run(
        drift_flow(read, "10s", fail_once),
        checkpoints=rf.CheckpointConfig(str(tmp_path), interval="500ms"),
        config=rf.JobConfig(restart=rf.Restart.fixed(delay="10ms")),
    ).table()
    assert not failures
    assert read["slow"].count(5) == 1, "it has gone on from a checkpoint"
    assert found(table) == sorted((who, start, 10) for who in ("fast", "slow") for start in range(0, 60, 10))


# ----------------------------------------------------------------------------------------------- bad input and building


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.timestamp("s"), [-20, -11, 5]),
        (pa.timestamp("ms"), [-20_000, -10_001, 5_999]),
        (pa.timestamp("us", "Europe/Berlin"), [-20_000_000, -10_000_001, 5_999_999]),
        (pa.timestamp("ns", "UTC"), [-20_000_000_000, -10_000_000_001, 5_999_999_999]),
    ],
)
def test_all_units_and_zones_and_times_before_1970_mean_the_same(kind: pa.DataType, values: list[int]) -> None:
    table = pa.table({"at": pa.array(values, pa.int64()).cast(kind), "who": ["a"] * 3})
    windows = counts(rf.from_arrow(table, batch_rows=1).with_event_time("at", max_delay="0s"))
    result = run(rf.Flow("x", windows.collect(name="counts"), windows.late.collect(name="late")))
    assert found(result.table("counts")) == [("a", -20, 2), ("a", 0, 1)]
    assert result.table("late").num_rows == 0


def test_dates_are_midnights() -> None:
    table = pa.table({"at": pa.array([-1, 0, 0], pa.date32()), "who": ["a"] * 3})
    windows = counts(rf.from_arrow(table).with_event_time("at", max_delay="0s"), size="1d")
    assert found(run(rf.Flow("x", windows.collect())).table()) == [("a", -86_400, 1), ("a", 0, 2)]


@pytest.mark.parametrize("kind", [pa.float64(), pa.int64(), pa.string()])
def test_what_is_no_time_is_refused_while_building(kind: pa.DataType) -> None:
    """A float could hold NaN, and neither it nor an integer says its unit."""
    table = pa.table({"at": pa.array([None], kind)})
    with pytest.raises(PlanError, match=r"'at' is (double|int64|string); cast it first"):
        rf.from_arrow(table).with_event_time("at")


def test_an_expression_makes_the_event_time() -> None:
    table = pa.table({"ms": pa.array([1_000, 12_000], pa.int64()), "who": ["a", "a"]})
    timed = rf.from_arrow(table).with_event_time(rf.col("ms").cast(pa.timestamp("ms")).alias("at"), max_delay="0s")
    assert timed.schema is not None
    assert timed.schema.names == ["ms", "who", "at"]
    assert found(run(rf.Flow("x", counts(timed).collect())).table()) == [("a", 0, 1), ("a", 10, 1)]


def _minutes(batch: pa.RecordBatch) -> pa.Array:
    return pc.add(pc.multiply(batch["minute"], 60_000_000), 1)


@pytest.mark.parametrize("direct", [True, False], ids=["at the source", "behind a step"])
def test_a_function_makes_the_event_time(direct: bool, tmp_path: Any) -> None:
    """And reads columns that nobody else needs, of a source that could leave them out."""
    table = pa.table({"minute": pa.array([0, 1, 2, -1], pa.int64()), "who": ["a", "a", "b", "b"], "v": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "rows.parquet")
    stream: rf.Stream = rf.read_parquet(str(tmp_path / "rows.parquet"))
    stream = stream if direct else stream.filter(rf.col("v") > 0)
    timed = stream.with_event_time(_minutes, into="at", max_delay="1h")
    assert timed.schema is not None
    assert timed.schema.field("at").type == pa.timestamp("us")
    flow = rf.Flow("x", counts(timed, size="1m").collect())
    assert found(run(flow).table()) == [("a", 0, 1), ("a", 60, 1), ("b", -60, 1), ("b", 120, 1)]
    assert "event time 'at'" in flow.explain()
    assert timed.take(4)["at"].cast(pa.int64()).to_pylist()[1] == 60_000_001


def test_a_function_may_have_a_drift_right_behind_a_source() -> None:
    table = pa.Table.from_batches([rows("a", *range(0, 50, 5))])
    timed = rf.from_arrow(table).with_event_time(
        lambda batch: batch["at"].cast(pa.timestamp("ms")), max_delay="0s", max_drift="1m"
    )
    assert sum(n for _, _, n in found(run(rf.Flow("x", counts(timed).collect())).table())) == 10


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda batch: 1 / 0, r"event time function <lambda> raised ZeroDivisionError: .*split '0-2'.*position"),
        (lambda batch: batch["who"], r"returned an array of string, expected an Arrow array of timestamps"),
        (lambda batch: pa.array([1.5, 2.5]), r"returned an array of double, expected"),
        (lambda batch: object(), r"returned object, expected"),
        (lambda batch: batch["at"].slice(1), r"returned 1 times for a batch of 2 rows"),
        (lambda batch: pa.array([1, None]), r"'event_time' is null in 1 of 2 rows, the first is row 1"),
        (lambda batch: pa.array([0, 2**62 + 1]), r"the bound is"),
    ],
)
@pytest.mark.parametrize("direct", [True, False])
def test_a_function_that_makes_no_times_is_named(function: Any, expected: str, direct: bool) -> None:
    stream: rf.Stream = rf.from_arrow(pa.Table.from_batches([rows("a", 1, 2)]))
    if not direct:
        stream, expected = stream.filter(rf.col("who") == "a"), expected.partition(".*split")[0]
    flow = rf.Flow("x", counts(stream.with_event_time(function)).collect())
    with pytest.raises(JobFailedError, match=expected) as failed:
        run(flow)
    assert "step" in str(failed.value) or "/0" in str(failed.value) or "[0]" in str(failed.value)


def test_a_function_may_not_make_a_column_that_is_there() -> None:
    with pytest.raises(PlanError, match=r"adds a column 'who', but the input has one already"):
        rf.from_arrow(pa.Table.from_batches([rows("a", 1)])).with_event_time(_minutes, into="who")


def test_a_source_takes_no_function_and_says_where_to_give_it() -> None:
    function: Any = _minutes
    with pytest.raises(PlanError, match=r"^step 'from_arrow' \(test_event_time_flows.py:\d+\): .*with_event_time"):
        rf.from_arrow(pa.Table.from_batches([rows("a", 1)]), event_time=function)


def test_a_null_time_names_row_and_place() -> None:
    table = pa.table({"at": pa.array([1, None], pa.timestamp("s")), "who": ["a", "b"]})
    flow = rf.Flow("x", counts(rf.from_arrow(table).with_event_time("at")).collect())
    with pytest.raises(
        JobFailedError, match=r"'at' is null in 1 of 2 rows, the first is row 1 .*'who': 'b'.*split '0-2'"
    ):
        run(flow)


def test_times_out_of_range_are_refused() -> None:
    table = pa.table({"at": pa.array([2**60], pa.timestamp("s")), "who": ["a"]})
    flow = rf.Flow("x", counts(rf.from_arrow(table).with_event_time("at")).collect())
    with pytest.raises(JobFailedError, match="does not fit in 64 bits of microseconds"):
        run(flow)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"idle_timeout": "5s"}, "idle_timeout='5s' needs max_delay"),
        ({"max_drift": "5s"}, "max_drift='5s' needs max_delay"),
        ({"on_ahead": "skip"}, "needs max_ahead"),
        ({"max_ahead": "1h", "on_ahead": "ignore"}, 'must be "fail" or "skip"'),
    ],
)
def test_options_that_mean_nothing_together_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(PlanError, match=expected):
        rf.from_arrow(pa.Table.from_batches([rows("a", 1)])).with_event_time("at", **options)


def test_a_drift_is_refused_where_there_is_no_source() -> None:
    stream = rf.from_arrow(pa.Table.from_batches([rows("a", 1)])).filter(rf.col("who") == "a")
    flow = rf.Flow("x", stream.with_event_time("at", max_delay="0s", max_drift="5s").collect())
    with pytest.raises(PlanError, match="max_drift.*not stand right behind one"):
        flow.plan()


def test_the_plan_shows_what_holds_event_time_back() -> None:
    table = pa.Table.from_batches([rows("a", 1)])
    timed = rf.from_arrow(table).with_event_time(
        "at", max_delay="5s", idle_timeout="30s", max_ahead="1m", on_ahead="skip", max_drift="5m"
    )
    text = rf.Flow("x", timed.collect()).explain()
    assert (
        "event time 'at', max delay 5 s, idle after 30 s, at most 60 s ahead of the clock (else skip), "
        "waits when 300 s ahead of the slowest source"
    ) in text
    behind = rf.from_arrow(table).filter(rf.col("who") == "a").with_event_time("at", max_delay="5s", idle_timeout="9s")
    assert "event time 'at', max delay 5 s, idle after 9 s" in rf.Flow("x", behind.collect()).explain()


# ------------------------------------------------------------------------------------- results depend on the rows alone


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_results_do_not_depend_on_parallelism_batches_pauses_or_drift(data: st.DataObject) -> None:
    """Three splits, each within the delay of its own order; in no setting is a row late."""
    delay = data.draw(st.integers(0, 5), label="delay")
    splits: list[list[int]] = []
    for _ in range(3):
        now, at = 0, []
        for step, behind in data.draw(st.lists(st.tuples(st.integers(-3, 20), st.integers(0, 5)), max_size=15)):
            now += max(0, step)
            at.append(now - min(behind, delay) - 20)
        splits.append(at)
    pauses = data.draw(st.lists(st.integers(0, 30), min_size=3, max_size=3), label="pauses")
    batch_rows = data.draw(st.integers(1, 4), label="rows a batch")
    max_drift = data.draw(st.sampled_from([None, "1s", "30s"]), label="drift")

    def fn(split: int, position: int) -> Iterator[pa.RecordBatch | None]:
        for first in range(position, len(splits[split]), batch_rows):
            yield from [None] * pauses[split]
            yield rows("ab"[split % 2], *splits[split][first : first + batch_rows])

    stream = rf.from_generator(fn, splits=3, schema=SCHEMA, bounded=False)
    windows = counts(stream.with_event_time("at", max_delay=f"{delay}s", max_drift=max_drift), size="7s")
    flow = rf.Flow("x", windows.collect(name="counts"), windows.late.collect(name="late"))
    result = run(flow, data.draw(st.integers(1, 4), label="parallelism"))
    expected = Counter(("ab"[i % 2], at // 7 * 7) for i, part in enumerate(splits) for at in part)
    assert found(result.table("counts")) == sorted((*key, n) for key, n in expected.items())
    assert result.table("late").num_rows == 0
