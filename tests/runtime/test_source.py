"""The source side: positions lie behind what was emitted (rule R2), splits one after another, errors with a place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from rayflow.core.ids import MIN_WATERMARK, CheckpointId
from rayflow.core.manifest import SplitState
from rayflow.errors import DataError, UserCodeError
from rayflow.operators.base import EventTime
from rayflow.operators.sources.memory import ArrowSource, GeneratorSource
from rayflow.plan import PlannedSource
from rayflow.runtime.source import SourceRunner
from tests.runtime.fakes import ListSource, Log, context, values


def runner(log: Log | None = None, event_time: EventTime | None = None, **splits: list[Any]) -> SourceRunner:
    source = ListSource(splits, log if log is not None else [])
    return SourceRunner(PlannedSource("src", "my source", source, event_time), context("src", "my source"))


def split(name: str, position: Any = None, order: int = 0) -> SplitState:
    return SplitState("src", name, order, name, position)


def polled(source: SourceRunner) -> list[Any]:
    """Values of each poll until nothing is left to poll."""
    found = []
    while source.can_poll:
        batch = source.poll()
        found.append(None if batch is None else values(batch))
    return found


def positions(source: SourceRunner) -> list[tuple[str, Any]]:
    return [(s.split_id, s.position) for s in source.unfinished()]


def test_positions_lie_behind_the_batches_that_were_emitted() -> None:
    source = runner(a=[[1], [2, 3], [4]])
    source.assign([split("a")], no_more=True)
    assert positions(source) == [("a", None)]
    source.poll()
    assert positions(source) == [("a", 1)]
    source.poll()
    assert positions(source) == [("a", 2)]
    again = runner(a=[[1], [2, 3], [4]])
    again.assign(source.unfinished(), no_more=True)
    assert polled(again) == [[4], None]


def test_a_split_with_a_batch_that_is_its_last_is_finished_by_it() -> None:
    log: Log = []
    source = runner(log, a=[[1], "last"])
    source.assign([split("a")], no_more=True)
    assert polled(source) == [[1], [1000]]
    assert source.unfinished() == ()
    assert source.exhausted
    assert log == [("reader", "a", None), ("closed",)]


def test_splits_are_read_one_after_another_and_unfinished_ones_are_in_the_snapshot() -> None:
    log: Log = []
    source = runner(log, a=[[1]], b=[[2], [3]])
    source.assign([split("a"), split("b")], no_more=False)
    source.poll()
    assert positions(source) == [("a", 1), ("b", None)]
    batch = source.poll()
    assert batch is not None, "the end of a split is no reason to wait"
    assert positions(source) == [("b", 1)]
    assert log == [("reader", "a", None), ("closed",), ("reader", "b", None)]


def test_an_empty_poll_keeps_the_position() -> None:
    source = runner(a=[[1], None, [2]])
    source.assign([split("a")], no_more=True)
    source.poll()
    assert source.poll() is None
    assert positions(source) == [("a", 1)]


def test_one_split_ahead_is_asked_for_once() -> None:
    source = runner(a=[[1]], b=[[2]])
    assert source.wants_split()
    assert not source.wants_split(), "it has asked already"
    source.assign([split("a")], no_more=False)
    assert source.wants_split(), "one ahead"
    source.assign([split("b")], no_more=False)
    assert not source.wants_split(), "one is enough"
    polled(source)
    assert source.wants_split()
    source.assign([], no_more=True)
    assert not source.wants_split()
    assert source.exhausted


def test_it_is_exhausted_only_when_nothing_more_comes() -> None:
    source = runner(a=[[1]])
    assert not source.exhausted
    source.assign([split("a")], no_more=False)
    polled(source)
    assert not source.exhausted
    source.assign([], no_more=True)
    assert source.exhausted


def test_skipped_rows_are_summed_over_splits() -> None:
    source = runner(a=[[1], "skip", "skip"], b=["skip", [2]])
    source.assign([split("a"), split("b")], no_more=True)
    source.poll()
    source.poll()
    assert source.skipped_rows == 1
    source.poll()
    source.poll()
    assert source.skipped_rows == 3
    polled(source)
    assert source.skipped_rows == 3


def test_an_error_names_step_split_and_position_and_is_chained() -> None:
    fault = OSError("disk gone")
    source = runner(a=[[1], fault])
    source.assign([split("a")], no_more=True)
    source.poll()
    with pytest.raises(
        UserCodeError, match=r"step 'my source' subtask 0/2 could not read split 'a' at position 1: OSError: disk gone"
    ) as caught:
        source.poll()
    assert caught.value.__cause__ is fault
    assert source.position == "split a at 1"
    assert positions(source) == [("a", 1)], "what was not emitted is not behind the position"


def test_an_error_of_ours_passes_as_it_is() -> None:
    fault = DataError("line 3 of x.csv")
    source = runner(a=[fault])
    source.assign([split("a")], no_more=True)
    with pytest.raises(DataError) as caught:
        source.poll()
    assert caught.value is fault


def test_a_split_that_cannot_be_opened_is_named() -> None:
    source = runner()
    source.assign([split("gone", 17)], no_more=True)
    with pytest.raises(UserCodeError, match="could not read split 'gone' at position 17: KeyError"):
        source.poll()


def test_before_the_first_split_it_says_so() -> None:
    assert runner().position == "before the first split"


def test_event_time_follows_the_rows() -> None:
    table = pa.table({"t": pa.array([10, 50, 30], pa.timestamp("us"))})
    planned = PlannedSource("src", "my source", ArrowSource(table, batch_rows=2), EventTime("t", max_delay_us=5))
    source = SourceRunner(planned, context())
    assert source.watermark == MIN_WATERMARK
    ((name, description),) = planned.source.discover()
    source.assign([SplitState("src", name, 0, description, None)], no_more=True)
    source.poll()
    assert source.watermark == 45
    source.poll()
    assert source.watermark == 45, "W1"
    assert runner().watermark == MIN_WATERMARK


def test_close_closes_the_open_reader_once() -> None:
    log: Log = []
    source = runner(log, a=[[1], [2]])
    source.close()
    source.assign([split("a")], no_more=True)
    source.poll()
    source.close()
    source.close()
    assert log == [("reader", "a", None), ("closed",)]


# ----------------------------------------------------------------------------------------- event time of several splits


class Timed:
    """A runner over splits of event times in us, with a clock; None is an empty poll."""

    def __init__(self, splits: dict[str, list[Any]], event_time: EventTime, *, endless: bool = True) -> None:
        self.now = 0.0

        def fn(name: str, position: int) -> Any:
            for at in splits[name][position:]:
                yield None if at is None else pa.record_batch({"t": pa.array([at], pa.timestamp("us"))})

        schema = pa.schema({"t": pa.timestamp("us")})
        source = GeneratorSource(fn, splits=list(splits), schema=schema, bounded=not endless)
        ctx = replace(context("src", "my source"), now=lambda: self.now, wall_time=lambda: 1.0)
        self.runner = SourceRunner(PlannedSource("src", "my source", source, event_time), ctx)

    def assign(self, *names: str, no_more: bool = True, newest_us: int | None = None) -> None:
        splits = [SplitState("src", n, i, n, None, newest_us) for i, n in enumerate(names)]
        self.runner.assign(splits, no_more=no_more)

    def idle(self) -> bool:
        return self.runner.idle

    def poll(self, times: int = 1) -> int:
        """The watermark after so many polls."""
        for _ in range(times):
            self.runner.poll()
        return self.runner.watermark


def test_the_watermark_is_the_lowest_of_the_splits_that_are_read_in_turns() -> None:
    timed = Timed({"a": [10, 20, 30], "b": [3, 4, 100]}, EventTime("t", max_delay_us=0))
    timed.assign("a", "b")
    assert timed.poll() == MIN_WATERMARK, "b has said nothing yet"
    assert timed.poll() == 3
    assert timed.poll(2) == 4
    assert timed.poll(2) == 30
    assert timed.poll() == 100, "a has ended and holds nothing back"


def test_the_watermark_waits_for_splits_that_may_still_come() -> None:
    timed = Timed({"a": [10, 20, 30], "b": [3]}, EventTime("t", max_delay_us=0))
    timed.assign("a", no_more=False)
    assert timed.poll() == MIN_WATERMARK
    assert timed.runner.wants_split(), "all it may have, at once"
    timed.assign("b")
    assert timed.poll(2) == 3


def test_a_split_that_is_asked_in_vain_for_long_is_left_out_and_comes_back() -> None:
    splits: dict[str, list[Any]] = {"a": list(range(10, 30)), "b": [3, None, None, None, None, None, None, 5, 6]}
    timed = Timed(splits, EventTime("t", max_delay_us=0, idle_timeout_us=1_000_000))
    timed.assign("a", "b")
    assert timed.poll(2) == 3
    timed.now = 100.0
    assert timed.poll(2) == 3, "time in which nobody asked does not count"
    timed.now = 100.9
    assert timed.poll(2) == 3
    timed.now = 101.0
    assert timed.poll() == 15
    assert not timed.runner.idle, "a is not"
    assert timed.poll(2) == 17
    assert timed.poll(3) == 17, "b is back at 5, and what was said stays (W1)"


def test_all_idle_says_so_and_the_watermark_stays() -> None:
    timed = Timed({"a": [10, None, None, 12]}, EventTime("t", max_delay_us=0, idle_timeout_us=1_000_000), endless=False)
    timed.assign("a")
    assert timed.poll() == 10
    timed.poll()
    timed.now = 1.0
    assert timed.poll() == 10
    assert timed.runner.idle
    assert timed.poll() == 12
    assert not timed.runner.idle


@pytest.mark.parametrize("endless", [True, False])
def test_event_time_goes_on_where_it_was_stored(endless: bool) -> None:
    timed = Timed({"a": [10, 7, 20]}, EventTime("t", max_delay_us=2), endless=endless)
    timed.assign("a")
    timed.poll()
    (stored,) = timed.runner.unfinished()
    assert stored.newest_us == 10
    again = Timed({"a": [10, 7, 20]}, EventTime("t", max_delay_us=2), endless=endless)
    again.runner.assign([stored], no_more=True)
    assert again.poll() == 8, "the row at 7 was late and stays so"
    (stored,) = again.runner.unfinished()
    assert stored.newest_us == 10


def can_poll(timed: Timed) -> bool:
    return timed.runner.can_poll


def test_a_split_that_is_too_far_ahead_is_not_read() -> None:
    timed = Timed({"a": [10, 11, 40, 41], "b": [8, 9, 10, 11]}, EventTime("t", max_delay_us=0, max_drift_us=5))
    timed.assign("a", "b")
    timed.poll(2)
    assert not can_poll(timed), "nobody knows yet how far the slowest is"
    timed.runner.slowest = 8
    assert can_poll(timed)
    assert timed.poll(4) == 10
    assert timed.poll() == 11, "b is read on, a waits at 40"
    assert timed.poll() == 40, "b has ended"
    assert not can_poll(timed)
    timed.runner.slowest = 36
    assert can_poll(timed)


# ------------------------------------------------------------------------------------------- more splits may be found


def test_event_time_advances_when_all_that_is_known_is_dealt_out() -> None:
    timed = Timed({"a": [10, 12, 14], "b": [20], "c": [30]}, EventTime("t", max_delay_us=0))
    timed.runner.assign([split("a")], no_more=False)
    timed.poll()
    assert timed.runner.watermark == MIN_WATERMARK, "another one may begin earlier"
    timed.runner.assign([split("b")], no_more=False, settled=True)
    assert timed.runner.watermark == MIN_WATERMARK
    assert timed.poll(2) == 12
    assert timed.runner.wants_split()
    timed.runner.assign([], no_more=False, settled=True)
    assert not timed.runner.wants_split(), "the request stays open"
    timed.runner.assign([split("c")], no_more=False, settled=True)
    assert timed.runner.wants_split()
    assert timed.runner.watermark == 12, "it does not fall (W1)"


def test_a_subtask_that_has_no_share_of_what_is_read_in_turns_is_idle() -> None:
    timed = Timed({"a": [10]}, EventTime("t", max_delay_us=0))
    assert not timed.idle()
    timed.runner.assign([], no_more=False, settled=True)
    assert timed.idle()
    timed.runner.assign([split("a")], no_more=False, settled=True)
    assert not timed.idle()


def test_files_one_after_another_keep_event_time_while_none_is_there_until_they_are_idle() -> None:
    timed = Timed({"a": [10, 11], "b": [20]}, EventTime("t", max_delay_us=0, idle_timeout_us=2_000_000), endless=False)
    timed.runner.assign([split("a")], no_more=False, settled=True)
    for _ in range(3):
        timed.poll()
    assert timed.runner.watermark == 11
    assert not timed.runner.can_poll
    assert not timed.idle()
    timed.now += 1.9
    assert not timed.idle()
    timed.now += 0.2
    assert timed.idle()
    assert timed.runner.watermark == 11
    timed.runner.assign([split("b")], no_more=False, settled=True)
    assert not timed.idle()
    timed.poll()
    assert timed.runner.watermark == 20


def test_files_that_are_only_waited_for_at_the_coordinator_do_not_make_a_subtask_idle() -> None:
    timed = Timed({"a": [10]}, EventTime("t", max_delay_us=0, idle_timeout_us=2_000_000), endless=False)
    assert not timed.idle()
    timed.now += 10.0
    assert not timed.idle(), "nobody has said that there is none"


def test_a_bounded_source_may_be_read_in_turns() -> None:
    class InTurns(ListSource):
        in_turns = True

    planned = PlannedSource("src", "my source", InTurns({"a": [[1], [3]], "b": [[2]]}))
    source = SourceRunner(planned, context("src", "my source"))
    source.assign([split("a"), split("b")], no_more=True)
    assert polled(source) == [[1], [2], [3], None]
    assert source.exhausted


# ------------------------------------------------------------------------------------------------ complete checkpoints


def test_a_reader_hears_its_position_in_the_checkpoint_that_is_complete() -> None:
    log: Log = []
    source = runner(log, a=[[1], [2], [3]])
    source.assign([split("a"), split("b")], no_more=True)
    source.snapshot(CheckpointId(1))
    source.poll()
    source.snapshot(CheckpointId(2))
    source.poll()
    source.snapshot(CheckpointId(3))
    source.poll()
    source.checkpointed(CheckpointId(1))
    assert log == [("reader", "a", None)], "it had not begun"
    source.checkpointed(CheckpointId(3))
    source.checkpointed(CheckpointId(2))
    assert log[1:] == [("checkpointed", 2)], "not where it is now, and nothing older later"
