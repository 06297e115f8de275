"""Graph -> plan: chains, edges, ids, combiners."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.ids import SubtaskId
from rayflow.errors import ConfigError, PlanError
from rayflow.plan import Plan
from rayflow.stream import Stream

ROWS = pa.table({"k": [1, 2, 3], "v": [10, 20, 30], "t": pa.array([0, 1, 2], pa.timestamp("us"))})


def rows() -> Stream:
    return rf.from_arrow(ROWS, event_time="t", max_delay="0s")


def plan_of(*sinks: object, parallelism: int = 2) -> Plan:
    return rf.Flow("test", *sinks).plan(parallelism=parallelism)  # type: ignore[arg-type]


def test_forward_steps_are_fused_into_one_chain() -> None:
    plan = plan_of(rows().filter(rf.col("v") > 5).select("k", "v").collect())
    assert [c.id for c in plan.chains] == ["from_arrow-1"]
    assert [o.id for o in plan.chains[0].operators] == ["filter-1", "select-1", "collect-1"]
    assert plan.edges == ()


def test_a_key_cuts_the_chain_and_the_combiner_goes_before_it() -> None:
    plan = plan_of(rows().key_by("k").window(rf.tumbling("1s")).agg(n=rf.count()).collect())
    assert [c.id for c in plan.chains] == ["from_arrow-1", "window-1"]
    assert [o.title for o in plan.chains[0].operators] == ["combine"]
    assert [str(e.exchange) for e in plan.edges] == ["hash(k)"]


def test_late_rows_need_the_raw_rows_so_there_is_no_combiner() -> None:
    windows = rows().key_by("k").window(rf.tumbling("1s")).agg(n=rf.count())
    plan = plan_of(windows.collect(), windows.late.collect())
    assert not any(o.title == "combine" for c in plan.chains for o in c.operators)
    assert sorted(e.tag for e in plan.edges) == ["late", "main", "main"]


def test_two_consumers_cut_the_chain() -> None:
    base = rows().filter(rf.col("v") > 5)
    plan = plan_of(base.collect(name="a"), base.select("k").collect(name="b"))
    assert [c.id for c in plan.chains] == ["from_arrow-1", "a", "select-1"]
    assert [e.exchange.kind for e in plan.edges] == ["forward", "forward"]


def test_a_forward_edge_has_one_channel_a_subtask_and_a_hash_edge_all_pairs() -> None:
    base = rows()
    plan = plan_of(base.collect(name="a"), base.key_by("k").map_batches(lambda b: b).collect(name="b"))
    by_kind = {e.exchange.kind: e for e in plan.edges}
    assert [(c.source.index, c.target.index) for c in plan.channels(by_kind["forward"])] == [(0, 0), (1, 1)]
    assert len(plan.channels(by_kind["hash"])) == 4


def test_another_parallelism_turns_a_forward_edge_into_a_rebalance() -> None:
    plan = plan_of(rows().map_batches(lambda b: b, parallelism=3).collect())
    assert {c.id: c.parallelism for c in plan.chains} == {"from_arrow-1": 2, "map_batches-1": 3, "collect-1": 2}
    assert [e.exchange.kind for e in plan.edges] == ["rebalance", "rebalance"]


def test_a_union_has_one_edge_an_input() -> None:
    plan = plan_of(rows().union(rows()).collect())
    assert [(e.source, e.input_index) for e in plan.edges] == [("from_arrow-1", 0), ("from_arrow-2", 1)]


def test_the_plan_is_the_same_every_time() -> None:
    flow = rf.Flow("x", rows().key_by("k").window(rf.tumbling("1s")).agg(n=rf.count()).collect())
    assert repr(flow.plan(parallelism=3).edges) == repr(flow.plan(parallelism=3).edges)
    assert [c.id for c in flow.plan().chains] == [c.id for c in flow.plan().chains]


def test_names_pin_ids_and_must_be_unique() -> None:
    plan = plan_of(rows().filter(rf.col("v") > 1, name="big").collect(name="out"))
    assert [o.id for o in plan.chains[0].operators] == ["big", "out"]
    with pytest.raises(PlanError, match="name='big' is given to 2 steps"):
        plan_of(rows().filter(rf.col("v") > 1, name="big").filter(rf.col("v") > 2, name="big").collect())
    with pytest.raises(PlanError, match="also the automatic id"):
        plan_of(rows().filter(rf.col("v") > 1, name="filter-1").filter(rf.col("v") > 2).collect())


def test_parallelism_must_fit_the_key_groups() -> None:
    with pytest.raises(ConfigError, match="between 1 and max_parallelism=128, got 129"):
        plan_of(rows().collect(), parallelism=129)


def test_the_topology_lists_every_subtask_and_channel() -> None:
    topology = plan_of(rows().key_by("k").window(rf.tumbling("1s")).agg(n=rf.count()).collect()).topology()
    assert set(topology.subtasks) == {SubtaskId(c, i) for c in ("from_arrow-1", "window-1") for i in range(2)}
    assert len(topology.channels) == 4
    assert topology.sources == {"from_arrow-1"}
    assert topology.keyed_operators == {"window-1"}


def test_explain_and_mermaid_show_chains_edges_and_keys() -> None:
    flow = rf.Flow("pretty", rows().key_by("k").window(rf.tumbling("1s")).agg(n=rf.count()).collect())
    text = flow.explain(parallelism=2)
    for piece in ("flow 'pretty'", "chain window-1 x2", "<- from_arrow-1 by hash(k)", "keyed by k", "event time 't'"):
        assert piece in text
    drawn = flow.to_mermaid(parallelism=2)
    assert drawn.startswith("flowchart LR")
    assert '-->|"hash(k)"|' in drawn


def test_two_sinks_at_one_place_are_refused(tmp_path: Path) -> None:
    base = rows()
    with pytest.raises(PlanError, match=r"'second'.*writes to '/data/out', where step 'first'.*writes already"):
        plan_of(base.write_parquet("/data/out", name="first"), base.write_parquet("/data/out/", name="second"))
    with pytest.raises(PlanError, match="place of its own"):
        plan_of(base.write_parquet("s3://b/out"), base.write_parquet("s3a://b/out"))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(PlanError, match="place of its own"):
        plan_of(base.write_parquet(f"{tmp_path}/out"), base.write_parquet(f"{tmp_path}/link"))
    once = base.write_parquet("/data/out")
    plan_of(once, once, base.write_parquet("/data/out/deeper"))
