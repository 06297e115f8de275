"""Producers of confluent-kafka as a sink uses them: batches of messages in, errors as those of rayflow out.

The client takes one message a call, so there is one loop over messages here. Measured, 50,000 messages with keys on one
core: the loop over ``produce`` hands over 2.5 M messages/s, the client's own ``produce_batch`` 1.8 M (it wants a dict a
message and takes no headers). Deliveries are reported only when they fail.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import repeat
from typing import Any

from rayflow.errors import ConfigError, ConnectorError, DataError, RayflowError
from rayflow.operators.kafka.client import CALL_TIMEOUT_S, confluent, error_of
from rayflow.operators.kafka.encoding import Messages

DELIVERY_TIMEOUT_S = 30.0
"""How long delivering may take before the checkpoint is declined; it is tried again with the next one."""
QUEUE_TIMEOUT_S = 30.0
"""How long the client's queue may stay full."""
SOCKET_TIMEOUT_MS = int(CALL_TIMEOUT_S * 1000)
"""How long one request may take. Without it some calls of the client (`send_offsets_to_transaction`) last its 60 s for
every request, whatever timeout they are given, with a broker that takes connections and does not answer."""
RESERVED = (
    "bootstrap.servers", "delivery.report.only.error", "enable.idempotence", "error_cb", "logger", "on_delivery",
    "transaction.timeout.ms", "transactional.id",
)  # fmt: skip
_DEFAULTS: Mapping[str, Any] = {
    "log_level": 4,
    "partitioner": "murmur2_random",
    "linger.ms": 5,
    "queue.buffering.max.messages": 200_000,
    "queue.buffering.max.kbytes": 131_072,
}
_BAD_ROW = frozenset({"MSG_SIZE_TOO_LARGE", "INVALID_RECORD", "INVALID_MSG", "_UNKNOWN_PARTITION"})
_FENCED = frozenset({"_FENCED", "INVALID_PRODUCER_EPOCH", "PRODUCER_FENCED"})
_log = logging.getLogger("rayflow.kafka")
_log.addHandler(logging.NullHandler())


class ProducerBrokenError(ConnectorError):
    """This producer can do nothing more: the attempt is over, the next one makes another."""


