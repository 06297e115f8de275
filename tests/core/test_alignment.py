"""Alignment: tables of barriers and what they decide."""

from __future__ import annotations

import random

import pytest

from rayflow.core.alignment import Aligned, Aligner, Overtaken
from rayflow.core.ids import ChannelId, CheckpointId, SubtaskId, Time
from rayflow.core.messages import Barrier
from rayflow.errors import ProtocolError

A, B, C = (ChannelId(0, SubtaskId("up", i), SubtaskId("down", 0)) for i in range(3))


def barrier(n: int) -> Barrier:
    return Barrier(CheckpointId(n))


def test_blocks_a_channel_until_all_have_the_barrier() -> None:
    aligner = Aligner([A, B], exactly_once=True)
    assert aligner.on_barrier(A, barrier(1), Time(10.0)) == []
    assert aligner.blocked(A)
    assert not aligner.blocked(B)
    assert aligner.on_barrier(B, barrier(1), Time(10.5)) == [Aligned(barrier(1), 0.5)]
    assert not aligner.blocked(A)


def test_at_least_once_never_blocks() -> None:
    aligner = Aligner([A, B], exactly_once=False)
    aligner.on_barrier(A, barrier(1), Time(0.0))
    assert not aligner.blocked(A)
    assert aligner.on_barrier(B, barrier(1), Time(0.0)) == [Aligned(barrier(1), 0.0)]


def test_one_channel_is_aligned_at_once() -> None:
    assert Aligner([A], exactly_once=True).on_barrier(A, barrier(7), Time(0.0)) == [Aligned(barrier(7), 0.0)]


def test_an_ended_channel_counts_as_aligned() -> None:
    aligner = Aligner([A, B], exactly_once=True)
    assert aligner.on_end(A, Time(0.0)) == []
    assert aligner.on_barrier(B, barrier(1), Time(0.0)) == [Aligned(barrier(1), 0.0)]


def test_an_end_can_complete_an_alignment() -> None:
    aligner = Aligner([A, B], exactly_once=True)
    aligner.on_barrier(A, barrier(1), Time(1.0))
    assert aligner.on_end(B, Time(3.0)) == [Aligned(barrier(1), 2.0)]
    assert not aligner.all_ended
    assert aligner.on_end(A, Time(3.0)) == []
    assert aligner.all_ended


def test_a_newer_barrier_aborts_the_older_by_name() -> None:
    aligner = Aligner([A, B], exactly_once=True)
    aligner.on_barrier(A, barrier(1), Time(0.0))
    assert aligner.on_barrier(B, barrier(2), Time(0.0)) == [Overtaken(CheckpointId(1), by=CheckpointId(2))]
    assert not aligner.blocked(A)
    assert aligner.blocked(B)
    assert aligner.on_barrier(A, barrier(2), Time(1.0)) == [Aligned(barrier(2), 1.0)]


def test_late_barriers_of_an_aborted_checkpoint_change_nothing() -> None:
    aligner = Aligner([A, B], exactly_once=True)
    aligner.on_barrier(A, barrier(1), Time(0.0))
    aligner.abort(CheckpointId(1))
    assert not aligner.blocked(A)
    assert aligner.on_barrier(B, barrier(1), Time(0.0)) == []
    assert not aligner.blocked(B)
    assert aligner.aligning is None


def test_an_older_barrier_behind_a_newer_alignment_changes_nothing() -> None:
    aligner = Aligner([A, B, C], exactly_once=True)
    aligner.on_barrier(A, barrier(2), Time(0.0))
    assert aligner.on_barrier(B, barrier(1), Time(0.0)) == []
    assert not aligner.blocked(B)
    assert aligner.aligning == 2


@pytest.mark.parametrize("second", [1, 2])
def test_ids_on_a_channel_must_rise(second: int) -> None:
    aligner = Aligner([A, B], exactly_once=True)
    aligner.on_barrier(A, barrier(2), Time(0.0))
    with pytest.raises(ProtocolError, match="A1"):
        aligner.on_barrier(A, barrier(second), Time(0.0))


def test_a_barrier_after_the_end_is_refused() -> None:
    aligner = Aligner([A, B], exactly_once=True)
    aligner.on_end(A, Time(0.0))
    with pytest.raises(ProtocolError, match="A6"):
        aligner.on_barrier(A, barrier(1), Time(0.0))


@pytest.mark.parametrize("seed", range(200))
def test_every_order_of_barriers_ends_and_aborts_keeps_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    channels = [A, B, C]
    aligner = Aligner(channels, exactly_once=True)
    sent = dict.fromkeys(channels, 0)
    ended: set[ChannelId] = set()
    aligned: list[int] = []
    for _ in range(60):
        live = [c for c in channels if c not in ended and not aligner.blocked(c)]
        if not live:
            break
        channel = rng.choice(live)
        if rng.random() < 0.05:
            ended.add(channel)
            outcomes = aligner.on_end(channel, Time(0.0))
        elif rng.random() < 0.1:
            aligner.abort(CheckpointId(max(sent.values())))
            outcomes = []
        else:
            sent[channel] += rng.randint(1, 2)
            outcomes = aligner.on_barrier(channel, barrier(sent[channel]), Time(0.0))
        aligned += [o.barrier.checkpoint for o in outcomes if isinstance(o, Aligned)]
        aligner.check_invariants()
    assert aligned == sorted(set(aligned))
