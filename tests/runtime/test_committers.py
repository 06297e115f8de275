"""For whom committers work: the same in the coordinator and in the subtasks, in every life of the job (C8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.core.ids import CheckpointId
from rayflow.errors import CommitLostError, ConnectorError
from rayflow.graph import Node
from rayflow.operators.base import Committer, CommitterContext, FrozenState, OperatorContext, SinkOperator
from rayflow.stream import StreamEnd

Said = list[tuple[str, Any]]


@dataclass(eq=False)
class Keeping(Committer):
    said: Said

    def open(self, ctx: CommitterContext) -> None:
        super().open(ctx)
        self.said.append(("open", ctx))

    def commit(self, committables: Sequence[Any]) -> None:
        self.said.append(("commit", self.ctx))
        self.said.append(("payloads", sorted(committables)))

    def recover(self, committables: Sequence[Any], *, fresh: bool) -> None:
        self.said.append(("recover", self.ctx))


class KeepingSink(SinkOperator):
    def __init__(self, said: Said) -> None:
        self.said = said

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self.said.append(("context", self.ctx))

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        return FrozenState(prepare=lambda: [f"{self.ctx.subtask} of {checkpoint}"])


@dataclass(frozen=True, eq=False)
class KeepingFactory:
    said: Said = field(default_factory=list)
    make: type[Keeping] = Keeping
    stateful = False

    def build(self) -> SinkOperator:
        return KeepingSink(self.said)

    def committer(self) -> Committer:
        return self.make(self.said)


def run(where: Path | None, *, make: type[Keeping] = Keeping, **options: Any) -> Said:
    factory = KeepingFactory(make=make)
    node = Node("write", operator=factory, inputs=(rf.from_arrow(pa.table({"v": [1]}))._input(),), name="out")
    checkpoints = None if where is None else rf.CheckpointConfig(str(where), storage_options={"auto_mkdir": True})
    rf.Flow("f", StreamEnd(node)).run(local=True, checkpoints=checkpoints, **options)
    return factory.said


def contexts(said: Said) -> list[CommitterContext]:
    return [ctx for _, ctx in said if isinstance(ctx, CommitterContext)]


def test_coordinator_and_subtasks_open_their_own_with_the_same_context(tmp_path: Path) -> None:
    said = run(tmp_path)
    assert [what for what, _ in said if what not in ("context", "payloads")] == ["open", "recover", "open", "commit"]
    (ctx,) = set(map(str, contexts(said)))
    assert ctx == "step 'out'"
    first = contexts(said)[0]
    assert all(other == first for other in contexts(said))
    assert (first.job, first.operator, first.parallelism) == ("f", "out", 1)
    assert first.staging is not None
    assert first.staging.url == f"{tmp_path}/f/staging"
    assert first.staging.storage_options == {"auto_mkdir": True}
    (operator,) = [ctx for what, ctx in said if what == "context" and isinstance(ctx, OperatorContext)]
    assert (operator.run_id, operator.staging) == (first.run_id, first.staging)


def test_the_run_id_is_that_of_the_directory(tmp_path: Path) -> None:
    first, again = (contexts(run(tmp_path / "one"))[0] for _ in range(2))
    other = contexts(run(tmp_path / "other"))[0]
    assert first.run_id == again.run_id != other.run_id
    copied = tmp_path / "one" / "f" / "chk-00000001"
    moved = contexts(run(tmp_path / "moved", start=str(copied)))[0]
    assert moved.run_id not in (first.run_id, other.run_id), "or it would be taken for the first one"


def test_without_a_place_there_is_no_staging() -> None:
    found = contexts(run(None))[0]
    assert found.staging is None
    assert found.run_id


class Whole(Keeping):
    whole = True


class FailsOnce(Whole):
    def commit(self, committables: Sequence[Any]) -> None:
        super().commit(committables)
        if sum(what == "commit" for what, _ in self.said) == 1:
            raise ConnectorError("the lake is down")

    def recover(self, committables: Sequence[Any], *, fresh: bool) -> None:
        self.said.append(("recovered", sorted(committables)))


class Gone(Whole):
    def commit(self, committables: Sequence[Any]) -> None:
        raise CommitLostError("step 'out': it is gone")


def test_one_commit_a_checkpoint_by_the_coordinator_alone(tmp_path: Path) -> None:
    said = run(tmp_path, make=Whole, parallelism=2)
    assert [what for what, _ in said if what == "open"] == ["open"], "subtasks have none"
    assert [payloads for what, payloads in said if what == "payloads"] == [["0 of 1", "1 of 1"]]


def test_a_commit_that_fails_is_made_good_by_the_recovery_from_the_same_manifest(tmp_path: Path) -> None:
    said = run(tmp_path, make=FailsOnce, parallelism=2)
    recovered = [payloads for what, payloads in said if what == "recovered"]
    assert recovered == [[], ["0 of 1", "1 of 1"]]
    manifests = [path.parent.name for path in tmp_path.glob("f/chk-*/manifest.json")]
    assert sorted(manifests) == ["chk-00000001", "chk-00000002"]


def test_a_lost_commit_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(rf.JobFailedError, match="step 'out': it is gone"):
        run(tmp_path, make=Gone)
