"""Bad rows, bad columns, bad times and bad user code: one clear sentence, and nothing committed is lost."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayflow as rf
from rayflow.errors import DataError, KeyHashError, PlanError, UserCodeError
from rayflow.operators.sources import lines
from rayflow.stream import Stream
from tests.faulty_jobs import BATCH, ROWS, N, Place, one_sentence, place, rows

__all__ = ["place"]

Read = Callable[..., Stream]
TEXTS: dict[str, tuple[Read, Callable[[int], str], str]] = {
    "csv": (rf.read_csv, lambda i: f"k{i % 7},{i:05d}\n", "k,v\n"),
    "json": (rf.read_json, lambda i: f'{{"k": "k{i % 7}", "v": {10000 + i}}}\n', ""),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches from a small file."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 200)


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("read", [rf.read_parquet, rf.read_csv, rf.read_json])
@pytest.mark.parametrize("what", ["missing.x", "missing/*.x", "empty"])
def test_a_missing_file_is_told_before_anything_starts(read: Read, what: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    flow = rf.Flow("job", read(str(tmp_path / what)).write_parquet(str(tmp_path / "out")))
    with pytest.raises(DataError) as caught:
        flow.run(local=True, checkpoints=rf.CheckpointConfig(str(tmp_path / "chk")))
    one_sentence(caught.value, str(tmp_path / what).replace("*", r"\*"), "no (such )?file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def test_a_file_that_goes_away_while_the_job_runs(place: Place, small_blocks: None) -> None:
    """Two files: the second is gone when its turn comes."""
    read, line, header = TEXTS["csv"]
    halves = [place.folder / "1.csv", place.folder / "2.csv"]
    texts = ["".join([header, *map(line, range(i * N // 2, (i + 1) * N // 2))]) for i in (0, 1)]
    for path, text in zip(halves, texts, strict=True):
        path.write_text(text)
    schema = ROWS.schema

    def lose(batch: pa.RecordBatch) -> pa.RecordBatch:
        halves[1].unlink(missing_ok=True)
        return batch

    stream = read([str(p) for p in halves], schema=schema)

    def mend() -> Stream:
        halves[1].write_text(texts[1])
        return stream

    place.fails_then_mended(stream.map_batches(lose, schema=schema), mend, "step 'read_csv.*", "no such file.*2.csv")


@pytest.mark.parametrize("kind", TEXTS)
def test_an_unreadable_row_is_named_by_file_line_and_text(kind: str, place: Place, small_blocks: None) -> None:
    read, line, header = TEXTS[kind]
    path = place.folder / f"rows.{kind}"
    good = [line(i) for i in range(N)]
    bad = list(good)
    bad[300] = good[300][:-4].replace("3", "?") + "\n".rjust(4, "x")
    path.write_text(header + "".join(bad))
    # The values are moved by 10000 in JSON, where a number cannot begin with a zero.
    stream = read(str(path), schema=ROWS.schema).with_columns(v=rf.col("v") % 10000)

    def mend() -> Stream:
        path.write_text(header + "".join(good))
        return stream

    number = 300 + 1 + header.count("\n")
    place.fails_then_mended(
        stream, mend, f"cannot read line {number} of {path}", "xxx", 'on_error="skip"', "step 'read_", "subtask 0/1"
    )


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("parallelism", [1, 2])
def test_skipped_rows_are_counted_and_shown(
    kind: str, parallelism: int, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "SPLIT_BYTES", 1000)
    read, line, header = TEXTS[kind]
    bad = {5, 6, 150, 399}
    (tmp_path / "rows").write_text(header + "".join("?,?,?\n" if i in bad else line(i) for i in range(N)))
    stream = read(str(tmp_path / "rows"), schema=ROWS.schema, on_error="skip")
    result = rf.Flow("job", stream.collect()).run(local=True, parallelism=parallelism)
    assert result.metrics["skipped_rows"] == len(bad)
    assert sorted(v % 10000 for v in result.table()["v"].to_pylist()) == [i for i in range(N) if i not in bad]


def test_no_skipped_rows_are_not_shown() -> None:
    assert "skipped_rows" not in rf.Flow("job", rows().collect()).run(local=True).metrics


# -------------------------------------------------------------------------------------------- columns, keys, event time


def unknown(stream: Stream) -> Stream:
    """The same rows, of a schema that only running tells."""
    return stream.map_batches(lambda batch: batch)


@pytest.mark.parametrize(
    ("step", "build"),
    [
        ("filter", lambda s: s.filter(rf.col("nope") > 1)),
        ("with_columns", lambda s: s.with_columns(x=rf.col("nope") + 1)),
        ("select", lambda s: s.select("nope")),
        ("rename", lambda s: s.rename({"nope": "x"})),
        ("drop", lambda s: s.drop("nope")),
        ("key_by", lambda s: s.key_by("nope").map_batches(lambda b: b)),
        ("with_event_time", lambda s: s.with_event_time("nope")),
        ("window", lambda s: s.key_by("k").window(rf.tumbling("1s")).agg(x=rf.sum("nope"))),
        ("key_by", lambda s: s.key_by("nope").window(rf.tumbling("1s")).agg(x=rf.sum("v"))),
    ],
)
def test_a_wrong_column(step: str, build: Callable[[Stream], Stream], place: Place) -> None:
    """While building where the schema is known; else at run time, by a sentence that names step, column and columns."""
    timed = rows().with_columns(t=rf.lit(datetime(2024, 1, 1, tzinfo=UTC))).with_event_time("t")
    with pytest.raises(PlanError) as caught:
        build(timed)
    one_sentence(caught.value, "nope", step)
    place.fails(build(unknown(timed)), "step '", "subtask 0/1", "nope", "'?k'?.*'?v'?")
    assert place.files() == {}


@pytest.mark.parametrize("stream", [rows(), unknown(rows())])
def test_a_window_without_event_time(stream: Stream) -> None:
    with pytest.raises(PlanError) as caught:
        stream.key_by("k").window(rf.tumbling("1s"))
    one_sentence(caught.value, r"step 'window' \(test_bad_input.py:\d+\)", "no event time", "with_event_time")


@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_null_key_is_a_key_of_its_own(parallelism: int) -> None:
    """Documented: rows whose key is null form one group, as in GROUP BY."""
    table = pa.table(
        {
            "k": [None if i % 5 == 0 else i % 3 for i in range(N)],
            "l": [None if i % 2 else "x" for i in range(N)],
            "t": pa.array([i * 1000 for i in range(N)], pa.timestamp("us")),
        }
    )
    windows = (
        rf.from_arrow(table, splits=3, event_time="t").key_by("k", "l").window(rf.tumbling("1s")).agg(n=rf.count())
    )
    found = rf.Flow("job", windows.collect()).run(local=True, parallelism=parallelism).table()
    expected = duckdb.sql('select k, l, count(*) as n from "table" group by all').fetchall()
    assert sorted(map(str, found.select(["k", "l", "n"]).to_pylist())) == sorted(
        str({"k": k, "l": v, "n": n}) for k, v, n in expected
    )


def test_an_unhashable_key(place: Place) -> None:
    listed = pa.schema([("v", pa.list_(pa.int64()))])

    def lists(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch([pa.array([[v] for v in batch["v"].to_pylist()])], names=["v"])

    with pytest.raises(KeyHashError) as caught:
        rows().map_batches(lists, schema=listed).key_by("v")
    one_sentence(caught.value, "'v'", "list")
    late = rows().map_batches(lists).key_by("v").map_batches(lambda b: b)
    place.fails(late, "step 'from_arrow -> map_batches' subtask 0/1", "'v'", "list<")
    assert place.files() == {}


@pytest.mark.parametrize("where", ["source", "step", "window"])
def test_null_event_times(where: str, place: Place) -> None:
    times: list[int | None] = [i * 1000 for i in range(N)]
    times[300] = None
    table = ROWS.append_column("t", pa.array(times, pa.timestamp("us")))

    def stream(table: pa.Table) -> Stream:
        if where == "source":
            return rf.from_arrow(table, batch_rows=BATCH, event_time="t", max_delay="0s")
        return rf.from_arrow(table, batch_rows=BATCH).with_event_time("t", max_delay="0s")

    whole = ROWS.append_column("t", pa.array([i * 1000 for i in range(N)], pa.timestamp("us")))
    if where == "window":
        windows = stream(table).key_by("k").window(rf.tumbling("1s")).agg(n=rf.count())
        place.fails(windows, "step", "'t' is null in 1 of 20 rows", "filter")
        return
    place.fails_then_mended(
        stream(table),
        lambda: stream(whole),
        "step '.*' subtask 0/1",
        "'t' is null in 1 of 20 rows",
        "'v': 300",
        "filter",
    )


# ------------------------------------------------------------------------------------------------------- user functions


def from_the_15th(bad: Callable[[pa.RecordBatch], Any]) -> Callable[[pa.RecordBatch], Any]:
    """Good for 14 batches, then bad. Recognised by the rows, so that it comes back after a restart."""

    def function(batch: pa.RecordBatch) -> Any:
        return bad(batch) if batch["v"][0].as_py() >= 14 * BATCH else batch

    return function


def divides(batch: pa.RecordBatch) -> pa.RecordBatch:
    raise ZeroDivisionError("no rows\nat all")


NONSENSE: dict[str, tuple[Callable[[pa.RecordBatch], Any], str]] = {
    "raises": (divides, "raised ZeroDivisionError: no rows at all"),
    "another column": (lambda b: b.rename_columns(["k", "w"]), r"returned columns \{k: string, w: int64\}, expected"),
    "another type": (lambda b: {"k": b["k"], "v": b["k"]}, "does not fit|returned columns"),
    "a column less": (lambda b: b.select(["v"]), r"returned columns \{v: int64\}, expected \{k: string, v: int64\}"),
    "columns of two lengths": (lambda b: {"k": b["k"], "v": [1]}, "function"),
    "a number": (lambda b: 42, "returned int, expected"),
    "nothing": (lambda b: None, "returned NoneType, expected"),
    "a list of numbers": (lambda b: [1, 2], "returned int, expected"),
    "a text": (lambda b: "rows", "returned str, expected"),
}


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize("promised", [True, False])
def test_a_user_function_that_goes_wrong_late(case: str, promised: bool, place: Place) -> None:
    bad, said = NONSENSE[case]
    schema = ROWS.schema if promised else None
    error = place.fails_then_mended(
        rows().map_batches(from_the_15th(bad), schema=schema, name="mine"),
        lambda: rows().map_batches(lambda b: b, schema=schema, name="mine"),
        r"step 'mine' subtask 0/1",
        said,
    )
    assert isinstance(error.__cause__, UserCodeError)
    if case == "raises":
        assert isinstance(error.__cause__.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (42, "function changed returned int, expected a dict"),
        ({"k": "a", "w": 1}, r"function changed returned columns .*w: int64.*, expected \{k: string, v: int64\}"),
        ({"k": 1, "v": "a"}, "returned rows that do not fit"),
    ],
)
def test_a_row_function_that_goes_wrong_late(bad: object, said: str, place: Place) -> None:
    def changed(row: dict[str, Any]) -> Any:
        return bad if row["v"] >= 320 else row

    place.fails_then_mended(
        rows().map(changed, name="mine"), lambda: rows().map(lambda r: r, name="mine"), "step 'mine' subtask 0/1", said
    )


def test_rows_of_another_schema_do_not_get_into_the_output(place: Place) -> None:
    """The first rows decide for the sink, too; a restart must not let the others be the first."""
    others = rows().filter(rf.col("v") < 300).union(rows().filter(rf.col("v") >= 300).map_batches(lambda b: b))
    place.run(others)
    assert place.committed() == list(range(N))

    elsewhere = Place(place.folder / "2")
    text = unknown(rows().filter(rf.col("v") >= 300)).map_batches(lambda b: b.set_column(1, "v", b["v"].cast("string")))
    mixed = unknown(rows().filter(rf.col("v") < 300)).union(text)
    elsewhere.fails(mixed, "step 'write_parquet' subtask 0/1 cannot write batches of two schemas", "'v' is string")
    assert all(isinstance(v, int) for v in elsewhere.committed())


def test_a_class_whose_constructor_raises(place: Place) -> None:
    class Model:
        def __init__(self) -> None:
            raise OSError("no such model")

        def __call__(self, batch: pa.RecordBatch) -> pa.RecordBatch:
            return batch

    place.fails(rows().map_batches(Model), "step 'map_batches' subtask 0/1", "constructor of Model", "no such model")


def test_an_expression_that_fails_on_a_value(place: Place) -> None:
    place.fails_then_mended(
        rows().with_columns(x=(rf.col("v") - 128).cast("int8")).drop("x"),
        lambda: rows().with_columns(x=rf.lit(1)).drop("x"),
        "step '.*with_columns.*' subtask 0/1", "128",
    )  # fmt: skip


def test_a_generator_that_raises_and_one_of_another_schema(place: Place) -> None:
    def broken(split: int, position: int) -> Any:
        for start in range(position, N, BATCH):
            if start == 300:
                raise ConnectionError("hung up")
            yield ROWS.slice(start, BATCH)

    def other(split: int, position: int) -> Any:
        for start in range(position, N, BATCH):
            yield ROWS.slice(start, BATCH) if start != 300 else pa.table({"k": ["a"]})

    def good(split: int, position: int) -> Any:
        yield ROWS.slice(position)

    def source(fn: Any) -> Stream:
        return rf.from_generator(fn, splits=1, schema=ROWS.schema, name="mine")

    place.fails(source(broken), "step 'mine' subtask 0/1", "ConnectionError: hung up")
    place.fails_then_mended(
        source(other), lambda: source(good), "step 'mine' subtask 0/1", "column 'v' is missing|expected"
    )


def test_other_rows_in_the_output_folder_are_refused(place: Place) -> None:
    place.out.mkdir()
    pq.write_table(pa.table({"v": [-1]}), place.out / "mine.parquet")
    place.fails(rows(), "already holds 1 files of another run", "append")
    assert place.committed() == [-1]
