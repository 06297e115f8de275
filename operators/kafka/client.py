"""What source and sink share of the client library: its import, its options, its errors, and a look at the cluster.

Errors of the client become those of rayflow by their name: what no retry can mend (credentials, authorization, an
option) is `ConfigError`, everything else `ConnectorError`, with which a job waits and goes on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from rayflow.errors import ConfigError, ConnectorError, RayflowError

CALL_TIMEOUT_S = 10.0
_SLICE_S = 1.0
PATIENCE_S = 60.0
"""How long all brokers may be away before a subtask gives up and leaves the waiting to the restart strategy."""
MISSING_S = 30.0
"""How long a topic or partition may be unknown: brokers learn of new ones one after the other."""

MISSING = frozenset({"_UNKNOWN_PARTITION", "_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_ID", "UNKNOWN_TOPIC_OR_PART"})
_FOR_GOOD = frozenset(
    {
        "_AUTHENTICATION",
        "_CONFLICT",
        "_INVALID_ARG",
        "_UNSUPPORTED_FEATURE",
        "CLUSTER_AUTHORIZATION_FAILED",
        "GROUP_AUTHORIZATION_FAILED",
        "ILLEGAL_SASL_STATE",
        "INVALID_TOPIC_EXCEPTION",
        "SASL_AUTHENTICATION_FAILED",
        "TOPIC_AUTHORIZATION_FAILED",
        "TOPIC_EXCEPTION",
        "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
        "UNSUPPORTED_SASL_MECHANISM",
    }
)


class Partition(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.number}]"


def confluent() -> Any:
    """The module `confluent_kafka`; `ConfigError` where it is not installed."""
    try:
        import confluent_kafka
    except ImportError as error:
        raise ConfigError(
            "Kafka needs the client library confluent-kafka, which is not installed; pip install 'rayflow[kafka]'"
        ) from error
    return confluent_kafka


def check_options(options: Mapping[str, Any], *, reserved: Collection[str], step: str) -> dict[str, Any]:
    """The user's librdkafka options; `ConfigError` for one on which correctness stands."""
    for name in options:
        if name in reserved:
            raise ConfigError(f"{step}(options) must not set {name!r}: rayflow decides it; leave it out")
    return dict(options)


def lasting(error: Any) -> bool:
    """Whether no retry can mend this `KafkaError`."""
    return error.name() in _FOR_GOOD


def error_of(error: Any, *, where: str, wanted: str, servers: str) -> RayflowError:
    """What to raise for a `KafkaError`: ``where`` could not do what was ``wanted``."""
    if lasting(error):
        return ConfigError(
            f"{where} could not {wanted} at {servers}: {error.name()}: {error.str()}; "
            "check credentials, permissions and options"
        )
    return ConnectorError(
        f"{where} could not {wanted} at {servers}: {error.name()}: {error.str()}; "
        "it is tried again, see whether the broker is there"
    )


@dataclass(slots=True)
class Trouble:
    """What the client tells of its connections, by its callback ``error_cb``."""

    since: float | None = None
    """When (`time.monotonic`) all brokers went away; None: not that we know."""
    lasting: Any = None
    """The first error that no retry can mend."""
    last: Any = None
    missing: Any = None
    """What is not there any more, and has not been for `MISSING_S`."""
    ignored: Collection[str] = field(default_factory=tuple)
    _missing_since: dict[str, float] = field(default_factory=dict)

    def __call__(self, error: Any) -> None:
        if error.name() in self.ignored:
            return
        if error.name() in MISSING:
            now = time.monotonic()
            if now - self._missing_since.setdefault(error.str(), now) >= MISSING_S:
                self.missing = error
            return
        if lasting(error) and self.lasting is None:
            self.lasting = error
        elif error.name() == "_ALL_BROKERS_DOWN":
            if self.since is None:
                self.since = time.monotonic()
        else:
            self.last = error


