"""The Kafka sink: at least once with one idempotent producer, exactly once with a transaction a checkpoint.

In both, everything before a barrier is with the broker before the checkpoint can be complete. The order of rows in a
partition is that of the stream also over barriers: while what is before a barrier is still being delivered, rows behind
it wait in memory, up to `PENDING_BYTES`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow as pa

from rayflow.core.ids import CheckpointId
from rayflow.core.manifest import Json
from rayflow.errors import ConfigError, ConnectorError, RayflowError, SchemaChangedError
from rayflow.operators.base import (
    Committer,
    FrozenState,
    Guarantee,
    Operator,
    OperatorContext,
    Output,
    RestoredState,
    SinkOperator,
)
from rayflow.operators.kafka.client import Cluster as Topics
from rayflow.operators.kafka.client import check_options
from rayflow.operators.kafka.committer import KafkaCommitter
from rayflow.operators.kafka.encoding import Encoder, Encoding, Messages, avro_schema
from rayflow.operators.kafka.producers import RESERVED, Producer, ProducerBrokenError
from rayflow.operators.kafka.slots import Destination, Slot, Slots
from rayflow.operators.sources.schemas import conform, describe, difference, plain, same_columns

KafkaGuarantee = Literal["exactly_once", "at_least_once"]
PENDING_BYTES = 32 * 1024 * 1024
"""Rows behind a barrier that may wait for those before it; more of them wait for the broker."""
TIMEOUT_MIN_MS = 10_000
"""Of a transaction: less than the time to find a dead process and to commit in its place would lose commits."""


class _Interval:
    """What lies between two barriers. Of the loop thread until it is sealed, then by who flushes, one at a time."""

    def __init__(self) -> None:
        self.pending: list[Messages] = []
        self.nbytes = 0
        self.slot: Slot | None = None
        self.checkpoint: CheckpointId | None = None
        self.lock = threading.Lock()
        self.done = False
        self.committables: list[Json] = []


class _KafkaOperator(SinkOperator):
    """Encodes, keeps the order over barriers, and delivers. Sub-classes say by what."""

    def __init__(self, sink: KafkaSink) -> None:
        self._sink = sink
        self._schema: pa.Schema | None = None
        self._encoder: Encoder | None = None
        self._failure: RayflowError | None = None
        """Of the uploader thread: no later checkpoint of this attempt can succeed."""
        self._lock = threading.Lock()  # guards the two below, which the uploader thread shares
        self._open = _Interval()
        self._sealed: deque[_Interval] = deque()

    def open(self, ctx: OperatorContext, out: Output) -> None:
        super().open(ctx, out)
        self._sink.check_topic(str(ctx))
        self._start()

    def restore(self, states: Sequence[RestoredState]) -> None:
        return None

    def process(self, batch: pa.RecordBatch, input_index: int) -> None:
        if self._failure is not None:
            raise self._failure
        if not batch.num_rows:
            return
        messages = self._encoded(batch)
        while True:
            with self._lock:
                if not self._sealed:
                    self._send(self._open, messages)
                    return
                if self._open.nbytes < PENDING_BYTES:
                    self._open.pending.append(messages)
                    self._open.nbytes += messages.nbytes
                    return
                oldest = self._sealed[0]
            self._finish(oldest)  # on this thread: the subtask waits for the broker, and its senders for it

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        with self._lock:
            # Not before the lock: whoever holds it may be losing rows of the very interval that is sealed here.
            if self._failure is not None:
                raise self._failure
            if self._is_empty(self._open):
                return None
            sealed, self._open = self._open, _Interval()
            sealed.checkpoint = checkpoint
            self._sealed.append(sealed)
        return FrozenState(prepare=partial(self._prepare, sealed))

    def _prepare(self, sealed: _Interval) -> Sequence[Json]:
        """On the uploader thread, in the order of the checkpoints; again when it has failed."""
        if self._failure is not None:
            raise self._failure
        try:
            self._finish(sealed)
        except RayflowError as error:
            if not isinstance(error, ConnectorError) or isinstance(error, ProducerBrokenError):
                self._failure = error
            raise  # else the checkpoint is declined, and the next one tries again
        return sealed.committables

    def _finish(self, sealed: _Interval) -> None:
        """Everything of it is with the broker. The loop thread comes here too when too much is waiting behind it."""
        with sealed.lock:
            if not sealed.done:
                waiting, sealed.pending = sealed.pending, []
                for at, messages in enumerate(waiting):
                    try:
                        self._send(sealed, messages)
                    except BaseException:
                        sealed.pending = waiting[at:]
                        raise
                self._deliver(sealed)
                sealed.done = True
                self._make_ready()
        with self._lock:
            if self._sealed and self._sealed[0] is sealed:
                self._sealed.popleft()
                if not self._sealed:
                    self._send_waiting(self._open)

    def _send_waiting(self, interval: _Interval) -> None:
        """What fails here is a later interval's failure: it ends the attempt, not this checkpoint."""
        waiting, interval.pending, interval.nbytes = interval.pending, [], 0
        try:
            for messages in waiting:
                self._send(interval, messages)
        except RayflowError as error:
            self._failure = error

    def _encoded(self, batch: pa.RecordBatch) -> Messages:
        got = plain(batch.schema)
        if self._schema is None or self._encoder is None:
            self._schema, self._encoder = got, Encoder(self._sink.encoding, got, str(self.ctx))
        elif not same_columns(got, self._schema):
            raise SchemaChangedError(
                f"{self.ctx} cannot write batches of two schemas to one topic: {difference(self._schema, got)}; "
                f"expected {describe(self._schema)}, got {describe(got)}; cast them alike before the sink"
            )
        return self._encoder.encode(conform(batch, self._schema))

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _is_empty(self, interval: _Interval) -> bool: ...

    @abstractmethod
    def _send(self, interval: _Interval, messages: Messages) -> None: ...

    @abstractmethod
    def _deliver(self, sealed: _Interval) -> None: ...

    def _make_ready(self) -> None:
        return None


