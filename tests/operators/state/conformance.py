"""What keyed state promises on every back end: random programs against a dict, and the promises one by one.

`Program` runs a list of steps on a `KeyedState` per subtask and on a plain dict, through real Arrow bytes, and compares
after every step. Bounds that are large in production are made tiny, so that everything happens in a few rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from rayflow.operators.state import cache, journal
from rayflow.operators.state.keyed import KeyedState
from rayflow.operators.state.table import StateTable
from rayflow.partition import hash_columns, key_groups
from tests.operators.state.fakes import Saved, World

Step: TypeAlias = tuple[Any, ...]
Key: TypeAlias = tuple[Any, ...]
Model: TypeAlias = dict[str, dict[Key, tuple[dict[str, Any], float]]]
"""Table -> key -> (values, when they expire)."""

TTL_S = 10.0
FIELDS = [pa.field("n", pa.int64()), pa.field("s", pa.string())]
TABLES: dict[str, tuple[pa.Schema, int, float | None]] = {
    "values": (pa.schema([("k", pa.int64())]), 0, None),
    "short": (pa.schema([("k", pa.int64())]), 0, TTL_S),
    "map": (pa.schema([("k", pa.int64()), ("i", pa.string())]), 1, None),
}


def _keys(table: str) -> st.SearchStrategy[list[Key]]:
    stream = st.one_of(st.none(), st.integers(0, 11))
    one = st.tuples(stream, st.sampled_from("abc")) if table == "map" else st.tuples(stream)
    return st.lists(one, min_size=1, max_size=8)


@st.composite
def _on_table(draw: st.DrawFn) -> Step:
    table = draw(st.sampled_from(sorted(TABLES)))
    kind = draw(st.sampled_from(["set", "set", "add", "delete", "delete", "look", "touch"]))
    return (kind, table, tuple(draw(_keys(table))), draw(st.integers(0, 99)))


steps = st.lists(
    st.one_of(
        _on_table(),
        _on_table(),
        _on_table(),
        st.just(("freeze", True)),
        st.just(("freeze", True)),
        st.just(("freeze", False)),
        st.tuples(st.just("restore"), st.integers(1, 3), st.booleans()),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 6.0, 11.0])),
        st.tuples(st.just("clear"), st.sampled_from(sorted(TABLES))),
    ),
    max_size=40,
)


def tiny(patch: pytest.MonkeyPatch) -> None:
    """All bounds so small that a few rows pass them."""
    patch.setattr(journal, "SEAL_ROWS", 6)
    patch.setattr(journal, "SMALL_RUNS", 3)
    patch.setattr(journal, "SMALL_ROWS", 8)
    patch.setattr(journal, "JOIN_RUNS", 2)
    patch.setattr(journal, "JOIN_ROWS", 8)
    patch.setattr(journal, "_WINDOW_MIN", 1)
    patch.setattr(cache, "DIRTY_ROWS", 6)
    patch.setattr(cache, "PURGE_ROWS", 3)


class Program:
    """A job with one keyed operator, and what it should hold."""

    def __init__(self, kind: str, folder: Path) -> None:
        # So little memory that every call of `slots` on a table with rows lets some go.
        self.world = World(kind, folder, memory_bytes=1)
        self.model: Model = {name: {} for name in TABLES}
        self.saved: list[Saved] = []
        self.saved_model: Model = {name: {} for name in TABLES}
        self.states: list[KeyedState] = []
        self.start(1, savepoint=False)

    def start(self, parallelism: int, *, savepoint: bool) -> None:
        for state in self.states:
            state.close()
        self.states = []
        for subtask in range(parallelism):
            ctx = self.world.context(subtask, parallelism)
            state = KeyedState(ctx, ("k",))
            back = self.world.give_back(self.saved, ctx, savepoint=savepoint)
            if back:
                state.restore(back)
            self.states.append(state)
        self.model = {
            name: {key: (dict(row), due) for key, (row, due) in rows.items()} for name, rows in self.saved_model.items()
        }

    def table(self, subtask: int, name: str) -> StateTable:
        keys, subkeys, ttl = TABLES[name]
        ttl_us = None if ttl is None else int(ttl * 1_000_000)
        return self.states[subtask].table(name, keys, pa.schema(FIELDS), subkeys=subkeys, ttl_us=ttl_us)

    def run(self, program: Sequence[Step]) -> None:
        for step in program:
            getattr(self, f"do_{step[0]}")(*step[1:])
        for name in TABLES:
            self.compare(name)
        self.do_freeze(True)
        self.do_restore(2, False)
        for name in TABLES:
            self.compare(name)
        for state in self.states:
            state.close()

    # ---------------------------------------------------------------------------------------------------------- steps

    def do_set(self, name: str, keys: Sequence[Key], seed: int) -> None:
        for table, arrays, mine in self.routed(name, keys):
            slots = table.slots(arrays, insert=True)
            numbers = [None if (seed + i) % 5 == 0 else seed + i for i in range(len(mine))]
            texts = [None if (seed + i) % 7 == 0 else f"{seed}-{i}" for i in range(len(mine))]
            table.set(slots, "n", pa.array(numbers, pa.int64()))
            table.set(slots, "s", pa.array(texts, pa.string()))
            for key, number, text in zip(mine, numbers, texts, strict=True):
                self.put(name, key, {"n": number, "s": text})

    def do_add(self, name: str, keys: Sequence[Key], seed: int) -> None:
        """In place, by slot, touched before it is written: allowed until the next `slots`."""
        for table, arrays, mine in self.routed(name, keys):
            slots = np.unique(table.slots(arrays, insert=True))
            table.touch(slots)
            table.numbers("n")[slots] += seed
            table.valid("n")[slots] = True
            for key in set(mine):
                row = self.row(name, key) or {"n": None, "s": None}
                self.put(name, key, {"n": (row["n"] or 0) + seed, "s": row["s"]})

    def do_delete(self, name: str, keys: Sequence[Key], seed: int) -> None:
        for table, arrays, mine in self.routed(name, keys):
            slots = table.slots(arrays, insert=False)
            table.delete(slots)
            for key in mine:
                self.model[name].pop(key, None)

    def do_touch(self, name: str, keys: Sequence[Key], seed: int) -> None:
        for table, arrays, mine in self.routed(name, keys):
            slots = table.slots(arrays, insert=False)
            table.touch(slots[slots >= 0])
            for key in mine:
                row = self.row(name, key)
                if row is not None:
                    self.put(name, key, row)

    def do_look(self, name: str, keys: Sequence[Key], seed: int) -> None:
        for table, arrays, mine in self.routed(name, keys):
            slots = table.slots(arrays, insert=False)
            expected = [self.row(name, key) for key in mine]
            assert [slot >= 0 for slot in slots] == [row is not None for row in expected]
            for column in ("n", "s"):
                found = table.get(slots, column).to_pylist()
                assert found == [None if row is None else row[column] for row in expected], column
            there = np.flatnonzero(slots >= 0)
            found_keys = list(zip(*(a.to_pylist() for a in table.key_arrays(slots[there])), strict=True))
            assert found_keys == [mine[i] for i in there]
            if name == "map":
                self.look_prefixes(table, mine)

    def look_prefixes(self, table: StateTable, keys: Sequence[Key]) -> None:
        streams = list(dict.fromkeys(key[0] for key in keys))
        found = table.with_prefix([pa.array(streams, pa.int64())]).to_pylist()
        seen = [row["k"] for row in found]
        assert len(dict.fromkeys(seen)) == sum(a != b for a, b in zip([object(), *seen], seen, strict=False)), "grouped"
        expected = {key: row for key, (row, _) in self.model["map"].items() if key[0] in streams}
        assert {(row["k"], row["i"]): {"n": row["n"], "s": row["s"]} for row in found} == expected
        assert len(found) == len(expected)

    def do_clear(self, name: str) -> None:
        for subtask in range(len(self.states)):
            self.table(subtask, name).clear()
        self.model[name] = {}

    def do_wait(self, seconds: float) -> None:
        self.world.now += seconds

    def do_freeze(self, complete: bool) -> None:
        frozen = [(state.freeze(), ctx) for state, ctx in zip(self.states, self.contexts(), strict=True)]
        expected = {name: {k: (dict(row), due) for k, (row, due) in rows.items()} for name, rows in self.model.items()}
        self.disturb()
        saved = [self.world.save(state, ctx.key_groups, complete=complete) for state, ctx in frozen]
        if complete:
            self.saved, self.saved_model = saved, expected

    def disturb(self) -> None:
        """Between a freeze and its upload processing goes on; what is frozen must not see it."""
        for name in TABLES:
            self.do_add(name, [(1, "a")[: len(TABLES[name][0])], (2, "b")[: len(TABLES[name][0])]], 1)
            self.do_delete(name, [(3, "c")[: len(TABLES[name][0])]], 0)

    def do_restore(self, parallelism: int, savepoint: bool) -> None:
        self.start(parallelism, savepoint=savepoint)

    # ------------------------------------------------------------------------------------------------------ the model

    def contexts(self) -> list[Any]:
        return [self.world.context(i, len(self.states)) for i in range(len(self.states))]

    def routed(self, name: str, keys: Sequence[Key]) -> list[tuple[StateTable, list[pa.Array], list[Key]]]:
        schema = TABLES[name][0]
        groups = key_groups(hash_columns([pa.array([key[0] for key in keys], pa.int64())]), 128)
        found = []
        for subtask, ctx in enumerate(self.contexts()):
            mine = [key for key, group in zip(keys, groups, strict=True) if group in ctx.key_groups]
            if mine:
                arrays = [
                    pa.array(list(c), field.type) for c, field in zip(zip(*mine, strict=True), schema, strict=True)
                ]
                found.append((self.table(subtask, name), arrays, mine))
        return found

    def row(self, name: str, key: Key) -> dict[str, Any] | None:
        found = self.model[name].get(key)
        return None if found is None or found[1] <= self.world.now else found[0]

    def put(self, name: str, key: Key, row: dict[str, Any]) -> None:
        ttl = TABLES[name][2]
        self.model[name][key] = (row, float("inf") if ttl is None else self.world.now + ttl)

    def compare(self, name: str) -> None:
        expected = {key: row for key in self.model[name] if (row := self.row(name, key)) is not None}
        names = TABLES[name][0].names
        rows = [
            row
            for subtask in range(len(self.states))
            for batch in self.table(subtask, name).scan(3)
            for row in batch.to_pylist()
        ]
        found = {tuple(row[c] for c in names): {"n": row["n"], "s": row["s"]} for row in rows}
        assert found == expected
        assert len(rows) == len(expected), "each once"
