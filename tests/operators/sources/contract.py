"""What every source must do (rule R2). A new source inherits `SourceContract` and adds a fixture."""

from __future__ import annotations

import cloudpickle
import pyarrow as pa
import pytest

from rayflow.core.manifest import Json
from rayflow.operators.base import OperatorContext, Source


def context(subtask: int = 0, *, parallelism: int = 1, attempt: int = 1, run_id: str = "run") -> OperatorContext:
    return OperatorContext(
        job="job",
        run_id=run_id,
        operator="op",
        step="step",
        subtask=subtask,
        parallelism=parallelism,
        max_parallelism=128,
        attempt=attempt,
        key_groups=range(128),
        now=lambda: 0.0,
    )


def read(source: Source, split: Json, position: Json = None) -> list[tuple[pa.RecordBatch, Json]]:
    """All batches of the split from the position on, each with the position behind it."""
    reader = source.reader(split, position, context())
    found = []
    try:
        for _ in range(100_000):
            polled = reader.poll()
            if polled.batch is not None:
                found.append((polled.batch, polled.position))
            if polled.done:
                return found
    finally:
        reader.close()
        reader.close()  # safe when called twice
    raise AssertionError("the reader never said done")


def rows(source: Source, split: Json, position: Json = None) -> pa.Table:
    batches = [batch for batch, _ in read(source, split, position)]
    return pa.Table.from_batches(batches, schema=source.schema())


def read_all(source: Source) -> pa.Table:
    schema = source.schema()
    assert schema is not None
    return pa.concat_tables([schema.empty_table(), *(rows(source, split) for _, split in source.discover())])


class SourceContract:
    @pytest.fixture
    def source(self) -> Source:
        raise NotImplementedError

    @pytest.fixture
    def expected(self) -> pa.Table:
        """All rows, in reading order."""
        raise NotImplementedError

    def test_splits_together_hold_every_row_once(self, source: Source, expected: pa.Table) -> None:
        assert read_all(source).equals(expected)

    def test_split_ids_differ_and_do_not_change(self, source: Source) -> None:
        found = source.discover()
        assert len({name for name, _ in found}) == len(found)
        assert list(source.discover()) == list(found)

    def test_every_position_yields_exactly_the_rest(self, source: Source) -> None:
        several = 0
        for _, split in source.discover():
            whole = rows(source, split)
            behind = 0
            for batch, position in read(source, split):
                behind += batch.num_rows
                several += 1
                assert rows(source, split, position).equals(whole.slice(behind)), position
            assert behind == whole.num_rows
        assert several > 2, "the fixture has too few batches to show anything"

    def test_two_readers_at_one_position_agree(self, source: Source) -> None:
        _, split = source.discover()[0]
        _, position = read(source, split)[0]
        assert read(source, split, position) == read(source, split, position)

    def test_batches_have_exactly_the_schema(self, source: Source) -> None:
        for _, split in source.discover():
            for batch, _ in read(source, split):
                assert batch.schema.equals(source.schema(), check_metadata=True)
                assert batch.num_rows > 0

    def test_a_pickled_copy_reads_the_same(self, source: Source) -> None:
        copy = cloudpickle.loads(cloudpickle.dumps(source))
        assert list(copy.discover()) == list(source.discover())
        assert read_all(copy).equals(read_all(source))

    def test_close_before_the_first_poll(self, source: Source) -> None:
        source.reader(source.discover()[0][1], None, context()).close()
