"""What becomes of a job when a stop, a rescale or the copy of a savepoint fails, without a cluster."""

from __future__ import annotations

from typing import Any, cast

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.cluster import job as jobs
from rayflow.cluster.job import Job
from rayflow.cluster.package import JobPackage
from rayflow.cluster.view import Ended
from rayflow.config import CheckpointConfig, JobConfig
from rayflow.core.events import JobState
from rayflow.core.ids import Attempt, CheckpointId
from rayflow.core.manifest import Manifest
from rayflow.core.messages import FailureCause
from rayflow.errors import ClusterError, JobFailedError, StorageError, UserCodeError
from rayflow.runtime.results import JobResult, JobStatus

SAVEPOINT = "file:///somewhere/savepoints/00000007-abcd"


class _Stopped(Job):
    """Ends when it is told to, unless ``ends`` is false."""

    def __init__(self, *, ends: bool = True) -> None:
        flow = rf.Flow("totals", rf.from_arrow(pa.table({"k": [1]})).collect())
        config = JobConfig()
        package = JobPackage(
            flow.plan(parallelism=1, config=config), config, CheckpointConfig("/x"), "run", "t", "latest"
        )
        super().__init__("totals:run", None, package)
        self._ends = ends

    def _ask(self, method: str, *args: Any) -> Any:
        return b"a flow" if method == "replan" else None

    def _copied(self, *args: Any) -> str:
        return SAVEPOINT

    def _copier(self, *args: Any) -> Any:
        return object()

    def stop(self, *args: Any, **kwargs: Any) -> JobResult:
        if not self._ends:
            return super().stop(*args, **kwargs)
        return JobResult("totals", "stopped", 7, 0, {}, (), {}, savepoint=SAVEPOINT)


def test_the_savepoint_is_named_when_the_job_cannot_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Job:
        raise ClusterError("the cluster is gone")

    job = _Stopped()
    monkeypatch.setattr(jobs, "unpack_replan", lambda data: lambda n: job._stores().plan)
    monkeypatch.setattr(jobs, "check_cluster", lambda plan: None)
    monkeypatch.setattr(jobs, "submit", refuse)
    with pytest.raises(ClusterError, match=r"is stopped, .* the cluster is gone; .* start='file:///somewhere"):
        job.rescale(2)


def test_a_stop_that_takes_too_long_does_not_say_that_the_job_goes_on() -> None:
    with pytest.raises(TimeoutError, match="was told to stop .* stop\\(\\) again for the savepoint"):
        _Stopped(ends=False).stop(0.0, savepoint=True)


class _Failed(_Stopped):
    def _ask(self, method: str, *args: Any) -> Any:
        if method != "outcome":
            return None
        cause = FailureCause("filter-2[0]: no module named 'theirs'", kind="UserCodeError")
        status = JobStatus("failed", 1, 0, None, 0, None, cause.message)
        return Ended(JobState.FAILED, cause, None, 0, (), {}, status, ())

    def _release(self) -> None:
        pass


@pytest.mark.parametrize("what", ["checkpoint", "savepoint"])
def test_who_waits_for_a_checkpoint_of_a_job_that_failed_is_told_why(what: str) -> None:
    with pytest.raises(JobFailedError, match="'totals' failed: filter-2.* no module named 'theirs'") as told:
        getattr(_Failed(), what)()
    assert isinstance(told.value.__cause__, UserCodeError)
    assert [f"it failed before a {what}"] == [
        note[: len(f"it failed before a {what}")] for note in told.value.__notes__
    ]


class _Failing:
    released = 0

    def copy(self, *_: Any) -> str:
        raise StorageError("the disk is full")

    def release(self, manifest: Manifest) -> None:
        self.released = manifest.checkpoint
        raise StorageError("and stays so")


def test_a_copy_that_failed_leaves_no_checkpoint_pinned_for_ever() -> None:
    manifest = Manifest("totals", CheckpointId(7), "savepoint", Attempt(1), 1, "run", 0.0, 128, {}, {}, ())
    copier = _Failing()
    with pytest.raises(StorageError, match="the disk is full"):
        Job._copied(_Stopped(), manifest, cast("Any", copier), None)
    assert copier.released == 7
