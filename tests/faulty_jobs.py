"""Jobs that end badly: what their one message must be like, what is left, and that a rerun gives the exact result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.errors import JobFailedError, RayflowError
from rayflow.stream import Stream

N = 400
BATCH = 20
ROWS = pa.table({"k": [f"k{i % 7}" for i in range(N)], "v": pa.array(range(N), pa.int64())})


def rows() -> Stream:
    """`ROWS` in 20 batches of one split, in order."""
    return rf.from_arrow(ROWS, batch_rows=BATCH)


def one_sentence(error: BaseException, *said: str) -> str:
    """The message of the error, after checking that it is one line that says all of ``said`` (regular expressions)."""
    assert isinstance(error, RayflowError), repr(error)
    text = str(error)
    assert "\n" not in text, text
    assert "Traceback" not in text
    for each in said:
        assert re.search(each, text), f"{each!r} is not in {text!r}"
    return text


@dataclass(frozen=True)
class Place:
    """Where a job keeps its checkpoints and its output."""

    folder: Path

    @property
    def checkpoints(self) -> rf.CheckpointConfig:
        return rf.CheckpointConfig(str(self.folder / "chk"), interval="2ms")

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def files(self) -> dict[str, bytes]:
        """All that readers of the output see."""
        found = sorted(self.out.glob("*.parquet")) if self.out.exists() else []
        return {path.name: path.read_bytes() for path in found}

    def storage(self) -> dict[str, bytes]:
        """All that lies in the checkpoint directory, but for the claims that every start adds."""
        root = self.folder / "chk"
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file() and "coordinators" not in path.parts
        }

    def committed(self, column: str = "v") -> list[Any]:
        if not self.files():
            return []
        found: list[Any] = pa.concat_tables([pq.read_table(self.out / f) for f in self.files()])[column].to_pylist()
        return sorted(found)

    def run(self, stream: Stream, **options: Any) -> rf.JobResult:
        flow = rf.Flow("job", stream.write_parquet(str(self.out)))
        return flow.run(local=True, **{"checkpoints": self.checkpoints, **options})

    def fails(self, stream: Stream, *said: str, **options: Any) -> JobFailedError:
        """Run a job that must end with one sentence; what is committed then is a part of the input, each row once."""
        with pytest.raises(JobFailedError) as caught:
            self.run(stream, **options)
        one_sentence(caught.value, "job 'job' failed", *said)
        return caught.value

    def fails_then_mended(self, bad: Stream, mend: Callable[[], Stream], *said: str, **options: Any) -> JobFailedError:
        """As `fails`; then the fault is mended, and the same job started again ends with exactly the whole result."""
        error = self.fails(bad, *said, **options)
        before, seen = self.files(), self.committed()
        assert seen == list(range(len(seen))), "what is committed is the beginning of the input, each row once"
        assert 0 < len(seen) < N, "the fault must come in the middle for this test to say anything"
        result = self.run(mend())
        assert self.committed() == list(range(N))
        assert before.items() <= self.files().items(), "a committed file was changed or taken away"
        assert result.metrics["rows_in"] < 2 * N, "the rerun began anew instead of going on"
        return error


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
