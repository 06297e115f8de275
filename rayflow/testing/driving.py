"""Readers, writers and committers driven by hand, as a job drives them: for what no whole flow shows."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import cloudpickle
import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import Json
from rayflow.operators.base import (
    Collected,
    Committer,
    CommitterContext,
    OperatorContext,
    SinkFactory,
    SinkOperator,
    Source,
    Staging,
)

Description = TypeVar("Description", Source, SinkFactory)

POLLS_MAX = 100_000
"""Of one split; a reader that has not said done by then never will."""


def operator_context(
    subtask: int = 0, *, parallelism: int = 1, attempt: int = 1, run_id: str = "run", job: str = "job"
) -> OperatorContext:
    """What an operator or reader is told of where it is, for one that is driven by hand."""
    return OperatorContext(
        job=job,
        run_id=run_id,
        operator="op",
        step="step",
        subtask=subtask,
        parallelism=parallelism,
        max_parallelism=128,
        attempt=attempt,
        key_groups=key_group_range(subtask, parallelism, 128),
        now=lambda: 0.0,
    )


def through_json(value: Json, what: str) -> Json:
    """As the manifest of a checkpoint gives it back. Fails where that is not the same value."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{what} must be JSON, it is kept in the checkpoint: {value!r} ({error})") from error
    back: Json = json.loads(text)
    assert back == value, f"{what} must be the same behind JSON: {value!r} came back as {back!r}"
    return back


def another_process(description: Description) -> Description:
    """The description as it arrives in a process of the cluster."""
    copy: Description = cloudpickle.loads(cloudpickle.dumps(description))
    return copy


def read_split(source: Source, split: Json, position: Json = None) -> list[tuple[pa.RecordBatch, Json]]:
    """All batches of the split from the position on, each with the position behind it."""
    reader = source.reader(split, position, operator_context())
    found = []
    try:
        for _ in range(POLLS_MAX):
            polled = reader.poll()
            if polled.batch is not None:
                found.append((polled.batch, polled.position))
            if polled.done:
                return found
    finally:
        reader.close()
        reader.close()  # safe when called twice
    raise AssertionError(
        f"the reader of split {split!r} never said done: give the suite an input that ends, as one that reads to the "
        "present end of what grows"
    )


@dataclass(eq=False)
class SinkRun:
    """One life of a job with this sink, without the job: writers and committers as attempts have them.

    Every writer and every committer is built from a copy that went through pickle, and ``prepare`` and the committers
    run on a thread that is not the one of the writers, as in a job.
    """

    sink: SinkFactory
    folder: Path
    """For what sinks keep beside the checkpoints."""
    schema: pa.Schema
    parallelism: int = 2
    job: str = field(default_factory=lambda: f"conformance-{uuid.uuid4().hex[:12]}")
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        if hasattr(self.sink, "with_input_schemas"):
            self.sink = self.sink.with_input_schemas([self.schema])
        self._background = ThreadPoolExecutor(1)
        self._writers: list[SinkOperator] = []

    def begin(self) -> None:
        """What the coordinator does before there is a checkpoint."""
        self.recover([], fresh=True)

    def writer(self, subtask: int = 0, *, attempt: int = 1) -> SinkOperator:
        """A new writer, opened."""
        operator = another_process(self.sink).build()
        assert isinstance(operator, SinkOperator), f"build() must give an rf.SinkOperator, got {type(operator)}"
        ctx = operator_context(subtask, parallelism=self.parallelism, attempt=attempt, run_id=self.run_id, job=self.job)
        self._writers.append(operator)
        operator.open(dataclasses.replace(ctx, staging=self._staging), Collected())
        return operator

    def prepared(self, writer: SinkOperator, checkpoint: int) -> list[Json]:
        """The barrier has come and the upload is done: the committables, as the manifest has them."""
        return self.upload(writer, checkpoint)()

    def upload(self, writer: SinkOperator, checkpoint: int) -> _Upload:
        """The barrier has come; the upload waits to be called."""
        frozen = writer.snapshot(CheckpointId(checkpoint))
        return _Upload(self._background, None if frozen is None else frozen.prepare)

    def commit(self, committables: Sequence[Json]) -> None:
        """By a new committer, which has prepared none of it."""
        committer = self._committer()
        if committer is not None and committables:
            self._background.submit(committer.commit, list(committables)).result()

    def recover(self, committables: Sequence[Json], *, fresh: bool = False) -> None:
        committer = self._committer()
        if committer is not None:
            self._background.submit(committer.recover, list(committables), fresh=fresh).result()

    def finish(self) -> None:
        committer = self._committer()
        if committer is not None:
            self._background.submit(committer.finish).result()

    def close(self) -> None:
        """All writers, also those that stand for processes that were killed."""
        for writer in self._writers:
            writer.close()
        self._background.shutdown()

    @property
    def _staging(self) -> Staging:
        return Staging(str(self.folder / self.job / "staging"))

    def _committer(self) -> Committer | None:
        committer = another_process(self.sink).committer()
        if committer is not None:
            committer.open(
                CommitterContext(self.job, self.run_id, "op", "step", self.parallelism, staging=self._staging)
            )
        return committer


@dataclass(frozen=True, slots=True)
class _Upload:
    background: ThreadPoolExecutor
    prepare: object

    def __call__(self) -> list[Json]:
        if self.prepare is None:
            return []
        assert callable(self.prepare)
        made = self.background.submit(self.prepare).result()
        return [through_json(each, "a committable") for each in made]
