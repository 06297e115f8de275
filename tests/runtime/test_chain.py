"""Fused operators: the order of calls, side outputs, and whom an error names."""

from __future__ import annotations

import pyarrow as pa
import pytest

from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, CheckpointId
from rayflow.errors import DataError, UserCodeError
from rayflow.operators.base import MAIN, RestoredState
from rayflow.plan import PlannedOperator
from rayflow.runtime.chain import ChainRunner
from tests.runtime.fakes import Log, batch, context, planned, values

Emitted = list[tuple[str, list[int]]]


def chain(*operators: PlannedOperator) -> tuple[ChainRunner, Emitted]:
    emitted: Emitted = []
    contexts = {o.id: context(o.id, o.title) for o in operators}
    runner = ChainRunner(operators, contexts, lambda b, tag: emitted.append((tag, values(b))))
    return runner, emitted


def opened(log: Log, *names: str) -> tuple[ChainRunner, Emitted]:
    runner, emitted = chain(*(planned(name, log) for name in names))
    runner.open({})
    log.clear()
    return runner, emitted


def whole_life(runner: ChainRunner) -> None:
    runner.open({})
    runner.process(batch(1), 0)
    runner.advance(1)
    runner.end()


def test_the_last_operator_is_opened_first_and_each_is_restored_with_its_own_states() -> None:
    log: Log = []
    runner, _ = chain(planned("a", log), planned("b", log))
    runner.open({"b-1": [RestoredState("left", pa.table({})), RestoredState("right", pa.table({}))]})
    assert log == [("b", "open"), ("b", "restore", "left", "right"), ("a", "open"), ("a", "restore")]


def test_rows_pass_all_operators_before_the_call_returns() -> None:
    log: Log = []
    runner, emitted = opened(log, "a", "b")
    runner.process(batch(1, 2), 0)
    assert log == [("a", "process", 1, 2), ("b", "process", 1, 2)]
    assert emitted == [(MAIN, [1, 2])]


def test_side_outputs_leave_the_chain_wherever_they_come_from() -> None:
    log: Log = []
    runner, emitted = opened(log, "a", "b")
    runner.process(batch(-1, 5), 0)
    assert emitted == [("late", [-1]), (MAIN, [5])]
    assert ("b", "process", 5) in log
    assert runner.counters() == {"late_rows": 1.0}


def test_empty_batches_go_nowhere() -> None:
    log: Log = []
    runner, emitted = opened(log, "a", "b")
    runner.process(batch(), 0)
    runner.process(batch(-1), 0)
    assert log == [("a", "process", -1)]
    assert emitted == [("late", [-1])]


def test_another_input_goes_to_the_first_operator_with_its_index() -> None:
    log: Log = []
    runner, emitted = opened(log, "a", "b")
    runner.process(batch(3), 1)
    assert log == [("a", "process", 3, "input 1"), ("b", "process", 3)]
    assert emitted == [(MAIN, [3])]


def test_a_chain_without_operators_passes_rows_and_time_on() -> None:
    runner, emitted = chain()
    runner.open({})
    runner.process(batch(1), 0)
    assert emitted == [(MAIN, [1])]
    assert runner.advance(5) == 5
    runner.end()
    assert runner.snapshot(CheckpointId(1)) == []


def test_time_passes_from_operator_to_operator_and_never_goes_back() -> None:
    log: Log = []
    runner, _ = opened(log, "a", "b")
    assert runner.watermark == MIN_WATERMARK
    assert runner.advance(10) == 8
    assert runner.advance(5) == 8, "W1"
    assert log == [("a", "watermark", 10), ("b", "watermark", 9), ("a", "watermark", 5), ("b", "watermark", 4)]


def test_the_end_of_one_operator_is_processed_by_the_next_before_its_own_end() -> None:
    log: Log = []
    runner, emitted = opened(log, "a", "b")
    runner.advance(MAX_WATERMARK)
    log.clear()
    runner.end()
    assert log == [("a", "end"), ("b", "process", 99), ("b", "end")]
    assert emitted == [(MAIN, [99]), (MAIN, [99])]


def test_a_snapshot_holds_what_stateful_operators_give() -> None:
    log: Log = []
    runner, _ = opened(log, "a", "stateless", "b")
    assert [(name, state.tables[0].name) for name, state in runner.snapshot(CheckpointId(4))] == [
        ("a-1", "a's"),
        ("b-1", "b's"),
    ]
    assert [entry[1:] for entry in log] == [("snapshot", 4)] * 3


def test_close_closes_all_and_can_be_called_again() -> None:
    log: Log = []
    runner, _ = opened(log, "a", "b")
    runner.close()
    runner.close()
    assert log == [("a", "close"), ("b", "close")]
    assert runner.counters() == {}


@pytest.mark.parametrize("method", ["process", "watermark", "end", "open", "restore"])
@pytest.mark.parametrize("culprit", ["a", "b"])
def test_an_error_names_the_step_that_raised_it_and_the_subtask(method: str, culprit: str) -> None:
    log: Log = []
    fault = ValueError("what a value")
    operators = [planned(name, log, **({method: fault} if name == culprit else {})) for name in ("a", "b")]
    runner, _ = chain(*operators)
    with pytest.raises(UserCodeError, match=f"step '{culprit}' subtask 0/2 raised ValueError: what a value") as caught:
        whole_life(runner)
    assert caught.value.__cause__ is fault


@pytest.mark.parametrize("method", ["process", "watermark", "end", "open"])
def test_an_error_of_ours_passes_as_it_is(method: str) -> None:
    fault = DataError("step 'b' subtask 0/2: an unreadable row")
    runner, _ = chain(planned("a", []), planned("b", [], **{method: fault}))
    with pytest.raises(DataError) as caught:
        whole_life(runner)
    assert caught.value is fault


def test_an_error_of_another_input_names_the_first_step() -> None:
    runner, _ = chain(planned("a", [], process=KeyError("k")), planned("b", []))
    runner.open({})
    with pytest.raises(UserCodeError, match="step 'a' subtask 0/2 raised KeyError"):
        runner.process(batch(1), 1)
