"""Joins as whole flows: DuckDB over the same rows, at every parallelism, through failures, and mistakes by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.joins import JoinResult
from tests.failing import FailsOnce

ROWS = 2_000


def _side(seed: int, key: str, rows: int = ROWS) -> pa.Table:
    """Rows a second apart, up to 20 s too late, with null keys."""
    rng = np.random.default_rng(seed)
    times = np.arange(rows) * 1_000_000 - rng.integers(0, 20_000_000, rows)
    return pa.table(
        {
            key: pa.array(rng.integers(0, 40, rows), mask=rng.random(rows) < 0.05),
            "row": np.arange(rows) + seed * 10_000,
            "t": pa.array(times, pa.timestamp("us")),
        }
    )


def _stream(table: pa.Table, batch_rows: int = 100) -> rf.Stream:
    return rf.from_arrow(table, event_time="t", max_delay="20s", batch_rows=batch_rows)


Build = Callable[[rf.KeyedStream, rf.KeyedStream], rf.Stream]
NEAR = "l.k = r.rk and r.t between l.t - interval 5 second and l.t + interval 30 second"
WINDOW = "l.k = r.rk and time_bucket(interval 60 second, l.t) = time_bucket(interval 60 second, r.t)"
JOINS: dict[str, tuple[Build, str]] = {
    "inner": (
        lambda a, b: a.join(b, within=("-5s", "30s")),
        f"select l.row, r.row from l join r on {NEAR}",
    ),
    "full": (
        lambda a, b: a.join(b, within=("-5s", "30s"), how="full"),
        f"select l.row, r.row from l full join r on {NEAR}",
    ),
    "anti": (
        lambda a, b: a.join(b, within=("-5s", "30s"), how="anti"),
        f"select l.row from l anti join r on {NEAR}",
    ),
    "retention": (
        lambda a, b: a.join(b, retention="10s", how="left"),
        """select l.row, r.row from l left join r
           on l.k = r.rk and r.t between l.t - interval 10 second and l.t + interval 10 second""",
    ),
    "all": (
        lambda a, b: a.join(b.filter(rf.col("row") % 7 == 0).key_by("rk"), how="right"),
        "select l.row, r.row from l right join (select * from r where row % 7 = 0) r on l.k = r.rk",
    ),
    "window": (
        lambda a, b: a.join(b, window=rf.tumbling("60s"), how="full"),
        f"select l.row, r.row from l full join r on {WINDOW}",
    ),
    "sliding": (
        lambda a, b: a.join(b, window=rf.sliding("60s", every="20s")),
        """select l.row, r.row from l join r on l.k = r.rk, range(3) x(j)
           where time_bucket(interval 20 second, r.t) between time_bucket(interval 20 second, l.t) - to_seconds(20 * j)
               and time_bucket(interval 20 second, l.t) - to_seconds(20 * j) + interval 40 second""",
    ),
    "asof": (
        lambda a, b: a.join_asof(b, tolerance="2m"),
        """select l.row, (select max(r.row) from r where r.rk = l.k and r.t = (
               select max(t) from r where r.rk = l.k and r.t <= l.t and r.t >= l.t - interval 2 minute)) from l""",
    ),
}


def _flow(join: str, left: rf.Stream, right: rf.Stream) -> tuple[rf.Flow, str]:
    build, query = JOINS[join]
    return rf.Flow("joined", build(left.key_by("k"), right.key_by("rk")).collect()), query


def _rows(table: pa.Table) -> Counter[tuple[Any, ...]]:
    names = [name for name in table.schema.names if name.startswith("row")]
    return Counter(zip(*(table.column(name).to_pylist() for name in names), strict=True))


def _expected(query: str, left: pa.Table, right: pa.Table) -> Counter[tuple[Any, ...]]:
    with duckdb.connect() as db:
        db.register("l", left)
        db.register("r", right)
        return Counter(map(tuple, db.execute(query).fetchall()))


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize(("parallelism", "batch_rows"), [(1, 500), (2, 90), (4, 41)])
def test_joins_equal_duckdb_at_every_parallelism(join: str, parallelism: int, batch_rows: int) -> None:
    left, right = _side(1, "k"), _side(2, "rk", ROWS // 2)
    flow, query = _flow(join, _stream(left, batch_rows), _stream(right, batch_rows))
    config = rf.JobConfig(batch_rows=batch_rows, watermark_interval="1ms")
    found = flow.run(parallelism=parallelism, local=True, progress=False, config=config).table()
    assert _rows(found) == _expected(query, left, right)


@pytest.mark.parametrize("join", JOINS)
def test_joins_go_on_from_a_checkpoint_as_if_nothing_had_happened(join: str, tmp_path: Path) -> None:
    left, right = _side(1, "k"), _side(2, "rk", ROWS // 2)
    failing = _stream(left, 20).map_batches(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 1_500), schema=left.schema
    )
    flow, query = _flow(join, failing, _stream(right, 20))
    result = flow.run(
        parallelism=2,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1ms", min_pause="0s"),
        config=rf.JobConfig(restart=rf.Restart.fixed(delay="0s"), watermark_interval="1ms"),
    )
    assert (tmp_path / "failed").exists()
    assert _rows(result.table()) == _expected(query, left, right)


def test_windows_over_joins_see_no_late_rows() -> None:
    """W1: rows that were held back come before the watermark that would close their window."""
    left, right = _side(1, "k"), _side(2, "rk", ROWS // 2)
    joined = _stream(left).key_by("k").join(_stream(right).key_by("rk"), within="10s", how="full")
    windows = joined.key_by("k").window(rf.tumbling("20s")).agg(n=rf.count())
    flow = rf.Flow("over", windows.collect(name="n"), windows.late.collect(name="late"))
    result = flow.run(parallelism=2, local=True, progress=False, config=rf.JobConfig(watermark_interval="1ms"))
    assert result.table("late").num_rows == 0
    query = """select l.row, r.row from l full join r
               on l.k = r.rk and r.t between l.t - interval 10 second and l.t + interval 10 second"""
    assert sum(result.table("n").column("n").to_pylist()) == _expected(query, left, right).total()


def test_a_stream_is_joined_with_itself() -> None:
    data = _side(1, "k", 300)
    keyed = _stream(data).key_by("k")
    found = rf.Flow("self", keyed.join(keyed, within="5s").collect()).run(local=True, progress=False).table()
    query = """select l.row, r.row from l join r
               on l.k = r.k and r.t between l.t - interval 5 second and l.t + interval 5 second"""
    assert found.schema.names == ["k", "row", "t", "row_right", "t_right", "join_time"]
    assert _rows(found) == _expected(query, data, data)


def test_late_rows_come_out_of_the_side() -> None:
    """What is behind the watermark of both sides is dropped, counted and shown."""
    data = pa.table({"k": [1, 1, 1], "row": [0, 1, 2], "t": pa.array([0, 100_000_000, 5_000_000], pa.timestamp("us"))})
    keyed = rf.from_arrow(data, event_time="t", max_delay="0s", batch_rows=1).key_by("k")
    joined = keyed.join(keyed, within="1s")
    sinks = [joined.collect(name="pairs"), joined.late_left.collect(name="l"), joined.late_right.collect(name="r")]
    config = rf.JobConfig(watermark_interval="0s", linger="0s", batch_rows=1)
    result = rf.Flow("late", *sinks).run(local=True, progress=False, config=config)
    assert joined.late_left.schema == data.schema
    assert result.table("l").column("row").to_pylist() == result.table("r").column("row").to_pylist() == [2]
    assert _rows(result.table("pairs")) == Counter([(0, 0), (1, 1)])


def test_columns_of_files_are_known_when_the_flow_is_planned(tmp_path: Path) -> None:
    """Neither side's schema is known while building; the right side has no row at all."""
    left, right = _side(1, "k", 50), _side(2, "rk", 50).rename_columns(["k", "row", "t"])
    for name, table in (("l", left), ("r", right.slice(0, 0))):
        (tmp_path / name).mkdir()
        pa.parquet.write_table(table, tmp_path / name / "a.parquet")
    sides = [rf.read_parquet(str(tmp_path / name), event_time="t", max_delay="20s").key_by("k") for name in "lr"]
    joined = sides[0].join(sides[1], within="5s", how="left", suffix="_r")
    found = rf.Flow("files", joined.collect()).run(local=True, progress=False).table()
    assert found.schema.names == ["k", "row", "t", "row_r", "t_r", "join_time"]
    assert found.num_rows == 50
    assert found.column("row_r").null_count == 50


