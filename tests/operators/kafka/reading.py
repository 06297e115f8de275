"""Reading splits of a Kafka source to their end or until something has come, for its tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.operators.base import OperatorContext, SplitReader
from rayflow.operators.kafka.formats import Format, JsonFormat
from rayflow.operators.kafka.source import KafkaSource
from tests.kafka_server import KafkaServer
from tests.operators.helpers import context

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])
_PATIENCE_S = 20.0


@dataclass(frozen=True)
class SmallJson(JsonFormat):
    """Few rows a batch, so that there are many positions."""

    messages_max = 7


def json_source(kafka: KafkaServer, topics: Any, *, format: Format | None = None, **options: Any) -> KafkaSource:
    return KafkaSource(
        topics, bootstrap_servers=kafka.bootstrap_servers, format=format or SmallJson(SCHEMA), **options
    )  # fmt: skip


def until(found: Callable[[], bool]) -> None:
    """Ask until it is so; a broker offers nothing else to wait on."""
    deadline = time.monotonic() + _PATIENCE_S
    while not found():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come")
        time.sleep(0)


def drain(reader: SplitReader, rows: int | None = None) -> list[tuple[pa.RecordBatch, Json]]:
    """All batches to the end of the split, or until there are ``rows``, each with the position behind it."""
    found: list[tuple[pa.RecordBatch, Json]] = []
    done = False

    def enough() -> bool:
        nonlocal done
        polled = reader.poll()
        if polled.batch is not None:
            found.append((polled.batch, polled.position))
        done = polled.done
        return done or (rows is not None and sum(batch.num_rows for batch, _ in found) >= rows)

    until(enough)
    return found


def read_split(
    source: KafkaSource, split: Json, position: Json = None, *, ctx: OperatorContext | None = None
) -> list[tuple[pa.RecordBatch, Json]]:
    reader = source.reader(split, position, ctx or context())
    try:
        return drain(reader)
    finally:
        reader.close()
        reader.close()  # safe when called twice


def rows_of(source: KafkaSource, batches: Sequence[tuple[pa.RecordBatch, Json]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pa.Table.from_batches([b for b, _ in batches], schema=source.schema()).to_pylist()
    return found


def read_all(source: KafkaSource) -> list[dict[str, Any]]:
    """All rows of a bounded source, one partition after the other."""
    return [row for _, split in source.discover() for row in rows_of(source, read_split(source, split))]


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"n{i}"} for i in range(first, first + count)]
