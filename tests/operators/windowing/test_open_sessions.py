"""The fast way to a key's open sessions finds what looking them up by prefix finds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from rayflow.operators.state.table import StateTable
from rayflow.operators.windowing.open_sessions import OpenSessions

TIME = pa.timestamp("us")
STEPS = st.lists(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1), max_size=12)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_equals_the_prefix(steps: list[set[tuple[int, int]]]) -> None:
    """Each step puts in the sessions (key, start) that are not there, and then removes those that were."""
    table = StateTable("t", pa.schema([("k", pa.int64()), ("s", TIME)]), pa.schema([("v", pa.int64())]), subkeys=1)
    table.keep_in_memory()
    sessions = OpenSessions(table)
    there: set[tuple[int, int]] = set()
    for step in steps:
        for chosen, put in ((sorted(step - there), True), (sorted(step & there), False)):
            if not chosen:
                continue
            keys = [pa.array([k for k, _ in chosen]), pa.array([s for _, s in chosen]).view(TIME)]
            if put:
                table.slots(keys, insert=True)
                sessions.added(keys[:1], np.array([s for _, s in chosen]))
            else:
                table.delete(table.slots(keys, insert=False))
                sessions.removed(keys[:1])
        there ^= step
        found = sessions.of([pa.array([5, 0, 1, 2, 3])])
        assert sorted(
            zip(*(column.view(pa.int64()).to_pylist() for column in found.columns[:2]), strict=True)
        ) == sorted(there)