class AtLeastOnceOperator(_KafkaOperator):
    """One idempotent producer; a checkpoint is complete only when what is before its barrier is delivered."""

    _producer: Producer | None = None
    _closed = False
    _dirty = False

    def _start(self) -> None:
        sink = self._sink
        self._producer = Producer(
            sink.bootstrap_servers, sink.options, where=str(self.ctx), closed=lambda: self._closed
        )  # fmt: skip

    def _is_empty(self, interval: _Interval) -> bool:
        return not self._dirty and not interval.pending

    def _send(self, interval: _Interval, messages: Messages) -> None:
        assert self._producer is not None
        self._dirty = True
        self._producer.send(self._sink.topic, messages)

    def _deliver(self, sealed: _Interval) -> None:
        assert self._producer is not None
        self._producer.flush()
        self._dirty = False

    def close(self) -> None:
        self._closed = True
        if self._producer is not None:
            self._producer.discard()
            self._producer = None


class ExactlyOnceOperator(_KafkaOperator):
    """A transaction of a slot for each interval; see `Slots`."""

    _slots: Slots | None = None

    def _start(self) -> None:
        self._slots = Slots(self._sink.cluster, self.ctx)

    def snapshot(self, checkpoint: CheckpointId) -> FrozenState | None:
        if self._slots is not None:
            self._slots.check_age()
        return super().snapshot(checkpoint)

    def _is_empty(self, interval: _Interval) -> bool:
        return interval.slot is None and not interval.pending

    def _send(self, interval: _Interval, messages: Messages) -> None:
        assert self._slots is not None
        if interval.slot is None:
            interval.slot = self._slots.take()
        interval.slot.send(messages)

    def _deliver(self, sealed: _Interval) -> None:
        assert sealed.slot is not None
        assert sealed.checkpoint is not None
        sealed.committables = [sealed.slot.prepare(sealed.checkpoint).to_json()]

    def _make_ready(self) -> None:
        assert self._slots is not None
        self._slots.make_ready()

    def close(self) -> None:
        """What is behind the last barrier belongs to no checkpoint and is aborted; what is before it others commit."""
        slots, self._slots = self._slots, None
        if slots is None:
            return
        slots.close()
        if self._open.slot is not None:
            self._open.slot.abort()


