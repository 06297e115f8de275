"""Topics of Kafka as a source: its partitions are the splits, offsets the positions.

R2: the job goes on from the offsets in its checkpoint and from nowhere else. What the consumer group has committed is
only written, for others to watch, and never read.
The splits of the beginning carry the offsets to begin and to stop at, so that they are decided once. Partitions that
are found later begin at their earliest message: all they hold came after the job's beginning.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

import pyarrow as pa

from rayflow.core.manifest import Json
from rayflow.errors import ConfigError
from rayflow.operators.base import OperatorContext, Source, SplitReader
from rayflow.operators.kafka.client import Cluster, Partition, check_options, confluent
from rayflow.operators.kafka.columns import TYPES, chosen
from rayflow.operators.kafka.consumer import SharedConsumer
from rayflow.operators.kafka.dead_letters import DeadLetters
from rayflow.operators.kafka.formats import Format, JsonFormat, RawFormat
from rayflow.operators.kafka.reader import OnError, PartitionReader

Start = Literal["earliest", "latest"] | datetime | Mapping[tuple[str, int], int]
Stop = Literal["latest"] | datetime | Mapping[tuple[str, int], int]
Isolation = Literal["read_committed", "read_uncommitted"]

RESERVED = frozenset(
    {
        "auto.offset.reset",
        "bootstrap.servers",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.partition.eof",
        "error_cb",
        "group.id",
        "group.instance.id",
        "group.protocol",
        "isolation.level",
        "on_commit",
    }
)
_STEP = "read_kafka"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class TopicPattern:
    """Every topic whose name matches the regular expression from its beginning; internal topics never do."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"topic_pattern got {self.pattern!r}, which is no regular expression: {error}") from error


