"""Folders of other key-group ranges and of other columns: every key once, old rows in new columns, Arrow out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayflow.errors import CorruptCheckpointError, StateSchemaError, StorageError
from rayflow.operators.base import Change, RestoredFolder
from rayflow.storage.rocks import read_folder
from rayflow.storage.rocks.catalog import CATALOG_FILE
from rayflow.storage.rocks.export import folder_tables
from rayflow.storage.rocks.store import RocksStore
from tests.storage.rocks.disk import (
    KEYS,
    VALUES,
    Rows,
    context,
    deletes,
    group_of,
    groups_of,
    open_store,
    puts,
    rows_of,
    upload,
    uploaded,
)

QUARTERS = [range(start, start + 32) for start in range(0, 128, 32)]
HALVES = [range(64), range(64, 128)]


def restored(path: Path, folders: list[RestoredFolder], groups: range) -> tuple[RocksStore, Rows]:
    store = RocksStore(path, context(groups=groups))
    store.restore(folders)
    return store, rows_of(store.table("t", KEYS, VALUES).scan())


def overlapping(folders: list[tuple[range, Path]], groups: range) -> list[RestoredFolder]:
    """As the runtime hands them out: each old folder with the groups of it that are wanted."""
    found = []
    for old, path in folders:
        common = range(max(old.start, groups.start), min(old.stop, groups.stop))
        if common:
            found.append(uploaded(path, groups=common, exact=common == old))
    return found


def test_two_to_four_to_two_has_every_key_once_and_forgets_none(tmp_path: Path) -> None:
    rows: Rows = {k: (k, f"s{k}") for k in range(3000)}
    folders: list[tuple[range, Path]] = []
    for index, half in enumerate(HALVES):
        store, table = open_store(tmp_path / f"a{index}", half)
        table.write(puts({k: v for k, v in rows.items() if group_of(k) in half}))
        upload(store.freeze({}), tmp_path / f"up-a{index}")
        folders.append((half, tmp_path / f"up-a{index}"))
        store.close()
    for turn, ranges in enumerate([QUARTERS, HALVES, [range(128)], QUARTERS]):
        together: Rows = {}
        later: list[tuple[range, Path]] = []
        for index, groups in enumerate(ranges):
            at = tmp_path / f"b{turn}-{index}"
            store, found = restored(at, overlapping(folders, groups), groups)
            assert {group_of(k) for k in found} <= set(groups)
            assert not together.keys() & found.keys()
            together |= found
            # A row that was clipped away must not come back when its groups do: change and delete in every turn.
            mine = [k for k in found if k % 10 == turn]
            change = {k: (-turn, None) for k in mine if k % 20 == turn}
            gone = [k for k in mine if k % 20 != turn]
            upload(store.freeze({"t": [puts(change), deletes(gone)]}), tmp_path / f"up-b{turn}-{index}")
            later.append((groups, tmp_path / f"up-b{turn}-{index}"))
            store.close()
        assert together == rows
        for k in [k for k in rows if k % 10 == turn]:
            if k % 20 == turn:
                rows[k] = (-turn, None)
            else:
                del rows[k]
        folders = later


def test_a_folder_that_is_not_clipped_is_caught(tmp_path: Path) -> None:
    """The broken variant: `exact` said of a folder that has more in it."""
    store, table = open_store(tmp_path / "a")
    table.write(puts({k: (k, "") for k in range(500)}))
    upload(store.freeze({}), tmp_path / "up")
    store.close()
    lied, found = restored(tmp_path / "b", [uploaded(tmp_path / "up", groups=HALVES[0], exact=True)], HALVES[0])
    assert not {group_of(k) for k in found} <= set(HALVES[0])
    lied.close()
    told, found = restored(tmp_path / "c", [uploaded(tmp_path / "up", groups=HALVES[0], exact=False)], HALVES[0])
    assert {group_of(k) for k in found} <= set(HALVES[0])
    told.close()


def test_tables_are_matched_by_name_not_by_number(tmp_path: Path) -> None:
    folders = []
    for index, (names, half) in enumerate(zip((["t", "u"], ["u", "t"]), HALVES, strict=True)):
        store = RocksStore(tmp_path / f"a{index}", context(groups=half))
        for name in names:
            rows = {k: (k, name) for k in range(200) if group_of(k) in half}
            store.table(name, KEYS, VALUES).write(puts(rows))
        upload(store.freeze({}), tmp_path / f"up{index}")
        folders.append(uploaded(tmp_path / f"up{index}", groups=half))
        store.close()
    store, found = restored(tmp_path / "b", folders, range(128))
    assert found == {k: (k, "t") for k in range(200)}
    assert rows_of(store.table("u", KEYS, VALUES).scan()) == {k: (k, "u") for k in range(200)}
    store.close()


def test_old_rows_are_read_in_new_columns_and_all_of_it_survives_the_next_restore(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "a")
    table.write(puts({1: (1, "one"), 2: (2, None)}))
    upload(store.freeze({}), tmp_path / "up1")
    store.close()
    wider = pa.schema([("new", pa.float64()), ("s", pa.string()), ("a", pa.int64())])
    store = RocksStore(tmp_path / "b", context())
    store.restore([uploaded(tmp_path / "up1")])
    table = store.table("t", KEYS, wider)
    keys = deletes([3]).keys
    table.write(Change(groups_of(keys), keys, pa.record_batch([[0.5], ["three"], [3]], schema=wider)))
    asked = deletes([3, 1, 9, 2])
    found, values = table.get(asked.groups, asked.keys)
    assert found.tolist() == [True, True, False, True]
    expected = [(0.5, "three", 3), (None, "one", 1), (None, None, None), (None, None, 2)]
    assert [tuple(row.values()) for row in values.to_pylist()] == expected
    frozen = store.freeze({})
    upload(frozen, tmp_path / "up2")
    store.close()
    exported = pa.Table.from_batches(read_folder(tmp_path / "up2", frozen.meta)["t"]).sort_by("k")
    assert [tuple(row.values()) for row in exported.to_pylist()] == [
        (1, *expected[1]),
        (2, *expected[3]),
        (3, *expected[0]),
    ]


def test_columns_that_do_not_fit_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "a")
    table.write(puts({1: (1, "one")}))
    with pytest.raises(StateSchemaError, match="state 't' of step 'counts'.*removed"):
        store.table("t", KEYS, pa.schema([("a", pa.int64())]))
    with pytest.raises(StateSchemaError, match="'k' was int64 and is string"):
        store.table("t", pa.schema([("k", pa.string())]), VALUES)
    with pytest.raises(StateSchemaError, match="other key groups"):
        store.table("t", KEYS, VALUES, subkeys=1)
    assert rows_of(store.table("t", KEYS, VALUES).scan()) == {1: (1, "one")}
    store.close()


def test_a_wider_key_is_a_rewrite(tmp_path: Path) -> None:
    narrow = pa.schema([("k", pa.int32())])
    store = RocksStore(tmp_path / "a", context())
    change = puts({k: (k, "x") for k in range(-50, 50)})
    store.table("t", narrow, VALUES).write(Change(change.groups, change.keys.cast(narrow), change.values))
    table = store.table("t", KEYS, VALUES)
    assert rows_of(table.scan()) == {k: (k, "x") for k in range(-50, 50)}
    found, _ = table.get(change.groups, change.keys)
    assert found.all()
    assert list(store.tables()) == ["t"]
    frozen = store.freeze({})
    upload(frozen, tmp_path / "up")
    store.close()
    assert rows_of(read_folder(tmp_path / "up", frozen.meta)["t"]) == {k: (k, "x") for k in range(-50, 50)}


def test_subkeys_are_found_by_their_prefix(tmp_path: Path) -> None:
    keys = pa.schema([("k", pa.string()), ("at", pa.int64())])
    store = RocksStore(tmp_path / "a", context())
    table = store.table("m", keys, pa.schema([("v", pa.int64())]), subkeys=1)
    batch = pa.record_batch([["a", "a", "ab", "", "b", None], [2, -1, 1, 5, 7, 8]], schema=keys)
    table.write(Change(groups_of(batch), batch, pa.record_batch([[1, 2, 3, 4, 5, 6]], names=["v"])))
    prefixes = pa.record_batch([pa.array(["a", None, "nowhere", ""])], schema=pa.schema([keys.field(0)]))
    found = table.scan_prefix(groups_of(prefixes), prefixes)
    assert [tuple(row.values()) for row in found.to_pylist()] == [("a", -1, 2), ("a", 2, 1), (None, 8, 6), ("", 5, 4)]
    assert table.scan_prefix(groups_of(prefixes)[2:3], prefixes.slice(2, 1)).schema == found.schema
    assert folder_tables(store.freeze({}).meta)["m"].subkeys == 1
    store.close()


def test_scan_and_export_are_in_the_order_of_key_groups_and_of_a_range_only(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "a")
    rows: Rows = {k: (k, "") for k in range(2000)}
    table.write(puts(rows))
    frozen = store.freeze({})
    upload(frozen, tmp_path / "up")
    for batches in (table.scan(range(20, 90), 100), read_folder(tmp_path / "up", frozen.meta, range(20, 90))["t"]):
        table_of = pa.Table.from_batches(batches)
        groups = groups_of(pa.record_batch([table_of["k"].combine_chunks()], schema=KEYS))
        assert (np.diff(groups.astype(int)) >= 0).all()
        assert set(table_of["k"].to_pylist()) == {k for k in rows if 20 <= group_of(k) < 90}
    store.close()


def test_a_folder_without_its_list_of_tables_or_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "a")
    table.write(puts({1: (1, "")}))
    frozen = store.freeze({})
    upload(frozen, tmp_path / "up")
    store.close()
    with pytest.raises(StorageError, match="format 2"):
        read_folder(tmp_path / "up", {**frozen.meta, "format": 2})
    (tmp_path / "up" / CATALOG_FILE).write_text("{")
    with pytest.raises(CorruptCheckpointError, match=CATALOG_FILE):
        restored(tmp_path / "b", [uploaded(tmp_path / "up")], range(128))
