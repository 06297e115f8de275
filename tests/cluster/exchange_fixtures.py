"""Fixtures of the exchange."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.cluster.exchange_harness import Receiver, Sender


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.close()


@pytest.fixture
def senders() -> Iterator[Callable[..., Sender]]:
    made: list[Sender] = []

    def make(*args: Any, **options: Any) -> Sender:
        made.append(Sender(*args, **options))
        return made[-1]

    yield make
    for sender in made:
        sender.client.close()