class Cluster:
    """Questions about topics and offsets, over one connection. All raise `ConfigError` or `ConnectorError`."""

    def __init__(self, servers: str, options: Mapping[str, Any], *, where: str, isolation: str) -> None:
        kafka = confluent()
        self._kafka = kafka
        self._servers = servers
        self._where = where
        self._trouble = Trouble()
        self._isolation = isolation
        # A consumer that asks for a topic does not create it, as an admin client would on a broker that lets it.
        self._config = {"log_level": 2, **options, "bootstrap.servers": servers, "error_cb": self._trouble}
        try:
            self._consumer = kafka.Consumer({**self._config, "group.id": "rayflow", "enable.auto.commit": False})
            from confluent_kafka.admin import AdminClient

            producing = {k: v for k, v in self._config.items() if k not in _consumer_only(options)}
            self._admin = AdminClient(producing)
        except kafka.KafkaException as error:
            raise ConfigError(f"{where}: the client refuses its options: {error.args[0].str()}") from error

    def close(self) -> None:
        self._consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def topics(self, names: Sequence[str]) -> list[Partition]:
        """The partitions of these topics; `ConfigError` for a topic that is not there."""
        found: list[Partition] = []
        for name in names:
            topic = self._metadata(name).topics.get(name)
            if topic is None or topic.error is not None or not topic.partitions:
                reason = "there is no such topic" if topic is None or topic.error is None else topic.error.str()
                if topic is not None and topic.error is not None and lasting(topic.error):
                    raise error_of(topic.error, where=self._where, wanted=f"read topic {name!r}", servers=self._servers)
                raise ConfigError(
                    f"{self._where} expected topic {name!r} at {self._servers}, got: {reason}; "
                    "create it or mend its name"
                )
            found += [Partition(name, number) for number in sorted(topic.partitions)]
        return found

    def matching(self, pattern: str) -> list[Partition]:
        """The partitions of all topics whose names match from their beginning; internal ones are left out."""
        match = re.compile(pattern).match
        topics = self._metadata(None).topics
        names = sorted(name for name in topics if match(name) and not name.startswith("__"))
        return [Partition(name, number) for name in names for number in sorted(topics[name].partitions)]

    def earliest(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The first offsets that the broker still has."""
        return self._offsets(dict.fromkeys(partitions, _spec().earliest()))

    def latest(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        """The offsets behind what may be read now: with ``read_committed`` behind the last decided transaction."""
        return self._offsets(dict.fromkeys(partitions, _spec().latest()))

    def at_time(self, partitions: Sequence[Partition], ms: int) -> dict[Partition, int]:
        """The first offsets with a timestamp at or after ``ms`` since the epoch; where there is none, `latest`."""
        found = self._offsets(dict.fromkeys(partitions, _spec().for_timestamp(ms)))
        none = [partition for partition, offset in found.items() if offset < 0]
        return found | (self.latest(none) if none else {})

    def _metadata(self, topic: str | None) -> Any:
        about = () if topic is None else (topic,)
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:  # in slices, so that refused credentials are told at once
            try:
                return self._consumer.list_topics(*about, timeout=min(_SLICE_S, CALL_TIMEOUT_S))
            except self._kafka.KafkaException as error:
                failed = self._failed(error.args[0], "list topics")
                if isinstance(failed, ConfigError) or time.monotonic() >= deadline:
                    raise failed from error

    def _offsets(self, wanted: Mapping[Partition, Any]) -> dict[Partition, int]:
        if not wanted:
            return {}
        kafka = self._kafka
        level = kafka.IsolationLevel.READ_COMMITTED
        if self._isolation != "read_committed":
            level = kafka.IsolationLevel.READ_UNCOMMITTED
        asked = {kafka.TopicPartition(p.topic, p.number): spec for p, spec in wanted.items()}
        try:
            answers = self._admin.list_offsets(asked, isolation_level=level, request_timeout=CALL_TIMEOUT_S)
            return {Partition(tp.topic, tp.partition): int(got.result().offset) for tp, got in answers.items()}
        except kafka.KafkaException as error:
            raise self._failed(error.args[0], "list offsets") from error

    def _failed(self, error: Any, wanted: str) -> RayflowError:
        self._consumer.poll(0)  # what the connections have to say comes by the callback
        self._admin.poll(0)
        cause = self._trouble.lasting or self._trouble.last or error
        return error_of(cause, where=self._where, wanted=wanted, servers=self._servers)


def _spec() -> Any:
    from confluent_kafka.admin import OffsetSpec

    return OffsetSpec


def _consumer_only(options: Mapping[str, Any]) -> set[str]:
    """Options of which an admin client would warn that it does not have them."""
    prefixes = ("fetch.", "queued.", "max.poll.", "check.crcs", "client.rack", "session.timeout", "group.")
    return {name for name in options if name.startswith(prefixes)}
