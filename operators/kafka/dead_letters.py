"""Messages that cannot be read go to a topic of their own, at least once.

The position of the source moves past them only when the broker has confirmed them: what a checkpoint holds was
delivered. After a failure those behind the checkpoint are produced again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayflow.errors import ConnectorError
from rayflow.operators.kafka.client import confluent, error_of, lasting


class DeadLetters:
    """The producer of one partition's reader, used on its thread; it connects at the first message."""

    def __init__(self, topic: str, config: Mapping[str, Any], *, where: str) -> None:
        self._topic = topic
        self._config = config
        self._where = where
        self._producer: Any = None
        self._error: Any = None

    def send(self, message: Any, reason: str) -> None:
        """Key, value and headers as they were, and headers ``rayflow.*`` that tell where it stood and what is wrong."""
        if self._producer is None:
            self._producer = confluent().Producer({"linger.ms": 0, "log_level": 2, **self._config})
        headers: list[tuple[str, Any]] = list(message.headers() or ())
        told = {
            "topic": message.topic(),
            "partition": message.partition(),
            "offset": message.offset(),
            "error": reason,
        }
        headers += [(f"rayflow.{name}", str(value).encode()) for name, value in told.items()]
        self._producer.produce(
            self._topic, message.value(), message.key(), headers=headers, on_delivery=self._delivered
        )  # fmt: skip

    def _delivered(self, error: Any, _: Any) -> None:
        self._error = self._error or error

    def confirmed(self) -> bool:
        """Whether all are with the broker. Raises `ConnectorError` or `ConfigError` when one cannot be delivered."""
        if self._producer is None:
            return True
        self._producer.poll(0)
        if self._error is not None:
            wanted = f"write the dead letter to topic {self._topic!r}"
            if lasting(self._error):
                raise error_of(self._error, where=self._where, wanted=wanted, servers=self._servers)
            raise ConnectorError(f"{self._where} could not {wanted}: {self._error.str()}; it is tried again")
        return len(self._producer) == 0

    @property
    def _servers(self) -> str:
        return str(self._config["bootstrap.servers"])

    def close(self) -> None:
        """What is not confirmed is behind the position: it may be dropped."""
        if self._producer is not None:
            self._producer.purge()
            self._producer = None
