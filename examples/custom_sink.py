"""A sink of one's own: JSON lines in a folder, visible exactly once, by two-phase commit with a rename.

docs/custom-sinks.md explains it; tests/test_conformance.py runs the suite `rayflow.testing.SinkConformance` on it.

    python examples/custom_sink.py
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

import rayflow as rf

# --8<-- connector
PENDING = "_pending"


@dataclass(frozen=True)
class JsonFolder(rf.Sink):
    """One file for each subtask and checkpoint with rows. Readers take ``*.jsonl``; what is prepared waits below."""

    folder: str

    def build(self) -> rf.SinkOperator:
        return JsonWriter(Path(self.folder))

    def committer(self) -> rf.Committer:
        return JsonCommitter(Path(self.folder))


class JsonWriter(rf.SinkOperator):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[pa.RecordBatch] = []

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        self._rows.append(batch)

    def snapshot(self, checkpoint: int) -> rf.FrozenState | None:
        """On the thread that also processes rows: hand over what came before the barrier, and do nothing else."""
        rows, self._rows = self._rows, []
        return rf.FrozenState(prepare=partial(self._prepare, checkpoint, rows))

    def _prepare(self, checkpoint: int, batches: list[pa.RecordBatch]) -> Sequence[Any]:
        """On the background thread: the rows are on disk when it returns. It may be called again after a failure."""
        rows = [row for batch in batches for row in batch.to_pylist()]
        if not rows:
            return []
        name = f"part-{checkpoint:08d}-{self.ctx.subtask:05d}.jsonl"
        (self._folder / PENDING).mkdir(parents=True, exist_ok=True)
        with open(self._folder / PENDING / name, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        return [name]


class JsonCommitter(rf.Committer):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def commit(self, committables: Sequence[Any]) -> None:
        for name in committables:
            try:
                os.replace(self._folder / PENDING / name, self._folder / name)
            except FileNotFoundError:
                if not (self._folder / name).exists():  # else it was committed before
                    raise rf.CommitLostError(f"{self.ctx}: {name} was prepared but is gone; restore it") from None

    def recover(self, committables: Sequence[Any], *, fresh: bool) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if fresh and any(self._folder.glob("*.jsonl")):
            raise rf.DataError(f"{self.ctx}: {self._folder} holds the output of another run; empty it")
        self.commit(committables)
        self.finish()

    def finish(self) -> None:
        shutil.rmtree(self._folder / PENDING, ignore_errors=True)


# --8<-- connector

ROWS = 5_000
raised = False


def fragile(batch: pa.RecordBatch) -> pa.RecordBatch:
    global raised
    if not raised and batch.column("n")[0].as_py() > ROWS // 2:
        raised = True
        raise RuntimeError("the service did not answer")
    return batch


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        numbers = rf.from_arrow(pa.table({"n": range(ROWS)}), batch_rows=50).map_batches(fragile).rebalance()
        result = rf.Flow("numbers", numbers.write(JsonFolder(f"{folder}/out"))).run(
            local=True, parallelism=2, checkpoints=rf.CheckpointConfig(f"{folder}/checkpoints", interval="5ms")
        )
        files = sorted(Path(folder, "out").glob("*.jsonl"))
        found = sorted(json.loads(line)["n"] for file in files for line in file.read_text().splitlines())
        assert raised
        assert result.restarts == 1
        assert len(files) > 4, "every checkpoint should have its files"
        assert found == list(range(ROWS))
        assert not Path(folder, "out", PENDING).exists()
    print(f"{ROWS} rows are in files of many checkpoints, each exactly once, through a failure")


if __name__ == "__main__":
    main()
