"""The other end of an exchange in a process of its own: `python -m tests.cluster.exchange_child ROLE [ADDRESS]`.

A receiver prints its address and takes elements without returning credit; a sender sends batches until it is stopped.
"""

from __future__ import annotations

import sys
import threading

import pyarrow as pa

from rayflow.cluster.exchange_client import ExchangeClient
from rayflow.cluster.exchange_server import ExchangeServer
from rayflow.core.ids import Attempt, ChannelId, SubtaskId
from rayflow.core.messages import Data

TOKEN = "a token"
JOB = "job"
ATTEMPT = Attempt(1)
CHANNEL = ChannelId(0, SubtaskId("a", 0), SubtaskId("b", 0))


def receive() -> None:
    server = ExchangeServer("127.0.0.1", TOKEN, lambda attempt, channel, element: None, window_bytes=1 << 40)
    server.accept(JOB, ATTEMPT, [CHANNEL])
    print(server.address, flush=True)
    threading.Event().wait()


def send(address: str) -> None:
    broken = threading.Event()
    client = ExchangeClient(TOKEN, JOB, ATTEMPT, lambda channel, taken: None, lambda channel, error: broken.set())
    client.connect(CHANNEL, address)
    client.send(CHANNEL, Data(pa.record_batch({"x": [1, 2, 3]}), 24))
    print("sent", flush=True)
    broken.wait()


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive()
    else:
        send(sys.argv[2])
