"""What has expired, or was written over, is really gone: from disk, from memory, after a change of the flow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayflow.operators.base import EXPIRES
from rayflow.operators.state import cache
from rayflow.operators.state.columns import HeapColumn
from rayflow.operators.state.keyed import KeyedState
from rayflow.operators.state.table import StateTable
from tests.operators.state.fakes import World

KEYS = pa.schema([("k", pa.int64())])
VALUES = pa.schema([("v", pa.int64())])
TTL_S = 10


def _table(state: KeyedState, *, ttl: bool = True) -> StateTable:
    return state.table("seen", KEYS, VALUES, ttl_us=TTL_S * 1_000_000 if ttl else None)


def _write(table: StateTable, keys: range) -> None:
    array = pa.array(np.arange(keys.start, keys.stop))
    table.set(table.slots([array], insert=True), "v", array)


@pytest.mark.parametrize("kind", ["fake", "rocksdb"])
def test_rows_on_disk_whose_time_has_passed_are_deleted_there(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that never come again must not fill the disk and every checkpoint."""
    monkeypatch.setattr(cache, "DIRTY_ROWS", 100)
    monkeypatch.setattr(cache, "PURGE_ROWS", 100)
    world = World(kind, tmp_path)
    state = KeyedState(world.context(), ("k",))
    table = _table(state)
    for n in range(40):
        _write(table, range(n * 100, n * 100 + 100))
        world.now += TTL_S / 2
    assert table.cache is not None
    table.cache.flush()
    kept = sum(rows.num_rows for rows in table.cache._cold.scan())
    assert 200 <= kept <= 1_000, "of 4,000, of which 100 live"
    assert sum(rows.num_rows for rows in table.scan()) == 100
    state.close()


@pytest.mark.parametrize("kind", ["fs", "fake", "rocksdb"])
@pytest.mark.parametrize("savepoint", [False, True])
def test_a_state_that_loses_its_time_to_live_does_not_get_back_what_had_expired(
    kind: str, savepoint: bool, tmp_path: Path
) -> None:
    world = World(kind, tmp_path)
    state = KeyedState(world.context(), ("k",))
    table = _table(state)
    _write(table, range(3))
    world.now += TTL_S - 1
    _write(table, range(2, 5))
    saved = [world.save(state.freeze(), range(128))]
    state.close()
    world.now += 2
    state = KeyedState(world.context(), ("k",))
    state.restore(world.give_back(saved, world.context(), savepoint=savepoint))
    table = _table(state, ttl=False)
    found = pa.Table.from_batches(list(table.scan()))
    assert sorted(found.column("k").to_pylist()) == [2, 3, 4]
    assert EXPIRES not in table.stored.names
    state.close()


def test_large_values_that_were_written_over_do_not_stay_in_memory() -> None:
    """One hot key with a large value: 65,536 old copies of it were kept."""
    column = HeapColumn(pa.binary())
    column.grow(1_000_000)
    small = pa.array([b"0123456789abcdef"]).take(pa.array(np.zeros(1_000_000, np.int64)))
    column.put(np.arange(1_000_000), small, None)
    large = 1_000_000
    highest = 0
    for n in range(300):
        column.put(np.array([7, 8]), pa.array([bytes([n % 256]) * large] * 2), None)
        highest = max(highest, column.heap_bytes)
    assert highest < 150_000_000, "of 600 MB that were written, 22 MB are live"
    assert column.get(np.array([6, 7, 8, -1])).to_pylist() == [b"0123456789abcdef", *[bytes([43]) * large] * 2, None]