class KafkaSource(Source):
    """Reads topics side by side, each partition with positions and a watermark of its own.

    Schema out: the columns of ``format``, then those of ``metadata``. Raises `ConfigError` for options that cannot be
    used, when built, and for topics that are not there, when the job starts.
    """

    def __init__(
        self,
        topics: str | Sequence[str] | TopicPattern,
        *,
        bootstrap_servers: str | Sequence[str],
        format: Format,
        start: Start = "earliest",
        stop: Stop | None = None,
        group: str | None = None,
        isolation: Isolation = "read_committed",
        discovery_s: float | None = 30.0,
        metadata: bool | Sequence[str] = False,
        on_error: OnError = "fail",
        dead_letter: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        confluent()
        self.topics = _topics(topics)
        self.servers = bootstrap_servers if isinstance(bootstrap_servers, str) else ",".join(bootstrap_servers)
        self.format = format
        self.start = _checked_point("start", start, ("earliest", "latest"))
        self.stop = None if stop is None else _checked_point("stop", stop, ("latest",))
        self.group = group
        self.isolation = isolation
        self.metadata = chosen(metadata)
        self.on_error = on_error
        self.dead_letter = dead_letter
        self.options = check_options(options or {}, reserved=RESERVED, step=_STEP)
        self._discovery_s = discovery_s
        self._consumers: dict[tuple[str, int, str, int], SharedConsumer] = {}
        if not self.servers:
            raise ConfigError(f'{_STEP}(bootstrap_servers) must name a broker such as "localhost:9092", got nothing')
        if isolation not in ("read_committed", "read_uncommitted"):
            raise ConfigError(f'{_STEP}(isolation) must be "read_committed" or "read_uncommitted", got {isolation!r}')
        if on_error not in ("fail", "skip", "dead_letter"):
            raise ConfigError(f'{_STEP}(on_error) must be "fail", "skip" or "dead_letter", got {on_error!r}')
        if (on_error == "dead_letter") != (dead_letter is not None):
            raise ConfigError(f'{_STEP}: on_error="dead_letter" and dead_letter="<topic>" belong together')
        double = [name for name in format.schema.names if name in self.metadata]
        if double:
            raise ConfigError(f"{_STEP}(metadata) adds {double[0]!r}, which the schema has already; leave one out")
        self._keep_tombstones = "_key" in self.metadata or isinstance(format, RawFormat)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_consumers": {}}  # connections stay where they are

    def __repr__(self) -> str:
        return f"KafkaSource({self.topics!r})"  # options may hold a password

    def schema(self) -> pa.Schema:
        return pa.schema([*self.format.schema, *(pa.field(name, TYPES[name]) for name in self.metadata)])

    def declared_schema(self) -> pa.Schema:
        return self.schema()

    def project(self, columns: Sequence[str]) -> Self:
        """The same source, giving only these columns; itself where they cannot be left out.

        Unless ``on_error="fail"`` every column of the message is read, because leaving one out would change which
        messages are bad.
        """
        payload = [field for field in self.format.schema if field.name in columns]
        if not payload:
            return self
        other = copy.copy(self)
        other._consumers = {}
        other.metadata = tuple(name for name in self.metadata if name in columns)
        if isinstance(self.format, JsonFormat) and self.on_error == "fail":
            other.format = replace(self.format, columns=pa.schema(payload))
        return other

    @property
    def bounded(self) -> bool:
        return self.stop is not None

    @property
    def in_turns(self) -> bool:
        """Partitions are read side by side even where they end: each has an order, and a watermark, of its own."""
        return True

    @property
    def discovery_interval_s(self) -> float | None:
        return None if self.bounded else self._discovery_s

    # ---------------------------------------------------------------------------------------------------------- splits

    def discover(self) -> Sequence[tuple[str, Json]]:
        """The partitions there are, with the offsets to begin and to stop at. Raises `ConfigError` for a topic that is
        not there, `ConnectorError` when no broker answers."""
        with self._cluster() as cluster:
            partitions = self._partitions(cluster)
            if not partitions:
                raise ConfigError(
                    f"{_STEP} expected topics that match {self.topics!r} at {self.servers}, got none; mend the pattern"
                )
            if self.dead_letter is not None:
                cluster.topics([self.dead_letter])
            starts = self._starts(cluster, partitions)
            stops = self._stops(cluster, partitions)
        return [_split(partition, starts[partition], stops.get(partition)) for partition in partitions]

    def discover_again(self) -> Sequence[tuple[str, Json]]:
        with self._cluster() as cluster:
            partitions = self._partitions(cluster)
            starts = cluster.earliest(partitions)
        return [_split(partition, starts[partition], None) for partition in partitions]

    def _cluster(self) -> Cluster:
        return Cluster(self.servers, self.options, where=_STEP, isolation=self.isolation)

    def _partitions(self, cluster: Cluster) -> list[Partition]:
        if isinstance(self.topics, TopicPattern):
            return cluster.matching(self.topics.pattern)
        return cluster.topics(self.topics)

    def _starts(self, cluster: Cluster, partitions: Sequence[Partition]) -> dict[Partition, int]:
        if self.start == "latest":
            return cluster.latest(partitions)
        if isinstance(self.start, datetime):
            return cluster.at_time(partitions, _ms(self.start))
        found = cluster.earliest(partitions)
        if isinstance(self.start, Mapping):
            found |= _offsets("start", self.start, partitions)
        return found

    def _stops(self, cluster: Cluster, partitions: Sequence[Partition]) -> dict[Partition, int]:
        if self.stop is None:
            return {}
        if isinstance(self.stop, datetime):
            return cluster.at_time(partitions, _ms(self.stop))
        if isinstance(self.stop, Mapping):
            stops = _offsets("stop", self.stop, partitions)
            missing = [str(partition) for partition in partitions if partition not in stops]
            if missing:
                raise ConfigError(f"{_STEP}(stop) must name every partition, {missing[0]} is missing")
            return stops
        return cluster.latest(partitions)

    # --------------------------------------------------------------------------------------------------------- reading

    def reader(self, split: Json, position: Json, ctx: OperatorContext) -> SplitReader:
        partition = Partition(str(split["topic"]), int(split["partition"]))
        key = (ctx.run_id, ctx.attempt, ctx.operator, ctx.subtask)
        consumer = self._consumers.get(key)
        if consumer is None:
            consumer = SharedConsumer(self._consuming(ctx), where=str(ctx), group=self.group)
            self._consumers[key] = consumer
        feed = consumer.add(partition, int(split["start"] if position is None else position))

        def close() -> None:
            if consumer.remove(feed):
                self._consumers.pop(key, None)

        dead_letters = None
        if self.dead_letter is not None:
            config = {**_producing(self.options), "bootstrap.servers": self.servers}
            dead_letters = DeadLetters(self.dead_letter, config, where=str(ctx))
        return PartitionReader(
            consumer,
            feed,
            stop=None if split["stop"] is None else int(split["stop"]),
            format=self.format,
            metadata=self.metadata,
            keep_tombstones=self._keep_tombstones,
            on_error=self.on_error,
            dead_letters=dead_letters,
            ctx=ctx,
            on_close=close,
        )

    def _consuming(self, ctx: OperatorContext) -> dict[str, Any]:
        return {
            "log_level": 2,  # what its connections suffer is told by errors, when it matters
            # A second, as it comes: whoever reads faster than its full queue lasts would then wait for messages.
            "fetch.queue.backoff.ms": 10,
            **self.options,
            "bootstrap.servers": self.servers,
            "group.id": self.group or f"rayflow-{ctx.job}",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": self.isolation,
        }


def _split(partition: Partition, start: int, stop: int | None) -> tuple[str, Json]:
    return str(partition), {"topic": partition.topic, "partition": partition.number, "start": start, "stop": stop}


def _topics(topics: str | Sequence[str] | TopicPattern) -> tuple[str, ...] | TopicPattern:
    if isinstance(topics, TopicPattern):
        return topics
    if isinstance(topics, str):
        if topics.startswith("^"):
            return TopicPattern(topics)
        topics = [topics]
    found = tuple(dict.fromkeys(topics))
    if not found or not all(isinstance(name, str) and name for name in found):
        raise ConfigError(f"{_STEP}(topics) must be a topic, a list of topics or a pattern, got {topics!r}")
    pattern = next((name for name in found if name.startswith("^")), None)
    if pattern is not None:
        raise ConfigError(f"{_STEP}(topics) is a list with the pattern {pattern!r}; give one pattern alone")
    return found


def _checked_point(what: str, point: Any, words: tuple[str, ...]) -> Any:
    if isinstance(point, datetime) or point in words:
        return point
    if isinstance(point, Mapping):
        for key, offset in point.items():
            fits = isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int)
            if not fits or not isinstance(offset, int) or offset < 0:
                raise ConfigError(
                    f"{_STEP}({what}) must map (topic, partition) to an offset of 0 or more, got {key!r}: {offset!r}"
                )
        return dict(point)
    words_shown = ", ".join(f'"{word}"' for word in words)
    raise ConfigError(f"{_STEP}({what}) must be {words_shown}, a datetime or a dict of offsets, got {point!r}")


def _offsets(what: str, given: Mapping[tuple[str, int], int], partitions: Sequence[Partition]) -> dict[Partition, int]:
    found = {Partition(*key): offset for key, offset in given.items()}
    unknown = [str(partition) for partition in found if partition not in set(partitions)]
    if unknown:
        raise ConfigError(f"{_STEP}({what}) names {unknown[0]}, which there is not")
    return found


def _ms(time: datetime) -> int:
    """Without a zone it is UTC, as everywhere in rayflow."""
    aware = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    return -((_EPOCH - aware) // timedelta(milliseconds=1))  # rounded up: no message of before that time


def _producing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say how to reach the brokers: a producer has no use for the others."""
    kept = ("security.", "sasl.", "ssl.", "socket.", "broker.", "client.id", "oauth", "debug", "log")
    return {name: value for name, value in options.items() if name.startswith(kept)}
