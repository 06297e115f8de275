"""Broadcast state: every subtask has it in full, keyed rows only read it, and it is frozen once."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import rayflow as rf
from rayflow.errors import PlanError, UserCodeError
from rayflow.operators.base import MAIN, RestoredState
from rayflow.operators.process import Process
from tests.operators.helpers import frozen, opened, rows

I64 = pa.int64()


class Priced(rf.BroadcastProcess):
    """Rows of the second input set prices, rows of the first are priced."""

    output = pa.schema([("k", I64), ("total", pa.float64())])
    prices = rf.BroadcastState(pa.string(), pa.float64())
    spent = rf.ReducingState(pa.float64(), "sum", default=0.0)

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        self.spent.add(ctx, pc.fill_null(self.prices.get(batch["item"]), 0.0))
        ctx.emit({"k": ctx.keys["k"], "total": self.spent.get(ctx)})

    def process_broadcast(self, rows: pa.RecordBatch, ctx: Any) -> None:
        self.prices.put(rows["item"], rows["price"])


class Writes(Priced):
    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        self.prices["a"] = 1.0


class Scalar(rf.BroadcastProcess):
    rules = rf.BroadcastState(I64, pa.string())

    def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
        ctx.emit({"rule": self.rules.get(key, "none"), "n": len(self.rules)})

    def process_broadcast(self, rows: pa.RecordBatch, ctx: Any) -> None:
        for row in rows.to_pylist():
            if row["rule"] is None:
                del self.rules[row["k"]]
            else:
                self.rules[row["k"]] = row["rule"]
        if ctx.subtask == 0:
            ctx.emit({"rule": ["changed"], "n": [len(self.rules)]})


def made(description: rf.KeyedProcess) -> Process:
    return Process(keys=("k",), description=description)


PRICES = pa.record_batch({"item": ["a", "b", "a"], "price": [1.0, 2.0, 3.0]})


def test_rows_of_both_inputs() -> None:
    operator, out = opened(made(Priced()))
    operator.process(pa.record_batch({"k": [1], "item": ["a"]}), 0)
    operator.process(PRICES, 1)
    operator.process(pa.record_batch({"k": [1, 2, 1], "item": ["a", "b", "c"]}), 0)
    assert rows(out.batches[MAIN]) == [
        {"k": 1, "total": 0.0},
        {"k": 1, "total": 3.0},
        {"k": 2, "total": 2.0},
    ]


def test_python_values_and_output_of_one_subtask() -> None:
    operator, out = opened(made(Scalar()))
    operator.process(pa.record_batch({"k": [1, 2, 1], "rule": ["x", "y", None]}), 1)
    operator.process(pa.record_batch({"k": [2, 1]}), 0)
    assert rows(out.batches[MAIN]) == [
        {"rule": "changed", "n": 1},
        {"rule": "y", "n": 1},
        {"rule": "none", "n": 1},
    ]


@pytest.mark.parametrize("parallelism", [1, 2, 4])
def test_one_copy_is_frozen_and_all_subtasks_have_it_again(parallelism: int) -> None:
    states: list[RestoredState] = []
    for subtask in range(parallelism):
        operator, _ = opened(made(Priced()), subtask, parallelism)
        operator.process(PRICES, 1)
        states += [s for s in frozen(operator) if s.name == "prices"]
    assert [s.table.to_pylist() for s in states] == [[{"map_key": "a", "value": 3.0}, {"map_key": "b", "value": 2.0}]]
    for subtask in range(3):
        operator, out = opened(made(Priced()), subtask, 3)
        operator.restore(states)
        operator.process(pa.record_batch({"k": [1], "item": ["b"]}), 0)
        assert rows(out.batches[MAIN]) == [{"k": 1, "total": 2.0}]


def test_a_state_that_is_declared_no_more_stays_in_the_checkpoints() -> None:
    class Later(Scalar):
        pass

    first, _ = opened(made(Scalar()))
    first.process(pa.record_batch({"k": [1], "rule": ["x"]}), 1)
    later, _ = opened(made(Priced()))
    later.restore(frozen(first))
    later.process(PRICES, 1)
    again, out = opened(made(Later()))
    again.restore([s for s in frozen(later) if s.name != "prices"])
    again.process(pa.record_batch({"k": [1]}), 0)
    assert rows(out.batches[MAIN]) == [{"rule": "x", "n": 1}]
    promised = made(Scalar()).state_schemas(pa.schema([("k", I64)]))
    assert promised is not None
    assert promised["rules"] == pa.schema([("map_key", I64), ("value", pa.string())])


def test_keyed_rows_only_read() -> None:
    operator, _ = opened(made(Writes()))
    with pytest.raises(UserCodeError, match="step 'under test' subtask 0/1: the broadcast state 'prices' is read-only"):
        operator.process(pa.record_batch({"k": [1], "item": ["a"]}), 0)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pa.record_batch({"item": [None, "b"], "price": [1.0, 2.0]}), "got 1 null keys"),
        (pa.record_batch({"item": ["a"], "price": ["x"]}), "holds double, got string"),
        (pa.record_batch({"item": [1], "price": [1.0]}), "holds string, got int64"),
    ],
)
def test_wrong_values_are_named(batch: pa.RecordBatch, message: str) -> None:
    operator, _ = opened(made(Priced()))
    with pytest.raises(UserCodeError, match=f"the broadcast state 'prices' {message}"):
        operator.process(batch, 1)


def test_mistakes_are_found_while_building() -> None:
    class Lonely(rf.KeyedProcess):
        rules = rf.BroadcastState(I64, I64)

        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None: ...

    class Deaf(rf.BroadcastProcess):
        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None: ...

    stream = rf.from_arrow(pa.table({"k": [1], "item": ["a"]}))
    with pytest.raises(PlanError, match=r"declares the BroadcastState 'rules'; derive it from rf.BroadcastProcess"):
        stream.key_by("k").process(Lonely)
    with pytest.raises(PlanError, match="no process_broadcast"):
        stream.key_by("k").connect(stream).process(Deaf)
    with pytest.raises(PlanError, match=r"needs a second stream; write keyed.connect\(other\)"):
        stream.key_by("k").process(Priced)
    with pytest.raises(PlanError, match="needs an rf.BroadcastProcess"):
        stream.key_by("k").connect(stream).process(Lonely)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="expected a stream, got int"):
        stream.key_by("k").connect(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("parallelism", [1, 2, 4])
@pytest.mark.parametrize("by_hand", [True, False])
def test_every_subtask_sees_every_row_once(parallelism: int, by_hand: bool) -> None:
    class Counts(rf.BroadcastProcess):
        seen = rf.BroadcastState(I64, I64)

        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None: ...

        def process_broadcast(self, rows: pa.RecordBatch, ctx: Any) -> None:
            ctx.emit({"subtask": [ctx.subtask] * rows.num_rows, "v": rows["v"]})

    keyed = rf.from_arrow(pa.table({"k": list(range(20))}), splits=3).key_by("k")
    other = rf.from_arrow(pa.table({"v": list(range(10))}), splits=2)
    stream = keyed.connect(other.broadcast() if by_hand else other).process(Counts)
    table = rf.Flow("seen", stream.collect()).run(local=True, parallelism=parallelism).table()
    found = sorted(zip(table["subtask"].to_pylist(), table["v"].to_pylist(), strict=True))
    assert found == [(s, v) for s in range(parallelism) for v in range(10)]
