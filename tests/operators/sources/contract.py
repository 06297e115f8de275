"""What every source must do (rule R2), and those of rayflow in reading order; see `rayflow.testing.SourceConformance`.

A new source inherits `SourceContract` and adds fixtures. Whole flows are in tests/test_conformance.py.
"""

from __future__ import annotations

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.operators.base import Source
from rayflow.testing import SourceConformance
from rayflow.testing import operator_context as context
from rayflow.testing import read_split as read

__all__ = ["SourceContract", "context", "read", "read_all", "rows"]


def rows(source: Source, split: Json, position: Json = None) -> pa.Table:
    batches = [batch for batch, _ in read(source, split, position)]
    return pa.Table.from_batches(batches, schema=source.schema())


def read_all(source: Source) -> pa.Table:
    schema = source.schema()
    assert schema is not None
    return pa.concat_tables([schema.empty_table(), *(rows(source, split) for _, split in source.discover())])


class SourceContract(SourceConformance):
    test_a_flow_that_fails_has_every_row_once = None
    test_a_flow_that_is_started_again_has_every_row_once = None  # type: ignore[assignment]

    def test_rows_come_in_reading_order(self, source: Source, expected: pa.Table) -> None:
        assert read_all(source).equals(expected)
