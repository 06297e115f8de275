from __future__ import annotations

import cloudpickle
import pyarrow as pa
import pytest

from rayflow.core.ids import CheckpointId
from rayflow.errors import ConfigError, DataError, StateTooLargeError
from rayflow.operators.base import Collected, FrozenTable, RestoredState
from rayflow.operators.sinks import collect
from rayflow.operators.sinks.collect import CollectOperator, CollectSink
from rayflow.operators.sinks.printing import PrintSink
from tests.operators.sinks.contract import batch
from tests.operators.sources.contract import context


def collecting(sink: CollectSink | None = None) -> CollectOperator:
    operator = cloudpickle.loads(cloudpickle.dumps(sink or CollectSink())).build()
    assert isinstance(operator, CollectOperator)
    operator.open(context(), Collected())
    return operator


def frozen(operator: CollectOperator) -> FrozenTable:
    state = operator.snapshot(CheckpointId(1))
    assert state is not None
    assert state.prepare is None
    (table,) = state.tables
    return table


def _parts(table: FrozenTable) -> list[pa.RecordBatch | pa.Table]:
    return [*(batch for piece in table.pieces for batch in piece.batches), *table.batches]


def values(table: FrozenTable) -> list[int]:
    return [v for part in _parts(table) for v in part["x"].to_pylist()]


def test_collects_in_order_with_few_pieces() -> None:
    operator = collecting()
    for i in range(5_000):
        operator.process(batch(i), 0)
    assert values(frozen(operator)) == list(range(5_000))
    assert len(_parts(frozen(operator))) < collect.TAIL_BATCHES + 10


def test_large_batches_are_not_copied() -> None:
    big = pa.record_batch({"x": pa.array(range(100_000))})
    operator = collecting()
    operator.process(big, 0)
    operator.process(big, 0)
    assert [part["x"].buffers()[1].address for part in _parts(frozen(operator))] == [big["x"].buffers()[1].address] * 2


def test_snapshot_is_frozen() -> None:
    operator = collecting()
    for i in range(300):
        operator.process(batch(i), 0)
    before = frozen(operator)
    for i in range(600):
        operator.process(batch(1000 + i), 0)
    assert values(before) == list(range(300))
    assert before.key_columns is None
    assert before.name == "rows"


def test_restore_appends_what_several_subtasks_had() -> None:
    operator = collecting()
    operator.restore([RestoredState("rows", pa.Table.from_batches([batch(1, 2)])) for _ in range(2)])
    operator.process(batch(3), 0)
    assert values(frozen(operator)) == [1, 2, 1, 2, 3]


def _restored(table: FrozenTable) -> list[RestoredState]:
    assert table.schema is not None
    tail = [t if isinstance(t, pa.Table) else pa.Table.from_batches([t]) for t in table.batches]
    found = [
        RestoredState("rows", pa.Table.from_batches(piece.batches), piece=piece.id)
        if isinstance(piece.batches[0], pa.RecordBatch)
        else RestoredState("rows", piece.batches[0], piece=piece.id)
        for piece in table.pieces
    ]
    return [*found, RestoredState("rows", pa.concat_tables([table.schema.empty_table(), *tail]))]


def test_full_runs_are_uploaded_once_and_rows_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "RUN_ROWS", 16)
    monkeypatch.setattr(collect, "TAIL_BATCHES", 3)
    operator = collecting()
    sizes = [1, 20, 3, 2, 1, 9, 4, 4, 4, 4, 1, 30, 1, 2, 1, 1]
    at, known, written = 0, set[str](), 0
    for number, size in enumerate(sizes * 4):
        operator.process(batch(*range(at, at + size)), 0)
        at += size
        table = frozen(operator)
        assert values(table) == list(range(at))
        names = [piece.id for piece in table.pieces]
        assert known <= set(names), "a run that was uploaded stays what it is"
        fresh = [piece for piece in table.pieces if piece.id not in known]
        written += sum(part.num_rows for piece in fresh for part in piece.batches)
        known = set(names)
        assert sum(part.num_rows for part in table.batches) < 2 * 16
        if number % 7 == 6:
            operator = collecting()
            operator.restore(_restored(table))
            assert [piece.id for piece in frozen(operator).pieces] == names
    assert written <= at, "every row once"


def test_pieces_of_two_subtasks_stay_whole() -> None:
    """After 2 -> 1: the tail of the first stands before the runs of the second."""
    one, other = collecting(), collecting()
    for operator, first in ((one, 0), (other, 100_000)):
        operator.process(batch(*range(first, first + collect.RUN_ROWS)), 0)
        operator.process(batch(first + collect.RUN_ROWS), 0)
    both = collecting()
    both.restore([*_restored(frozen(one)), *_restored(frozen(other))])
    assert values(frozen(both)) == values(frozen(one)) + values(frozen(other))
    assert {p.id for p in frozen(both).pieces} >= {p.id for t in (one, other) for p in frozen(t).pieces}


def test_nothing_collected() -> None:
    assert collecting().snapshot(CheckpointId(1)) is None
    schema = pa.schema([("x", pa.int64())])
    assert frozen(collecting(CollectSink(schema=schema))).schema == schema
    operator = collecting()
    operator.process(batch(), 0)
    assert frozen(operator).batches == ()


def test_too_much_and_two_schemas() -> None:
    operator = collecting(CollectSink(max_bytes=1_000))
    with pytest.raises(StateTooLargeError, match="step 'step' .* more than the 1000 allowed.*write_parquet"):
        operator.process(batch(*range(200)), 0)
    operator.process(batch(), 0)
    with pytest.raises(DataError, match="column 's' is missing"):
        operator.process(pa.record_batch({"x": [1]}), 0)


def test_print_is_a_neat_table_with_a_limit(capsys: pytest.CaptureFixture[str]) -> None:
    operator = PrintSink(2).build()
    operator.open(context(), Collected())
    operator.process(pa.record_batch({"name": ["a", None, "c"], "delay": [1.5, 120.25, 3.0]}), 0)
    operator.process(pa.record_batch({"name": ["d"], "delay": [1.0]}), 0)
    operator.on_end()
    assert capsys.readouterr().out.splitlines() == [
        "name   delay",
        "────  ──────",
        "a        1.5",
        "null  120.25",
        "… and 2 more rows",
    ]


def test_print_tells_subtasks_apart(capsys: pytest.CaptureFixture[str]) -> None:
    operator = PrintSink(None, title="late").build()
    operator.open(context(1, parallelism=2), Collected())
    operator.process(pa.record_batch({"x": ["y" * 50 + "\n"]}), 0)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("late [1] ") for line in lines)
    assert lines[2].endswith("yy…")
    with pytest.raises(ConfigError, match="limit"):
        PrintSink(0)
