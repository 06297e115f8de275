"""What every sink must do (rule S1): what its guarantee says, wherever a job fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from uuid import NAMESPACE_URL, uuid5

import pyarrow as pa
import pytest

from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, JobFailedError
from rayflow.flow import Flow
from rayflow.operators.base import Guarantee, SinkFactory, SinkOperator
from rayflow.reading import from_arrow
from rayflow.testing.applying import applies, drop_what_does_not_apply
from rayflow.testing.driving import SinkRun, another_process
from rayflow.testing.flows import POINTS, Declining, FailingSink, Failure, Point, run

Visible = Callable[[], Iterable[int]]
Leftovers = Callable[[], Sequence[object]]
Lose = Callable[[Json], None]

ROWS = 240
BATCH = 6
LADDER = (2, 3, 1)


class SinkConformance:
    """Derive ``class TestMySink(SinkConformance)`` and give the fixtures ``sink`` and ``visible``; with ``leftovers``
    and ``lose`` more is tested. A test has a target of its own, which is empty.

    Tests that say nothing about a sink of this `guarantee`, or that need a fixture which is not given, are not there.
    """

    guarantee: ClassVar[Guarantee] = "exactly_once"
    """What the sink promises; it must say the same."""

    @pytest.fixture
    def sink(self) -> SinkFactory:
        """The sink under test."""
        raise NotImplementedError(f"{type(self).__name__} must give a fixture 'sink'")

    @pytest.fixture
    def visible(self) -> Visible:
        """A function: the column ``id`` of all rows that a reader of the target sees now, in any order."""
        raise NotImplementedError(f"{type(self).__name__} must give a fixture 'visible'")

    @pytest.fixture
    def leftovers(self) -> Leftovers:
        """A function: all that is there of the sink and is not output (prepared files, open transactions)."""
        return lambda: ()

    @pytest.fixture
    def lose(self) -> Lose:
        """A function that destroys what a committable stands for, behind the back of the sink."""
        raise NotImplementedError

    def rows(self, *ids: int) -> pa.RecordBatch:
        """Rows with these ids, for sinks that want other columns; ``id`` is an int64 and must be among them."""
        return pa.record_batch({"id": pa.array(ids, pa.int64()), "text": pa.array([f"row {i}" for i in ids])})

    def crash(self, writer: SinkOperator) -> None:
        """The process of a writer is killed: its objects stay as they are, unclosed, until the test is over. A writer
        that holds what only the death of a process would release (a lock) must release it here."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        drop_what_does_not_apply(cls, SinkConformance, cls.guarantee)

    @pytest.fixture
    def job(self, sink: SinkFactory, tmp_path: Path) -> Iterator[SinkRun]:
        """A life of a job that has just begun."""
        job = SinkRun(sink, tmp_path / "conformance", self.rows().schema)
        job.begin()
        yield job
        job.close()

    # ------------------------------------------------------------------------------------- without failures, by hand

    def test_it_promises_what_is_tested(self, sink: SinkFactory) -> None:
        for each in (sink, another_process(sink)):
            assert getattr(each, "guarantee", "exactly_once") == self.guarantee

    def test_what_is_committed_is_visible(self, job: SinkRun, visible: Visible) -> None:
        writers = [job.writer(subtask) for subtask in range(2)]
        everything: list[int] = []
        for checkpoint in range(1, 4):
            for writer in writers:
                ids = [len(everything), len(everything) + 1]
                writer.process(self.rows(*ids), 0)
                everything += ids
            job.commit([each for writer in writers for each in job.prepared(writer, checkpoint)])
            self._check(visible, everything)
        job.finish()
        self._check(visible, everything)

    def test_intervals_without_rows(self, job: SinkRun, visible: Visible) -> None:
        writer = job.writer()
        job.commit(job.prepared(writer, 1))
        writer.process(self.rows(), 0)
        job.commit(job.prepared(writer, 2))
        writer.process(self.rows(1), 0)
        job.commit(job.prepared(writer, 3))
        job.commit(job.prepared(writer, 4))
        self._check(visible, [1])

    def test_writers_are_closed_at_any_point(self, job: SinkRun, visible: Visible) -> None:
        job.writer().close()
        writer = job.writer()
        writer.process(self.rows(1), 0)
        committables = job.prepared(writer, 1)
        writer.process(self.rows(2), 0)
        writer.close()
        writer.close()
        job.commit(committables)
        assert 1 in set(visible())

    @applies("exactly_once")
    def test_nothing_is_visible_before_the_commit(self, job: SinkRun, visible: Visible) -> None:
        writer = job.writer()
        for n in range(2):
            writer.process(self.rows(n), 0)
            assert not list(visible()), "rows are visible as soon as they are written; no checkpoint may ever hold them"
        committables = job.prepared(writer, 7)
        assert not list(visible()), "the pre-commit made rows visible; the checkpoint may still be given up"
        job.commit(committables)
        self._check(visible, [0, 1])

    @applies("exactly_once")
    def test_the_upload_takes_no_rows_of_a_later_checkpoint(self, job: SinkRun, visible: Visible) -> None:
        """It may run long after the barrier, with the next interval written and its barrier there (rule A3)."""
        writer = job.writer()
        writer.process(self.rows(1), 0)
        first = job.upload(writer, 1)
        writer.process(self.rows(2), 0)
        second = job.upload(writer, 2)
        writer.process(self.rows(3), 0)
        job.commit(first())
        self._check(visible, [1])
        job.commit(second())
        self._check(visible, [1, 2])

    @applies("exactly_once")
    def test_what_an_aborted_checkpoint_prepared_is_committed_with_the_next(
        self, job: SinkRun, visible: Visible
    ) -> None:
        writer = job.writer()
        writer.process(self.rows(1), 0)
        kept = job.prepared(writer, 1)
        writer.process(self.rows(2), 0)
        job.commit([*kept, *job.prepared(writer, 2)])
        self._check(visible, [1, 2])

    # -------------------------------------------------------------------------------------------- failures, by hand

    @applies("exactly_once", "idempotent")
    def test_committing_twice_changes_nothing(self, job: SinkRun, visible: Visible) -> None:
        """The answer to a commit may get lost, and every recovery commits once more what its checkpoint holds."""
        writer = job.writer()
        writer.process(self.rows(1, 2), 0)
        committables = job.prepared(writer, 1)
        for _ in range(3):
            job.commit(committables)
        job.recover(committables)
        job.recover(committables)
        self._check(visible, [1, 2])

    @applies("exactly_once")
    def test_killed_between_the_pre_commit_and_the_commit(self, job: SinkRun, visible: Visible) -> None:
        """The manifest was written, nobody committed: another process does, and then the job goes on."""
        writer = job.writer()
        writer.process(self.rows(1, 2), 0)
        committables = job.prepared(writer, 1)
        writer.process(self.rows(3), 0)
        self.crash(writer)
        job.recover(committables)
        self._check(visible, [1, 2])
        again = job.writer(attempt=2)
        again.process(self.rows(3), 0)
        job.commit(job.prepared(again, 2))
        self._check(visible, [1, 2, 3])

    @applies("exactly_once")
    def test_killed_behind_the_commit_before_anybody_knew(self, job: SinkRun, visible: Visible) -> None:
        writer = job.writer()
        writer.process(self.rows(1), 0)
        committables = job.prepared(writer, 1)
        job.commit(committables)
        self.crash(writer)
        job.recover(committables)
        again = job.writer(attempt=2)
        again.process(self.rows(2), 0)
        job.commit(job.prepared(again, 2))
        self._check(visible, [1, 2])

    @applies("exactly_once")
    def test_killed_before_the_first_checkpoint(self, job: SinkRun, visible: Visible, leftovers: Leftovers) -> None:
        """Prepared, but no manifest was written: all of it is given up and comes again, under another run id."""
        writer = job.writer()
        writer.process(self.rows(1, 2), 0)
        job.prepared(writer, 1)
        writer.process(self.rows(3), 0)
        self.crash(writer)
        job.run_id = f"{job.run_id}-again"
        job.begin()
        assert not list(visible())
        assert not list(leftovers())
        again = job.writer(attempt=2)
        again.process(self.rows(1, 2, 3), 0)
        job.commit(job.prepared(again, 2))
        self._check(visible, [1, 2, 3])

    @applies("exactly_once")
    def test_recovery_gives_up_what_the_checkpoint_does_not_hold(self, job: SinkRun, visible: Visible) -> None:
        writers = [job.writer(subtask) for subtask in range(2)]
        held: list[Json] = []
        for n, writer in enumerate(writers):
            writer.process(self.rows(n), 0)
            held += job.prepared(writer, 1)
        for n, writer in enumerate(writers):
            writer.process(self.rows(10 + n), 0)
            job.prepared(writer, 2)
            writer.process(self.rows(20 + n), 0)
            self.crash(writer)
        job.recover(held)
        self._check(visible, [0, 1])
        again = job.writer(attempt=2)
        again.process(self.rows(10, 11, 20, 21), 0)
        job.commit(job.prepared(again, 3))
        self._check(visible, [0, 1, 10, 11, 20, 21])
        job.finish()
        self._check(visible, [0, 1, 10, 11, 20, 21])

    @applies("exactly_once")
    def test_recovery_with_less_parallelism(self, job: SinkRun, visible: Visible, leftovers: Leftovers) -> None:
        """What subtasks that are no more have prepared is committed where it is held, and given up where not."""
        job.parallelism = 5
        writers = [job.writer(subtask) for subtask in range(5)]
        held: list[Json] = []
        for n, writer in enumerate(writers):
            writer.process(self.rows(n), 0)
            held += job.prepared(writer, 1)
            writer.process(self.rows(10 + n), 0)
            job.prepared(writer, 2)
            self.crash(writer)
        job.parallelism = 1
        job.recover(held)
        self._check(visible, range(5))
        assert not list(leftovers())
        again = job.writer(attempt=2)
        again.process(self.rows(*range(10, 15)), 0)
        job.commit(job.prepared(again, 3))
        self._check(visible, [*range(5), *range(10, 15)])

    @applies("exactly_once")
    def test_going_back_to_an_old_checkpoint(self, job: SinkRun, visible: Visible) -> None:
        """What it holds was committed long ago, and is there once; later ones are out of the sink's hands."""
        writer = job.writer()
        held = {}
        for n in range(1, 5):
            writer.process(self.rows(n), 0)
            held[n] = job.prepared(writer, n)
            job.commit(held[n])
        self.crash(writer)
        job.recover(held[2])
        found = Counter(visible())
        assert found[1] == found[2] == 1, (
            f"rows of checkpoints that were committed long ago: {sorted(found.elements())}"
        )
        again = job.writer(attempt=2)
        again.process(self.rows(5), 0)
        job.commit(job.prepared(again, 5))
        assert Counter(visible())[5] == 1

    @applies("exactly_once", hook="leftovers")
    def test_recovery_and_the_end_leave_nothing_behind(
        self, job: SinkRun, visible: Visible, leftovers: Leftovers
    ) -> None:
        writer = job.writer()
        writer.process(self.rows(1), 0)
        held = job.prepared(writer, 1)
        writer.process(self.rows(2), 0)
        assert job.prepared(writer, 2)
        assert list(leftovers()), "leftovers() sees nothing of what is prepared, so it will not see what is left behind"
        self.crash(writer)
        job.recover(held)
        assert not list(leftovers()), "recovery left behind what its checkpoint does not hold"
        again = job.writer(attempt=2)
        again.process(self.rows(2), 0)
        job.commit(job.prepared(again, 3))
        again.close()
        job.finish()
        assert not list(leftovers()), "the job is over, and not only its output is there"
        self._check(visible, [1, 2])

    @applies("exactly_once", hook="lose")
    def test_what_was_prepared_and_is_gone_ends_the_job(self, job: SinkRun, lose: Lose) -> None:
        """Going on would be a silent hole in the output."""
        writer = job.writer()
        writer.process(self.rows(1), 0)
        committables = job.prepared(writer, 1)
        self.crash(writer)
        for each in committables:
            lose(each)
        with pytest.raises(CommitLostError):
            job.commit(committables)
        with pytest.raises(CommitLostError):
            job.recover(committables)

    @applies("at_least_once", "idempotent")
    def test_killed_behind_a_checkpoint_no_row_of_it_is_missing(self, job: SinkRun, visible: Visible) -> None:
        """Rows that the source will not give again are in the target, or in what the checkpoint holds."""
        writer = job.writer()
        writer.process(self.rows(1, 2), 0)
        committables = job.prepared(writer, 1)
        writer.process(self.rows(3), 0)
        self.crash(writer)
        job.recover(committables)
        assert {1, 2} <= set(visible())
        again = job.writer(attempt=2)
        again.process(self.rows(3), 0)
        job.commit(job.prepared(again, 2))
        self._check(visible, [1, 2, 3])

    # ----------------------------------------------------------------------------------------------------- whole flows

    @pytest.mark.parametrize("point", POINTS)
    def test_a_flow_that_fails(
        self, sink: SinkFactory, visible: Visible, leftovers: Leftovers, tmp_path: Path, point: Point
    ) -> None:
        """Behind a checkpoint; it is reset and goes on."""
        failure = Failure()
        run(self._flow(sink, tmp_path, point, failure), tmp_path, failure, parallelism=2)
        if self.guarantee == "exactly_once" or not point.endswith("commit"):  # others may have nothing to commit
            failure.check_struck()
        self._check(visible, range(ROWS))
        assert not list(leftovers())

    def test_a_flow_that_fails_before_the_first_checkpoint(
        self, sink: SinkFactory, visible: Visible, leftovers: Leftovers, tmp_path: Path
    ) -> None:
        failure = Failure(behind=0)
        run(self._flow(sink, tmp_path, "prepare", failure), tmp_path, failure, parallelism=2)
        failure.check_struck()
        self._check(visible, range(ROWS))
        assert not list(leftovers())

    def test_a_flow_started_again_and_again_with_another_parallelism(
        self, sink: SinkFactory, visible: Visible, leftovers: Leftovers, tmp_path: Path
    ) -> None:
        """Every run but the last ends in a failure, behind a checkpoint of its own."""
        for n, parallelism in enumerate(LADDER):
            failure = Failure()
            flow = self._flow(sink, tmp_path, ("rows", "prepare")[n % 2], failure)
            with pytest.raises(JobFailedError, match="a subtask died"):
                run(flow, tmp_path, failure, parallelism=parallelism, restart=False)
            found = Counter(visible())
            assert self.guarantee == "at_least_once" or set(found.values()) <= {1}, "rows are there twice, meanwhile"
        run(self._flow(sink, tmp_path, "rows", Failure(behind=1_000_000)), tmp_path, Failure(), parallelism=2)
        self._check(visible, range(ROWS))
        assert not list(leftovers())

    # ----------------------------------------------------------------------------------------------------------- parts

    def _flow(self, sink: SinkFactory, folder: Path, point: Point, failure: Failure) -> Flow:
        rows = from_arrow(pa.Table.from_batches([self.rows(*range(ROWS))]), batch_rows=BATCH)
        stream = rows._step("declining", Declining(point, failure)).rebalance()
        # A name of its own for each test: sinks tell by it what is theirs in places that tests share.
        return Flow(
            f"conformance-{uuid5(NAMESPACE_URL, str(folder)).hex}", stream.write(FailingSink(sink, point, failure))
        )

    def _check(self, visible: Visible, ids: Iterable[int]) -> None:
        found, wanted = Counter(visible()), Counter(ids)
        missing = sorted((wanted - found).elements())
        assert not missing, f"{len(missing)} rows are missing, such as {missing[:5]}"
        unknown = sorted(set(found) - set(wanted))
        assert not unknown, f"{len(unknown)} rows are visible that should not be, such as {unknown[:5]}"
        twice = sorted(i for i, n in found.items() if n > 1)
        assert self.guarantee == "at_least_once" or not twice, f"{len(twice)} rows are there twice, such as {twice[:5]}"
