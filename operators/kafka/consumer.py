"""One consumer for all partitions that a subtask reads.

A consumer of its own for each partition would cost three threads, two connections and a queue of 64 MB each. The
client hands out messages of all partitions together; they wait here, by partition, until their reader is asked.
Partitions are assigned by hand: no consumer group, so nothing but the job decides who reads what.

What bounds the waiting (rule F3): a partition whose reader is not asked (it is held back for others) is paused when a
call's worth of messages waits, and goes on when its reader has taken them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from rayflow.errors import ConnectorError, DataError, ProtocolError
from rayflow.operators.kafka.client import MISSING, PATIENCE_S, Partition, Trouble, confluent, error_of, lasting

FETCH_MESSAGES = 2_000
"""Taken from the client at once at most. Of more at once each costs more: 10,000 take three times the processor time of
500, which in turn are small batches for what comes behind."""
_EMPTY_PAUSE_S = 0.001
_PROBE_S = 1.0

_PASSING = frozenset(
    {
        "_ALL_BROKERS_DOWN",
        "_RESOLVE",
        "_TIMED_OUT",
        "_TIMED_OUT_QUEUE",
        "_TRANSPORT",
        "_WAIT_COORD",
        "BROKER_NOT_AVAILABLE",
        "COORDINATOR_LOAD_IN_PROGRESS",
        "COORDINATOR_NOT_AVAILABLE",
        "FENCED_LEADER_EPOCH",
        "LEADER_NOT_AVAILABLE",
        "NOT_COORDINATOR",
        "NOT_LEADER_FOR_PARTITION",
        "OFFSET_NOT_AVAILABLE",
        "REQUEST_TIMED_OUT",
        "UNKNOWN_LEADER_EPOCH",
    }
)
"""The client tries again by itself."""
_GROUP = ("GROUP_AUTHORIZATION_FAILED",)


@dataclass(eq=False, slots=True)
class Feed:
    """What waits of one partition."""

    partition: Partition
    position: int
    """The next offset that may come."""
    waiting: deque[Sequence[Any]] = field(default_factory=deque)
    messages: int = 0
    end: int = -1
    """The broker has said that there is nothing before this offset but what was handed out."""
    gone: str | None = None
    """Why the broker does not have the position."""
    paused: bool = False
    asked_at: int = 0

    def take(self, limit: int) -> Sequence[Any]:
        """Up to ``limit`` messages in the order of their offsets; empty when none waits."""
        if not self.waiting:
            return ()
        found = self.waiting.popleft()
        if len(found) > limit:
            self.waiting.appendleft(found[limit:])
            found = found[:limit]
        self.messages -= len(found)
        return found


class SharedConsumer:
    """Used by the readers of one subtask in one attempt, on its loop thread."""

    def __init__(self, config: Mapping[str, Any], *, where: str, group: str | None) -> None:
        kafka = confluent()
        self._kafka = kafka
        self._where = where
        self._group = group
        self._servers = str(config["bootstrap.servers"])
        self._trouble = Trouble(ignored=_GROUP if group is None else ())
        self._feeds: dict[Partition, Feed] = {}
        self._topics: dict[str, int] = {}
        self._empty_until = 0.0
        self._asked = 0
        message = kafka.Message
        self._get_error, self._get_partition, self._get_topic = message.error, message.partition, message.topic
        self._consumer = kafka.Consumer({**config, "error_cb": self._trouble})

    # ------------------------------------------------------------------------------------------------------ partitions

    def add(self, partition: Partition, position: int) -> Feed:
        feed = Feed(partition, position)
        self._consumer.incremental_assign([self._kafka.TopicPartition(*partition, position)])
        self._feeds[partition] = feed
        self._topics.setdefault(partition.topic, len(self._topics))
        return feed

    def remove(self, feed: Feed) -> bool:
        """The partition is read no more; whether none is left, and the consumer closed with it."""
        if self._feeds.pop(feed.partition, None) is None:
            return False
        if self._feeds:
            self._consumer.incremental_unassign([self._kafka.TopicPartition(*feed.partition)])
            return False
        self._consumer.close()
        return True

    def commit(self, partition: Partition, position: int) -> None:
        """Tell the group how far the job has got, where there is one; without waiting for the answer."""
        if self._group is not None and partition in self._feeds:
            try:
                self._consumer.commit(
                    offsets=[self._kafka.TopicPartition(*partition, position)], asynchronous=True
                )  # fmt: skip
            except self._kafka.KafkaException:
                return  # an outside view of progress, which the next checkpoint brings up to date

    # --------------------------------------------------------------------------------------------------------- reading

    def take(self, feed: Feed, limit: int) -> Sequence[Any]:
        """Messages of this partition, if there are any just now.

        Raises `DataError` when the broker does not have its position, `ConnectorError`, `ConfigError`.
        """
        self._asked += 1
        feed.asked_at = self._asked
        if not feed.waiting:
            self._fill()
        found = feed.take(limit)
        if feed.paused and not feed.waiting:
            feed.paused = False
            self._consumer.resume([self._kafka.TopicPartition(*feed.partition)])
        if found:
            first = found[0].offset()
            if first < feed.position:
                raise ProtocolError(f"{self._where} got offset {first} of {feed.partition} behind {feed.position}")
            feed.position = found[-1].offset() + 1
        elif feed.gone is not None:
            raise self._position_gone(feed)
        return found

    def _fill(self) -> None:
        now = time.monotonic()
        if now < self._empty_until or not self._room():
            return
        messages = self._consumer.consume(FETCH_MESSAGES, 0)
        if messages:
            self._deal(messages)
        else:
            self._empty_until = now + _EMPTY_PAUSE_S
        trouble = self._trouble
        if trouble.lasting is not None or trouble.missing is not None or trouble.since is not None:
            self._look_at_trouble(alive=bool(messages))

    def _room(self) -> bool:
        """Whether more may be taken: no partition has a call's worth waiting that its reader is about to take."""
        for feed in self._feeds.values():
            if feed.messages >= FETCH_MESSAGES and not feed.paused:
                if self._asked - feed.asked_at < 2 * len(self._feeds):
                    return False
                feed.paused = True
                self._consumer.pause([self._kafka.TopicPartition(*feed.partition)])
        return True

    def _deal(self, messages: list[Any]) -> None:
        if any(map(self._get_error, messages)):
            self._deal_events(messages)
        elif len(self._feeds) == 1:
            self._give(next(iter(self._feeds.values())), messages)
        else:
            self._deal_runs(messages)

    def _deal_runs(self, messages: list[Any]) -> None:
        """Messages without events; those of a partition come in long runs."""
        if not messages:
            return
        numbers = np.fromiter(map(self._get_partition, messages), np.int64, len(messages))
        changed = np.diff(numbers) != 0
        if len(self._topics) > 1:
            names = map(self._topics.__getitem__, map(self._get_topic, messages))
            changed |= np.diff(np.fromiter(names, np.int64, len(messages))) != 0
        edges = [0, *(np.flatnonzero(changed) + 1).tolist(), len(messages)]
        for first, last in pairwise(edges):
            head = messages[first]
            feed = self._feeds.get(Partition(head.topic(), head.partition()))
            if feed is not None:
                self._give(feed, messages[first:last])

    def _give(self, feed: Feed, messages: Sequence[Any]) -> None:
        feed.waiting.append(messages)
        feed.messages += len(messages)

    def _deal_events(self, messages: list[Any]) -> None:
        before = 0
        for at, message in enumerate(messages):
            error = message.error()
            if error is not None:
                self._deal_runs(messages[before:at])
                self._event(message, error)
                before = at + 1
        self._deal_runs(messages[before:])

    def _event(self, message: Any, error: Any) -> None:
        name = error.name()
        feed = None if message.topic() is None else self._feeds.get(Partition(message.topic(), message.partition()))
        if name == "_PARTITION_EOF":
            if feed is not None:
                feed.end = message.offset()
        elif name in ("_AUTO_OFFSET_RESET", "OFFSET_OUT_OF_RANGE"):
            if feed is not None:
                feed.gone = error.str()
        elif name in MISSING:
            self._trouble(error)
        elif name not in _PASSING and name not in self._trouble.ignored:
            wanted = "read" if feed is None else f"read {feed.partition}"
            raise error_of(error, where=self._where, wanted=wanted, servers=self._servers)

    # --------------------------------------------------------------------------------------------------------- trouble

    def _look_at_trouble(self, *, alive: bool) -> None:
        trouble = self._trouble
        if trouble.lasting is not None:
            raise error_of(trouble.lasting, where=self._where, wanted="read", servers=self._servers)
        if trouble.missing is not None:
            raise ConnectorError(
                f"{self._where} reads what is not there any more at {self._servers}: {trouble.missing.str()}; the job "
                "starts again with its restart strategy: make the topic again, or stop the job"
            )
        if alive:
            trouble.since = None
        elif trouble.since is not None and time.monotonic() - trouble.since > PATIENCE_S:
            try:  # a quiet topic on a broker that is back says nothing by itself
                partition = next(iter(self._feeds))
                self._consumer.get_watermark_offsets(self._kafka.TopicPartition(*partition), timeout=_PROBE_S)
                trouble.since = None
            except self._kafka.KafkaException as error:
                cause = trouble.last or error.args[0]
                raise ConnectorError(
                    f"{self._where} has not reached any broker at {self._servers} for {PATIENCE_S:g} s: {cause.str()}; "
                    "the job starts again with its restart strategy"
                ) from error

    def _position_gone(self, feed: Feed) -> Exception:
        try:
            asked = self._kafka.TopicPartition(*feed.partition)
            first, last = self._consumer.get_watermark_offsets(asked, timeout=_PROBE_S)
            has = f"offsets {first} to {last}"
        except self._kafka.KafkaException as error:
            if lasting(error.args[0]):
                return error_of(error.args[0], where=self._where, wanted="read", servers=self._servers)
            has = "other offsets"
        return DataError(
            f"{self._where} expected to read {feed.partition} from offset {feed.position}, but the broker has only "
            f"{has}: the messages were deleted (retention) or the topic was made anew; start the job anew on an empty "
            "checkpoint directory with start= at an offset that is there, and keep messages longer than a job may stand"
        )
