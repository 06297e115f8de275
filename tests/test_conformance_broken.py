"""The suites of `rayflow.testing`, run against broken connectors, which they catch, each for what is wrong with it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pyarrow as pa
import pytest

import rayflow as rf
from examples.custom_sink import PENDING, JsonCommitter, JsonFolder, JsonWriter
from examples.custom_source import Orders, OrdersReader, make_table
from rayflow.operators.sources.memory import ArrowSource
from rayflow.testing import SinkConformance, SinkRun, SourceConformance, read_split

ROWS = pa.table({"id": pa.array(range(60), pa.int64()), "text": [f"row {i}" for i in range(60)]})


def ids_in(folder: Path) -> list[int]:
    return [json.loads(line)["id"] for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------------- sources that are broken

Suite = SourceConformance()


@pytest.fixture
def orders(tmp_path: Path) -> Orders:
    make_table(tmp_path / "shop.sqlite", 200)
    return Orders(str(tmp_path / "shop.sqlite"), ids_per_split=80, batch_rows=15)


@pytest.fixture
def all_orders(orders: Orders) -> pa.Table:
    return pa.concat_tables(
        pa.Table.from_batches([batch]) for _, split in orders.discover() for batch, _ in read_split(orders, split)
    )


@dataclasses.dataclass(frozen=True)
class Broken(Orders):
    """The reader is one that is broken."""

    broken: type[OrdersReader] = OrdersReader

    def reader(self, split: Any, position: Any, ctx: rf.OperatorContext) -> rf.SplitReader:
        start, stop = split
        return self.broken(self, start if position is None else position, stop)


class FromTheBeginning(OrdersReader):
    def __init__(self, source: Orders, start: int, stop: int) -> None:
        super().__init__(source, start // 80 * 80, stop)


class OneTooFar(OrdersReader):
    def poll(self) -> rf.Polled:
        polled = super().poll()
        return dataclasses.replace(polled, position=polled.position + 1)


class AnyOrder(OrdersReader):
    def poll(self) -> rf.Polled:
        polled = super().poll()
        if polled.batch is None:
            return polled
        order = random.sample(range(polled.batch.num_rows), polled.batch.num_rows)
        return dataclasses.replace(polled, batch=polled.batch.take(pa.array(order)))


class Pairs(OrdersReader):
    def __init__(self, source: Orders, start: Any, stop: int) -> None:
        super().__init__(source, start if isinstance(start, int) else start[0], stop)

    def poll(self) -> rf.Polled:
        polled = super().poll()
        return dataclasses.replace(polled, position=(polled.position, self._stop))


class OneForAll(OrdersReader):
    """Readers share what one of them should have for itself."""

    at: ClassVar[dict[int, int]] = {}

    def poll(self) -> rf.Polled:
        self._next = max(self._next, self.at.get(self._stop, 0))
        polled = super().poll()
        self.at[self._stop] = self._next
        return polled

    def close(self) -> None:
        self.at.clear()
        super().close()


class Waits(OrdersReader):
    def poll(self) -> rf.Polled:
        polled = super().poll()
        if polled.done:
            threading.Event().wait(0.02)
        return polled


def broken(orders: Orders, reader: type[OrdersReader]) -> Broken:
    return Broken(orders.path, orders.ids_per_split, orders.batch_rows, reader)


def test_a_source_that_loses_its_position_is_caught(orders: Orders, all_orders: pa.Table) -> None:
    source = broken(orders, FromTheBeginning)
    with pytest.raises(AssertionError, match="the rows behind the first 15 must come"):
        Suite.test_every_position_yields_exactly_the_rest(source)
    with pytest.raises(AssertionError):
        Suite.test_a_flow_that_fails_has_every_row_once(source, all_orders, 1, 1)


def test_a_source_that_skips_a_row_at_its_position_is_caught(orders: Orders) -> None:
    with pytest.raises(AssertionError, match="the rows behind the first 15 must come"):
        Suite.test_every_position_yields_exactly_the_rest(broken(orders, OneTooFar))


def test_a_source_that_orders_rows_anew_is_caught(orders: Orders) -> None:
    source = broken(orders, AnyOrder)
    with pytest.raises(AssertionError, match="other rows or another order"):
        Suite.test_two_readers_at_one_position_agree(source)
    with pytest.raises(AssertionError):
        Suite.test_every_position_yields_exactly_the_rest(source)


def test_a_position_that_json_changes_is_caught(orders: Orders) -> None:
    with pytest.raises(AssertionError, match=r"a position must be the same behind JSON: \(.*came back as \["):
        Suite.test_every_position_yields_exactly_the_rest(broken(orders, Pairs))


def test_readers_that_disturb_each_other_are_caught(orders: Orders) -> None:
    with pytest.raises(AssertionError, match="two readers"):
        Suite.test_two_readers_at_one_position_agree(broken(orders, OneForAll))


def test_a_poll_that_waits_is_caught(orders: Orders) -> None:
    class Impatient(SourceConformance):
        poll_s_max = 0.01

    with pytest.raises(AssertionError, match=r"a poll took \d\.\d s"):
        Impatient().test_poll_does_not_block(broken(orders, Waits))


def test_splits_whose_ids_change_are_caught(orders: Orders) -> None:
    class Renamed(Orders):
        def discover(self) -> Sequence[tuple[str, Any]]:
            return [(f"{name} {random.random()}", split) for name, split in super().discover()]

    with pytest.raises(AssertionError, match="must give the same splits"):
        Suite.test_split_ids_differ_and_do_not_change(Renamed(orders.path))


def test_a_schema_that_is_not_that_of_the_rows_is_caught(orders: Orders) -> None:
    class Wrong(Orders):
        def declared_schema(self) -> pa.Schema:
            return super().declared_schema().append(pa.field("more", pa.int8()))

    with pytest.raises(AssertionError, match="declared_schema"):
        Suite.test_batches_have_exactly_the_schema(Wrong(orders.path))


def test_an_input_that_is_too_small_shows_nothing_and_it_says_so() -> None:
    source = ArrowSource(ROWS)
    with pytest.raises(AssertionError, match="too few batches"):
        Suite.test_every_position_yields_exactly_the_rest(source)
    with pytest.raises(AssertionError, match="nothing has been shown"):
        Suite.test_a_flow_that_fails_has_every_row_once(source, ROWS, 2, 1)


def test_a_reader_without_an_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayflow.testing.driving.POLLS_MAX", 50)
    endless = rf.from_generator(lambda split, at: iter(lambda: None, 1), schema=ROWS.schema, bounded=False)
    with pytest.raises(AssertionError, match="never said done"):
        Suite.test_batches_have_exactly_the_schema(cast(Any, endless)._node.source)


# ---------------------------------------------------------------------------------------------- sinks that are broken


class VisibleAtOnce(JsonFolder):
    """Commits in the pre-commit."""

    def build(self) -> rf.SinkOperator:
        class Writer(JsonWriter):
            def _prepare(self, checkpoint: int, batches: list[pa.RecordBatch]) -> Sequence[Any]:
                names = super()._prepare(checkpoint, batches)
                for name in names:
                    (self._folder / PENDING / name).rename(self._folder / name)
                return names

        return Writer(Path(self.folder))


class WithCommitter(JsonFolder):
    """The committer is one that is broken."""

    kind: ClassVar[type[JsonCommitter]] = JsonCommitter

    def committer(self) -> rf.Committer:
        return self.kind(Path(self.folder))


class WritesAgain(WithCommitter):
    """Takes every commit for the first."""

    class kind(JsonCommitter):
        commits = 0

        def commit(self, committables: Sequence[Any]) -> None:
            for name in committables:
                if (self._folder / PENDING / name).exists():
                    super().commit([name])
                else:
                    copy = self._folder / f"{len(ids_in(self._folder))}-{name}"
                    copy.write_text((self._folder / name).read_text())


class ForgetsWhatIsHeld(WithCommitter):
    """Takes what is prepared for given up."""

    class kind(JsonCommitter):
        def recover(self, committables: Sequence[Any], *, fresh: bool) -> None:
            super().recover([], fresh=fresh)


class LeavesBehind(WithCommitter):
    class kind(JsonCommitter):
        def finish(self) -> None:
            pass


class CommitsAllThereIs(WithCommitter):
    """Takes what is prepared for held."""

    class kind(JsonCommitter):
        def recover(self, committables: Sequence[Any], *, fresh: bool) -> None:
            prepared = [path.name for path in (self._folder / PENDING).glob("*.jsonl")]
            super().recover([*committables, *(set(prepared) - set(committables))], fresh=fresh)


class GoesOnWithAHole(WithCommitter):
    class kind(JsonCommitter):
        def commit(self, committables: Sequence[Any]) -> None:
            super().commit([name for name in committables if (self._folder / PENDING / name).exists()])


class TakesLaterRows(JsonFolder):
    """The upload takes what is there when it runs."""

    def build(self) -> rf.SinkOperator:
        class Writer(JsonWriter):
            def snapshot(self, checkpoint: int) -> rf.FrozenState | None:
                def prepare() -> Sequence[Any]:
                    rows, self._rows = self._rows, []
                    return self._prepare(checkpoint, rows)

                return rf.FrozenState(prepare=prepare)

        return Writer(Path(self.folder))


class KeepsRowsInMemory(JsonFolder):
    """Says that it writes at least once, and writes a checkpoint too late."""

    guarantee = "at_least_once"

    def committer(self) -> rf.Committer | None:  # type: ignore[override]
        return None

    def build(self) -> rf.SinkOperator:
        class Writer(JsonWriter):
            before: list[pa.RecordBatch]

            def open(self, ctx: rf.OperatorContext, out: Any) -> None:
                super().open(ctx, out)
                self._folder.mkdir(exist_ok=True)
                self.before = []

            def _prepare(self, checkpoint: int, batches: list[pa.RecordBatch]) -> Sequence[Any]:
                late, self.before = self.before, batches
                for name in super()._prepare(checkpoint, late):
                    (self._folder / PENDING / name).rename(self._folder / f"{self.ctx.attempt}-{name}")
                return ()

        return Writer(Path(self.folder))


class BoundToAThread(JsonFolder):
    """Writes with what only the thread that made it may use."""

    def build(self) -> rf.SinkOperator:
        class Writer(JsonWriter):
            def open(self, ctx: rf.OperatorContext, out: Any) -> None:
                super().open(ctx, out)
                self._db = sqlite3.connect(":memory:")

            def _prepare(self, checkpoint: int, batches: list[pa.RecordBatch]) -> Sequence[Any]:
                self._db.execute("SELECT 1")
                return super()._prepare(checkpoint, batches)

            def close(self) -> None:
                self._db.close()

        return Writer(Path(self.folder))


class Tuples(JsonFolder):
    def build(self) -> rf.SinkOperator:
        class Writer(JsonWriter):
            def _prepare(self, checkpoint: int, batches: list[pa.RecordBatch]) -> Sequence[Any]:
                return [(name, 1) for name in super()._prepare(checkpoint, batches)]

        return Writer(Path(self.folder))


class Check:
    """One test of the suite on one sink."""

    def __init__(self, sink: JsonFolder, folder: Path, suite: SinkConformance | None = None) -> None:
        self.sink, self.folder = sink, folder
        self.suite: Any = suite or SinkConformance()
        self.parts = {
            "sink": sink,
            "visible": partial(ids_in, Path(sink.folder)),
            "leftovers": lambda: list(Path(sink.folder).glob("_*/*")),
            "lose": lambda name: (Path(sink.folder) / PENDING / name).unlink(),
            "tmp_path": folder,
        }

    def run(self, test: str, **more: Any) -> None:
        method = getattr(self.suite, f"test_{test}")
        job = SinkRun(self.sink, self.folder / "conformance", self.suite.rows().schema)
        names = inspect.signature(method).parameters
        try:
            if "job" in names:
                job.begin()
            method(**{name: part for name, part in {**self.parts, "job": job, **more}.items() if name in names})
        finally:
            job.close()


@pytest.fixture
def check(tmp_path: Path) -> Callable[[type[JsonFolder]], Check]:
    return lambda kind: Check(kind(str(tmp_path / "out")), tmp_path)


MakeCheck = Callable[[type[JsonFolder]], Check]


@pytest.mark.parametrize(
    ("kind", "test", "told"),
    [
        (VisibleAtOnce, "nothing_is_visible_before_the_commit", "the pre-commit made rows visible"),
        (WritesAgain, "committing_twice_changes_nothing", "2 rows are there twice"),
        (WritesAgain, "killed_behind_the_commit_before_anybody_knew", "1 rows are there twice"),
        (WritesAgain, "going_back_to_an_old_checkpoint", "committed long ago"),
        (ForgetsWhatIsHeld, "killed_between_the_pre_commit_and_the_commit", "2 rows are missing"),
        (ForgetsWhatIsHeld, "recovery_with_less_parallelism", "5 rows are missing"),
        (LeavesBehind, "recovery_and_the_end_leave_nothing_behind", "recovery left behind"),
        (CommitsAllThereIs, "recovery_gives_up_what_the_checkpoint_does_not_hold", "2 rows are visible"),
        (CommitsAllThereIs, "killed_before_the_first_checkpoint", "assert not"),
        (TakesLaterRows, "the_upload_takes_no_rows_of_a_later_checkpoint", "rows are visible that should not"),
        (BoundToAThread, "what_is_committed_is_visible", "thread"),
        (Tuples, "what_is_committed_is_visible", "a committable must be the same behind JSON"),
    ],
)  # fmt: skip
def test_a_broken_sink_is_caught(check: MakeCheck, kind: type[JsonFolder], test: str, told: str) -> None:
    check(JsonFolder).run(test)
    shutil.rmtree(check(JsonFolder).sink.folder)
    with pytest.raises((AssertionError, sqlite3.ProgrammingError), match=told):
        check(kind).run(test)


def test_a_sink_that_goes_on_with_a_hole_is_caught(check: MakeCheck) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(GoesOnWithAHole).run("what_was_prepared_and_is_gone_ends_the_job")


@pytest.mark.parametrize(
    ("kind", "point", "told"),
    [
        (VisibleAtOnce, "prepare", "twice"),
        (WritesAgain, "after commit", "twice"),
        (ForgetsWhatIsHeld, "before commit", "missing"),
        (CommitsAllThereIs, "prepare", "twice"),
    ],
)
def test_a_broken_sink_is_caught_by_a_whole_flow(
    check: MakeCheck, kind: type[JsonFolder], point: str, told: str
) -> None:
    with pytest.raises(AssertionError, match=told):
        check(kind).run("a_flow_that_fails", point=point)


def test_a_sink_that_keeps_rows_behind_a_checkpoint_is_caught(tmp_path: Path) -> None:
    class AtLeastOnce(SinkConformance):
        guarantee = "at_least_once"

    sink = KeepsRowsInMemory(str(tmp_path / "out"))
    with pytest.raises(AssertionError):
        Check(sink, tmp_path, AtLeastOnce()).run("killed_behind_a_checkpoint_no_row_of_it_is_missing")
    with pytest.raises(AssertionError):
        Check(sink, tmp_path).run("it_promises_what_is_tested")
