"""State tables through storage: what goes in comes out, split by key group, and damage is named."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from rayflow.core.ids import SubtaskId
from rayflow.core.keygroups import key_group_range
from rayflow.core.manifest import StateHandle, SubtaskSnapshot
from rayflow.errors import CorruptCheckpointError, ProtocolError, StateTooLargeError, StorageError
from rayflow.operators.base import FrozenState, FrozenTable
from rayflow.partition import hash_columns, key_groups
from rayflow.storage.faults import Fault, FaultyStore, flipped
from rayflow.storage.snapshots import SnapshotStore, check_memory_state, inline_bytes, rows_of_groups
from rayflow.storage.store import MemoryStore, Store

G = 13


def table(rows: int, seed: int = 0) -> pa.Table:
    numbers = np.random.default_rng(seed)
    keys = numbers.integers(0, 50, rows)
    return pa.table(
        {
            "key": pa.array([f"key-{k}" for k in keys], pa.string()),
            "tag": pa.array(keys % 3, pa.int8()),
            "n": numbers.integers(0, 1000, rows),
            "amount": pa.array([Decimal(int(k)) / 4 for k in keys], pa.decimal128(12, 2)),
            "at": pa.array([datetime(2024, 1, 1, tzinfo=UTC)] * rows, pa.timestamp("us", "UTC")),
        }
    ).replace_schema_metadata({b"mine": b"kept"})


def keyed(rows: int, name: str = "runs") -> FrozenTable:
    whole = table(rows)
    return FrozenTable(name, tuple(whole.to_batches(max_chunksize=7)), whole.schema, ("key", "tag"), {"watermark": 5})


def as_sorted(found: pa.Table) -> list[tuple[object, ...]]:
    return sorted(zip(*(column.to_pylist() for column in found.columns), strict=True), key=repr)


def snapshots(store: Store, inline_max_bytes: int | None = 0) -> SnapshotStore:
    return SnapshotStore(store, G, inline_max_bytes)


def write_one(into: SnapshotStore, frozen: FrozenTable, operator: str = "op") -> StateHandle:
    (handle,) = into.write(7, SubtaskId("chain/ü", 1), 4, [(operator, FrozenState((frozen,)))]).handles
    return handle


def written(store: Store, frozen: FrozenTable) -> StateHandle:
    return write_one(snapshots(store), frozen, "window/ü")


@pytest.mark.parametrize("inline_max_bytes", [0, 1_000_000, None])
@pytest.mark.parametrize("rows", [0, 1, 1000])
def test_keyed_state_comes_back_whole(inline_max_bytes: int | None, rows: int) -> None:
    store = MemoryStore()
    handle = write_one(snapshots(store, inline_max_bytes), keyed(rows), "window/ü")
    assert (handle.inline is None) == (inline_max_bytes == 0)
    assert bool(store.list()) == (inline_max_bytes == 0)
    assert (inline_bytes(handle) > 0) == (inline_max_bytes != 0)
    restored = snapshots(store).read(handle, None)
    assert restored.table.schema.equals(table(rows).schema, check_metadata=True)
    assert as_sorted(restored.table) == as_sorted(table(rows))
    assert (restored.name, restored.meta, handle.rows) == ("runs", {"watermark": 5}, rows)


@pytest.mark.parametrize("parallelism", [1, 2, 3, 5, 13])
def test_every_subtask_gets_its_own_groups_and_all_get_all(parallelism: int) -> None:
    store = MemoryStore()
    handle = written(store, keyed(1000))
    parts = []
    for index in range(parallelism):
        own = key_group_range(index, parallelism, G)
        part = snapshots(store).read(handle, own).table
        groups = key_groups(hash_columns([part.column("key"), part.column("tag")]), G)
        assert all(group in own for group in groups.tolist()), "rule K3"
        parts.append(part)
    assert as_sorted(pa.concat_tables(parts)) == as_sorted(table(1000))


def test_rows_of_one_key_keep_their_order() -> None:
    """The sort is stable: `first` and `last` may depend on it."""
    batch = pa.record_batch({"key": ["a", "b"] * 500, "n": list(range(1000))})
    store = MemoryStore()
    handle = written(store, FrozenTable("s", (batch,), key_columns=("key",)))
    found = snapshots(store).read(handle, None).table
    for key in ("a", "b"):
        mine = [n for k, n in zip(found["key"].to_pylist(), found["n"].to_pylist(), strict=True) if k == key]
        assert mine == sorted(mine)
        assert len(mine) == 500


def test_a_table_of_many_batches_is_cut_at_group_borders() -> None:
    rows = 200_000
    store = MemoryStore()
    frozen = FrozenTable("big", (pa.record_batch({"k": np.arange(rows)}),), key_columns=("k",))
    handle = written(store, frozen)
    assert handle.file is not None
    assert pa.ipc.open_file(io.BytesIO(store.get(handle.file.path))).num_record_batches > 1
    found = [snapshots(store).read(handle, range(g, g + 1)).table["k"].to_pylist() for g in range(G)]
    assert sorted(k for part in found for k in part) == list(range(rows))
    groups = key_groups(hash_columns([pa.array(np.arange(rows))]), G)
    assert all((groups[part] == g).all() for g, part in enumerate(found))


def test_operator_state_is_not_sorted_nor_cut() -> None:
    store = MemoryStore()
    batch = pa.record_batch({"n": [3, 1, 2]})
    handle = written(store, FrozenTable("list", (batch,)))
    assert not handle.keyed
    assert snapshots(store).read(handle, range(1)).table["n"].to_pylist() == [3, 1, 2]


def test_dictionaries_that_differ_by_batch_are_unified() -> None:
    store = MemoryStore()
    batches = tuple(pa.record_batch({"k": pa.array([text]).dictionary_encode()}) for text in ("a", "b", "a"))
    handle = written(store, FrozenTable("d", batches))
    assert snapshots(store).read(handle, None).table["k"].to_pylist() == ["a", "b", "a"]


def test_the_file_is_readable_without_rayflow_and_tells_what_it_is() -> None:
    store = MemoryStore()
    handle = written(store, keyed(100))
    assert handle.file is not None
    found = pa.ipc.open_file(io.BytesIO(store.get(handle.file.path))).read_all()
    assert as_sorted(found) == as_sorted(table(100))
    assert b'"key_columns": ["key", "tag"]' in found.schema.metadata[b"rayflow"]


def test_writing_twice_gives_the_same_bytes() -> None:
    assert written(MemoryStore(), keyed(500)) == written(MemoryStore(), keyed(500))


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(("damage", "says"), [(flipped, "checksum"), (lambda data: data[: len(data) // 2], "bytes")])
def test_a_damaged_file_is_named(damage: object, says: str) -> None:
    store = MemoryStore()
    handle = written(store, keyed(100))
    assert handle.file is not None
    assert callable(damage)
    store.put(handle.file.path, damage(store.get(handle.file.path)))
    with pytest.raises(CorruptCheckpointError, match=f"chk-00000007/.*{says}.*manifest says") as caught:
        snapshots(store).read(handle, None)
    assert "subtask 1" in str(caught.value)


def test_a_missing_file_is_named_and_never_an_empty_state() -> None:
    store = MemoryStore()
    handle = written(store, keyed(100))
    assert handle.file is not None
    store.delete(handle.file.path)
    with pytest.raises(CorruptCheckpointError, match="chk-00000007/.* is missing"):
        snapshots(store).read(handle, None)


def test_a_bit_flipped_on_the_way_back_is_found() -> None:
    inner = MemoryStore()
    handle = written(inner, keyed(100))
    lying = FaultyStore(inner, lambda operation, path: Fault.FLIP if operation == "get_range" else None)
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        snapshots(lying).read(handle, None)


@pytest.mark.parametrize("fault", [Fault.FAIL, Fault.HALF])
def test_a_write_that_fails_gives_no_handle(fault: Fault) -> None:
    with pytest.raises(StorageError):
        written(FaultyStore(MemoryStore(), lambda operation, path: fault), keyed(100))


@pytest.mark.parametrize(
    "group_rows",
    [
        (),
        ((0, 1),),
        ((0, 0), (0, 5)),
        ((3, 0), (1, 5)),
        ((0, 0), (1, 100)),
        ((0, 0), (1, 7), (2, 7)),
        ((-1, 0),),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(group_rows: tuple[tuple[int, int], ...]) -> None:
    store = MemoryStore()
    handle = replace(written(store, keyed(100)), group_rows=group_rows)
    with pytest.raises(CorruptCheckpointError, match="index of key groups"):
        snapshots(store).read(handle, range(3))


def test_rows_that_do_not_match_the_manifest_are_refused() -> None:
    store = MemoryStore()
    handle = written(store, keyed(100))
    with pytest.raises(CorruptCheckpointError, match="has 100 rows.*its manifest says 101"):
        snapshots(store).read(replace(handle, rows=101), None)


def test_another_number_of_key_groups_is_refused() -> None:
    """Rule K4."""
    store = MemoryStore()
    handle = written(store, keyed(100))
    for other in (4, 128):
        with pytest.raises(CorruptCheckpointError, match="K4"):
            SnapshotStore(store, other).read(handle, None)


def test_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    handle = written(store, keyed(100))
    monkeypatch.setattr("rayflow.storage.snapshots.HASH_VERSION", 999)
    with pytest.raises(CorruptCheckpointError, match="hash version"):
        snapshots(store).read(handle, None)


def test_inline_state_that_is_no_state_is_refused() -> None:
    handle = write_one(snapshots(MemoryStore(), None), keyed(10))
    for inline in ("***", "AAAA"):
        with pytest.raises(CorruptCheckpointError, match="inline state"):
            snapshots(MemoryStore()).read(replace(handle, inline=inline), None)
    with pytest.raises(CorruptCheckpointError, match="neither"):
        snapshots(MemoryStore()).read(replace(handle, inline=None), None)


def test_what_cannot_be_one_table_is_told() -> None:
    one, other = pa.record_batch({"a": [1]}), pa.record_batch({"b": ["x"]})
    with pytest.raises(ProtocolError, match="several schemas"):
        written(MemoryStore(), FrozenTable("t", (one, other)))
    with pytest.raises(ProtocolError, match="must say its schema"):
        written(MemoryStore(), FrozenTable("t", ()))
    with pytest.raises(ProtocolError, match="key columns"):
        written(MemoryStore(), FrozenTable("t", (one,), key_columns=("nope",)))


def test_state_in_memory_is_bounded() -> None:
    handle = write_one(snapshots(MemoryStore(), None), keyed(1000))
    parts = [SubtaskSnapshot(SubtaskId("chain", i), states=(handle,)) for i in range(3)]
    check_memory_state(parts, limit=3 * inline_bytes(handle))
    with pytest.raises(StateTooLargeError, match="state=\"memory\".*'runs' of operator 'op'"):
        check_memory_state(parts, limit=3 * inline_bytes(handle) - 1)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (range(13), slice(0, 10)),
        (range(2), slice(0, 0)),
        (range(2, 3), slice(0, 4)),
        (range(3, 5), slice(4, 4)),
        (range(3, 8), slice(4, 10)),
        (range(8, 13), slice(10, 10)),
    ],
)
def test_the_rows_of_a_range_of_groups(groups: range, expected: slice) -> None:
    handle = StateHandle("op", 0, 1, "s", rows=10, keyed=True, group_rows=((2, 0), (5, 4), (7, 9)))
    assert rows_of_groups(handle, groups) == expected
