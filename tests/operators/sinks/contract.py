"""What every transactional sink must do (rule S1). A new sink inherits `SinkContract` and adds the hooks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import cloudpickle
import pyarrow as pa
import pytest

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import CommitLostError, DataError
from rayflow.operators.base import Collected, Committer, SinkFactory, SinkOperator
from tests.operators.sources.contract import context


def batch(*values: int) -> pa.RecordBatch:
    return pa.record_batch(
        {"x": pa.array(values, pa.int64()), "s": pa.array([f"text {v}" for v in values], pa.string())}
    )


def started(factory: SinkFactory, subtask: int = 0, *, attempt: int = 1, run_id: str = "run") -> SinkOperator:
    operator = factory.build()
    assert isinstance(operator, SinkOperator)
    operator.open(context(subtask, parallelism=2, attempt=attempt, run_id=run_id), Collected())
    return operator


def prepared(operator: SinkOperator, checkpoint: int) -> list[Json]:
    frozen = operator.snapshot(CheckpointId(checkpoint))
    return list(frozen.prepare()) if frozen is not None and frozen.prepare is not None else []


def committer(factory: SinkFactory) -> Committer:
    found = factory.committer()
    assert found is not None
    return found


class SinkContract:
    suffix = ".parquet"

    @pytest.fixture
    def factory(self) -> Any:
        raise NotImplementedError

    @abstractmethod
    def visible(self) -> list[int]:
        """Column x of all that a reader of the output sees, sorted."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all that a reader of the output sees, sorted."""

    @abstractmethod
    def leftovers(self) -> Sequence[object]:
        """All that exists of the sink and is not output."""

    @abstractmethod
    def lose(self, committable: Json) -> None:
        """Destroy what was prepared, behind the sink's back."""

    def test_nothing_is_visible_before_the_commit(self, factory: SinkFactory) -> None:
        operator = started(factory)
        for values in ((1, 2), (3,)):
            operator.process(batch(*values), 0)
            assert self.names() == []
        found = prepared(operator, 7)
        assert self.names() == []
        committer(factory).commit(found)
        assert self.visible() == [1, 2, 3]
        operator.close()

    def test_commit_twice_changes_nothing(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1, 2), 0)
        found = prepared(operator, 1)
        for _ in range(3):
            committer(factory).commit(found)
        committer(factory).recover(found, fresh=False)
        assert self.visible() == [1, 2]

    def test_many_intervals_and_subtasks(self, factory: SinkFactory) -> None:
        operators = [started(factory, subtask) for subtask in range(2)]
        for n in range(1, 5):
            for i, operator in enumerate(operators):
                operator.process(batch(10 * n + i), 0)
                committer(factory).commit(prepared(operator, n))
        assert self.visible() == sorted(10 * n + i for n in range(1, 5) for i in range(2))

    def test_an_interval_without_rows_prepares_nothing(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(), 0)
        assert prepared(operator, 1) == []
        operator.process(batch(1), 0)
        assert len(prepared(operator, 2)) == 1
        assert prepared(operator, 3) == []

    def test_crash_between_prepare_and_commit(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1, 2), 0)
        found = prepared(operator, 1)
        operator.process(batch(3), 0)
        operator.close()
        committer(cloudpickle.loads(cloudpickle.dumps(factory))).recover(found, fresh=False)
        assert self.visible() == [1, 2]
        again = started(factory, attempt=2)
        again.process(batch(3), 0)
        committer(factory).commit(prepared(again, 2))
        assert self.visible() == [1, 2, 3]

    def test_recovery_aborts_what_no_checkpoint_names(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1), 0)
        first = prepared(operator, 1)
        operator.process(batch(2), 0)
        assert prepared(operator, 2) != []
        operator.process(batch(3), 0)
        operator.close()
        assert self.leftovers()
        committer(factory).recover(first, fresh=False)
        assert self.visible() == [1]
        assert not self.leftovers()

    def test_two_recoveries_in_a_row(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1), 0)
        found = prepared(operator, 1)
        for _ in range(2):
            committer(factory).recover(found, fresh=False)
        assert self.visible() == [1]

    def test_what_was_prepared_of_an_aborted_checkpoint_is_committed_with_the_next(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1), 0)
        kept = prepared(operator, 1)
        operator.process(batch(2), 0)
        committer(factory).commit([*kept, *prepared(operator, 2)])
        assert self.visible() == [1, 2]

    def test_prepare_takes_no_rows_of_a_later_checkpoint(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1), 0)
        one = operator.snapshot(CheckpointId(1))
        operator.process(batch(2), 0)
        two = operator.snapshot(CheckpointId(2))
        assert one is not None
        assert two is not None
        assert one.prepare is not None
        assert two.prepare is not None
        committer(factory).commit(one.prepare())
        assert self.visible() == [1]
        committer(factory).commit(two.prepare())
        assert self.visible() == [1, 2]

    def test_names_are_a_function_of_subtask_and_checkpoint(self, factory: SinkFactory) -> None:
        for attempt in (1, 2):
            operator = started(factory, 1, attempt=attempt)
            operator.process(batch(attempt), 0)
            committer(factory).commit(prepared(operator, 40 + attempt))
        assert self.names() == [f"part-00001-000000{n}-0000{self.suffix}" for n in (41, 42)]

    def test_lost_prepared_output_is_an_error(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1), 0)
        found = prepared(operator, 1)
        self.lose(found[0])
        with pytest.raises(CommitLostError, match="part-00000-00000001-0000"):
            committer(factory).commit(found)
        with pytest.raises(CommitLostError, match="part-00000-00000001-0000"):
            committer(factory).recover(found, fresh=False)

    def test_fresh_start_refuses_output_of_another_run(self, factory: SinkFactory) -> None:
        committer(factory).recover([], fresh=True)
        operator = started(factory)
        operator.process(batch(1), 0)
        committer(factory).commit(prepared(operator, 1))
        with pytest.raises(DataError, match="another run.*append"):
            committer(factory).recover([], fresh=True)
        committer(factory).recover([], fresh=False)
        assert self.visible() == [1]

    def test_fresh_start_aborts_leftovers(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1), 0)
        prepared(operator, 1)
        operator.close()
        assert self.leftovers()
        committer(factory).recover([], fresh=True)
        assert not self.leftovers()

    def test_finish_leaves_nothing_but_the_output(self, factory: SinkFactory) -> None:
        committer(factory).recover([], fresh=True)
        operator = started(factory)
        operator.process(batch(1), 0)
        committer(factory).commit(prepared(operator, 1))
        operator.process(batch(2), 0)
        prepared(operator, 2)
        operator.close()
        committer(factory).finish()
        assert self.visible() == [1]
        assert not self.leftovers()

    def test_two_schemas_are_refused(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.process(batch(1), 0)
        with pytest.raises(DataError, match=r"step 'step' subtask 0/2 .*column 's' is missing; expected .x: int64"):
            operator.process(pa.record_batch({"x": [1]}), 0)

    def test_close_twice_and_at_any_point(self, factory: SinkFactory) -> None:
        operator = started(factory)
        operator.close()
        operator = started(factory)
        operator.process(batch(1), 0)
        operator.snapshot(CheckpointId(1))
        operator.process(batch(2), 0)
        operator.close()
        operator.close()
        assert self.names() == []
