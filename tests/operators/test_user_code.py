"""User functions: every shape they may return, and every way in which they go wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayflow.errors import ConfigError, DataError, UserCodeError
from rayflow.operators.base import MAIN
from rayflow.operators.stateless import FlatMap, Map, MapBatches
from tests.operators.helpers import context, opened, outputs, rows

BATCH = pa.record_batch({"a": [1, 2, 3, 4]})
INT = pa.schema([("a", pa.int64())])
WHERE = "step 'under test' subtask 0/1"


def _generate(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    yield batch.slice(0, 1)
    yield batch.slice(1, 0)
    yield batch.slice(2)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda b: b, [1, 2, 3, 4]),
        (lambda b: pa.Table.from_batches([b, b]), [1, 2, 3, 4] * 2),
        (lambda b: {"a": b.column("a").to_numpy() * 2}, [2, 4, 6, 8]),
        (lambda b: {"a": pa.chunked_array([[1], [2]])}, [1, 2]),
        (_generate, [1, 3, 4]),
        (lambda b: [b, pa.Table.from_batches([b]), {"a": [9]}], [1, 2, 3, 4] * 2 + [9]),
        (lambda b: [], []),
        (lambda b: b.slice(0, 0), []),
    ],
)
@pytest.mark.parametrize("schema", [None, INT])
def test_every_shape_of_a_result(fn: Any, expected: list[int], schema: pa.Schema | None) -> None:
    found = outputs(MapBatches(fn, schema=schema), [BATCH])
    assert [row["a"] for row in rows(found)] == expected
    assert all(batch.num_rows for batch in found)


def test_arguments_and_batch_size() -> None:
    def add(batch: pa.RecordBatch, one: int, *, two: int) -> Mapping[str, Any]:
        assert batch.num_rows <= 3
        return {"a": batch.column("a").to_numpy() + one + two}

    step = MapBatches(add, fn_args=(10,), fn_kwargs={"two": 100}, batch_size=3)
    assert [b.num_rows for b in outputs(step, [BATCH])] == [3, 1]
    assert [row["a"] for row in rows(outputs(step, [BATCH]))] == [111, 112, 113, 114]


def test_a_class_is_built_once_in_open() -> None:
    built = []

    class Model:
        def __init__(self, weight: int, *, bias: int) -> None:
            built.append(self)
            self.weight, self.bias = weight, bias

        def __call__(self, batch: pa.RecordBatch) -> Mapping[str, Any]:
            return {"a": batch.column("a").to_numpy() * self.weight + self.bias}

    step = MapBatches(Model, fn_constructor_args=(2,), fn_constructor_kwargs={"bias": 1})
    step.build()
    assert built == []
    operator, out = opened(step)
    operator.process(BATCH, 0)
    operator.process(BATCH, 0)
    assert len(built) == 1
    assert [row["a"] for row in rows(out.batches[MAIN])] == [3, 5, 7, 9] * 2


def _raise(batch: Any) -> Any:
    raise KeyError("gone")


def _raise_later(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    yield batch
    raise KeyError("gone")


@pytest.mark.parametrize("fn", [_raise, _raise_later])
def test_an_exception_is_chained_and_named(fn: Any) -> None:
    with pytest.raises(UserCodeError, match=f"{WHERE}.*{fn.__name__} raised KeyError.*4 rows") as caught:
        outputs(MapBatches(fn), [BATCH])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_constructor_that_raises_and_a_class_that_cannot_be_called() -> None:
    class Broken:
        def __init__(self) -> None:
            raise OSError("no model")

    class NoCall:
        pass

    with pytest.raises(UserCodeError, match="constructor of Broken raised OSError: no model"):
        opened(MapBatches(Broken))
    with pytest.raises(UserCodeError, match="__call__"):
        opened(MapBatches(NoCall))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType, expected a pyarrow.RecordBatch"),
        (7, "returned int"),
        ("text", "returned str"),
        ([1], "returned int"),
        (pa.array([1]), "returned Int64Array"),
        (pa.record_batch({"b": [1]}), r"returned columns \{b: int64\}, expected \{a: int64\} \(its schema=\)"),
        (pa.record_batch({"a": [1.5]}), r"\{a: double\}, expected \{a: int64\}"),
        (pa.record_batch({"a": [1], "b": [1]}), r"expected \{a: int64\}"),
        (pa.table({"a": pa.array([], pa.string())}), r"\{a: string\}, expected \{a: int64\}"),
        ({"a": ["x"]}, "a dict that does not fit"),
        ({"a": [1], "b": [2]}, r"expected \{a: int64\}"),
    ],
)
def test_a_result_against_its_promise(result: Any, message: str) -> None:
    with pytest.raises(UserCodeError, match=message) as caught:
        outputs(MapBatches(lambda _: result, schema=INT), [BATCH])
    assert WHERE in str(caught.value)


def test_the_first_output_decides_the_schema() -> None:
    results = iter([pa.record_batch({"x": []}), pa.record_batch({"a": [1]}), pa.record_batch({"a": ["s"]})])
    operator, out = opened(MapBatches(lambda _: next(results)))
    operator.process(BATCH, 0)
    operator.process(BATCH, 0)
    assert len(out.batches[MAIN]) == 1
    with pytest.raises(UserCodeError, match="as in its first output"):
        operator.process(BATCH, 0)


def test_an_error_of_the_next_step_is_not_blamed_on_the_function() -> None:
    class Refuses:
        def emit(self, batch: pa.RecordBatch, tag: str = MAIN) -> None:
            raise ZeroDivisionError("downstream")

    operator = MapBatches(lambda b: b).build()
    operator.open(context(), Refuses())
    with pytest.raises(ZeroDivisionError):
        operator.process(BATCH, 0)


def test_errors_of_rayflow_pass_unchanged() -> None:
    def fail(batch: pa.RecordBatch) -> pa.RecordBatch:
        raise DataError("mine")

    with pytest.raises(DataError, match="^mine$"):
        outputs(MapBatches(fail), [BATCH])


def test_options_are_checked_while_building() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        MapBatches(lambda b: b, batch_size=0)
    with pytest.raises(ConfigError, match="function or a class, got int"):
        MapBatches(7)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fn_constructor_args"):
        MapBatches(lambda b: b, fn_constructor_args=(1,))
    assert MapBatches(lambda b: b, schema=INT).output_schema(None) == INT
    assert Map(lambda r: r).output_schema(INT) is None


def test_map_and_flat_map_over_rows() -> None:
    assert rows(outputs(Map(lambda r: {"b": r["a"] * 2}), [BATCH])) == [{"b": n} for n in (2, 4, 6, 8)]
    repeated = FlatMap(lambda r: ({"n": np.int64(r["a"])} for _ in range(r["a"] - 1)))
    assert [row["n"] for row in rows(outputs(repeated, [BATCH]))] == [2, 3, 3, 4, 4, 4]
    assert outputs(FlatMap(lambda r: []), [BATCH]) == []
    typed = Map(lambda r: {"b": r["a"]}, schema=pa.schema([("b", pa.float32()), ("c", pa.string())]))
    assert rows(outputs(typed, [BATCH]))[0] == {"b": 1.0, "c": None}


def test_names_come_from_all_rows() -> None:
    """pyarrow's from_pylist looks at the first row only and would lose column c."""
    found = outputs(Map(lambda r: {"b": 1} if r["a"] == 1 else {"b": 2, "c": r["a"]}), [BATCH])
    assert rows(found)[1] == {"b": 2, "c": 2}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Map(lambda r: 7), "returned int, expected a dict"),  # type: ignore[arg-type, return-value]
        (Map(lambda r: None), "returned NoneType, expected a dict"),  # type: ignore[arg-type, return-value]
        (FlatMap(lambda r: {"a": 1}), "returned dict, expected an iterable of dicts"),  # type: ignore[dict-item]
        (FlatMap(lambda r: [1]), "returned int, expected an iterable of dicts"),  # type: ignore[list-item]
        (Map(lambda r: {"a": "x"}, schema=INT), "rows that do not fit"),
        (Map(lambda r: {"a": 1, "b": 1}, schema=INT), r"expected \{a: int64\}"),
        (Map(lambda r: {"a": 1 if r["a"] < 2 else "x"}), "rows that do not fit"),
        (Map(lambda r: {"a": 1 / (r["a"] - 1)}), "raised ZeroDivisionError"),
    ],
)
def test_rows_against_their_promise(step: Map | FlatMap, message: str) -> None:
    with pytest.raises(UserCodeError, match=message) as caught:
        outputs(step, [BATCH])
    assert WHERE in str(caught.value)


def test_later_rows_with_another_type_are_refused() -> None:
    operator, _ = opened(Map(lambda r: {"a": r["a"]}))
    operator.process(BATCH, 0)
    with pytest.raises(UserCodeError, match="do not fit"):
        operator.process(pa.record_batch({"a": ["x"]}), 0)
