"""What is wrong is told in one sentence: step, subtask, state, expected, got; while building wherever it can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.errors import DataError, PlanError, SchemaChangedError, StateSchemaError, UserCodeError
from rayflow.operators.base import MAIN
from rayflow.operators.process import Process
from tests.operators.helpers import frozen, opened, rows

I64 = pa.int64()
WHERE = "step 'under test' subtask 0/1: "
BATCH = pa.record_batch({"k": [1, 2, 1], "v": [5, 6, 7]})


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: rf.ValueState(int), r"ValueState needs an Arrow type such as pa.int64\(\), got <class 'int'>"),
        (lambda: rf.ValueState("integer"), "ValueState needs an Arrow type"),
        (lambda: rf.ValueState(I64, default="x"), "ValueState.default. must be a value of type int64, got 'x'"),
        (lambda: rf.ValueState(pa.int8(), default=1000), "must be a value of type int8, got 1000"),
        (lambda: rf.ValueState(I64, ttl="0s"), r"ValueState\(ttl\) must be longer than zero, got '0s'"),
        (lambda: rf.ListState(I64, ttl=0), r"ListState\(ttl\) must be longer than zero, got 0"),
        (lambda: rf.MapState(I64, I64, ttl=-5), r"MapState\(ttl\) must be longer than zero, got -5"),
        (lambda: rf.ValueState(I64, ttl="soon"), r"ValueState\(ttl\) must be a duration"),
        (lambda: rf.ValueState(pa.dictionary(pa.int8(), pa.string())), "expected the type of its values: string"),
        (lambda: rf.ValueState(pa.list_(pa.string_view())), "expected string in place of string_view"),
        (lambda: rf.MapState(pa.binary_view(), I64), "MapState got binary_view, expected binary"),
        (lambda: rf.MapState(pa.list_(I64), I64), "MapState cannot have keys of type list"),
        (
            lambda: rf.ReducingState(I64, cast("Any", "median")),
            "must be .sum., .min., .max. or a function, got 'median'",
        ),
        (lambda: rf.ReducingState(I64, cast("Any", 3)), "or a function, got 3"),
        (lambda: rf.ReducingState(pa.string(), "sum"), r"ReducingState\(string, 'sum'\) cannot be"),
        (lambda: rf.ReducingState(pa.list_(I64), "max"), "that type has no order"),
        (
            lambda: rf.AggregatingState(I64, lift=cast("Any", 1), merge=max),
            r"AggregatingState\(lift\) must be a function, got 1",
        ),
        (lambda: rf.AggregatingState(I64, lift=int, merge=max, output=pa.string()), "pass result= too"),
    ],
)
def test_declarations(declare: Callable[[], Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        declare()


class Good(rf.KeyedProcess):
    n = rf.ValueState(I64, default=0)

    def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None: ...


class Neither(rf.KeyedProcess):
    n = rf.ValueState(I64)


class Both(Good):
    def process(self, key: Any, rows: pa.RecordBatch, ctx: Any) -> None: ...


class WrongTimers(Good):
    def on_timer(self, key: Any, time: int, ctx: Any) -> None: ...


class WrongTimersToo(rf.KeyedProcess):
    def process(self, key: Any, rows: pa.RecordBatch, ctx: Any) -> None: ...

    def on_timers(self, times: Any, ctx: Any) -> None: ...


class Needs(Good):
    def __init__(self, threshold: int) -> None:
        self.threshold = threshold


def with_state(name: str) -> type[rf.KeyedProcess]:
    return type("Named", (Good,), {name: rf.ValueState(I64)})


def with_attribute(name: str, value: Any) -> type[rf.KeyedProcess]:
    return type("Odd", (Good,), {name: value})


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (Neither, r"Neither has neither process_batch\(batch, ctx\) nor process\(key, rows, ctx\)"),
        (Both, "Both has both process_batch and process"),
        (WrongTimers, r"timers come to on_timers\(times, ctx\), not to on_timer"),
        (WrongTimersToo, r"timers come to on_timer\(key, time, ctx\), not to on_timers"),
        (Needs, "Needs cannot be made without arguments .*threshold.*; pass an instance"),
        (int, "needs an rf.KeyedProcess, the class or an instance, got <class 'int'>"),
        (len, "needs an rf.KeyedProcess"),
        (with_state("k"), r"the state 'k' of Named is also a key column \(k\)"),
        (with_state("values"), "the state 'values' of Named is a name that rayflow uses"),
        (with_state("timers"), "the state 'timers' of Named is a name that rayflow uses"),
        (with_state("__deleted"), "begins with"),
        (with_attribute("output", "schema"), "Odd.output must be a pyarrow.Schema or None, got str"),
        (with_attribute("output", lambda self, schema: schema.missing), "Odd.output raised AttributeError"),
        (with_attribute("side_outputs", {"late": 3}), "Odd.side_outputs must map tags to"),
        (with_attribute("side_outputs", {"main": None}), "names 'main', which is the main output"),
    ],
)
def test_mistakes_are_found_while_building(process: Any, message: str) -> None:
    stream = rf.from_arrow(pa.table({"k": [1]}))
    with pytest.raises(PlanError, match=message) as caught:
        stream.key_by("k").process(process)
    assert "test_bad_process.py:" in str(caught.value)
    assert "step 'process'" in str(caught.value)


def test_a_side_output_that_is_not_declared() -> None:
    result = rf.from_arrow(pa.table({"k": [1]})).key_by("k").process(Good)
    with pytest.raises(PlanError, match="has no side output 'late', it declares none; name it in Good.side_outputs"):
        result.side("late")


def test_states_have_values_only_in_a_running_job() -> None:
    with pytest.raises(PlanError, match="the state Good.n has values only in a running job"):
        _ = Good().n


def batched(call: Callable[[Any, pa.RecordBatch, Any], Any]) -> rf.KeyedProcess:
    class Mistaken(rf.KeyedProcess):
        output = pa.schema([("x", I64)])
        n = rf.ValueState(I64, default=0)
        total = rf.ReducingState(pa.int8(), "sum")
        of = rf.MapState(pa.string(), I64)
        seen = rf.ListState(I64)
        bad = rf.ReducingState(I64, lambda a, b: a.missing)
        short = rf.ReducingState(I64, lambda a, b: a[:0], vectorized=True)

        def process_batch(self, batch: pa.RecordBatch, ctx: Any) -> None:
            call(self, batch, ctx)

    return Mistaken()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, b, c: s.n.set(c, ["x", "y"]), r"the state 'n' holds int64, got 'x' \(str\)"),
        (lambda s, b, c: s.n.set(c, pa.array(["1", "2"])), "the state 'n' holds int64, got string; cast"),
        (lambda s, b, c: s.n.set(c, pa.array([1.5, 2.0])), "holds int64, got double values that do not fit"),
        (lambda s, b, c: s.n.set(c, b["v"]), "got 3 values, expected 2, one per key"),
        (lambda s, b, c: s.n.set(c, [1, 2], mask=[1, 0]), "needs a mask of true and false, got int64"),
        (lambda s, b, c: s.n.set(c, [1, 2], mask=[True]), "got a mask of 1 entries, expected 2, one per key"),
        (lambda s, b, c: s.n.get(b), "the state 'n' needs the ctx of the call as its first argument, got RecordBatch"),
        (lambda s, b, c: s.total.add(c, [100, 100, 100]), "the state 'total' could not be added to: ArrowInvalid"),
        (lambda s, b, c: s.total.add(c, [1, 2]), "the state 'total' got 2 values, expected 3, one per row"),
        (lambda s, b, c: s.of.put(c, ["a", None, "b"], b["v"]), "the state 'of' got 1 null map keys"),
        (lambda s, b, c: s.of.put(c, [1, 2, 3], b["v"]), "the state 'of' holds string, got 1"),
        (lambda s, b, c: s.seen.append(c, ["x"] * 3), "the state 'seen' holds int64, got 'x'"),
        (lambda s, b, c: s.bad.add(c, b["v"]), "Mistaken.process_batch raised AttributeError.* on 3 rows"),
        (lambda s, b, c: s.short.add(c, b["v"]), "the state 'short' .*gave 0 values for 1"),
        (lambda s, b, c: c.emit({"y": [1]}), r"columns \{y: int64\}, expected \{x: int64\} \(its attribute output"),
        (lambda s, b, c: c.emit({"x": ["a"]}), r"emitted what does not fit \{x: int64\}"),
        (lambda s, b, c: c.emit(7), "Mistaken emitted int, expected a pyarrow.RecordBatch"),
        (lambda s, b, c: c.emit(b, tag="late"), "emitted to tag='late', which it does not declare; declared: none"),
        (lambda s, b, c: c.set_event_timer([1, None]), "the timers got 1 null times, expected none; leave"),
        (lambda s, b, c: c.set_event_timer(["x", "y"]), "the timers need timestamps, dates or int64"),
        (lambda s, b, c: c.set_event_timer([1.5, 2.5]), "the timers need timestamps"),
        (lambda s, b, c: c.set_event_timer([1] * 7), r"got 7 times, expected 2 \(one per key\) or 3 \(one per row\)"),
        (lambda s, b, c: c.set_event_timer([1, 2**62 + 1]), "expected microseconds since the epoch within"),
        (lambda s, b, c: c.timestamps, "ctx.timestamps needs event time, the stream has none"),
        (lambda s, b, c: 1 / 0, "Mistaken.process_batch raised ZeroDivisionError: division by zero on 3 rows"),
    ],
)  # fmt: skip
def test_mistakes_in_a_batch_are_named(call: Callable[[Any, pa.RecordBatch, Any], Any], message: str) -> None:
    operator, _ = opened(Process(keys=("k",), description=batched(call)))
    with pytest.raises(UserCodeError, match=f"{WHERE}.*{message}"):
        operator.process(BATCH, 0)


def by_key(call: Callable[[Any, Any], Any]) -> rf.KeyedProcess:
    class Mistaken(rf.KeyedProcess):
        n = rf.ValueState(I64, default=0)
        of = rf.MapState(pa.string(), I64)

        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
            call(self, ctx)

        def on_timer(self, key: int, time: int, ctx: Any) -> None:
            _ = ctx.timestamps

    return Mistaken()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, c: s.n.update("x"), r"the state 'n' holds int64, got 'x' \(str\)"),
        (lambda s, c: s.of.__setitem__(3, 4), "the state 'of' holds string, got 3"),
        (lambda s, c: s.of[None], "the state 'of' got 1 null map keys"),
        (lambda s, c: c.emit(["x"]), "Mistaken emitted str, expected a dict a row"),
        (lambda s, c: c.emit(3), "Mistaken emitted int, expected a dict, a list of dicts"),
        (lambda s, c: c.timer(None), "a timer needs int microseconds since the epoch or a datetime, got None"),
        (lambda s, c: c.timer("soon"), "a timer needs int microseconds .* got 'soon'"),
        (lambda s, c: s.of["gone"], "Mistaken.process raised KeyError: 'gone' for key 1 on 2 rows"),
    ],
)
def test_mistakes_by_key_are_named(call: Callable[[Any, Any], Any], message: str) -> None:
    operator, _ = opened(Process(keys=("k",), description=by_key(call)))
    with pytest.raises(UserCodeError, match=f"{WHERE}.*{message}"):
        operator.process(BATCH, 0)


def test_timers_without_a_method() -> None:
    operator, _ = opened(Process(keys=("k",), description=batched(lambda s, b, c: c.set_event_timer(3))))
    operator.process(BATCH, 0)
    with pytest.raises(UserCodeError, match=f"{WHERE}Mistaken sets timers and has no on_timers"):
        operator.on_watermark(5)


def test_a_ctx_of_an_earlier_call() -> None:
    kept: list[Any] = []

    def call(self: Any, batch: pa.RecordBatch, ctx: Any) -> None:
        kept.append(ctx)
        self.n.get(kept[0])

    operator, _ = opened(Process(keys=("k",), description=batched(call)))
    operator.process(BATCH, 0)
    with pytest.raises(UserCodeError, match="the state 'n' was used with the ctx of an earlier call"):
        operator.process(BATCH, 0)


def test_rows_without_the_key_or_with_another_type_of_it() -> None:
    operator, _ = opened(Process(keys=("k",), description=Good()))
    operator.process(BATCH, 0)
    with pytest.raises(DataError, match=f"{WHERE}the rows have no key column 'k'"):
        operator.process(pa.record_batch({"v": [1]}), 0)
    with pytest.raises(StateSchemaError, match=f"{WHERE}the key column 'k' is string, and int64 in the state"):
        operator.process(pa.record_batch({"k": ["a"]}), 0)
    operator.process(pa.record_batch({"k": pa.array([1], pa.int16())}), 0)


def test_the_first_output_decides_where_nothing_is_declared() -> None:
    class First(rf.KeyedProcess):
        side_outputs = {"odd": pa.schema([("k", I64)])}  # noqa: RUF012

        def process(self, key: int, rows: pa.RecordBatch, ctx: Any) -> None:
            ctx.emit({"k": key if key < 3 else "three"})
            ctx.emit({"k": key}, tag="odd")

    operator, out = opened(Process(keys=("k",), description=First()))
    operator.process(BATCH, 0)
    assert rows(out.batches[MAIN]) == rows(out.batches["odd"]) == [{"k": 1}, {"k": 2}]
    with pytest.raises(SchemaChangedError, match="as|first"):
        operator.process(pa.record_batch({"k": [3]}), 0)


def test_an_error_of_the_next_step_is_not_blamed_on_the_process() -> None:
    class Refuses:
        def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
            raise ZeroDivisionError("downstream")

    operator, _ = opened(
        Process(keys=("k",), description=batched(lambda s, b, c: c.emit({"x": b["v"]}))),
        out=Refuses(),  # type: ignore[arg-type]
    )
    with pytest.raises(ZeroDivisionError):
        operator.process(BATCH, 0)


def test_an_instance_that_cannot_be_copied() -> None:
    class Opens(Good):
        def __init__(self) -> None:
            self.generator = (i for i in range(3))

    with pytest.raises(UserCodeError, match=r"Opens cannot be copied for a subtask.*open\(ctx\)"):
        Process(keys=("k",), description=Opens()).build()


def test_a_state_that_changed_its_type_is_refused() -> None:
    operator, _ = opened(Process(keys=("k",), description=batched(lambda s, b, c: s.n.set(c, 1))))
    operator.process(BATCH, 0)

    class Changed(Good):
        n = rf.ValueState(pa.string())

    again, _ = opened(Process(keys=("k",), description=Changed()))
    again.restore([s for s in frozen(operator) if s.name in ("values", "__keys")])
    with pytest.raises(StateSchemaError, match=r"under test.*n"):
        again.process(BATCH, 0)
