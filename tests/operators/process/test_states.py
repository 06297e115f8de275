"""States of a `KeyedProcess` at operator level: whole batches and key by key, against a model in plain Python."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import rayflow as rf
from rayflow.operators.base import MAIN, Operator
from rayflow.operators.process import Process
from rayflow.operators.process_operator import ProcessOperator
from tests.operators.helpers import frozen, opened, rows

I64 = pa.int64()
OUT = pa.schema([("k", pa.string()), ("last", I64), ("total", I64), ("low", I64), ("mean", pa.float64()),
                 ("seen", pa.list_(I64)), ("of", I64)])  # fmt: skip


def lift(value: int) -> dict[str, int]:
    return {"sum": value, "n": 1}


def merge(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {"sum": a["sum"] + b["sum"], "n": a["n"] + b["n"]}


def mean(a: dict[str, int]) -> float:
    return a["sum"] / a["n"]


ACCUMULATOR = pa.struct([("sum", I64), ("n", I64)])


class States(rf.KeyedProcess):
    last = rf.ValueState(I64, default=-1)
    total = rf.ReducingState(I64, "sum", default=0)
    low = rf.ReducingState(I64, min)
    average = rf.AggregatingState(ACCUMULATOR, lift=lift, merge=merge, result=mean, output=pa.float64())
    seen = rf.ListState(I64)
    by_kind = rf.MapState(I64, I64)


class Batched(States):
    """For every key of a batch one row of what there was before, then the batch is added."""

    output = OUT

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
        values = batch["v"]
        last = np.zeros(ctx.keys.num_rows, np.int64)
        last[ctx.index] = values.to_numpy()
        kinds = pa.array(np.full(batch.num_rows, 7))
        ctx.emit(
            {
                "k": ctx.keys["k"],
                "last": self.last.get(ctx),
                "total": self.total.get(ctx),
                "low": self.low.get(ctx),
                "mean": self.average.get(ctx),
                "seen": self.seen.get(ctx),
                "of": self._of(ctx, kinds),
            }
        )
        self.last.set(ctx, last)
        self.total.add(ctx, values)
        self.low.add(ctx, values)
        self.average.add(ctx, values)
        self.seen.append(ctx, values)
        self.by_kind.put(ctx, kinds, values)
        self._reset(ctx)

    def _of(self, ctx: Any, kinds: pa.Array) -> pa.Array:
        found = self.by_kind.get(ctx, kinds)
        first = np.zeros(ctx.keys.num_rows, np.int64)
        first[ctx.index] = np.arange(len(ctx.index))
        return found.take(pa.array(first))

    def _reset(self, ctx: Any) -> None:
        """Keys whose last value is divisible by 10 forget everything."""
        reset = pc.equal(pc.bit_wise_and(self.last.get(ctx), 7), 0)
        for state in (self.last, self.total, self.low, self.average, self.seen, self.by_kind):
            state.clear(ctx, reset)


class ByKey(States):
    output = OUT

    def process(self, key: str, rows: pa.RecordBatch, ctx: Any) -> None:
        values = rows["v"].to_pylist()
        ctx.emit(
            {
                "k": key,
                "last": self.last.value,
                "total": self.total.value,
                "low": self.low.value,
                "mean": self.average.value,
                "seen": self.seen.get(),
                "of": self.by_kind.get(7),
            }
        )
        for value in values:
            self.total.add(value)
            self.low.add(value)
            self.average.add(value)
            self.seen.append(value)
            self.by_kind[7] = value
        self.last.update(values[-1])
        if self.last.value & 7 == 0:
            self.last.clear()
            self.total.clear()
            self.low.clear()
            self.average.clear()
            self.seen.clear()
            self.by_kind.clear()


def batches(seed: int, n: int = 12) -> list[pa.RecordBatch]:
    random = np.random.default_rng(seed)
    return [
        pa.record_batch(
            {
                "k": pa.array([None if k == 0 else f"k{k}" for k in random.integers(0, 6, size)], pa.string()),
                "v": pa.array(random.integers(-50, 50, size)),
            }
        )
        for size in random.integers(1, 40, n)
    ]


def model(found: list[pa.RecordBatch]) -> list[dict[str, Any]]:
    state: dict[Any, list[int]] = defaultdict(list)
    result = []
    for batch in found:
        new: dict[Any, list[int]] = defaultdict(list)
        for row in batch.to_pylist():
            new[row["k"]].append(row["v"])
        for key, values in new.items():
            seen = state[key]
            result.append(
                {
                    "k": key,
                    "last": seen[-1] if seen else -1,
                    "total": sum(seen),
                    "low": min(seen) if seen else None,
                    "mean": sum(seen) / len(seen) if seen else None,
                    "seen": list(seen),
                    "of": seen[-1] if seen else None,
                }
            )
            seen += values
            if values[-1] & 7 == 0:
                seen.clear()
    return result


def factory(description: rf.KeyedProcess, schema: pa.Schema | None = None) -> Process:
    return Process(keys=("k",), description=description, schema=schema)


def again(operator: Operator, made: Process) -> tuple[Operator, Any]:
    """The operator that is built from a snapshot of this one."""
    states = frozen(operator)
    operator.close()
    restored, out = opened(made)
    restored.restore(states)
    return restored, out


@pytest.mark.parametrize("description", [Batched(), ByKey()], ids=["batched", "by key"])
@pytest.mark.parametrize("restore_every", [None, 1, 4])
def test_all_kinds_of_state_equal_the_model(description: rf.KeyedProcess, restore_every: int | None) -> None:
    for seed in range(4):
        given, found = batches(seed), []
        made = factory(description, given[0].schema if seed % 2 else None)
        operator, out = opened(made)
        for i, batch in enumerate(given):
            operator.process(batch, 0)
            found += out.batches.pop(MAIN, [])
            if restore_every is not None and i % restore_every == 0:
                operator, out = again(operator, made)
        assert rows(found) == model(given), f"seed {seed}"


def test_a_snapshot_does_not_see_what_comes_after_it() -> None:
    """A3: the same states restored twice give the same, whatever the first operator went on to do."""
    given = batches(9)
    made = factory(Batched())
    operator, _ = opened(made)
    for batch in given[:6]:
        operator.process(batch, 0)
    states = frozen(operator)
    for batch in given[6:]:
        operator.process(batch, 0)
    restored, out = opened(made)
    restored.restore(states)
    for batch in given[6:]:
        restored.process(batch, 0)
    assert rows(out.batches[MAIN]) == model(given)[len(model(given[:6])) :]


def test_tables_in_a_checkpoint_are_those_documented() -> None:
    operator, _ = opened(factory(Batched()))
    operator.process(pa.record_batch({"k": ["a"], "v": [3]}), 0)
    tables = {state.name: state.table for state in frozen(operator)}
    assert set(tables) == {"values", "seen", "by_kind", "timers", "__keys"}
    assert tables["values"].to_pylist() == [{"k": "a", "last": 3, "total": 3, "low": 3, "average": {"sum": 3, "n": 1}}]
    assert tables["seen"].to_pylist() == [{"k": "a", "position": 0, "value": 3}]
    assert tables["by_kind"].to_pylist() == [{"k": "a", "map_key": 7, "value": 3}]
    assert tables["timers"].schema.names == ["k", "time", "kind"]


def test_state_schemas_are_those_frozen() -> None:
    schema = pa.schema([("k", pa.dictionary(pa.int8(), pa.string())), ("v", I64)])
    made = factory(Batched())
    assert made.state_schemas(None) is None
    operator, _ = opened(made)
    operator.process(
        pa.record_batch({"k": pa.array(["a"]).dictionary_encode().cast(schema.field(0).type), "v": [3]}), 0
    )
    found = {s.name: s.table.schema for s in frozen(operator)}
    promised = made.state_schemas(schema)
    assert promised is not None
    assert {n: [(f.name, f.type) for f in s] for n, s in promised.items()} == {
        n: [(f.name, f.type) for f in s] for n, s in found.items()
    }


def test_names_that_a_key_column_has_get_a_line_behind() -> None:
    class Seen(rf.KeyedProcess):
        seen = rf.ListState(I64)

        def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
            self.seen.append(ctx, batch["v"])

    made = Process(keys=("kind", "value"), description=Seen())
    operator, _ = opened(made)
    operator.process(pa.record_batch({"kind": [1], "value": [2], "v": [3]}), 0)
    tables = {s.name: s.table for s in frozen(operator)}
    assert tables["seen"].to_pylist() == [{"kind": 1, "value": 2, "position": 0, "value_": 3}]
    assert tables["timers"].schema.names == ["kind", "value", "time", "kind_"]


def test_keys_that_were_only_asked_for_leave_no_row() -> None:
    class Reads(rf.KeyedProcess):
        n = rf.ValueState(I64, default=0)

        def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
            self.n.set(ctx, self.n.get(ctx), mask=pc.equal(ctx.keys["k"], "a"))

    operator, _ = opened(factory(Reads()))
    operator.process(pa.record_batch({"k": ["a", "b", "c"]}), 0)
    (values,) = [s.table for s in frozen(operator) if s.name == "values"]
    assert values.to_pylist() == [{"k": "a", "n": 0}]


def test_positions_of_list_elements_ascend_after_a_rescale() -> None:
    """The elements of two old subtasks in one new one: what is appended then comes behind both."""

    class Appends(rf.KeyedProcess):
        seen = rf.ListState(I64)

        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
            self.seen.extend(rows["v"].to_pylist())
            ctx.emit({"k": key, "seen": self.seen.get()})

    made = factory(Appends())
    one, _ = opened(made, 0, 2)
    two, _ = opened(made, 1, 2)
    one.process(pa.record_batch({"k": [1] * 5, "v": [0, 1, 2, 3, 4]}), 0)
    two.process(pa.record_batch({"k": [2], "v": [10]}), 0)
    whole, out = opened(made)
    whole.restore([*frozen(one), *frozen(two)])
    whole.process(pa.record_batch({"k": [2, 1], "v": [11, 5]}), 0)
    assert rows(out.batches[MAIN]) == [{"k": 2, "seen": [10, 11]}, {"k": 1, "seen": [0, 1, 2, 3, 4, 5]}]


def test_vectorised_functions_see_arrays_and_keep_the_order() -> None:
    calls = []

    def join(a: pa.Array, b: pa.Array) -> pa.Array:
        calls.append(len(a))
        return pc.binary_join_element_wise(a, b, "")

    class Joined(rf.KeyedProcess):
        text = rf.ReducingState(pa.string(), join, vectorized=True)

        def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
            self.text.add(ctx, batch["v"])
            ctx.emit({"k": ctx.keys["k"], "text": self.text.get(ctx)})

    operator, out = opened(factory(Joined()))
    letters = [chr(97 + i % 26) for i in range(1000)]
    operator.process(pa.record_batch({"k": [i % 3 for i in range(1000)], "v": letters}), 0)
    operator.process(pa.record_batch({"k": [1, 0], "v": ["!", None]}), 0)
    found = rows(out.batches[MAIN])
    assert [row["text"] for row in found[:3]] == ["".join(letters[i::3]) for i in range(3)]
    assert found[3:] == [{"k": 1, "text": "".join(letters[1::3]) + "!"}, {"k": 0, "text": "".join(letters[0::3])}]
    assert len(calls) < 14, "as many calls as the logarithm of the rows of a key"


def test_time_to_live_by_the_wall_clock() -> None:
    class Sessions(rf.KeyedProcess):
        output = pa.schema([("n", I64), ("seen", pa.list_(I64)), ("of", I64)])
        n = rf.ValueState(I64, default=0, ttl="10s")
        seen = rf.ListState(I64, ttl="10s")
        of = rf.MapState(I64, I64, ttl="10s")

        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
            (value,) = rows["v"].to_pylist()
            ctx.emit({"n": self.n.value, "seen": self.seen.get(), "of": len(self.of)})
            self.n.update(self.n.value + 1)
            self.seen.append(value)
            self.of[value] = value

    clock = [100.0]
    operator, out = opened(factory(Sessions()))
    assert isinstance(operator, ProcessOperator)
    object.__setattr__(operator.ctx, "wall_time", lambda: clock[0])
    found = []
    for time in (100.0, 106.0, 112.0, 121.9, 140.0):
        clock[0] = time
        operator.process(pa.record_batch({"k": [1], "v": [int(time)]}), 0)
        found += rows(out.batches.pop(MAIN))
    assert found == [
        {"n": 0, "seen": [], "of": 0},
        {"n": 1, "seen": [100], "of": 1},
        {"n": 2, "seen": [106], "of": 1},
        {"n": 3, "seen": [112], "of": 1},
        {"n": 0, "seen": [], "of": 0},
    ]


def test_lists_and_maps_as_a_whole() -> None:
    class Whole(rf.KeyedProcess):
        seen = rf.ListState(I64)
        of = rf.MapState(pa.string(), I64)

        def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
            names = batch["n"]
            self.seen.set(ctx, [[1, 2], None, [3]])
            self.of.put(ctx, names, batch["v"], mask=pc.greater(batch["v"], 0))
            assert self.of.contains(ctx, names).to_pylist() == [True, True, True, False]
            assert self.of.get(ctx, names).to_pylist() == [5, 6, 5, None]
            entries = self.of.entries(ctx).to_pylist()
            assert sorted((e["index"], e["map_key"], e["value"]) for e in entries) == [(0, "x", 5), (1, "x", 6)]
            self.of.remove(ctx, ["x", "nothing", "y", "y"])
            assert self.of.entries(ctx).to_pylist() == [{"index": 1, "map_key": "x", "value": 6}]
            self.seen.append(ctx, 9, mask=[False, True, False, False])
            assert self.seen.get(ctx).to_pylist() == [[1, 2], [9], [3]]

    operator, _ = opened(factory(Whole()))
    operator.process(pa.record_batch({"k": ["a", "b", "a", "c"], "n": ["x", "x", "x", "z"], "v": [4, 6, 5, 0]}), 0)


def test_subtasks_work_on_copies_and_options_come_through_the_constructor() -> None:
    class Above(rf.KeyedProcess):
        n = rf.ValueState(I64, default=0)

        def __init__(self, threshold: int) -> None:
            self.threshold = threshold
            self.opened: list[int] = []

        def open(self, ctx: Any) -> None:
            self.opened.append(ctx.subtask)

        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
            self.n.update(self.n.value + rows.num_rows)
            if self.n.value > self.threshold:
                ctx.emit({"k": key, "opened": self.opened})

    description = Above(threshold=1)
    made = factory(description)
    first, out = opened(made, 0, 2)
    second, _ = opened(made, 1, 2)
    batch = pa.record_batch({"k": [1]})
    for operator in (first, second, first):
        operator.process(batch, 0)
    assert rows(out.batches[MAIN]) == [{"k": 1, "opened": [0]}]
    assert description.opened == []
