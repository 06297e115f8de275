"""Jobs that could be tried again for ever, and must end with the reason."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.errors import JobFailedError


def test_output_that_no_checkpoint_can_write_ends_the_job_with_its_own_message(tmp_path: Path) -> None:
    """A pre-commit that refuses the data would refuse it at every later checkpoint and in every later attempt."""
    prepared: list[int] = []

    def unwritable(batch: pa.RecordBatch) -> pa.RecordBatch:
        prepared.append(batch.num_rows)
        return pa.record_batch({"gap": pa.array([pa.MonthDayNano([1, 2, 3])] * batch.num_rows)})

    rows = rf.from_arrow(pa.table({"v": list(range(10))}))
    flow = rf.Flow("unwritable", rows.map_batches(unwritable).write_parquet(str(tmp_path / "out")))
    with pytest.raises(
        JobFailedError, match=r"write_parquet.* cannot write its output file: .*month_day_nano_interval"
    ):
        flow.run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path / "chk"), interval="5ms"))
    assert len(prepared) == 3, "the same error at the same place, three times in a row"
