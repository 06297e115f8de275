"""The lying store tells exactly the lies it is asked for."""

from __future__ import annotations

import pytest

from rayflow.errors import StorageError
from rayflow.storage.faults import Fault, FaultyStore, flipped
from rayflow.storage.store import MemoryStore, PutOutcome
from tests.storage.conformance import StoreConformance


class TestWithoutFaults(StoreConformance):
    @pytest.fixture
    def store(self) -> FaultyStore:
        return FaultyStore(MemoryStore(), lambda operation, path: None)

    @pytest.fixture
    def another(self, store: FaultyStore) -> FaultyStore:
        return store


@pytest.mark.parametrize(
    ("fault", "raises", "left"),
    [
        (Fault.FAIL, True, None),
        (Fault.FAIL_AFTER, True, b"abcdef"),
        (Fault.HALF, True, b"abc"),
        (Fault.LOSE, False, None),
        (Fault.FLIP, False, flipped(b"abcdef")),
        (Fault.STALE, True, None),
    ],
)
@pytest.mark.parametrize("operation", ["put", "put_if_absent"])
def test_writes(operation: str, fault: Fault, raises: bool, left: bytes | None) -> None:
    inner = MemoryStore()
    store = FaultyStore(inner, lambda *_: fault)
    write = store.put if operation == "put" else store.put_if_absent
    if raises:
        with pytest.raises(StorageError):
            write("a", b"abcdef")
    else:
        assert write("a", b"abcdef") in (None, PutOutcome.CREATED)
    assert (inner.get("a") if inner.exists("a") else None) == left


def test_reads_listings_and_deletes() -> None:
    inner = MemoryStore()
    faults: list[Fault | None] = []
    store = FaultyStore(inner, lambda *_: faults.pop() if faults else None)
    inner.put("a", b"abcdef")
    assert store.list() == [("a", 6)]
    inner.put("b", b"")
    faults.append(Fault.STALE)
    assert store.list() == [("a", 6)]
    assert len(store.list()) == 2
    faults.append(Fault.FLIP)
    assert store.get("a") == flipped(b"abcdef") != b"abcdef"
    faults.append(Fault.LOSE)
    store.delete("a")
    assert inner.exists("a")
    faults.append(Fault.FAIL_AFTER)
    with pytest.raises(StorageError):
        store.delete_prefix("a")
    assert not inner.exists("a")
    faults.append(Fault.FAIL)
    with pytest.raises(StorageError):
        store.exists("b")
