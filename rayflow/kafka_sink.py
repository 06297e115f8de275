"""Streams that end in Kafka: the options of `Stream.write_kafka`, checked while building."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rayflow.config import Duration, duration_us
from rayflow.errors import ConfigError
from rayflow.operators.kafka.encoding import Encoding, ValueFormat, columns_of, fixed_headers
from rayflow.operators.kafka.sink import KafkaGuarantee, KafkaSink

if TYPE_CHECKING:
    from rayflow.stream import StreamEnd


class WritesKafka:
    """The part of a `Stream` that writes to Kafka."""

    def _sink(self, label: str, operator: Any, *, detail: str = "", name: str | None = None) -> StreamEnd:
        raise NotImplementedError

    def write_kafka(
        self,
        topic: str,
        *,
        bootstrap_servers: str | Sequence[str],
        format: ValueFormat = "json",
        key: str | Sequence[str] | None = None,
        headers: str | Mapping[str, str | bytes] | None = None,
        timestamp: str | None = None,
        partition: str | None = None,
        schema: str | None = None,
        schema_id: int | None = None,
        guarantee: KafkaGuarantee = "exactly_once",
        transaction_timeout: Duration = "15m",
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> StreamEnd:
        """Every row a message of a Kafka topic, which must exist; docs/kafka-sink.md tells what is guaranteed how.

        ``exactly_once``: one transaction a checkpoint and subtask; readers with ``isolation.level=read_committed`` see
        rows when their checkpoint is complete. ``transaction_timeout`` must be longer than the interval and timeout of
        checkpoints together, and than the job may be down; a transaction that expires ends the job. ``at_least_once``:
        readers see rows at once, and after a failure some twice.
        ``key``: text or bytes as they are, others as JSON, several columns as a JSON object; keys choose the partition
        as Java clients do. ``headers``: a map column, or the same for all. ``timestamp`` (else now), ``partition`` and
        ``headers`` columns are left out of the value. ``"avro"``: ``schema`` is the record schema (JSON text; else made
        from the columns), ``schema_id`` frames messages for a schema registry. ``"arrow"``: an IPC stream of many rows.
        ``options``: of librdkafka, but those that rayflow decides.
        """
        if guarantee not in ("exactly_once", "at_least_once"):
            raise ConfigError(f'write_kafka(guarantee) must be "exactly_once" or "at_least_once", got {guarantee!r}')
        encoding = Encoding(
            format,
            key=columns_of("key", key),
            headers=headers if isinstance(headers, str) else fixed_headers(headers or {}),
            timestamp=timestamp,
            partition=partition,
            avro_schema=schema,
            avro_schema_id=schema_id,
        )
        sink = KafkaSink(
            topic,
            bootstrap_servers=bootstrap_servers if isinstance(bootstrap_servers, str) else ",".join(bootstrap_servers),
            encoding=encoding,
            exactly_once=guarantee == "exactly_once",
            transaction_timeout_ms=duration_us(transaction_timeout, what="write_kafka(transaction_timeout)") // 1000,
            options=dict(options or {}),
        )
        made = self._sink("write_kafka", sink, detail=f"{topic}, {format}, {guarantee}", name=name)
        made.node.schema(look=False)
        return made
