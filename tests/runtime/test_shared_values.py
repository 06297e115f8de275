"""Columns whose slices share the values of the whole: cut to the credit of a channel, nothing lost, types kept."""

from __future__ import annotations

import pyarrow as pa
import pytest

import rayflow as rf

ROWS = 1_000
NAMES = [f"{i:04d}" * 100 for i in range(ROWS)]
"""400 kB in all; half the credit below is 25 kB."""


@pytest.mark.parametrize("parallelism", [1, 2])
@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.binary_view(),
        pa.dictionary(pa.int16(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_batches_larger_than_the_credit_are_cut(kind: pa.DataType, parallelism: int) -> None:
    seen: set[str] = set()

    def convert(batch: pa.RecordBatch) -> pa.RecordBatch:
        plain = batch.column("name")
        if pa.types.is_binary_view(kind):
            plain = plain.cast(pa.binary())
        column = plain.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else plain.cast(kind)
        return pa.record_batch({"name": column})

    def back(batch: pa.RecordBatch) -> pa.RecordBatch:
        column = batch.column("name")
        seen.add(str(column.type))
        if pa.types.is_binary_view(kind):
            column = column.cast(pa.binary())
        return pa.record_batch({"name": column.cast(pa.string())})

    rows = rf.from_arrow(pa.table({"name": NAMES}), splits=2).map_batches(convert).rebalance().map_batches(back)
    result = rf.Flow("shared", rows.collect()).run(
        local=True, parallelism=parallelism, config=rf.JobConfig(inflight_bytes=50_000)
    )
    assert sorted(result.table()["name"].to_pylist()) == NAMES
    assert seen == {str(kind)}


def test_dictionaries_with_too_many_values_together_go_one_by_one() -> None:
    """As pandas makes them: int8 indices as long as one batch has less than 128 values."""
    small = pa.dictionary(pa.int8(), pa.string())

    def encode(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch({"name": batch.column("name").dictionary_encode().cast(small)})

    rows = rf.from_arrow(pa.table({"name": NAMES}), batch_rows=50).map_batches(encode).rebalance()
    result = rf.Flow("small", rows.collect()).run(local=True)
    assert sorted(result.table()["name"].to_pylist()) == NAMES