def test_joins_are_explained() -> None:
    a, b = _stream(_side(1, "k", 10)).key_by("k"), _stream(_side(2, "rk", 10)).key_by("rk")
    sinks = [
        a.join(b, within=("-5s", "1m"), how="left").collect(name="a"),
        a.join(b, window=rf.tumbling("1m")).collect(name="b"),
        a.join_asof(b, tolerance="1h").collect(name="c"),
        a.join(b).collect(name="d"),
    ]
    text = rf.Flow("all", *sinks).explain()
    for line in (
        "left by k: within -0:00:05 to 0:01:00",
        "inner by k: tumbling 0:01:00",
        "left by k: the version of the time, at most 1h old",
        "inner by k: all rows",
        "state, keyed by k",
    ):
        assert line in text


class Endless(rf.Source):
    """Never ends; nothing reads it."""

    def schema(self) -> pa.Schema:
        return pa.schema([("k", pa.int64()), ("t", pa.timestamp("us"))])

    def declared_schema(self) -> pa.Schema:
        return self.schema()

    def discover(self) -> list[tuple[str, Any]]:
        return []

    def reader(self, split: Any, position: Any, ctx: Any) -> Any:
        raise NotImplementedError

    @property
    def bounded(self) -> bool:
        return False


def _endless(max_delay: str | None = "1s") -> rf.KeyedStream:
    return rf.read_source(Endless(), event_time="t", max_delay=max_delay).key_by("k")


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda a, b: a.join(b.filter(rf.col("row") > 0)), r"^step 'join' \(test_joins.py:\d+\): .*must be keyed"),
        (lambda a, b: a.join(b, within="1s", retention="1s"), r"give one of .* got within= and retention="),
        (lambda a, b: a.join(b, within=("5s", "-5s")), r"from the earlier to the later"),
        (lambda a, b: a.join(b, within=("5s",)), r"within= takes two bounds"),
        (lambda a, b: a.join(b, within="soon"), r"join\(within\) must be a duration"),
        (lambda a, b: a.join(b, within="1s", how="outer"), r"^step 'join' .*how= must be one of inner, left"),
        (lambda a, b: a.join(b, window="1m"), r"window= must be windows such as rf.tumbling"),
        (lambda a, b: a.join(b, window=rf.session(gap="1m")), r"window= must be windows .* got Session"),
        (lambda a, b: a.join_asof(b, how="full"), r"^step 'join_asof' .*how= must be one of inner, left here"),
        (lambda a, b: a.join_asof(b, tolerance="-1s"), r"join_asof\(tolerance\)"),
        (lambda a, b: a.join(b, within="1s", suffix=""), r"would have the column 'row' twice"),
        (lambda a, b: a.key_by("k", "row").join(b, within="1s"), r"the same number of keys"),
        (
            lambda a, b: a.join(b.with_columns(rk=rf.col("rk").cast("int32")).key_by("rk"), within="1s"),
            r"^step 'join' \(test_joins.py:\d+\): keys that are compared must have one type, 'k' .* int64, 'rk' .* int",
        ),
        (
            lambda a, b: a.join(rf.from_arrow(_side(2, "rk", 9)).key_by("rk"), within="1s"),
            r"within= needs event time on both sides, the right one has none",
        ),
        (
            lambda a, b: a.join(rf.from_arrow(_side(2, "rk", 9)).key_by("rk"), window=rf.tumbling("1s")),
            r"window= needs event time on both sides, the right one has none",
        ),
        (
            lambda a, b: rf.from_arrow(_side(2, "k", 9)).key_by("k").join_asof(b),
            r"join_asof needs event time on both sides, the left one has none",
        ),
        (lambda a, b: a.join(_endless()), r"the right side never ends, .*give within="),
        (lambda a, b: _endless(None).join(b, within="1s"), r"the left side never ends and its event time has no max_"),
    ],
)
def test_mistakes_are_told_with_the_line_that_wrote_them(build: Any, match: str) -> None:
    a, b = _stream(_side(1, "k", 10)).key_by("k"), _stream(_side(2, "rk", 10)).key_by("rk")
    with pytest.raises(rf.PlanError, match=match):
        build(a, b)
    assert isinstance(_endless().join(a, within="1s"), JoinResult)


