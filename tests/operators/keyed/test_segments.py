"""Scans over the rows of each key, against a loop over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.operators.keyed.segments import Segments

SLOTS = st.lists(st.integers(0, 6), min_size=1, max_size=300)


@settings(max_examples=100, deadline=None)
@given(SLOTS)
def test_rows_are_sorted_by_slot_and_stay_in_their_order(slots: list[int]) -> None:
    segments = Segments.of(np.array(slots, np.int64))
    assert segments.order.tolist() == sorted(range(len(slots)), key=lambda row: (slots[row], row))
    assert segments.heads.tolist() == sorted(set(slots))
    assert segments.lengths.tolist() == [slots.count(slot) for slot in sorted(set(slots))]
    assert segments.order[segments.inverse()].tolist() == list(range(len(slots)))
    seen: dict[int, int] = {}
    occurrence = []
    for slot in slots:
        occurrence.append(seen.get(slot, 0))
        seen[slot] = seen.get(slot, 0) + 1
    assert segments.occurrence()[segments.inverse()].tolist() == occurrence


@settings(max_examples=100, deadline=None)
@given(SLOTS, st.sampled_from([np.add, np.maximum, np.minimum]), st.integers(0, 2**32))
def test_scans_are_those_of_a_loop_to_the_last_bit(slots: list[int], function: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    segments = Segments.of(np.array(slots, np.int64))
    values = rng.normal(0, 1e6, len(slots))
    seeds = rng.normal(0, 1e6, len(segments.heads))
    state = dict(zip(segments.heads.tolist(), seeds, strict=True))
    expected = []
    for slot, value in zip(slots, values, strict=True):
        state[slot] = function(state[slot], value)
        expected.append(state[slot])
    found = segments.scan(function, seeds, values[segments.order])[segments.inverse()]
    assert found.tolist() == expected
    whole = rng.integers(-(2**62), 2**62, len(slots))
    with np.errstate(over="ignore"):
        by_sums = segments.add(np.arange(len(segments.heads)), whole[segments.order])
        by_scan = segments.scan(np.add, np.arange(len(segments.heads)), whole[segments.order])
    assert by_sums.tolist() == by_scan.tolist()


@pytest.mark.parametrize("rows", [1, 2, 64, 65, 3000])
def test_one_key_has_all_rows(rows: int) -> None:
    segments = Segments.of(np.zeros(rows, np.int64))
    values = np.full(rows, 0.1)
    assert segments.scan(np.add, np.zeros(1), values).tolist() == np.add.accumulate(values).tolist()


def test_differences_of_sums_over_all_keys_would_be_seen() -> None:
    """What not to do with floats: one sum over the whole batch, less what other keys have added."""
    slots = np.array([0, 1, 1], np.int64)
    segments, values = Segments.of(slots), np.array([1e20, 1.0, 2.0])
    total = np.cumsum(values)
    assert (total - np.repeat(total[segments.starts] - values[segments.starts], segments.lengths)).tolist()[1:] != [
        1,
        3,
    ]
    assert segments.scan(np.add, np.zeros(2), values).tolist() == [1e20, 1.0, 3.0]
