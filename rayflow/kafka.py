"""Streams that begin in Kafka. Nothing is read while building."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from rayflow.config import Duration, duration_us
from rayflow.errors import ConfigError
from rayflow.graph import Node, caller_location
from rayflow.operators.event_time import check_event_time
from rayflow.operators.kafka.avro import AvroFormat, RegistryAvroFormat
from rayflow.operators.kafka.formats import ArrowFormat, Format, JsonFormat, RawFormat
from rayflow.operators.kafka.reader import OnError
from rayflow.operators.kafka.source import Isolation, KafkaSource, Start, Stop, TopicPattern
from rayflow.stream import Stream, event_time_of

FormatName = Literal["json", "avro", "avro-registry", "arrow", "raw"]


def topic_pattern(pattern: str) -> TopicPattern:
    """Every topic whose name matches the regular expression from its beginning, new ones too; for `read_kafka`."""
    return TopicPattern(pattern)


def read_kafka(
    topics: str | Sequence[str] | TopicPattern,
    *,
    bootstrap_servers: str | Sequence[str],
    format: FormatName | Format = "json",
    schema: pa.Schema | str | None = None,
    registry: str | Mapping[int, str] | None = None,
    start: Start = "earliest",
    stop: Stop | None = None,
    group: str | None = None,
    isolation: Isolation = "read_committed",
    event_time: str | None = None,
    max_delay: Duration | None = None,
    idle_timeout: Duration | None = None,
    discover: Duration | None = "30s",
    metadata: bool | Sequence[str] = False,
    on_error: OnError = "fail",
    dead_letter: str | None = None,
    options: Mapping[str, Any] | None = None,
    parallelism: int | None = None,
    name: str | None = None,
) -> Stream:
    """Messages of Kafka topics; partitions are read side by side, each with its position and watermark (rule R2).

    ``topics``: a name, a list, ``"^regex"`` or `topic_pattern`; every ``discover`` new partitions and topics are looked
    for and read from their earliest message. ``schema``: a `pyarrow.Schema` ("json", "arrow") or the JSON text of an
    Avro record; ``registry``: for "avro-registry", a URL or the schemas by id. "raw" gives one column, ``value``.
    ``start``, ``stop``: "earliest" (start only), "latest", a time (a naive one is UTC), or offsets by (topic,
    partition); with ``stop`` the stream ends there. A job that goes on from a checkpoint goes on from its offsets.
    ``group``: where to write the offsets of complete checkpoints for others to watch; they are never read.
    ``metadata``: True or names of ``_topic``, ``_partition``, ``_offset``, ``_timestamp``, ``_key``, ``_headers``. With
    ``_key`` a message without value (tombstone) is a row with a null payload; else it is left out and counted.
    ``on_error``: "fail" names topic, partition and offset of a message that cannot be read; "skip" counts it;
    "dead_letter" counts it and sends it to the topic ``dead_letter``, at least once. ``options``: for librdkafka.

    Raises `ConfigError` here, and when the job starts for a topic that is not there or credentials that are refused.
    """
    source = KafkaSource(
        topics,
        bootstrap_servers=bootstrap_servers,
        format=_format(format, schema, registry),
        start=start,
        stop=stop,
        group=group,
        isolation=isolation,
        discovery_s=None
        if discover is None
        else duration_us(discover, what="read_kafka(discover)", minimum_us=100_000) / 1e6,
        metadata=metadata,
        on_error=on_error,
        dead_letter=dead_letter,
        options=options,
    )
    time = event_time_of(event_time, max_delay, idle_timeout=idle_timeout)
    if event_time is not None:
        check_event_time(source.schema(), event_time, step=name or "read_kafka")
    node = Node(
        "read_kafka", source=source, event_time=time, detail=_detail(source), name=name, parallelism=parallelism,
        location=caller_location(),
    )  # fmt: skip
    return Stream(node, event_time=event_time)


def _detail(source: KafkaSource) -> str:
    topics = source.topics
    return topics.pattern if isinstance(topics, TopicPattern) else ", ".join(topics)


def _format(format: Any, schema: Any, registry: Any) -> Format:
    if isinstance(format, Format):
        if schema is not None or registry is not None:
            raise ConfigError("read_kafka: a Format of your own has its schema; leave schema= and registry= out")
        return format
    if registry is not None and format != "avro-registry":
        raise ConfigError(f'read_kafka(registry) is for format="avro-registry", got format={format!r}')
    if format == "raw":
        if schema is not None:
            raise ConfigError('read_kafka: format="raw" has one column, value; leave schema= out')
        return RawFormat()
    if schema is None:
        raise ConfigError(
            f"read_kafka needs schema= for format={format!r}: a topic does not say what its messages are; "
            'use format="raw" to get bytes'
        )
    if format == "json":
        return JsonFormat(schema)
    if format == "arrow":
        return ArrowFormat(schema)
    if format == "avro":
        return AvroFormat(schema)
    if format == "avro-registry":
        if registry is None:
            raise ConfigError(
                'read_kafka: format="avro-registry" needs registry=, the URL of the registry or a dict of schemas by '
                "id: without the schema a message was written with it would be read as something else"
            )
        return RegistryAvroFormat(schema, registry)
    raise ConfigError(
        f'read_kafka(format) must be "json", "avro", "avro-registry", "arrow", "raw" or a Format, got {format!r}'
    )
