"""A disk that takes no more: named by its folder, nothing later is believed, and what was frozen before is whole."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rayflow.errors import ConfigError, StorageError
from rayflow.storage.rocks import open_rocks, read_folder
from tests.storage.rocks.disk import KEYS, VALUES, Rows, context, open_store, puts, rows_of, upload

BIG: Rows = {k: (k, f"{k:x}" * 40) for k in range(20_000)}


@contextmanager
def no_room() -> Iterator[None]:
    """Files of this process cannot grow past 64 KiB: every larger write really fails, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_finds_no_room_says_where_and_ends_the_store(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "db")
    table.write(puts({1: (1, "a")}))
    good = store.freeze({})
    upload(good, tmp_path / "up")
    frozen = store.freeze({"t": [puts(BIG)]})
    with no_room(), pytest.raises(StorageError, match=str(tmp_path / "db")):
        frozen.finish()
    # There is room again, but rows may be missing: whoever goes on must be told.
    for use in (frozen.finish, lambda: list(table.scan()), lambda: table.write(puts({2: (2, "b")}))):
        with pytest.raises(StorageError, match=str(tmp_path / "db")):
            use()
    frozen.release()
    store.close()
    assert rows_of(read_folder(tmp_path / "up", good.meta)["t"]) == {1: (1, "a")}


def test_a_write_that_finds_no_room_is_an_error_of_storage(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "db")

    def fill() -> None:
        for _ in range(20):
            table.write(puts(BIG))
            store.freeze({}).finish()

    with no_room(), pytest.raises(StorageError, match=str(tmp_path / "db")):
        fill()
    store.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = open_rocks(tmp_path / "file" / "db", context())
    table = store.table("t", KEYS, VALUES)
    with pytest.raises(StorageError, match="local_dir"):
        table.write(puts({1: (1, "a")}))
    store.close()


def test_without_rocksdict_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("rayflow.storage.rocks.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    with pytest.raises(ConfigError, match=r'pip install "rayflow\[rocksdb\]"'):
        open_rocks(tmp_path / "db", context())
    with pytest.raises(ConfigError, match=r'pip install "rayflow\[rocksdb\]"'):
        read_folder(tmp_path / "db", {})
