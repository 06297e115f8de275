"""What every store must do (`rayflow.storage.store.Store`): a back end inherits the class and adds its fixtures."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rayflow.storage.store import PutOutcome, Store

NAMES = [
    "plain",
    "with space",
    "per%cent",
    "per%20cent",
    "ümläut",
    "ha#sh",
    "quest?ion",
    "a+b&c=d",
    "x.y",
    "~tilde",
    "*[1]",
]


class StoreConformance:
    races = 3

    def test_what_was_put_is_read_back(self, store: Store) -> None:
        store.put("a/b/c.bin", b"\x00\xff" * 1000)
        assert store.get("a/b/c.bin") == b"\x00\xff" * 1000
        assert store.exists("a/b/c.bin")

    def test_an_empty_object_is_an_object(self, store: Store) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        assert store.list() == [("empty", 0)]

    def test_put_replaces_as_a_whole(self, store: Store) -> None:
        store.put("a", b"long and old")
        store.put("a", b"new")
        assert store.get("a") == b"new"
        assert store.list() == [("a", 3)]

    def test_put_if_absent_touches_nothing_that_is_there(self, store: Store) -> None:
        assert store.put_if_absent("x/a", b"first") is PutOutcome.CREATED
        assert store.put_if_absent("x/a", b"second") is PutOutcome.EXISTS
        assert store.put_if_absent("x/a", b"first") is PutOutcome.EXISTS, "equal bytes are no excuse: two winners"
        assert store.get("x/a") == b"first"

    def test_what_is_not_there_is_said_to_be_missing(self, store: Store) -> None:
        store.put("folder/object", b"x")
        for path in ("nothing", "folder", "folder/nothing", "folder/object/below"):
            assert not store.exists(path), path
            with pytest.raises(FileNotFoundError):
                store.get(path)
            with pytest.raises(FileNotFoundError):
                store.get_range(path, 0, 1)

    def test_ranges_are_cut_at_the_end(self, store: Store) -> None:
        store.put("r", bytes(range(100)))
        assert store.get_range("r", 0, 10) == bytes(range(10))
        assert store.get_range("r", 90, 200) == bytes(range(90, 100))
        assert store.get_range("r", 7, 7) == b""
        assert store.get_range("r", 100, 120) == b""

    def test_list_takes_any_prefix(self, store: Store) -> None:
        for path in ("chk-1/a", "chk-1/b/c", "chk-12/a", "shared/x"):
            store.put(path, path.encode())
        assert [p for p, _ in store.list()] == ["chk-1/a", "chk-1/b/c", "chk-12/a", "shared/x"]
        assert [p for p, _ in store.list("chk-1")] == ["chk-1/a", "chk-1/b/c", "chk-12/a"]
        assert store.list("chk-1/") == [("chk-1/a", 7), ("chk-1/b/c", 9)]
        assert store.list("nothing/") == []
        assert [p for p, _ in store.list("chk-", after="chk-1/a")] == ["chk-1/b/c", "chk-12/a"]
        assert [p for p, _ in store.list("chk-1/", after="chk-0")] == ["chk-1/a", "chk-1/b/c"]
        assert store.list("chk-1/", after="chk-1/b/c") == []

    def test_list_is_never_stale(self, store: Store, another: Store) -> None:
        """``another`` is a second client of the same place: what it does is seen at once."""
        for n in range(5):
            assert [p for p, _ in store.list("s/")] == [f"s/{i}" for i in range(n)]
            another.put(f"s/{n}", b"x" * n)
            assert store.exists(f"s/{n}")
        another.put("s/0", b"grown")
        assert store.list("s/0") == [("s/0", 5)]
        another.delete("s/0")
        assert not store.exists("s/0")
        assert [p for p, _ in store.list("s/")] == ["s/1", "s/2", "s/3", "s/4"]

    def test_delete_is_content_with_nothing(self, store: Store) -> None:
        store.put("d/a", b"x")
        store.delete("d/a")
        store.delete("d/a")
        store.delete("never/was")
        store.delete_prefix("never/was/")
        assert store.list() == []

    def test_delete_prefix_takes_all_below_and_no_more(self, store: Store) -> None:
        for path in ("chk-1/a", "chk-1/b/c", "chk-12/a", "other"):
            store.put(path, b"x")
        store.delete_prefix("chk-1/")
        assert [p for p, _ in store.list()] == ["chk-12/a", "other"]
        store.put("chk-1/a", b"again")
        assert store.get("chk-1/a") == b"again"
        store.delete_prefix("chk-")
        assert [p for p, _ in store.list()] == ["other"]

    @pytest.mark.parametrize(
        "path", ["", "/abs", "a//b", "../up", "a/../b", "a/./b", ".hidden", "a/", "back\\slash", "nul\0"]
    )
    def test_paths_that_could_leave_the_root_are_refused(self, store: Store, path: str) -> None:
        with pytest.raises(ValueError, match="storage path"):
            store.put(path, b"x")
        with pytest.raises(ValueError, match="storage path"):
            store.put_if_absent(path, b"x")

    def test_names_of_all_kinds_stay_apart(self, store: Store) -> None:
        for name in NAMES:
            store.put(f"n/{name}/{name}", name.encode())
        assert sorted(p for p, _ in store.list("n/")) == sorted(f"n/{name}/{name}" for name in NAMES)
        for name in NAMES:
            assert store.get(f"n/{name}/{name}") == name.encode()
            assert store.put_if_absent(f"n/{name}/{name}", b"") is PutOutcome.EXISTS
            store.delete_prefix(f"n/{name}/")
        assert store.list() == []

    def test_sixteen_race_and_one_wins(self, store: Store) -> None:
        for round_ in range(self.races):
            start = threading.Barrier(16)

            def race(who: int, path: str = f"race/{round_}", start: threading.Barrier = start) -> PutOutcome:
                start.wait()
                return store.put_if_absent(path, f"writer {who}".encode())

            with ThreadPoolExecutor(16) as pool:
                outcomes = list(pool.map(race, range(16)))
            assert outcomes.count(PutOutcome.CREATED) == 1
            winner = outcomes.index(PutOutcome.CREATED)
            assert store.get(f"race/{round_}") == f"writer {winner}".encode()

    def test_no_reader_ever_sees_a_part(self, store: Store) -> None:
        """Objects of one repeated byte: a mixture or a part of one would show in its length or its bytes."""
        size = 200_000
        store.put("whole", b"\x00" * size)
        done = threading.Event()

        def write() -> None:
            for byte in range(1, 12):
                store.put("whole", bytes([byte]) * size)
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            while not done.is_set():
                data = store.get("whole")
                assert len(data) == size
                assert len(set(data)) == 1
        finally:
            writer.join()
