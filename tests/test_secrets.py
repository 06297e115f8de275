"""Keys and passwords of options do not show where streams, sinks and settings are printed, as notebooks do."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

import rayflow as rf
from rayflow.operators.base import Staging
from rayflow.operators.delta.table import DeltaTable
from rayflow.operators.sinks.s3 import Bucket
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.stream import StreamEnd

OPTIONS = {"key": "someone", "secret": "s3cret-of-ours"}
ROWS = rf.from_arrow(pa.table({"x": [1]}))
SHOWN: dict[str, Callable[[], object]] = {
    "write_parquet": lambda: ROWS.write_parquet("s3://b/out", storage_options=OPTIONS),
    "write_delta": lambda: ROWS.write_delta("s3://b/table", storage_options=OPTIONS),
    "write_postgres": lambda: ROWS.write_postgres("t", url="postgresql://u:s3cret-of-ours@h/d", guarantee="wal"),
    "read_parquet": lambda: ParquetSource("s3://b/in", storage_options=OPTIONS),
    "checkpoints": lambda: rf.CheckpointConfig("s3://b/chk", storage_options=OPTIONS),
    "staging": lambda: Staging("s3://b/chk", OPTIONS),
    "bucket": lambda: Bucket("s3://b", OPTIONS),
    "table": lambda: DeltaTable("s3://b", OPTIONS),
}


@pytest.mark.parametrize("what", SHOWN)
def test_no_secret_is_shown(what: str) -> None:
    made = SHOWN[what]()
    assert OPTIONS["secret"] not in repr(made)
    if isinstance(made, StreamEnd):
        assert OPTIONS["secret"] not in rf.Flow("job", made).explain()
