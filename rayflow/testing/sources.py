"""What every source must do (rule R2): the same rows from the same position, every time, whatever fails."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest

from rayflow.core.manifest import Json
from rayflow.errors import JobFailedError
from rayflow.flow import Flow
from rayflow.operators.base import Source
from rayflow.reading import read_source
from rayflow.stream import Stream
from rayflow.testing.driving import POLLS_MAX, another_process, operator_context, read_split, through_json
from rayflow.testing.flows import Failure, PacedSource, run


class SourceConformance:
    """Derive ``class TestMySource(SourceConformance)`` and give two fixtures, ``source`` and ``expected``.

    The input must end, and one split at least must have three batches or more: make it small and the batches smaller.
    """

    poll_s_max: ClassVar[float] = 1.0
    """A poll that takes longer, three times in a row, blocks the loop thread. Mean for some 100 ms."""

    @pytest.fixture
    def source(self) -> Source:
        """The source under test; the input is there."""
        raise NotImplementedError(f"{type(self).__name__} must give a fixture 'source'")

    @pytest.fixture
    def expected(self) -> pa.Table:
        """All its rows, in any order."""
        raise NotImplementedError(f"{type(self).__name__} must give a fixture 'expected'")

    # ------------------------------------------------------------------------------------------------ splits and schema

    def test_splits_together_hold_every_row_once(self, source: Source, expected: pa.Table) -> None:
        assert in_order(_rows_of_all(source)) == in_order(expected)

    def test_split_ids_differ_and_do_not_change(self, source: Source) -> None:
        """A checkpoint knows splits by their ids, and gives back their descriptions through JSON."""
        found = source.discover()
        ids = [split_id for split_id, _ in found]
        assert found, "discover() found no split"
        assert all(isinstance(each, str) for each in ids), f"ids of splits must be text, got {ids}"
        assert len(set(ids)) == len(ids), f"two splits have one id: {sorted(ids)}"
        for again in (source.discover(), another_process(source).discover()):
            assert list(again) == list(found), "discover() must give the same splits in the same order every time"
        missing = set(ids) - {split_id for split_id, _ in source.discover_again()}
        assert not missing, f"discover_again() must still know what was found before, {missing} is missing"
        for split_id, split in found:
            through_json(split, f"the description of split {split_id!r}")

    def test_batches_have_exactly_the_schema(self, source: Source) -> None:
        schema, declared = source.schema(), source.declared_schema()
        assert declared is None or declared.equals(schema), "declared_schema() must be schema(), or None"
        assert schema is not None, "schema() is None: give the suite a source that knows its columns"
        for split in _splits(source):
            for batch, _ in read_split(source, split):
                assert batch.schema.equals(schema, check_metadata=True), f"expected {schema}, got {batch.schema}"
                assert batch.num_rows > 0, "a batch without rows: give Polled() instead"

    def test_a_pickled_copy_reads_the_same(self, source: Source) -> None:
        assert _rows_of_all(another_process(source)).equals(_rows_of_all(source))

    def test_it_says_that_it_can_be_read_again(self, source: Source) -> None:
        assert source.replayable, "what cannot be read again loses rows in a failure; this suite cannot help there"

    # ------------------------------------------------------------------------------------------------------- positions

    def test_every_position_yields_exactly_the_rest(self, source: Source) -> None:
        """Of all positions that a checkpoint may hold, as it gives them back."""
        several = 0
        for split in _splits(source):
            read = read_split(source, split)
            whole, behind = _table(source, [batch for batch, _ in read]), 0
            for batch, position in read:
                behind += batch.num_rows
                several += 1
                rest = _rows(source, split, through_json(position, "a position"))
                assert rest.equals(whole.slice(behind)), (
                    f"from position {position!r} of split {split!r} the rows behind the first {behind} must come, "
                    f"these {whole.num_rows - behind} in this order, but {rest.num_rows} came:\n{rest}"
                )
            assert behind == whole.num_rows
        assert several > 2, "the input has too few batches to show anything: make it larger, or batches smaller"

    def test_two_readers_at_one_position_agree(self, source: Source) -> None:
        """Read in turns, as a process that was thought dead and the one that replaces it do."""
        split = _longest_split(source)
        _, position = read_split(source, split)[0]
        readers = [source.reader(split, position, operator_context(attempt=n)) for n in (1, 2)]
        batches: list[list[pa.RecordBatch]] = [[], []]
        going = {0, 1}
        try:
            for _ in range(POLLS_MAX):
                for each in sorted(going):
                    polled = readers[each].poll()
                    if polled.batch is not None:
                        batches[each].append(polled.batch)
                    if polled.done:
                        going.discard(each)
                if not going:
                    break
        finally:
            for reader in readers:
                reader.close()
        one, other = (_table(source, found) for found in batches)
        assert one.equals(other), "two readers of one split, from one position, gave other rows or another order"
        assert one.equals(_rows(source, split, position)), "two readers at a time disturb each other"

    def test_a_reader_is_closed_at_any_point(self, source: Source) -> None:
        split = _longest_split(source)
        source.reader(split, None, operator_context()).close()
        reader = source.reader(split, None, operator_context())
        reader.poll()
        reader.close()
        reader.close()
        assert _rows(source, split).num_rows > 0

    def test_news_of_a_checkpoint_change_nothing(self, source: Source) -> None:
        split = _longest_split(source)
        reader = source.reader(split, None, operator_context())
        batches = []
        try:
            for _ in range(POLLS_MAX):
                polled = reader.poll()
                if polled.batch is not None:
                    batches.append(polled.batch)
                    reader.checkpointed(through_json(polled.position, "a position"))
                if polled.done:
                    break
        finally:
            reader.close()
        assert _table(source, batches).equals(_rows(source, split))

    def test_poll_does_not_block(self, source: Source) -> None:
        """While it does, barriers wait: a slow machine is forgiven, a reader that waits for rows is not."""
        split = _longest_split(source)
        slowest = min(_slowest_poll(source, split) for _ in range(3))
        assert slowest < self.poll_s_max, (
            f"a poll took {slowest:.1f} s; return Polled() when there is nothing, and read less at a time"
        )

    # ----------------------------------------------------------------------------------------------------- whole flows

    @pytest.mark.parametrize(("checkpoints", "parallelism"), [(0, 2), (1, 1), (2, 2)])
    def test_a_flow_that_fails_has_every_row_once(
        self, source: Source, expected: pa.Table, checkpoints: int, parallelism: int
    ) -> None:
        """Behind so many checkpoints; it is reset and goes on."""
        failure = Failure(behind=checkpoints)
        found = run(_flow(source, failure), None, failure, parallelism=parallelism)
        failure.check_struck()
        assert found.restarts == 1
        assert in_order(found.table()) == in_order(expected)

    def test_a_flow_that_is_started_again_has_every_row_once(
        self, source: Source, expected: pa.Table, tmp_path: Path
    ) -> None:
        """By other processes, with another parallelism."""
        failure = Failure(behind=1)
        with pytest.raises(JobFailedError, match="a subtask died"):
            run(_flow(source, failure), tmp_path, failure, parallelism=1, restart=False)
        found = run(_flow(another_process(source), failure), tmp_path, failure, parallelism=3)
        assert in_order(found.table()) == in_order(expected)


def in_order(rows: pa.Table) -> list[dict[str, Any]]:
    """The rows in an order of their own."""
    return sorted(rows.to_pylist(), key=repr)


def _flow(source: Source, failure: Failure) -> Flow:
    rows: Stream = read_source(PacedSource(source, failure)).map_batches(failure.on_batch, schema=source.schema())
    return Flow("conformance", rows.collect())


def _splits(source: Source) -> Sequence[Json]:
    return [split for _, split in source.discover()]


def _longest_split(source: Source) -> Json:
    return max(_splits(source), key=lambda split: len(read_split(source, split)))


def _table(source: Source, batches: Sequence[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches, schema=source.schema())


def _rows(source: Source, split: Json, position: Json = None) -> pa.Table:
    return _table(source, [batch for batch, _ in read_split(source, split, position)])


def _rows_of_all(source: Source) -> pa.Table:
    return _table(source, [batch for split in _splits(source) for batch, _ in read_split(source, split)])


def _slowest_poll(source: Source, split: Json) -> float:
    reader, slowest = source.reader(split, None, operator_context()), 0.0
    try:
        for _ in range(POLLS_MAX):
            began = time.monotonic()
            polled = reader.poll()
            slowest = max(slowest, time.monotonic() - began)
            if polled.done:
                break
    finally:
        reader.close()
    return slowest
