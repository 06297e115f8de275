"""Where streams begin: files, Arrow data, generators, and sources of your own. Nothing is read while building."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from rayflow.config import Duration, duration_us
from rayflow.errors import PlanError
from rayflow.graph import Node, caller_location
from rayflow.operators.base import Source
from rayflow.operators.event_time import check_event_time
from rayflow.operators.sources.memory import ArrowSource, GeneratorSource
from rayflow.operators.sources.parquet import ParquetSource
from rayflow.operators.sources.text import CsvSource, JsonSource
from rayflow.stream import Stream, event_time_of


def read_parquet(
    path: Any,
    *,
    columns: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    watch: Duration | None = None,
    event_time: str | None = None,
    max_delay: Duration | None = None,
    storage_options: Mapping[str, Any] | None = None,
    parallelism: int | None = None,
    name: str | None = None,
) -> Stream:
    """Rows of Parquet files: a path, glob, folder or list; any fsspec URL. Read in parallel by row groups.

    ``schema``: of the files, where they must not be looked at while the flow is built. ``watch="10s"``: go on looking
    for new files; each is read once, whole, by one subtask, and must be complete when it appears and then not change.
    """
    source = ParquetSource(
        path,
        columns=tuple(columns) if columns is not None else None,
        storage_options=dict(storage_options or {}),
        file_schema=schema,
        watch_s=_seconds(watch, "read_parquet"),
    )
    return read_source(
        source, event_time=event_time, max_delay=max_delay, parallelism=parallelism, name=name, label="read_parquet",
        detail=str(path),
    )  # fmt: skip


def read_csv(
    path: Any,
    *,
    schema: pa.Schema | None = None,
    delimiter: str = ",",
    header: bool = True,
    null_values: Sequence[str] | None = None,
    newlines_in_values: bool = False,
    on_error: Literal["fail", "skip"] = "fail",
    watch: Duration | None = None,
    event_time: str | None = None,
    max_delay: Duration | None = None,
    storage_options: Mapping[str, Any] | None = None,
    parallelism: int | None = None,
    name: str | None = None,
) -> Stream:
    """Rows of CSV files, read in parallel by byte ranges; without ``schema`` the first block decides the types.

    ``on_error="fail"`` names file, row and text of a row that does not fit; ``"skip"`` counts it.
    ``watch`` as in `read_parquet`; it needs ``schema``.
    """
    source = CsvSource(
        path,
        schema=schema,
        delimiter=delimiter,
        header=header,
        null_values=tuple(null_values) if null_values is not None else None,
        newlines_in_values=newlines_in_values,
        on_error=on_error,
        storage_options=dict(storage_options or {}),
        watch_s=_seconds(watch, "read_csv"),
    )
    return read_source(
        source, event_time=event_time, max_delay=max_delay, parallelism=parallelism, name=name, label="read_csv",
        detail=str(path),
    )  # fmt: skip


def read_json(
    path: Any,
    *,
    schema: pa.Schema | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    watch: Duration | None = None,
    event_time: str | None = None,
    max_delay: Duration | None = None,
    storage_options: Mapping[str, Any] | None = None,
    parallelism: int | None = None,
    name: str | None = None,
) -> Stream:
    """Rows of newline-delimited JSON files, read in parallel by byte ranges.

    ``watch`` as in `read_parquet`; it needs ``schema``.
    """
    source = JsonSource(
        path,
        schema=schema,
        on_error=on_error,
        storage_options=dict(storage_options or {}),
        watch_s=_seconds(watch, "read_json"),
    )
    return read_source(
        source, event_time=event_time, max_delay=max_delay, parallelism=parallelism, name=name, label="read_json",
        detail=str(path),
    )  # fmt: skip


def from_arrow(
    data: Any,
    *,
    splits: int = 1,
    batch_rows: int = 65_536,
    event_time: str | None = None,
    max_delay: Duration | None = None,
    parallelism: int | None = None,
    name: str | None = None,
) -> Stream:
    """Rows of a pyarrow Table, RecordBatch or list of batches; ``splits`` contiguous pieces can be read in parallel."""
    source = ArrowSource(data, splits=splits, batch_rows=batch_rows)
    return read_source(
        source, event_time=event_time, max_delay=max_delay, parallelism=parallelism, name=name, label="from_arrow"
    )


def from_generator(
    fn: Callable[[Any, int], Iterable[pa.RecordBatch]],
    *,
    splits: int | Sequence[Any] = 1,
    schema: pa.Schema,
    bounded: bool = True,
    event_time: str | None = None,
    max_delay: Duration | None = None,
    parallelism: int | None = None,
    name: str | None = None,
) -> Stream:
    """``fn(split, position)`` yields record batches of ``schema`` from row ``position`` of the split on.

    The same split and position must give the same rows every time: recovery stands on it (rule R2). A subtask reads
    its splits one after another; with ``bounded=False``, which says that they never end, it reads them in turns, and
    each has a watermark of its own. A batch without rows, or None, means: nothing just now.
    """
    source = GeneratorSource(fn, splits=splits, schema=schema, bounded=bounded)
    return read_source(
        source, event_time=event_time, max_delay=max_delay, parallelism=parallelism, name=name,
        label="from_generator", detail=getattr(fn, "__name__", repr(fn)),
    )  # fmt: skip


def read_source(
    source: Source,
    *,
    event_time: str | None = None,
    max_delay: Duration | None = None,
    parallelism: int | None = None,
    name: str | None = None,
    label: str = "read_source",
    detail: str = "",
) -> Stream:
    """Rows of a source of your own; see `rayflow.operators.base.Source` for its contract.

    ``event_time`` names the event time column; ``max_delay`` as in `Stream.with_event_time`, which, right
    behind the source, has further options.
    """
    if event_time is not None and not isinstance(event_time, str):
        raise PlanError(
            f"step {name or label!r} ({caller_location()}): event_time= must name a column, got {event_time!r}; for an "
            "expression or a function call .with_event_time(...) right behind the source"
        )
    time = event_time_of(event_time, max_delay)
    declared = source.declared_schema()
    if declared is not None and event_time is not None:
        check_event_time(declared, event_time, step=name or label)
    node = Node(
        label, source=source, event_time=time, detail=detail, name=name, parallelism=parallelism,
        location=caller_location(),
    )  # fmt: skip
    return Stream(node, event_time=event_time)


def _seconds(watch: Duration | None, function: str) -> float | None:
    return None if watch is None else duration_us(watch, what=f"{function}(watch)", minimum_us=1_000) / 1_000_000
