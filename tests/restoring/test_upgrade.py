"""A rolling upgrade: stop with a savepoint, change the flow, dry run, restart; and savepoints across back ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.restore_plan import Verdict, restore_plan
from rayflow.storage import savepoint_copy
from tests.restoring import flows
from tests.restoring.stopping import manifest_in, newest, run, savepoint_of

Backend = Literal["memory", "fs", "rocksdb"]
DIGITS = 5


class Before(flows.Totals):
    """Sums by key; and of every key the values by their last digit, and all of them in a list."""

    digits = rf.MapState(pa.int64(), pa.int64())
    everything = rf.ListState(pa.int64())

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        super().process_batch(batch, ctx)
        digits = pa.array([v % DIGITS for v in batch["v"].to_pylist()], pa.int64())
        self.digits.put(ctx, digits, batch["v"])
        self.everything.append(ctx, batch["v"])


class After(Before):
    """With the highest value so far: a new nullable column of the state, and of the output."""

    output = pa.schema([*flows.Totals.output, ("highest", pa.int64()), ("ups", pa.int64())])
    highest = rf.ReducingState(pa.int64(), "max")
    ups = rf.ReducingState(pa.int64(), "sum", default=0, ttl="10d")

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        self.highest.add(ctx, batch["v"])
        self.ups.add(ctx, pa.array([1] * batch.num_rows, pa.int64()))
        super().process_batch(batch, ctx)

    def emit(self, ctx: Any) -> None:
        keys = ctx.keys["k"]
        ctx.emit(
            {
                "k": keys,
                "subtask": pa.array([ctx.subtask] * len(keys), pa.int64()),
                "n": self.n.get(ctx),
                "total": self.total.get(ctx),
                "highest": self.highest.get(ctx),
                "ups": self.ups.get(ctx),
            }
        )


def config(state: Backend) -> rf.JobConfig:
    return rf.JobConfig(max_parallelism=flows.GROUPS, batch_rows=64, inflight_bytes=4096, state=state)


def before() -> rf.Flow:
    return rf.Flow("upgrade", flows.source().key_by("k").process(Before, name="totals").collect(name="rows"))


def after() -> rf.Flow:
    """A new step behind, with state of its own, and another sink: the old one took rows without the new columns."""
    totals = flows.source().key_by("k").process(After, name="totals")
    counted = totals.key_by("k").agg(emitted=rf.count(), name="emitted")
    return rf.Flow("upgrade", totals.collect(name="more"), counted.collect(name="counts"))


BACKENDS: list[tuple[Backend, Backend]] = [("fs", "rocksdb"), ("rocksdb", "fs"), ("fs", "memory")]


@pytest.mark.parametrize(("old", "new"), BACKENDS)
def test_a_rolling_upgrade_is_exact(old: Backend, new: Backend, tmp_path: Path) -> None:
    stopped = run(before(), tmp_path / "a", parallelism=2, rounds=25, config=config(old))
    assert stopped.status == "stopped"
    first = stopped.table("rows")
    url = savepoint_of(tmp_path / "a", "upgrade", tmp_path / "savepoint")
    assert {h.format for sub in manifest_in(tmp_path / "savepoint").subtasks for h in sub.states} == {"arrow"}

    dry = restore_plan(after(), url, parallelism=3, config=config(new))
    assert [p for p in dry.problems if "'rows'" in p] == list(dry.problems), "the old sink is gone, and nothing else"
    dry = restore_plan(after(), url, parallelism=3, config=config(new), allow_dropped=["rows"])
    assert not dry.refused
    found = {(line.step, line.state): line.verdict for line in dry.lines}
    assert found["totals", "values"] is Verdict.CHANGED
    assert found["totals", "ups"] is Verdict.NEW
    assert found["rows", "rows"] is Verdict.DROPPED

    checkpoints = None if new == "memory" else tmp_path / "b"
    result = run(after(), checkpoints, parallelism=3, start=url, config=config(new), allow_dropped=["rows"])
    assert result.status == "finished"
    rest = result.table("more")
    assert first.num_rows + rest.num_rows == rows_in_batches(first, rest)
    last = flows.last_of(rest)
    assert {key: total for key, (_, total) in last.items()} == {k: flows.total(k) for k in range(flows.KEYS)}
    highest: dict[int, int] = {}
    for row in rest.to_pylist():
        assert row["highest"] is not None, "set by the rows after the upgrade"
        highest[row["k"]] = max(highest.get(row["k"], 0), row["highest"])
    assert highest == {k: max(range(k, flows.ROWS, flows.KEYS)) for k in range(flows.KEYS)}
    ups = {row["k"]: row["ups"] for row in rest.sort_by("n").to_pylist()}
    assert sum(ups.values()) == result.metrics["rows_in"], "counted from the upgrade on"
    counts = {row["k"]: row["emitted"] for row in result.table("counts").sort_by("emitted").to_pylist()}
    assert sum(counts.values()) == rest.num_rows


def rows_in_batches(first: pa.Table, rest: pa.Table) -> int:
    """Every batch emits one row a key: none is given twice and none is lost over the upgrade."""
    distinct = {(row["k"], row["n"]) for table in (first, rest) for row in table.to_pylist()}
    return len(distinct)


@pytest.mark.parametrize(("old", "new"), [("fs", "rocksdb"), ("rocksdb", "rocksdb"), ("rocksdb", "fs")])
def test_maps_and_lists_go_through_savepoints_across_back_ends(old: Backend, new: Backend, tmp_path: Path) -> None:
    run(before(), tmp_path / "a", parallelism=2, rounds=25, config=config(old))
    native = {h.format for sub in newest(tmp_path / "a", "upgrade").subtasks for h in sub.states}
    assert ("rocksdb" in native) == (old == "rocksdb")
    url = savepoint_of(tmp_path / "a", "upgrade", tmp_path / "first")
    run(before(), tmp_path / "b", parallelism=3, start=url, config=config(new))
    savepoint_of(tmp_path / "b", "upgrade", tmp_path / "second")
    taken = rf.read_checkpoint(str(tmp_path / "second"))
    lists: dict[int, list[int]] = {}
    for row in taken.table("totals", "everything").sort_by("position").to_pylist():
        lists.setdefault(row["k"], []).append(row["value"])
    assert {k: sorted(v) for k, v in lists.items()} == {
        k: list(range(k, flows.ROWS, flows.KEYS)) for k in range(flows.KEYS)
    }
    maps = {(row["k"], row["map_key"]) for row in taken.table("totals", "digits").to_pylist()}
    assert maps == {(v % flows.KEYS, v % DIGITS) for v in range(flows.ROWS)}
    assert taken.table("totals", "digits").num_rows == len(maps)


def test_states_that_are_not_declared_any_more_are_kept(tmp_path: Path) -> None:
    run(before(), tmp_path / "a", rounds=20, config=config("fs"))
    url = savepoint_of(tmp_path / "a", "upgrade", tmp_path / "first")
    fewer = rf.Flow("upgrade", flows.source().key_by("k").process(flows.Totals, name="totals").collect(name="rows"))
    dry = restore_plan(fewer, url, config=config("fs"))
    assert not dry.refused
    assert {line.state for line in dry.lines if line.verdict is Verdict.KEPT} == {"digits", "everything"}
    run(fewer, tmp_path / "b", parallelism=3, start=url, rounds=15, config=config("fs"))
    there = rf.read_checkpoint(url)
    again = rf.read_checkpoint(savepoint_of(tmp_path / "b", "upgrade", tmp_path / "second"))
    for state in ("digits", "everything"):
        order = [(name, "ascending") for name in there.schema("totals", state).names]
        kept = again.table("totals", state).sort_by(order)
        assert kept.to_pylist() == there.table("totals", state).sort_by(order).to_pylist()


def test_an_export_comes_in_chunks_and_never_as_none() -> None:
    schema = pa.schema([("k", pa.int64())])
    batch = pa.record_batch([pa.array(range(10))], schema=schema)
    assert [t.num_rows for t in savepoint_copy._chunks(iter(()), schema)] == [0]
    many = savepoint_copy._chunks(iter([batch] * 5), schema, rows_max=20)
    assert [t.num_rows for t in many] == [20, 20, 10]