def test_columns_that_are_known_at_run_time_only_are_refused() -> None:
    a, b = _stream(_side(1, "k", 10)), _stream(_side(2, "rk", 10)).key_by("rk")
    joined = a.map_batches(lambda batch: batch).key_by("k").join(b, within="1s")
    with pytest.raises(rf.PlanError, match=r"^step 'join' \(.*\): the columns of the left side are known only at run"):
        rf.Flow("unknown", joined.collect()).plan()


def test_the_page_on_joins_runs() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "joins.md").read_text()
    namespace: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "joins.md", "exec"), namespace)
    rows = {name: namespace[name].to_arrow().num_rows for name in ("near", "minute", "valid", "kept", "whole", "named")}
    assert rows == {"near": 3, "minute": 3, "valid": 3, "kept": 5, "whole": 5, "named": 3}


@pytest.mark.parametrize("parallelism", [1, 2, 4])
def test_rows_are_looked_up_in_a_table_that_every_subtask_has(parallelism: int) -> None:
    """A row finds what is right or, where the table is not there yet, nothing; the next step goes on with its time."""
    data = _side(1, "k")
    table = pa.table({"id": np.arange(30), "name": [f"n{i}" for i in range(30)]})
    named = _stream(data).lookup(rf.from_arrow(table).key_by("id"), on="k")
    windows = named.key_by("k").window(rf.tumbling("60s")).agg(n=rf.count())
    result = rf.Flow("lookup", named.collect(name="rows"), windows.collect(name="n")).run(
        parallelism=parallelism, local=True, progress=False
    )
    found = result.table("rows")
    assert found.schema.names == ["k", "row", "t", "name"]
    assert sorted(found.column("row").to_pylist()) == data.column("row").to_pylist()
    for k, name in zip(found.column("k").to_pylist(), found.column("name").to_pylist(), strict=True):
        assert name is None or name == f"n{k}"
    assert sum(result.table("n").column("n").to_pylist()) == ROWS


