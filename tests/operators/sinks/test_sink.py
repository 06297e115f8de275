"""`rf.Sink`: what a sink of one's own derives from, and what the engine makes of the little that it must say."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pytest

import rayflow as rf


class Into(rf.Sink):
    """Rows into a list, once their checkpoint is prepared."""

    guarantee = "at_least_once"

    def __init__(self, rows: list[Any]) -> None:
        self._rows = rows

    def build(self) -> rf.SinkOperator:
        return _Into(self._rows)

    def check(self, schema: pa.Schema) -> None:
        if "v" not in schema.names:
            raise rf.PlanError(f"the sink needs a column v, got {schema.names}")


class _Into(rf.SinkOperator):
    def __init__(self, rows: list[Any]) -> None:
        self._target = rows
        self._waiting: list[Any] = []

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._waiting += batch.column("v").to_pylist()

    def snapshot(self, checkpoint: int) -> rf.FrozenState:
        rows, self._waiting = self._waiting, []
        return rf.FrozenState(prepare=partial(self._prepare, rows))

    def _prepare(self, rows: list[Any]) -> Sequence[Any]:
        self._target.extend(rows)
        return ()


def test_a_sink_that_says_little_is_enough(tmp_path: Any) -> None:
    found: list[Any] = []
    flow = rf.Flow("f", rf.from_arrow(pa.table({"v": range(10)}), batch_rows=3).write(Into(found)))
    with pytest.warns(rf.GuaranteeWarning, match="sink 'write' writes rows again"):
        flow.run(local=True, progress=False, checkpoints=rf.CheckpointConfig(str(tmp_path), interval="1ms"))
    assert sorted(found) == list(range(10))
    assert "at least once: sink 'write' writes rows again" in flow.explain()


def test_columns_are_checked_while_building() -> None:
    with pytest.raises(rf.PlanError, match=r"step 'write' \(test_sink.py:\d+\): the sink needs a column v"):
        rf.from_arrow(pa.table({"w": [1]})).write(Into([]))


def test_a_flow_is_given_the_end_of_a_stream_and_not_a_sink() -> None:
    with pytest.raises(rf.PlanError, match=r"takes sinks, got Into; .*\.write\(sink\), and give what that returns"):
        rf.Flow("f", Into([]))  # type: ignore[arg-type]
