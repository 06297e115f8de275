"""Sources that drift apart: who is told what, who is held, and that nobody waits for ever."""

from __future__ import annotations

import random

import pytest

from rayflow.core.drift import SourceDrift, too_far
from rayflow.core.ids import MAX_WATERMARK, MIN_WATERMARK, SubtaskId

A, B, C = (SubtaskId("source", i) for i in range(3))


def test_the_slowest_is_told_when_it_changes() -> None:
    drift = SourceDrift([A, B])
    assert drift.reported(A, 10, idle=False) is None, "B has said nothing yet"
    assert drift.reported(B, 4, idle=False) == 4
    assert drift.reported(A, 12, idle=False) is None
    assert drift.reported(B, 20, idle=False) == 12
    drift.check_invariants()


def test_idle_and_ended_ones_are_waited_for_by_nobody() -> None:
    drift = SourceDrift([A, B, C])
    assert drift.reported(A, 10, idle=False) is None
    assert drift.ended(C) is None
    assert drift.reported(B, MIN_WATERMARK, idle=True) == 10
    assert drift.reported(B, 3, idle=False) == 3, "it is back, and is waited for"
    assert drift.ended(B) == 10
    assert drift.ended(A) == MAX_WATERMARK
    assert drift.members == ()
    drift.check_invariants()


def test_late_news_of_one_that_has_ended_changes_nothing() -> None:
    drift = SourceDrift([A, B])
    drift.reported(A, 10, idle=False)
    assert drift.ended(B) == 10
    assert drift.reported(B, 5, idle=False) is None
    assert drift.slowest == 10


def test_when_all_are_idle_nobody_waits() -> None:
    drift = SourceDrift([A, B])
    drift.reported(A, 10, idle=False)
    drift.reported(B, 10, idle=False)
    drift.reported(A, 10, idle=True)
    assert drift.reported(B, 10, idle=True) == MAX_WATERMARK
    assert not too_far(10, MAX_WATERMARK, 0)


@pytest.mark.parametrize(
    ("watermark", "slowest", "held"),
    [
        (MIN_WATERMARK, MIN_WATERMARK, False),
        (10, MIN_WATERMARK, True),
        (10, 5, False),
        (11, 5, True),
        (-4, -10, True),
        (5, 10, False),
        (MAX_WATERMARK, 0, True),
    ],
)
def test_who_is_held(watermark: int, slowest: int, held: bool) -> None:
    assert too_far(watermark, slowest, 5) is held


def run(seed: int, *, ignore_idle: bool = False, never_held: bool = False) -> tuple[int, bool]:
    """(the largest drift that was ever seen, whether all came to the end) of three sources with a slow wire."""
    rng = random.Random(seed)
    bound, end, names = 5, 60, [A, B, C]
    drift = SourceDrift(names)
    at = dict.fromkeys(names, MIN_WATERMARK)
    told = dict.fromkeys(names, MIN_WATERMARK)
    reports: dict[SubtaskId, list[tuple[int, bool]]] = {s: [] for s in names}
    words: dict[SubtaskId, list[int]] = {s: [] for s in names}
    done: set[SubtaskId] = set()
    silent = rng.choice([None, *names])  # never has a row, and turns idle
    widest = 0

    def announce(news: int | None) -> None:
        for s in drift.members if news is not None else ():
            words[s].append(news or 0)

    for _ in range(4000):
        s = rng.choice(names)
        match rng.randrange(3):
            case 0:
                if words[s]:
                    told[s] = words[s].pop(0)
            case 1:
                if reports[s]:
                    watermark, idle = reports[s].pop(0)
                    announce(drift.reported(s, watermark, idle=idle and not ignore_idle))
                elif s in done:
                    announce(drift.ended(s))
                drift.check_invariants()
            case _ if s not in done:
                if s == silent:
                    reports[s].append((MIN_WATERMARK, True))
                elif never_held or not too_far(at[s], told[s], bound):
                    at[s] = max(at[s], 0) + rng.randrange(4)
                    if at[s] >= end:
                        done.add(s)
                reports[s].append((at[s], s == silent))
                moving = [at[o] for o in names if o not in done and o != silent]
                if moving and min(moving) > MIN_WATERMARK:
                    widest = max(widest, max(moving) - min(moving))
    return widest, done >= set(names) - {silent}


def test_nobody_runs_away_and_nobody_waits_for_ever() -> None:
    for seed in range(200):
        widest, finished = run(seed)
        assert widest <= 5 + 3, f"seed {seed}: drifted {widest} apart"
        assert finished, f"seed {seed}: they wait for ever"


def test_both_would_be_seen() -> None:
    assert any(run(seed, never_held=True)[0] > 8 for seed in range(50))
    assert not all(run(seed, ignore_idle=True)[1] for seed in range(50))
