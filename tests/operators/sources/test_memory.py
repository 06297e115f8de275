from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cloudpickle
import pyarrow as pa
import pytest

from rayflow.errors import ConfigError, PlanError, UserCodeError
from rayflow.operators.base import Source
from rayflow.operators.sources.memory import ArrowSource, GeneratorSource
from tests.operators.sources.contract import SourceContract, context, read_all

SCHEMA = pa.schema([("x", pa.int64())])


def numbers(n: int, first: int = 0) -> pa.Table:
    return pa.table({"x": pa.array(range(first, first + n))})


class TestArrow(SourceContract):
    @pytest.fixture
    def source(self) -> Source:
        return ArrowSource(pa.concat_tables([numbers(50), numbers(50, 50)]), splits=3, batch_rows=7)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return numbers(100)


class TestGenerator(SourceContract):
    @pytest.fixture
    def source(self) -> Source:
        def count(split: int, position: int) -> Iterator[pa.RecordBatch | pa.Table | None]:
            for first in range(position, 20, 3):
                yield None
                rows = numbers(min(3, 20 - first), 100 * split + first)
                yield rows if first % 2 else rows.to_batches()[0]
                yield rows.slice(0, 0)

        return GeneratorSource(count, splits=2, schema=SCHEMA)

    @pytest.fixture
    def expected(self) -> pa.Table:
        return pa.concat_tables([numbers(20), numbers(20, 100)])


def test_arrow_takes_batches_and_lists_of_them() -> None:
    batches = numbers(10).to_batches(max_chunksize=4)
    assert read_all(ArrowSource(batches)).equals(numbers(10))
    assert read_all(ArrowSource(batches[0])).equals(numbers(4))
    assert read_all(ArrowSource(numbers(0))).num_rows == 0
    assert read_all(ArrowSource(numbers(2), splits=5)).equals(numbers(2))


def test_arrow_pickles_only_its_own_rows() -> None:
    assert len(cloudpickle.dumps(ArrowSource(numbers(1_000_000).slice(5, 10)))) < 10_000


def test_arrow_project() -> None:
    source = ArrowSource(pa.table({"a": [1], "b": [2]})).project(["b"])
    assert read_all(source).to_pylist() == [{"b": 2}]


def test_arrow_refuses_what_has_no_one_schema() -> None:
    with pytest.raises(PlanError, match="different schemas"):
        ArrowSource([*numbers(1).to_batches(), *pa.table({"y": [1]}).to_batches()])
    with pytest.raises(PlanError, match="empty list"):
        ArrowSource([])
    with pytest.raises(PlanError, match="RecordBatch"):
        ArrowSource([1])
    with pytest.raises(ConfigError, match="splits"):
        ArrowSource(numbers(1), splits=0)


def failing(split: Any, position: int) -> Iterator[Any]:
    yield numbers(2).to_batches()[0]
    if split == "raise":
        raise ZeroDivisionError("bad luck")
    yield {"schema": pa.table({"x": ["text"]}), "type": 17}[split]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            "raise",
            r"step 'step' subtask 0/1: the generator of split 'raise' at row 2 raised ZeroDivisionError: bad luck",
        ),
        ("schema", r"at row 2 .*column 'x' is string, not int64; expected .x: int64., got .x: string"),
        ("type", r"must yield pyarrow.RecordBatch, got int"),
    ],
)
def test_generator_that_breaks_its_promise(split: str, message: str) -> None:
    reader = GeneratorSource(failing, splits=[split], schema=SCHEMA).reader(split, None, context())
    assert reader.poll().position == 2
    with pytest.raises(UserCodeError, match=message) as caught:
        reader.poll()
    assert (caught.value.__cause__ is not None) == (split == "raise")


def test_generator_that_cannot_even_start() -> None:
    def bad(split: Any, position: int) -> Any:
        return 5

    with pytest.raises(UserCodeError, match="TypeError.*not iterable"):
        GeneratorSource(bad, splits=1, schema=SCHEMA).reader(0, None, context()).poll()


def test_generator_is_closed_with_its_reader() -> None:
    closed = []

    def endless(split: int, position: int) -> Iterator[pa.RecordBatch]:
        try:
            while True:
                yield numbers(1).to_batches()[0]
        finally:
            closed.append(split)

    reader = GeneratorSource(endless, splits=1, schema=SCHEMA, bounded=False).reader(0, None, context())
    reader.poll()
    reader.close()
    assert closed == [0]


def test_generator_options() -> None:
    assert GeneratorSource(failing, splits=1, schema=SCHEMA).bounded
    assert not GeneratorSource(failing, splits=1, schema=SCHEMA, bounded=False).bounded
    assert GeneratorSource(failing, splits=[{"b": 1, "a": 2}], schema=SCHEMA).discover()[0][0] == '{"a": 2, "b": 1}'
    with pytest.raises(ConfigError, match="at least 1"):
        GeneratorSource(failing, splits=0, schema=SCHEMA)
    with pytest.raises(ConfigError, match="differ"):
        GeneratorSource(failing, splits=["a", "a"], schema=SCHEMA)
    with pytest.raises(PlanError, match="JSON"):
        GeneratorSource(failing, splits=[object()], schema=SCHEMA)
    with pytest.raises(PlanError, match="function"):
        GeneratorSource(3, splits=1, schema=SCHEMA)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="pyarrow.Schema"):
        GeneratorSource(failing, splits=1, schema=None)