@dataclass(frozen=True)
class KafkaSink:
    """Writes every row as a message of ``topic``; immutable and picklable. Made by `Stream.write_kafka`."""

    topic: str
    _: KW_ONLY
    bootstrap_servers: str
    encoding: Encoding = field(default_factory=Encoding)
    exactly_once: bool = True
    transaction_timeout_ms: int = 900_000
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.topic or not isinstance(self.topic, str):
            raise ConfigError(f"write_kafka(topic) must name a topic, got {self.topic!r}")
        if not self.bootstrap_servers or not isinstance(self.bootstrap_servers, str):
            raise ConfigError(
                f'write_kafka(bootstrap_servers) must be "host:port" (or several), got {self.bootstrap_servers!r}'
            )
        check_options(self.options, reserved=RESERVED, step="write_kafka")
        if self.exactly_once:
            self._check_exactly_once()

    def _check_exactly_once(self) -> None:
        protocol = str(self.options.get("security.protocol", "plaintext")).lower()
        if protocol != "plaintext":
            raise ConfigError(
                f'write_kafka(guarantee="exactly_once") speaks to brokers without encryption only, to commit for a '
                f'process that is gone; got security.protocol={protocol!r}: use guarantee="at_least_once"'
            )
        if self.transaction_timeout_ms < TIMEOUT_MIN_MS:
            raise ConfigError(
                f"write_kafka(transaction_timeout) must be at least {TIMEOUT_MIN_MS // 1000} s, got "
                f"{self.transaction_timeout_ms / 1000:g} s: a transaction that expires before its commit is lost"
            )

    @property
    def cluster(self) -> Destination:
        return Destination(self.bootstrap_servers, self.topic, self.options, self.transaction_timeout_ms)

    @property
    def guarantee(self) -> Guarantee:
        return "exactly_once" if self.exactly_once else "at_least_once"

    @property
    def stateful(self) -> bool:
        return False

    def build(self) -> Operator:
        return ExactlyOnceOperator(self) if self.exactly_once else AtLeastOnceOperator(self)

    def committer(self) -> Committer | None:
        return KafkaCommitter(self.cluster) if self.exactly_once else None

    def output_schema(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Of the values. Raises `PlanError` for columns that do not fit."""
        if schema is None:
            return None
        value = self.encoding.check(schema)
        if self.encoding.format == "avro" and self.encoding.avro_schema is None:
            avro_schema(value)
        return value

    def check_checkpoints(self, interval_s: float, timeout_s: float) -> None:
        """A transaction is open from the first row behind a barrier until the checkpoint of the next one is complete.

        Raises `ConfigError` when it could expire before, without anything having failed.
        """
        if self.exactly_once and self.transaction_timeout_ms / 1000 <= interval_s + timeout_s:
            raise ConfigError(
                f"write_kafka(transaction_timeout={self.transaction_timeout_ms / 1000:g} s) must be longer than the "
                f"interval and the timeout of checkpoints together ({interval_s:g} s + {timeout_s:g} s), because a "
                "transaction that expires before its checkpoint is complete is lost; raise it, or lower those two"
            )

    def check_topic(self, where: str) -> None:
        """Raises `ConfigError` when there is no such topic, `ConnectorError` when no broker answers."""
        with Topics(self.bootstrap_servers, self.options, where=where, isolation="read_committed") as topics:
            topics.topics([self.topic])
