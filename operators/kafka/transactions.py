"""Transactions of the exactly-once sink: their names, their committables, and the proof that one was committed.

**Names.** ``rayflow-<job>:<operator>:<subtask>:<slot>``, the same in every attempt: so a later attempt can end what an
earlier one began, and fences it. Slots are a small pool: the next interval is written while the last one waits for its
checkpoint.

**The marker.** Kafka cannot be asked whether a transaction of the past was committed: its coordinator knows the latest
state of an id only, and once the id has been initialised again, "committed long ago" and "expired" look the same. So
every transaction also commits an offset, for a consumer group with the name of the transactional id: the number of its
checkpoint. The offset is there if and only if the transaction was committed, because both are one transaction.
Runs are told apart by their id in the metadata of the offset, which names the last checkpoint of each of the last few
runs, so that restoring an old savepoint is told right too.

Commit and recovery go by it: marker there: nothing to do (rule S1). Not there: EndTxn; and if it is still not there
afterwards, whatever the broker answered, the transaction is lost: expired, or ended by somebody else.
The marker lives as long as the broker keeps offsets of groups without members (``offsets.retention.minutes``, 7 days).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NewType
from urllib.parse import quote, unquote

from rayflow.core.manifest import Json
from rayflow.errors import ConnectorError
from rayflow.operators.kafka.client import CALL_TIMEOUT_S, confluent

PREFIX = "rayflow-"
_ID = re.compile(r"rayflow-([^:]+):([^:]+):(\d+):(\d+)")
_RUNS_KEPT = 16
TransactionalId = NewType("TransactionalId", str)


def transactional_id(job: str, operator: str, subtask: int, slot: int) -> TransactionalId:
    """Stable over attempts, and different for what is different: ``:`` and ``%`` in names are escaped."""
    return TransactionalId(f"{PREFIX}{_part(job)}:{_part(operator)}:{subtask}:{slot}")


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a transactional id is."""

    job: str
    operator: str
    subtask: int
    slot: int


def owner_of(name: str) -> Owner | None:
    """None for an id that is not rayflow's."""
    found = _ID.fullmatch(name)
    if found is None:
        return None
    job, operator, subtask, slot = found.groups()
    return Owner(unquote(job), unquote(operator), int(subtask), int(slot))


def _part(name: str) -> str:
    return quote(name, safe=" -_.~/@+=,()!'*$&;?#[]|")


@dataclass(frozen=True, slots=True)
class Committable:
    """A transaction that is complete with the broker and waits for its checkpoint."""

    transactional_id: TransactionalId
    producer_id: int
    epoch: int
    checkpoint: int
    run_id: str

    def to_json(self) -> Json:
        return asdict(self)

    @staticmethod
    def of(payload: Json) -> Committable:
        assert isinstance(payload, Mapping)
        return Committable(**payload)

    def __str__(self) -> str:
        return f"transaction of checkpoint {self.checkpoint} ({self.transactional_id}, producer {self.producer_id})"


# ----------------------------------------------------------------------------------------------------------- the marker


@dataclass(frozen=True, slots=True)
class Marker:
    """Run id -> its last checkpoint that was committed under one transactional id."""

    runs: tuple[tuple[str, int], ...] = ()

    def has(self, committable: Committable) -> bool:
        """Its transactions are committed in order, and another is begun only behind a commit or an abort."""
        return dict(self.runs).get(committable.run_id, -1) >= committable.checkpoint

    def after(self, run_id: str, checkpoint: int) -> Marker:
        """With one more commit; the oldest runs are forgotten."""
        others = [(run, n) for run, n in self.runs if run != run_id]
        return Marker((*others[-(_RUNS_KEPT - 1) :], (run_id, checkpoint)))

    def encode(self) -> str:
        return json.dumps(self.runs, separators=(",", ":"))

    @staticmethod
    def decode(text: str | None) -> Marker:
        return Marker(tuple((str(run), int(n)) for run, n in json.loads(text))) if text else Marker()


class Markers:
    """Reads and names the markers of one sink. Raises `ConnectorError` when the broker does not answer."""

    def __init__(self, servers: str, options: Mapping[str, Any], topic: str, where: str) -> None:
        self._servers = servers
        self._options = options
        self._topic = topic
        self._where = where

    def read(self, name: TransactionalId, *, settled: bool) -> Marker:
        """``settled``: wait until no transaction is open that would change it."""
        kafka = confluent()
        consumer = self._consumer(name, settled=settled)
        try:
            (found,) = consumer.committed([kafka.TopicPartition(self._topic, 0)], timeout=CALL_TIMEOUT_S)
        except kafka.KafkaException as error:
            raise ConnectorError(
                f"{self._where} could not read offsets of group {name!r} at {self._servers}: {error.args[0].str()}; "
                "is the broker there, and may the job read and write groups that begin with 'rayflow-'? "
                "It is tried again"
            ) from error
        finally:
            consumer.close()
        if found.error is not None:
            raise ConnectorError(f"{self._where} could not read offsets of group {name!r}: {found.error}")
        return Marker.decode(found.metadata) if found.offset >= 0 else Marker()

    def offsets(self, marker: Marker) -> list[Any]:
        """What a transaction commits to become ``marker``."""
        checkpoint = marker.runs[-1][1]
        return [confluent().TopicPartition(self._topic, 0, checkpoint, metadata=marker.encode())]

    def group(self, name: TransactionalId) -> Any:
        """Metadata of the group, as `send_offsets_to_transaction` takes it."""
        consumer = self._consumer(name, settled=False)
        try:
            return consumer.consumer_group_metadata()
        finally:
            consumer.close()

    def _consumer(self, name: TransactionalId, *, settled: bool) -> Any:
        return confluent().Consumer(
            {
                **self._options,
                "log_level": 2,
                "bootstrap.servers": self._servers,
                "group.id": name,
                "enable.auto.commit": False,
                "isolation.level": "read_committed" if settled else "read_uncommitted",
            }
        )


# --------------------------------------------------------------------------------------------- transactions held here

_live: dict[tuple[str, Committable], Callable[[], None]] = {}
"""Sealed transactions whose producer lives in this process. Operator and committer are made apart from each other, and
in the local runtime many of both share a process; what is not here is committed by way of the protocol."""
_guard = threading.Lock()


def hold(servers: str, committable: Committable, commit: Callable[[], None]) -> None:
    with _guard:
        _live[servers, committable] = commit


def take(servers: str, committable: Committable) -> Callable[[], None] | None:
    """How the producer itself commits it; None when it is not here, or has been asked before."""
    with _guard:
        return _live.pop((servers, committable), None)
