"""A watched folder and sinks that commit as a whole, on real Ray: files come while a subtask and the coordinator are
killed, between two starts too; every row is in both targets once (rules R2, R3, S1)."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

import rayflow as rf
from rayflow.cluster.job import Job
from tests.cluster.ray_harness import kill, kill_and_recover, recovered, until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

FILE_ROWS = 50
SCHEMA = pa.schema([("x", pa.int64())])


class Folders:
    """What comes in as files and what has come out as tables."""

    def __init__(self, root: Path) -> None:
        self.incoming, self.delta, self.database = root / "in", root / "delta", root / "rows.sqlite"
        self.checkpoints = root / "checkpoints"
        self.incoming.mkdir()
        self.files = 0

    def put(self, count: int) -> None:
        """So many files more, each complete when it appears."""
        for number in range(self.files, self.files + count):
            hidden = self.incoming / f"_{number}"
            rows = range(number * FILE_ROWS, (number + 1) * FILE_ROWS)
            hidden.write_text("".join(json.dumps({"x": x}) + "\n" for x in rows))
            hidden.rename(self.incoming / f"{number * 7 % 11:02d}-{number}.jsonl")
        self.files += count

    def submit(self) -> Job:
        rows = rf.read_json(self.incoming, schema=SCHEMA, watch="100ms", name="incoming")
        flow = rf.Flow(
            "watched-on-ray",
            rows.write_delta(str(self.delta), name="lake"),
            rows.write_sqlite("rows", path=self.database, name="database"),
        )
        return flow.submit(
            parallelism=2,
            checkpoints=rf.CheckpointConfig(str(self.checkpoints), interval="100ms"),
            config=rf.JobConfig(restart=rf.Restart.fixed(delay="50ms")),
        )

    def in_delta(self) -> list[int]:
        if not DeltaTable.is_deltatable(str(self.delta)):
            return []
        return sorted(DeltaTable(str(self.delta)).to_pyarrow_table()["x"].to_pylist())

    def in_sqlite(self) -> list[int]:
        with closing(sqlite3.connect(self.database)) as database:
            return sorted(x for (x,) in database.execute("select x from rows"))

    def committed(self) -> None:
        """Until a complete checkpoint holds all that was put."""
        expected = list(range(self.files * FILE_ROWS))
        until(lambda: len(self.in_delta()) >= len(expected), f"{len(expected)} rows are committed")
        assert self.in_delta() == expected


def checkpoints_in(delta: Path) -> Iterable[int]:
    """The checkpoint of each commit that added rows, in the order of the log."""
    history = reversed(DeltaTable(str(delta)).history())
    return [int(commit["rayflow.checkpoint"]) for commit in history if "rayflow.checkpoint" in commit]


def test_files_come_while_a_subtask_and_the_coordinator_die(tmp_path: Path) -> None:
    folders = Folders(tmp_path)
    job = folders.submit()
    folders.put(2)
    folders.committed()

    folders.put(3)
    kill_and_recover(job, job.subtasks()[1].pid)
    folders.committed()

    folders.put(3)
    attempt = job.status().attempt
    kill(job.coordinator().pid)
    recovered(job, attempt)
    folders.committed()

    folders.put(1)
    assert job.stop(120).status == "stopped"
    folders.put(2)
    job = folders.submit()
    folders.committed()
    assert job.stop(120).status == "stopped"

    assert folders.in_delta() == folders.in_sqlite() == list(range(folders.files * FILE_ROWS))
    commits = list(checkpoints_in(folders.delta))
    assert commits == sorted(set(commits)), "one commit a checkpoint"
