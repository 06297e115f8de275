"""Both ends of an exchange for tests: a receiver and a sender whose loop is the test, and a peer in its own process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayflow.cluster.exchange_client import ExchangeClient
from rayflow.cluster.exchange_server import ExchangeServer
from rayflow.cluster.inbox import Inbox
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.messages import Data, Element
from rayflow.errors import ClusterError, RayflowError
from tests.cluster.exchange_child import ATTEMPT, CHANNEL, JOB, TOKEN

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 1 << 20
PATIENCE_S = 20.0


class Receiver:
    """A server and what came in; the test is its loop."""

    def __init__(
        self, *channels: ChannelId, window: int = WINDOW, server: type[ExchangeServer] = ExchangeServer
    ) -> None:
        self.inbox: Inbox[tuple[Attempt, ChannelId, Element]] = Inbox()
        self.broken: Inbox[tuple[Attempt, ChannelId, RayflowError]] = Inbox()
        self.put: Callable[[Attempt, ChannelId, Element], None] = lambda a, c, e: self.inbox.put((a, c, e))
        self.server = ExchangeServer(
            "127.0.0.1",
            TOKEN,
            lambda a, c, e: self.put(a, c, e),
            window_bytes=window,
            on_broken=lambda a, c, e: self.broken.put((a, c, e)),
        )
        self.server.accept(JOB, ATTEMPT, channels or [CHANNEL])

    def take(self, count: int, *, credit: bool = True) -> list[Element]:
        """Exactly this many more elements, in order of arrival."""
        taken: list[Element] = []
        while len(taken) < count:
            events = self.inbox.drain(PATIENCE_S)
            assert events, f"{len(taken)} of {count} elements came; broken: {self.broken.drain(0)}"
            for _, channel, element in events:
                taken.append(element)
                if credit and isinstance(element, Data):
                    self.server.return_credit(channel, element.nbytes)
        assert len(taken) == count
        return taken


class Sender:
    """A client and what it was told."""

    def __init__(
        self,
        address: str,
        *channels: ChannelId,
        token: str = TOKEN,
        job: str = JOB,
        attempt: Attempt = ATTEMPT,
        timeout_s: float = 10.0,
    ) -> None:
        self.credits: Inbox[tuple[ChannelId, int]] = Inbox()
        self.broken: Inbox[tuple[ChannelId, RayflowError]] = Inbox()
        self.on_credit: Callable[[ChannelId, int], None] = lambda c, n: self.credits.put((c, n))
        self.client = ExchangeClient(
            token,
            job,
            attempt,
            lambda c, n: self.on_credit(c, n),
            lambda c, e: self.broken.put((c, e)),
            connect_timeout_s=timeout_s,
        )
        for channel in channels or [CHANNEL]:
            self.client.connect(channel, address)

    def send(self, element: Element, channel: ChannelId = CHANNEL) -> None:
        self.client.send(channel, element)

    def error(self) -> str:
        """Why the channel broke; it was told exactly once."""
        events = self.broken.drain(PATIENCE_S)
        assert len(events) == 1, events
        assert isinstance(events[0][1], ClusterError)
        return str(events[0][1])


@contextlib.contextmanager
def child(role: str, *args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the other end, and the first line it said. Killed at the end."""
    command = [sys.executable, "-m", "tests.cluster.exchange_child", role, *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def data(n: int, start: int = 0, **columns: Any) -> Data:
    batch = pa.record_batch({"x": np.arange(start, start + n), **columns})
    return Data(batch, batch.nbytes)


def wait_for(condition: Callable[[], bool]) -> None:
    """For states that nothing announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        os.sched_yield()


def channels_into(target: int, count: int) -> list[ChannelId]:
    return [ChannelId(0, SubtaskId("a", i), SubtaskId("b", target)) for i in range(count)]
