"""Local state against a dict: what is written is read, what is frozen stays as it was, what is restored is whole."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from rayflow.errors import StorageError
from rayflow.storage.rocks import read_folder
from tests.storage.rocks.disk import Rows, deletes, open_store, puts, rows_of, upload, uploaded


def some(rng: random.Random, count: int = 20) -> Rows:
    keys = rng.sample(range(60), count)
    return {k: (rng.choice([None, rng.randrange(99)]), rng.choice([None, "", "x" * rng.randrange(40)])) for k in keys}


def read(store_rows: Rows, keys: list[int]) -> list[tuple[int | None, str | None] | None]:
    return [store_rows.get(key) for key in keys]


@pytest.mark.parametrize("seed", range(12))
def test_behaves_like_a_dict_over_freezes_and_restores(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    store, table = open_store(tmp_path / "life0")
    model: Rows = {}
    waiting = []
    lives = 1
    for step in range(60):
        action = rng.choice(["put", "put", "delete", "get", "scan", "freeze", "finish", "restore"])
        if action == "put":
            rows = some(rng)
            table.write(puts(rows))
            model |= rows
        elif action == "delete":
            keys = rng.sample(range(60), 10)
            table.write(deletes(keys))
            for key in keys:
                model.pop(key, None)
        elif action == "get":
            keys = rng.sample(range(60), 30)
            asked = deletes(keys)
            found, values = table.get(asked.groups, asked.keys)
            got = [
                (row["a"], row["s"]) if there else None
                for there, row in zip(found.tolist(), values.to_pylist(), strict=True)
            ]
            assert got == read(model, keys), f"seed {seed} step {step}"
            assert all(row == {"a": None, "s": None} for row, t in zip(values.to_pylist(), found, strict=True) if not t)
        elif action == "scan":
            assert rows_of(table.scan(batch_rows=7)) == model, f"seed {seed} step {step}"
        elif action == "freeze":
            rows, gone = some(rng, 5), rng.sample(range(60), 3)
            frozen = store.freeze({"t": [puts(rows), deletes(gone)]})
            model |= rows
            for key in gone:
                model.pop(key, None)
            waiting.append((frozen, dict(model), tmp_path / f"up{step}"))
        elif waiting:
            frozen, expected, folder = waiting.pop(rng.randrange(len(waiting)))
            names = upload(frozen, folder)
            assert rows_of(read_folder(folder, frozen.meta)["t"]) == expected, f"seed {seed} step {step}"
            if action == "restore":
                store.close()
                store, _ = open_store(tmp_path / f"life{lives}")
                store.restore([uploaded(folder, immutable=names)])
                table = store.table("t", *store.tables()["t"])
                lives, model, waiting = lives + 1, dict(expected), []
    assert rows_of(table.scan()) == model
    store.close()


def test_a_freeze_is_a_note_that_the_next_write_performs(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "db")
    table.write(puts({1: (1, "a")}))
    before = sorted(path.name for path in (tmp_path / "db").iterdir())
    frozen = store.freeze({"t": [puts({2: (2, "b")})]})
    assert sorted(path.name for path in (tmp_path / "db").iterdir()) == before
    table.write(puts({1: (9, "late"), 3: (3, "late")}))
    upload(frozen, tmp_path / "up")
    assert rows_of(read_folder(tmp_path / "up", frozen.meta)["t"]) == {1: (1, "a"), 2: (2, "b")}
    assert rows_of(table.scan()) == {1: (9, "late"), 2: (2, "b"), 3: (3, "late")}
    store.close()


def test_a_freeze_that_links_after_later_writes_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken variant of the test above: writes that do not perform the freeze get into it."""
    store, table = open_store(tmp_path / "db")
    table.write(puts({1: (1, "a")}))
    frozen = store.freeze({})
    monkeypatch.setattr(store, "_perform_outstanding", lambda: None)
    table.write(puts({1: (9, "late")}))
    upload(frozen, tmp_path / "up")
    assert rows_of(read_folder(tmp_path / "up", frozen.meta)["t"]) != {1: (1, "a")}
    store.close()