class Producer:
    """One producer. `send` is called by one thread at a time; `flush` may run meanwhile in another.

    ``where`` names step and subtask in messages; ``closed`` says that nobody needs the outcome any more.
    """

    def __init__(
        self,
        servers: str,
        options: Mapping[str, Any],
        *,
        where: str,
        closed: Callable[[], bool] = lambda: False,
        **own: Any,
    ) -> None:
        self._servers = servers
        self._where = where
        self._closed = closed
        self._kafka = confluent()
        self._failed: list[Any] = []
        config = {
            **_DEFAULTS,
            "socket.timeout.ms": SOCKET_TIMEOUT_MS,
            **options,
            "bootstrap.servers": servers,
            "enable.idempotence": True,
            "delivery.report.only.error": True,
            "on_delivery": self._delivered,
            "error_cb": _ignored,  # what matters comes back from calls
            "logger": _log,
            **own,
        }
        try:
            self.client = self._kafka.Producer(config)
        except self._kafka.KafkaException as error:
            raise ConfigError(f"{where}: the Kafka client refuses its options: {error.args[0].str()}") from error

    def send(self, topic: str, messages: Messages) -> None:
        """Hand over to the client, which sends in the background. Raises `DataError` for a message it will not take,
        `ConnectorError` when none was taken, `ProducerBrokenError` when some were: again they would be there twice."""
        count, client = len(messages), self.client
        keys = messages.keys or repeat(None)
        produce: Callable[..., None] = client.produce
        rows: list[Any] = list(zip(messages.values, keys, strict=False))
        if not (messages.partitions is None and messages.timestamps is None and messages.headers is None):
            partitions, timestamps = messages.partitions or repeat(-1), messages.timestamps or repeat(0)
            rows = list(zip(rows, partitions, timestamps, messages.headers or repeat(None), strict=False))
            produce = partial(_produce, client.produce)
        at, deadline = 0, 0.0
        while at < count:
            try:
                for at in range(at, count):  # noqa: B020  resumes where the queue was full
                    produce(topic, *rows[at])
                break
            except BufferError:
                now = time.monotonic()
                deadline = deadline or now + QUEUE_TIMEOUT_S
                if now > deadline:
                    raise (ProducerBrokenError if at else ConnectorError)(
                        f"{self._where} could not write to {topic!r} at {self._servers}: the client's queue was full "
                        f"for {QUEUE_TIMEOUT_S:g} s; is the broker there? It is tried again"
                    ) from None
                before = len(self.client)
                self.client.poll(0.05)
                self.check()
                if len(self.client) < before:
                    deadline = 0.0
            except self._kafka.KafkaException as error:
                found = self.error(error.args[0], f"write to {topic!r}")
                if at and isinstance(found, ConnectorError):
                    found = ProducerBrokenError(str(found))
                raise found from error
        self.client.poll(0)
        self.check()

    def flush(self) -> None:
        """Everything handed over is with the broker. Raises `ConnectorError` when it takes too long."""
        deadline = time.monotonic() + DELIVERY_TIMEOUT_S
        while self.client.flush(0.5):
            self.check()
            if self._closed():
                raise ConnectorError(f"{self._where} was closed before its messages were delivered")
            if time.monotonic() > deadline:
                raise ConnectorError(
                    f"{self._where} expected its messages to be delivered to {self._servers} within "
                    f"{DELIVERY_TIMEOUT_S:g} s, {len(self.client)} are not; is the broker there? It is tried again"
                )
        self.check()

    def check(self) -> None:
        """Raises for a message that the broker has refused."""
        if self._failed:
            error = self.error(self._failed[0], "deliver a message")
            raise ProducerBrokenError(str(error)) if isinstance(error, ConnectorError) else error

    def call(self, wanted: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call the client; what may be tried again is, for a few seconds."""
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            try:
                return function(*args)
            except self._kafka.KafkaException as error:
                reason = error.args[0]
                if not reason.retriable() or time.monotonic() > deadline:
                    raise self.error(reason, wanted) from error
                self.client.poll(0.05)

    def discard(self) -> None:
        """Forget what was not sent; for when the outcome does not matter any more. Never raises."""
        with contextlib.suppress(Exception):
            self.client.purge()

    def error(self, reason: Any, wanted: str) -> RayflowError:
        """What a `KafkaError` means."""
        name = reason.name()
        if name in _BAD_ROW:
            return DataError(
                f"{self._where} could not {wanted}: {name}: {reason.str()}; mend the row (or its partition number), or "
                "raise message.max.bytes in options and at the topic"
            )
        if name in _FENCED:
            return ProducerBrokenError(
                f"{self._where} could not {wanted}: another producer with its transactional id has taken over; a newer "
                "attempt of this job, or another job of the same name, which must be stopped or renamed"
            )
        if name in ("INVALID_TRANSACTION_TIMEOUT", "_UNKNOWN_TOPIC", "UNKNOWN_TOPIC_OR_PART"):
            return ConfigError(f"{self._where} could not {wanted} at {self._servers}: {reason.str()}")
        found = error_of(reason, where=self._where, wanted=wanted, servers=self._servers)
        broken = isinstance(found, ConnectorError) and (reason.fatal() or reason.txn_requires_abort())
        return ProducerBrokenError(str(found)) if broken else found

    def _delivered(self, error: Any, _: Any) -> None:
        if error is not None and error.name() not in ("_PURGE_QUEUE", "_PURGE_INFLIGHT"):
            self._failed.append(error)


def _produce(produce: Any, topic: str, row: Any, partition: int, timestamp: int, headers: Any) -> None:
    produce(topic, *row, partition, timestamp=timestamp, headers=headers)


def _ignored(_: Any) -> None:
    return None
