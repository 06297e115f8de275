"""List and union state of a sink of one's own: dealt out row by row, or given to all, at another parallelism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.ids import CheckpointId
from rayflow.errors import JobFailedError
from rayflow.operators.base import Committer, RestoredState

SCHEMA = pa.schema([("v", pa.int64())])
SEEN = pa.schema([("subtask", pa.int64()), ("rows", pa.int64())])


@dataclass
class Told:
    """What the subtasks of the second run were given, by subtask."""

    listed: dict[int, list[int]] = field(default_factory=dict)
    united: dict[int, list[dict[str, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Keeps:
    """Keeps all its rows as list state, and says how many it has as union state."""

    told: Told

    @property
    def stateful(self) -> bool:
        return True

    def build(self) -> rf.SinkOperator:
        return KeepsOperator(self.told)

    def committer(self) -> Committer | None:
        return None


class KeepsOperator(rf.SinkOperator):
    def __init__(self, told: Told) -> None:
        self._told = told
        self._rows: list[pa.RecordBatch] = []

    def restore(self, states: Sequence[RestoredState]) -> None:
        for state in states:
            if state.name == "rows":
                self._rows += state.table.to_batches()
                self._told.listed.setdefault(self.ctx.subtask, []).extend(state.table["v"].to_pylist())
            else:
                self._told.united.setdefault(self.ctx.subtask, []).extend(state.table.to_pylist())

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._rows.append(batch)

    def snapshot(self, checkpoint: CheckpointId) -> rf.FrozenState:
        count = pa.record_batch([[self.ctx.subtask], [sum(b.num_rows for b in self._rows)]], schema=SEEN)
        return rf.FrozenState(
            (
                rf.FrozenTable("rows", tuple(self._rows), SCHEMA, spread="list"),
                rf.FrozenTable("counts", (count,), SEEN, spread="union"),
            )
        )


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (2, 2), (4, 2)])
def test_operator_state_at_another_parallelism(before: int, after: int, tmp_path: Path) -> None:
    failed: list[int] = []

    def fail(batch: pa.RecordBatch) -> pa.RecordBatch:
        if not failed and 900 in batch["v"].to_pylist():
            failed.append(1)
            raise RuntimeError("as told")
        return batch

    told = Told()
    rows = rf.from_arrow(pa.table({"v": list(range(1000))}, SCHEMA), splits=4, batch_rows=10)
    flow = rf.Flow("own", rows.map_batches(fail, schema=SCHEMA).rebalance().write(Keeps(told)))
    checkpoints = rf.CheckpointConfig(str(tmp_path), interval="5ms")
    config = rf.JobConfig(restart=rf.Restart.none(), batch_rows=20, inflight_bytes=4096)
    with pytest.raises(JobFailedError, match="as told"):
        flow.run(local=True, parallelism=before, checkpoints=checkpoints, config=config)
    assert told == Told(), "nothing was restored yet"
    flow.run(local=True, parallelism=after, checkpoints=checkpoints, config=config)
    listed = [v for values in told.listed.values() for v in values]
    assert len(listed) == len(set(listed)) > 0, "each row went to one subtask"
    assert set(told.listed) == set(range(after))
    sizes = [len(values) for values in told.listed.values()]
    if before != after:
        assert max(sizes) - min(sizes) <= before, "dealt out evenly"
        assert {s: sorted(c["subtask"] for c in seen) for s, seen in told.united.items()} == {
            s: list(range(before)) for s in range(after)
        }
    assert sum(c["rows"] for c in told.united[0]) == len(listed)


def test_what_is_no_sink_is_refused() -> None:
    with pytest.raises(rf.PlanError, match=r"step 'write' \(test_operator_state.py:.*int has no build"):
        rf.from_arrow(pa.table({"v": [1]})).write(3)  # type: ignore[arg-type]
