"""What a flow guarantees, and that one which gives less than was asked for says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.errors import GuaranteeWarning, PlanError
from rayflow.graph import Node
from rayflow.guarantees import Given, guarantees
from rayflow.operators.base import Guarantee
from rayflow.operators.sinks.printing import PrintSink
from rayflow.operators.sources.memory import ArrowSource
from rayflow.stream import Stream, StreamEnd

TABLE = pa.table({"v": [1, 2]})


@dataclass(frozen=True)
class Out:
    guarantee: Guarantee
    stateful = False

    def build(self) -> Any:
        return PrintSink(limit=1).build()

    def committer(self) -> None:
        return None


class Radio(ArrowSource):
    replayable = False


def sink(stream: Stream, guarantee: Guarantee, name: str = "out") -> StreamEnd:
    return StreamEnd(Node("write", inputs=(stream._input(),), operator=Out(guarantee), name=name))


def given(flow: rf.Flow, mode: str = "exactly_once") -> list[tuple[str, str, Given]]:
    return [(p.source.id, p.sink.id, p.given) for p in guarantees(flow.plan(), mode)]


def radio() -> Stream:
    return rf.read_source(Radio(TABLE), name="radio")


def test_the_weakest_of_source_mode_and_sink() -> None:
    table = rf.from_arrow(TABLE, name="table")
    both = table.union(radio())
    flow = rf.Flow("f", sink(table, "idempotent", "upserts"), sink(both, "exactly_once"), table.collect(name="kept"))
    assert sorted(given(flow)) == [
        ("radio", "out", Given.AT_MOST_ONCE),
        ("table", "kept", Given.EXACTLY_ONCE),
        ("table", "out", Given.EXACTLY_ONCE),
        ("table", "upserts", Given.IDEMPOTENT),
    ]
    assert {g for _, _, g in given(flow, "at_least_once")} == {Given.AT_LEAST_ONCE, Given.AT_MOST_ONCE}


def test_explain_tells_every_path() -> None:
    flow = rf.Flow("f", sink(rf.from_arrow(TABLE, name="table"), "at_least_once"))
    assert flow.explain().splitlines()[-2:] == [
        "guarantees with exactly-once checkpoints; without checkpoints at most once",
        "  table -> out: at least once: sink 'out' writes rows again after a failure",
    ]
    weaker = flow.explain(checkpoints=rf.CheckpointConfig("x", mode="at_least_once"))
    assert weaker.splitlines()[-2:] == ["guarantees with at-least-once checkpoints", "  table -> out: at least once"]


def test_a_flow_that_gives_less_than_is_asked_for_warns_by_name(tmp_path: Path) -> None:
    flow = rf.Flow("f", sink(rf.from_arrow(TABLE).union(rf.from_arrow(TABLE)), "at_least_once"))
    told = r"flow 'f' gives at least once and not exactly-once: sink 'out' writes rows again .*; choose another"
    with pytest.warns(GuaranteeWarning, match=told) as found:
        flow.run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path)))
    assert len(found) == 1, "once, whatever comes into it"
    lossy = rf.Flow("g", radio().collect())
    with pytest.warns(GuaranteeWarning, match="source 'radio' cannot be read again, so rows in flight are lost"):
        lossy.run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path), mode="at_least_once"))


def test_strict_refuses_it_and_what_is_printed_too(tmp_path: Path) -> None:
    strict = rf.CheckpointConfig(str(tmp_path), strict=True)
    table = rf.from_arrow(TABLE)
    refused: Sequence[StreamEnd] = (sink(table, "at_least_once"), table.print())
    for weak in refused:
        with pytest.raises(PlanError, match=r"writes rows again after a failure; .*CheckpointConfig\(strict=False\)"):
            rf.Flow("f", weak).run(local=True, checkpoints=strict)
    assert not list(tmp_path.iterdir()), "before anything is written"
    rf.Flow("f", table.collect()).run(local=True, checkpoints=strict)


def test_what_is_enough_or_only_shown_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rf.from_arrow(TABLE)
    rf.Flow("f", table.print()).run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path)))
    assert "v" in capsys.readouterr().out
    enough = rf.CheckpointConfig(str(tmp_path), mode="at_least_once")
    rf.Flow("g", sink(table, "at_least_once")).run(local=True, checkpoints=enough)
    rf.Flow("h", sink(table, "at_least_once")).run(local=True)