def test_reads_see_what_was_frozen_before_anybody_has_performed_it(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "db")
    table.write(puts({1: (1, "a"), 2: (2, "b")}))
    frozen = store.freeze({"t": [deletes([1])]})
    asked = deletes([1, 2])
    found, _ = table.get(asked.groups, asked.keys)
    assert found.tolist() == [False, True]
    upload(frozen, tmp_path / "up")
    assert rows_of(read_folder(tmp_path / "up", frozen.meta)["t"]) == {2: (2, "b")}
    store.close()


def test_nothing_is_in_the_log_so_a_crash_loses_what_was_not_frozen(tmp_path: Path) -> None:
    """The write-ahead log is off: the bytes of a live folder do not have the rows, those of a frozen one do."""
    store, table = open_store(tmp_path / "db")
    table.write(puts({1: (1, "a")}))
    frozen = store.freeze({})
    names = upload(frozen, tmp_path / "up")
    table.write(puts({2: (2, "b")}))
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for path in (tmp_path / "db" / "db").iterdir():
        (crashed / path.name).write_bytes(path.read_bytes())
    assert rows_of(read_folder(crashed, frozen.meta)["t"]) == {1: (1, "a")}
    assert all(path.stat().st_size == 0 for path in crashed.glob("*.log"))
    assert len(names) == 1
    store.close()


def test_a_file_keeps_its_name_for_ever_and_a_new_life_gives_new_names(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "first")
    table.write(puts({1: (1, "a")}))
    first = upload(store.freeze({}), tmp_path / "up1")
    table.write(puts({2: (2, "b")}))
    second = upload(store.freeze({}), tmp_path / "up2")
    assert first.items() <= second.items()
    assert len(second) == 2
    store.close()

    def later(folder: str, value: str) -> dict[str, str]:
        again, _ = open_store(tmp_path / folder)
        again.restore([uploaded(tmp_path / "up2", immutable=second)])
        again.table("t", *again.tables()["t"]).write(puts({3: (3, value)}))
        names = upload(again.freeze({}), tmp_path / f"{folder}-up")
        again.close()
        return names

    one, two = later("one", "x"), later("two", "y")
    assert second.items() <= one.items()
    # Both lives number their new file alike: only the lineage keeps one from being taken for the other.
    assert set(one) == set(two)
    assert set(one.values()) & set(two.values()) == set(second.values())


def test_finish_works_in_another_thread_while_the_loop_reads(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "db")
    expected: Rows = {k: (k, "x" * 100) for k in range(2000)}
    table.write(puts(expected))
    for turn in range(5):
        frozen = store.freeze({"t": [puts(dict.fromkeys(range(50), (turn, "y")))]})
        expected |= dict.fromkeys(range(50), (turn, "y"))
        uploader = threading.Thread(target=upload, args=(frozen, tmp_path / f"up{turn}"))
        uploader.start()
        while uploader.is_alive():
            assert rows_of(table.scan()) == expected
        uploader.join()
        assert rows_of(read_folder(tmp_path / f"up{turn}", frozen.meta)["t"]) == expected
    store.close()


def test_closing_leaves_frozen_files_and_gives_up_what_was_not_begun(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "db")
    table.write(puts({1: (1, "a")}))
    done = store.freeze({})
    files, _ = done.finish()
    pending = store.freeze({})
    store.close()
    store.close()
    assert all(file.path.exists() for file in files.values())
    with pytest.raises(StorageError, match="closed"):
        pending.finish()
    pending.release()
    done.release()
    assert not any(file.path.exists() for file in files.values())
    with pytest.raises(StorageError, match="closed"):
        table.write(puts({2: (2, "b")}))


def test_a_freeze_that_nobody_wants_still_writes_its_changes(tmp_path: Path) -> None:
    store, table = open_store(tmp_path / "db")
    store.freeze({"t": [puts({1: (1, "a")})]}).release()
    table.write(puts({2: (2, "b")}))
    assert rows_of(table.scan()) == {1: (1, "a"), 2: (2, "b")}
    assert sorted(path.name for path in (tmp_path / "db").iterdir()) == ["db"]
    store.close()
