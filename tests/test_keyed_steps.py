"""Steps on a keyed stream, from the builder to the result: parallelism, back ends, checkpoints, restarts, messages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rayflow as rf
from tests.failing import FailsOnce, rows_of, run_with_checkpoints

BACK_ENDS: list[Literal["memory", "fs", "rocksdb"]] = ["memory", "fs", "rocksdb"]


def _data(rows: int = 6_000, keys: int = 200) -> pa.Table:
    rng = np.random.default_rng(5)
    return pa.table(
        {
            "k": rng.integers(0, keys, rows),
            "row": np.arange(rows),
            "v": pa.array(rng.integers(-50, 50, rows), mask=rng.random(rows) < 0.1),
            "t": pa.array(np.arange(rows) * 1_000_000, pa.timestamp("us")),
        }
    )


def _stream(table: pa.Table) -> rf.KeyedStream:
    return rf.from_arrow(table, event_time="t", max_delay="0s", batch_rows=500).key_by("k")


def add(state: pa.RecordBatch, rows: pa.RecordBatch) -> dict[str, Any]:
    """The sum of v, and the newer row in all else."""
    total = pc.add(pc.coalesce(state.column("v"), 0), pc.coalesce(rows.column("v"), 0))
    return {"row": rows.column("row"), "v": total, "t": rows.column("t")}


STEPS: dict[str, tuple[Callable[[rf.KeyedStream], rf.Stream], str]] = {
    "agg": (
        lambda s: s.agg(total=rf.sum("v"), n=rf.count(), hi=rf.max("v")),
        """select k, t, (sum(v) over w)::bigint total, count(*) over w n, max(v) over w hi from data
           window w as (partition by k order by row)""",
    ),
    "agg of sets": (
        lambda s: s.agg(many=rf.count_distinct("v"), best=rf.arg_max("row", "v"), least=rf.arg_min("v", "v")),
        """select k, t, count(distinct v) over w many,
                  (max({'v': v, 'row': row}) filter (v is not null) over w).row best, min(v) over w least
           from data window w as (partition by k order by row)""",
    ),
    "reduce": (
        lambda s: s.reduce(add),
        """select k, row, case when row_number() over w = 1 then v
                          else (sum(coalesce(v, 0)) over w)::bigint end v, t
           from data window w as (partition by k order by row)""",
    ),
    "deduplicate": (
        lambda s: s.deduplicate(),
        "select k, row, v, t from data qualify row_number() over (partition by k order by row) = 1",
    ),
    "top": (
        lambda s: s.top(2, by="v"),
        """select k, row, v, t, 1 + (select count(*) from data e where e.k = d.k and e.row < d.row and e.v >= d.v) rank
           from data d where v is not null and rank <= 2""",
    ),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("parallelism", [1, 2, 4])
def test_steps_equal_duckdb_at_every_parallelism(step: str, parallelism: int) -> None:
    build, query = STEPS[step]
    data = _data()
    flow = rf.Flow("steps", build(_stream(data)).collect())
    found = flow.run(parallelism=parallelism, local=True, progress=False).table().to_pylist()
    assert sorted(found, key=repr) == rows_of(query, data)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", BACK_ENDS)
def test_steps_go_on_from_a_checkpoint_as_if_nothing_had_happened(
    step: str, state: Literal["memory", "fs", "rocksdb"], tmp_path: Path
) -> None:
    build, query = STEPS[step]
    data = _data()
    failing = _stream(data).map_batches(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 2_000), schema=data.schema
    )
    flow = rf.Flow("steps", build(failing.key_by("k")).collect())
    config = rf.JobConfig(state=state, restart=rf.Restart.fixed(delay="0s"))
    assert run_with_checkpoints(flow, tmp_path, config) == rows_of(query, data)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_results_do_not_depend_on_how_the_flow_is_run(draw: st.DataObject) -> None:
    """Parallelism, batches, linger, back end, and where it fails."""
    build, query = STEPS[draw.draw(st.sampled_from(sorted(STEPS)), "step")]
    data = _data(draw.draw(st.integers(1, 300), "rows"), keys=draw.draw(st.sampled_from([1, 3, 40]), "keys"))
    batch_rows = draw.draw(st.sampled_from([1, 7, 64, 1_000]), "rows a batch of the source")
    stream = rf.from_arrow(data, event_time="t", max_delay="0s", batch_rows=max(batch_rows, data.num_rows // 40))
    config = rf.JobConfig(
        batch_rows=draw.draw(st.sampled_from([1, 50, 65_536]), "rows a batch of the exchange"),
        linger=draw.draw(st.sampled_from(["0s", "5ms"]), "linger"),
        state=draw.draw(st.sampled_from(BACK_ENDS), "state"),
        restart=rf.Restart.fixed(delay="0s"),
    )
    parallelism = draw.draw(st.sampled_from([1, 2, 4]), "parallelism")
    after = draw.draw(st.integers(0, data.num_rows - 1), "fails behind row")
    with tempfile.TemporaryDirectory() as folder:
        failing = stream.map_batches(FailsOnce, fn_constructor_args=(f"{folder}/failed", after), schema=data.schema)
        flow = rf.Flow("steps", build(failing.key_by("k")).collect())
        checkpoints = rf.CheckpointConfig(f"{folder}/checkpoints", interval="1ms", min_pause="0s")
        result = flow.run(parallelism=parallelism, local=True, progress=False, checkpoints=checkpoints, config=config)
        assert Path(folder, "failed").exists()
    assert sorted(result.table().to_pylist(), key=repr) == rows_of(query, data)


@pytest.mark.parametrize("step", STEPS)
def test_steps_equal_duckdb_with_state_larger_than_memory(step: str, tmp_path: Path) -> None:
    """Far more keys than fit in the bound; those that are not in memory come from disk."""
    build, query = STEPS[step]
    data = _data(100_000, keys=50_000)
    stream = rf.from_arrow(data, event_time="t", max_delay="0s", batch_rows=5_000).key_by("k")
    result = rf.Flow("large", build(stream).collect()).run(
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="100ms"),
        config=rf.JobConfig(state="rocksdb", state_memory_bytes=1024 * 1024),
    )
    assert sorted(result.table().to_pylist(), key=repr) == rows_of(query, data)


def test_event_time_goes_on_behind_running_aggregates() -> None:
    """A window over them fires, with the last total of each key in it."""
    data = _data(1_000, keys=3)
    totals = _stream(data).agg(total=rf.sum("v"))
    windows = totals.key_by("k").window(rf.tumbling("100s")).agg(end=rf.last("total"), n=rf.count())
    found = rf.Flow("both", windows.collect()).run(parallelism=2, local=True, progress=False).table().to_pylist()
    assert sum(row["n"] for row in found) == 1_000
    last = {row["k"]: row["end"] for row in sorted(found, key=lambda row: row["window_start"])}
    assert last == {k: sum(v for i, v in _pairs(data) if i == k and v is not None) for k in range(3)}


def _pairs(data: pa.Table) -> list[tuple[int, Any]]:
    return list(zip(data.column("k").to_pylist(), data.column("v").to_pylist(), strict=True))


def _passing(data: pa.Table, within_s: int) -> list[int]:
    last: dict[int, int] = {}
    found = []
    for at, key in enumerate(data.column("k").to_pylist()):
        if key not in last or at >= last[key] + within_s:
            last[key] = at
            found.append(at)
    return found


@pytest.mark.parametrize("state", BACK_ENDS)
@pytest.mark.parametrize("parallelism", [1, 2])
def test_deduplicate_within_goes_on_from_a_checkpoint(
    state: Literal["memory", "fs", "rocksdb"], parallelism: int, tmp_path: Path
) -> None:
    """Keys are forgotten as event time goes on; no row is late in order of time."""
    data = _data(6_000, keys=50)
    failing = _stream(data).map_batches(
        FailsOnce, fn_constructor_args=(str(tmp_path / "failed"), 2_000), schema=data.schema
    )
    step = failing.key_by("k").deduplicate(within="100s")
    flow = rf.Flow("within", step.collect(name="passed"), step.late.collect(name="late"))
    result = flow.run(
        parallelism=parallelism,
        local=True,
        progress=False,
        checkpoints=rf.CheckpointConfig(str(tmp_path / "checkpoints"), interval="1ms", min_pause="0s"),
        config=rf.JobConfig(state=state, restart=rf.Restart.fixed(delay="0s")),
    )
    assert (tmp_path / "failed").exists()
    assert sorted(result.table("passed").column("row").to_pylist()) == _passing(data, 100)
    assert result.table("late").num_rows == 0


def test_steps_are_explained_with_their_keys() -> None:
    keyed = _stream(_data(10))
    sinks = [
        keyed.agg(n=rf.count(), emit="batch").collect(name="a"),
        keyed.deduplicate(within="10m").collect(name="b"),
        keyed.top(3, by="v", descending=False).collect(name="c"),
        keyed.reduce(add).collect(name="d"),
    ]
    text = rf.Flow("all", *sinks).explain()
    for line in (
        "agg by k: n, once a batch",
        "deduplicate by k within 10m",
        "top 3 by k: lowest v",
        "reduce by k: add",
        "state, keyed by k",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda k: k.agg(), r"^step 'agg' \(test_keyed_steps.py:\d+\): agg\(\) needs at least one aggregate"),
        (lambda k: k.agg(n=rf.sum("nope")), r"^step 'agg' \(test_keyed_steps.py:\d+\): .*'nope'"),
        (lambda k: k.agg(n=rf.count(), emit="x"), r"^step 'agg' .*emit"),
        (lambda k: k.top(0, by="v"), r"^step 'top' \(test_keyed_steps.py:\d+\): top\(n\) must be"),
        (lambda k: k.top(1, by="nope"), r"^step 'top' .*needs a column of that name"),
        (lambda k: k.deduplicate(within="0s"), r"^step 'deduplicate' .*longer than zero"),
        (lambda k: k.deduplicate(within="soon"), r"deduplicate\(within\) must be a duration"),
        (lambda k: k.reduce(None), r"^step 'reduce' .*needs a function"),
    ],
)
def test_mistakes_are_told_with_the_line_that_wrote_them(build: Any, match: str) -> None:
    with pytest.raises(rf.PlanError, match=match):
        build(_stream(_data(10)))
    with pytest.raises(rf.PlanError, match="needs event time"):
        rf.from_arrow(_data(10)).key_by("k").deduplicate(within="1s")