def test_lookups_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """No row is lost or comes twice, and none finds what is not its own."""
    data = _side(1, "k")
    table = pa.table({"id": np.arange(40), "name": [f"n{i}" for i in range(40)]})
    failing = _stream(data).map_batches(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 1_500), schema=data.schema
    )
    flow = rf.Flow("lookup", failing.lookup(rf.from_arrow(table).key_by("id"), on="k").collect())
    result = flow.run(
        parallelism=2,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1ms", min_pause="0s"),
        config=rf.JobConfig(restart=rf.Restart.fixed(delay="0s")),
    )
    assert (tmp_path / "failed").exists()
    found = result.table()
    assert sorted(found.column("row").to_pylist()) == data.column("row").to_pylist()
    named = [r for r in found.to_pylist() if r["name"] is not None]
    assert named
    assert all(r["name"] == f"n{r['k']}" for r in named)


def test_mistakes_in_lookups_are_told() -> None:
    rows, table = _stream(_side(1, "k", 10)), _stream(_side(2, "rk", 10))
    with pytest.raises(rf.PlanError, match=r"^step 'lookup' \(test_joins.py:\d+\): the table must be keyed"):
        rows.lookup(table)  # type: ignore[arg-type]
    with pytest.raises(rf.PlanError, match=r"on= names the column 'rk', which is not among k, row, t"):
        rows.lookup(table.key_by("rk"))
    with pytest.raises(rf.PlanError, match=r"how= must be one of inner, left here, got 'full'"):
        rows.lookup(table.key_by("rk"), on="k", how="full")  # type: ignore[arg-type]
    with pytest.raises(rf.PlanError, match=r"must have one type, 't' of the left side"):
        rows.lookup(table.key_by("rk"), on="t")


@pytest.mark.parametrize("join", ["full", "window", "asof"])
def test_joins_go_on_at_another_parallelism(join: str, tmp_path: Path) -> None:
    """From the checkpoint of a run of two subtasks that failed, with three and from its files."""
    left, right = _side(1, "k"), _side(2, "rk", ROWS // 2)
    checkpoints = rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1ms", min_pause="0s")
    failing = _stream(left, 20).map_batches(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 1_500), schema=left.schema
    )
    flow, query = _flow(join, failing, _stream(right, 20))
    with pytest.raises(rf.JobFailedError):
        flow.run(
            parallelism=2,
            local=True,
            progress=False,
            checkpoints=checkpoints,
            config=rf.JobConfig(restart=rf.Restart.none(), watermark_interval="1ms"),
        )
    checkpoint = rf.read_checkpoint(str(tmp_path / "checkpoints" / "joined"))
    (step,) = (step for step in checkpoint.steps() if step.startswith("join"))
    assert all(checkpoint.table(step, side).num_rows for side in ("left", "right"))
    result = flow.run(parallelism=3, local=True, progress=False, checkpoints=checkpoints)
    assert _rows(result.table()) == _expected(query, left, right)
