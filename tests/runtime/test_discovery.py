"""A source that goes on looking, in the local runtime: over restarts, savepoints and other parallelisms (rule R2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner

import rayflow as rf
from rayflow.cli.main import main
from rayflow.core.events import CheckpointRequested
from rayflow.core.messages import CheckpointKind
from rayflow.flow import run_local
from rayflow.operators.base import OperatorContext, Polled, Source, SplitReader
from rayflow.runtime.inprocess import World


class Reader(SplitReader):
    def __init__(self, value: int) -> None:
        self.value = value

    def poll(self) -> Polled:
        return Polled(pa.record_batch({"v": [self.value]}), 1, done=True)


@dataclass(frozen=True, eq=False)
class Folder(Source):
    """Splits are numbers. Those in ``later`` turn up one a look."""

    values: tuple[int, ...]
    later: list[int]
    discovery_interval_s: float | None = 0.01
    bounded = False
    in_turns = False

    def schema(self) -> pa.Schema:
        return pa.schema({"v": pa.int64()})

    def discover(self) -> Sequence[tuple[str, Any]]:
        return [(f"file-{v}", v) for v in self.values]

    def discover_again(self) -> Sequence[tuple[str, Any]]:
        object.__setattr__(self, "values", (*self.values, *self.later[:1]))
        del self.later[:1]
        return self.discover()

    def reader(self, split: Any, position: Any, ctx: OperatorContext) -> SplitReader:
        return Reader(split)


def flow(source: Source) -> rf.Flow:
    return rf.Flow("f", rf.read_source(source, name="folder").collect(name="rows"))


def run(source: Folder, where: Path, *, until: int, parallelism: int = 1, **options: Any) -> list[int]:
    """Stop when so many rows have come; all rows that the job has collected."""
    told: list[float] = []

    def stop(world: World) -> None:
        rows = sum(slot.runtime.metrics()["rows_in"] for s, slot in world.slots.items() if s.chain == "folder")
        if rows >= until and not told:
            told.append(rows)
            world.coordinator_inbox.append(CheckpointRequested(CheckpointKind.STOP))

    plan = flow(source).plan(parallelism=parallelism)
    result = run_local(plan, rf.JobConfig(), rf.CheckpointConfig(str(where)), on_round=stop, **options)
    assert result.status == "stopped"
    rows: list[int] = result.tables["rows"]["v"].to_pylist()
    return sorted(rows)


def test_what_turns_up_is_read_once_over_restarts_and_parallelisms(tmp_path: Path) -> None:
    where = tmp_path / "checkpoints"
    assert run(Folder((1, 2), [3, 4]), where, until=4) == [1, 2, 3, 4]
    assert run(Folder((1, 2, 3, 4), [5]), where, until=1, parallelism=3) == [1, 2, 3, 4, 5]
    kept = max((where / "f").glob("chk-*"))
    moved = run(Folder((1, 2, 3, 4, 5), [6]), tmp_path / "other", until=1, start=str(kept))
    assert moved == [1, 2, 3, 4, 5, 6], "a savepoint knows it too"
    shown = CliRunner().invoke(main, ["checkpoints", "show", str(where)])
    assert "folder looks for new splits and has found 5 so far" in shown.output
    as_json = CliRunner().invoke(main, ["checkpoints", "show", str(where), "--json"])
    assert '"count": 5' in as_json.output
    assert "digests" not in as_json.output


def test_a_source_that_did_not_look_does_not_know_what_it_has_read(tmp_path: Path) -> None:
    run(Folder((1, 2), [], discovery_interval_s=None), tmp_path, until=2)
    watched = flow(Folder((1, 2), []))
    with pytest.raises(
        rf.JobFailedError, match=r"does not tell which splits of source 'folder' were read to their end"
    ):
        watched.run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path)))
    kept = max((tmp_path / "f").glob("chk-*"))
    problems = rf.restore_plan(watched, str(kept)).problems
    assert [p for p in problems if "does not tell which splits of source 'folder'" in p]


def test_a_job_whose_source_looks_no_more_reads_what_is_left(tmp_path: Path) -> None:
    run(Folder((1, 2), []), tmp_path, until=2)
    source = Folder((1, 2, 3), [], discovery_interval_s=None)
    object.__setattr__(source, "bounded", True)
    result = flow(source).run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path)))
    assert sorted(result.tables["rows"]["v"].to_pylist()) == [1, 2]
