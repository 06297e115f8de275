"""The inbox: nothing lost, each producer's order kept, the consumer woken."""

from __future__ import annotations

import threading

from rayflow.cluster.inbox import Inbox


def test_drain_gives_all_that_is_there_in_order() -> None:
    inbox: Inbox[int] = Inbox()
    for i in range(5):
        inbox.put(i)
    assert len(inbox) == 5
    assert inbox.drain(None) == [0, 1, 2, 3, 4]
    assert inbox.drain(0) == []


def test_an_empty_inbox_times_out() -> None:
    assert Inbox[int]().drain(0.001) == []


def test_a_put_wakes_a_waiting_drain() -> None:
    inbox: Inbox[int] = Inbox()
    got: list[list[int]] = []
    consumer = threading.Thread(target=lambda: got.append(inbox.drain(None)))
    consumer.start()
    inbox.put(7)
    consumer.join(20)
    assert got == [[7]]


def test_many_producers_lose_nothing_and_keep_their_order() -> None:
    inbox: Inbox[tuple[int, int]] = Inbox()

    def produce(who: int) -> None:
        for i in range(5_000):
            inbox.put((who, i))

    producers = [threading.Thread(target=produce, args=(who,)) for who in range(4)]
    for producer in producers:
        producer.start()
    got: list[tuple[int, int]] = []
    while len(got) < 20_000:
        events = inbox.drain(20)
        assert events, f"only {len(got)} came"
        got += events
    for producer in producers:
        producer.join()
    for who in range(4):
        assert [i for w, i in got if w == who] == list(range(5_000))
