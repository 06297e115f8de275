"""The pool of transactional producers of one subtask of the exactly-once sink.

An interval between two barriers is one transaction of one producer, called a slot by its number. A slot is free again
when its transaction is committed. One is made at the start and a second behind the first barrier, in the background
(it takes some 0.1 s); more only while checkpoints are aborted or commits late, up to `SLOTS_MAX`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

from rayflow.core.ids import CheckpointId
from rayflow.errors import CommitLostError, ConnectorError
from rayflow.operators.base import OperatorContext
from rayflow.operators.kafka.client import CALL_TIMEOUT_S
from rayflow.operators.kafka.encoding import Messages
from rayflow.operators.kafka.producers import Producer, ProducerBrokenError
from rayflow.operators.kafka.protocol import TransactionClient
from rayflow.operators.kafka.transactions import (
    Committable,
    Marker,
    Markers,
    TransactionalId,
    hold,
    take,
    transactional_id,
)

SLOTS_MAX = 8
"""Transactions of one subtask that may be open at once: as many checkpoints in a row may fail to complete, less two."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where transactions go, and how."""

    servers: str
    topic: str
    options: Mapping[str, Any] = field(repr=False)
    timeout_ms: int

    def markers(self, where: str) -> Markers:
        return Markers(self.servers, self.options, self.topic, where)


class Slot:
    """A transactional producer. Making one fences every earlier one with its id, and aborts what that had open."""

    def __init__(self, cluster: Destination, ctx: OperatorContext, number: int, pool: Slots) -> None:
        self.id: TransactionalId = transactional_id(ctx.job, ctx.operator, ctx.subtask, number)
        self._cluster = cluster
        self._ctx = ctx
        self._pool = pool
        self._producer = Producer(
            cluster.servers,
            cluster.options,
            where=str(ctx),
            closed=lambda: pool.closed,
            **{"transactional.id": self.id, "transaction.timeout.ms": cluster.timeout_ms},
        )
        self._producer.call("prepare transactions", self._producer.client.init_transactions, CALL_TIMEOUT_S)
        markers = cluster.markers(str(ctx))
        self._markers = markers
        self._group = markers.group(self.id)
        self._marker = markers.read(self.id, settled=True)
        with TransactionClient(cluster.servers) as asked:
            described = asked.describe(self.id)
        if described is None:
            raise ConnectorError(f"{ctx} expected the broker to know {self.id!r}, which it has just made; tried again")
        # Ours, if we are not fenced: then nothing can be flushed, and no committable names what was described here.
        self._producer_id, self._epoch = described.producer_id, described.epoch
        self._begun, self._begun_at = False, 0.0
        self.committable: Committable | None = None

    @property
    def age_s(self) -> float:
        """How long its transaction has been open."""
        return monotonic() - self._begun_at if self._begun else 0.0

    def send(self, messages: Messages) -> None:
        if not self._begun:
            self._producer.call("begin a transaction", self._producer.client.begin_transaction)
            self._begun, self._begun_at = True, monotonic()
        self._producer.send(self._cluster.topic, messages)

    def prepare(self, checkpoint: CheckpointId) -> Committable:
        """Deliver everything, and the marker of the commit behind it. May be tried again."""
        self._producer.flush()
        marker = self._marker.after(self._ctx.run_id, checkpoint)
        client = self._producer.client
        self._producer.call(
            "write the marker of a transaction",
            client.send_offsets_to_transaction,
            self._markers.offsets(marker),
            self._group,
            CALL_TIMEOUT_S,
        )
        self.committable = Committable(self.id, self._producer_id, self._epoch, checkpoint, self._ctx.run_id)
        if not self._pool.closed:
            hold(self._cluster.servers, self.committable, partial(self._commit, marker))
        return self.committable

    def _commit(self, marker: Marker) -> None:
        client = self._producer.client
        self._producer.call("commit a transaction", client.commit_transaction, CALL_TIMEOUT_S)
        self._marker = marker
        self._begun, self.committable = False, None
        self._pool.give_back(self)

    def abort(self) -> None:
        """What no checkpoint can name: readers need not wait for its end. Never raises."""
        if self._begun and self.committable is None:
            try:
                self._producer.client.abort_transaction(1.0)
            except Exception:  # the recovery, or the broker's timeout, ends it
                self._producer.discard()

    def let_go(self) -> None:
        """Others will have to commit it."""
        if self.committable is not None:
            take(self._cluster.servers, self.committable)


class Slots:
    """Shared by the loop thread and the uploader thread of a subtask."""

    def __init__(self, cluster: Destination, ctx: OperatorContext, *, ready: int = 1) -> None:
        self._cluster = cluster
        self._ctx = ctx
        self._lock = threading.Lock()
        self._all: list[Slot] = []
        self._free: list[Slot] = []
        self.closed = False
        for _ in range(ready):
            self._free.append(self._new())

    def take(self) -> Slot:
        """A free one; a new one where there is none, which takes a few calls to the broker."""
        with self._lock:
            return self._free.pop(0) if self._free else self._new()

    def make_ready(self) -> None:
        """So that the next `take` does not wait; for the uploader thread."""
        with self._lock:
            if not self._free and len(self._all) < SLOTS_MAX and not self.closed:
                self._free.append(self._new())

    def check_age(self) -> None:
        """Raises `ProducerBrokenError` when the broker may have aborted what the next checkpoint would name: then going
        back to the last one loses nothing, while that next one could not be committed."""
        oldest, limit = max((slot.age_s for slot in list(self._all)), default=0.0), self._cluster.timeout_ms / 1000
        if oldest >= limit:
            raise ProducerBrokenError(
                f"{self._ctx} has had a transaction open for {oldest:.0f} s, because checkpoints did not complete, and "
                f"the broker aborts it after transaction_timeout ({limit:g} s); the job goes back to its last "
                "checkpoint. `rayflow checkpoints explain` tells why they failed"
            )

    def give_back(self, slot: Slot) -> None:
        with self._lock:
            self._free.append(slot)

    def close(self) -> None:
        self.closed = True
        for slot in list(self._all):
            slot.let_go()

    def _new(self) -> Slot:
        if len(self._all) >= SLOTS_MAX:
            raise ConnectorError(
                f"{self._ctx} has {SLOTS_MAX} transactions open, because the checkpoints of the last intervals did not "
                "complete; the job goes back to its last one. `rayflow checkpoints explain` tells why they failed"
            )
        slot = Slot(self._cluster, self._ctx, len(self._all), self)
        self._all.append(slot)
        return slot


def lost(committable: Committable, why: str, where: str) -> CommitLostError:
    """A complete checkpoint counts on it, and it is not there (rule S1)."""
    return CommitLostError(
        f"{where}: the {committable} is lost: {why}, and its rows are not there. Either it was open for longer than "
        "transaction_timeout, or another job of this name has ended it; raise the one or rename the other, and go back "
        "to an earlier checkpoint, whose output is then written again"
    )
