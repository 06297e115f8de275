"""The exchange between two processes, with credit: rows a second from a sender's loop to a receiver's loop.

`python -m benchmarks.exchange [SECONDS]`. The bars are what was measured for Flight between Ray actors before this was
written (ARCHITECTURE.md, "Exchange").
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Final

import numpy as np
import pyarrow as pa

from benchmarks.figures import emit
from rayflow.cluster.exchange_client import ExchangeClient
from rayflow.cluster.exchange_server import WINDOW_BYTES, ExchangeServer
from rayflow.cluster.inbox import Inbox
from rayflow.core.credits import OutputAccount
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.messages import Data, Element, EndOfInput
from rayflow.errors import RayflowError

TOKEN: Final = "benchmark"
ATTEMPT: Final = Attempt(1)
BARS: Final = {10: 0.14e6, 1_000: 10e6, 10_000: 32e6, 65_536: 43e6}


def channels(count: int) -> list[ChannelId]:
    return [ChannelId(0, SubtaskId("a", i), SubtaskId("b", 0)) for i in range(count)]


def send(address: str, rows: int, count: int, seconds: float) -> None:
    """Send as fast as credit allows, on all channels in turn; then end them."""
    inbox: Inbox[tuple[ChannelId, int | RayflowError]] = Inbox()
    client = ExchangeClient(
        TOKEN, "job", ATTEMPT, lambda c, taken: inbox.put((c, taken)), lambda c, error: inbox.put((c, error))
    )
    names = channels(count)
    accounts = {c: OutputAccount(c, WINDOW_BYTES) for c in names}
    for channel in names:
        client.connect(channel, address)
    batch = pa.record_batch({name: np.arange(rows) for name in "abcd"})
    data = Data(batch, batch.nbytes)
    deadline = time.perf_counter() + seconds
    blocked: set[ChannelId] = set()
    while time.perf_counter() < deadline:
        for channel in names:
            if channel not in blocked:
                for element in accounts[channel].offer(data):
                    client.send(channel, element)
                if accounts[channel].waiting:
                    blocked.add(channel)
        for channel, event in inbox.drain(None if len(blocked) == count else 0):
            if isinstance(event, RayflowError):
                raise event
            for element in accounts[channel].credit(event):
                client.send(channel, element)
            if not accounts[channel].waiting:
                blocked.discard(channel)
    for channel in names:
        client.send(channel, EndOfInput())
    sys.stdin.read()  # until the receiver has all


def measure(rows: int, count: int, seconds: float) -> float:
    """Rows a second; from the first element to the last end of input."""
    inbox: Inbox[tuple[ChannelId, Element]] = Inbox()
    server = ExchangeServer("127.0.0.1", TOKEN, lambda attempt, channel, element: inbox.put((channel, element)))
    server.accept("job", ATTEMPT, channels(count))
    command = [sys.executable, "-m", "benchmarks.exchange", "send", server.address, str(rows), str(count), str(seconds)]
    received, ended, started = 0, 0, 0.0
    with subprocess.Popen(command, stdin=subprocess.PIPE) as sender:
        while ended < count:
            events = inbox.drain(30.0)
            if not events:
                raise TimeoutError(f"nothing came for 30 s; {ended} of {count} channels had ended")
            started = started or time.perf_counter()
            for channel, element in events:
                if isinstance(element, Data):
                    received += element.payload.num_rows
                    server.return_credit(channel, element.nbytes)
                elif isinstance(element, EndOfInput):
                    ended += 1
        elapsed = time.perf_counter() - started
        sender.communicate()
    server.close()
    return received / elapsed


def main(seconds: float) -> None:
    for rows, bar in BARS.items():
        value = measure(rows, 1, seconds)
        emit(f"exchange, 1 channel, {rows} rows a batch", round(value), "rows/s", bar, value >= bar)
    for count in (4, 32):
        value = measure(10_000, count, seconds)
        emit(
            f"exchange, {count} channels, 10000 rows a batch",
            round(value),
            "rows/s",
            BARS[10_000],
            value >= BARS[10_000],
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["send"]:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
