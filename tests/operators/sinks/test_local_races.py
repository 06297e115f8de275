"""Two processes commit the same files to a local folder: a subtask that was thought dead, and the recovery after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayflow.errors import StorageError
from rayflow.operators.sinks import local
from rayflow.operators.sinks.local import PENDING, LocalCommitter


class Meddled:
    """`os`, as the committer sees it; another process commits everything just before operation ``at`` (from 0)."""

    def __init__(self, at: int, meddle: Callable[[], None]) -> None:
        self.calls: list[str] = []
        self._at = at
        self._meddle = meddle
        self.path = _Wrapped(os.path, self)

    def __getattr__(self, name: str) -> Any:
        return _Wrapped(os, self).__getattr__(name)

    def called(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self._at + 1:
            self._meddle()


class _Wrapped:
    def __init__(self, inner: Any, owner: Meddled) -> None:
        self._inner = inner
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in ("exists", "getsize", "link", "unlink", "samefile"):
            return found

        def call(*args: Any) -> Any:
            self._owner.called(name)
            return found(*args)

        return call


def test_a_recovery_that_could_not_look_at_the_records_has_not_recovered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: LocalCommitter) -> frozenset[str]:
        raise FileNotFoundError("merge-1.json")

    monkeypatch.setattr(LocalCommitter, "_merged", gone)
    (tmp_path / PENDING).mkdir()
    (tmp_path / PENDING / "p").write_bytes(b"rows")
    committable = {"pending": "p", "final": "part.parquet", "rows": 1, "nbytes": 4}
    with pytest.raises(StorageError, match="cannot use"):
        LocalCommitter(str(tmp_path), (".parquet",), refuse_existing=True).recover([committable], fresh=False)


@pytest.mark.parametrize("at", range(5))
def test_a_commit_that_somebody_else_makes_at_any_moment_is_a_commit(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = LocalCommitter(str(tmp_path), (".parquet",), refuse_existing=True)
    (tmp_path / PENDING).mkdir()
    (tmp_path / PENDING / "p").write_bytes(b"rows")
    committable = {"pending": "p", "final": "part.parquet", "rows": 1, "nbytes": 4}

    def by_another() -> None:
        with monkeypatch.context() as inside:
            inside.setattr(local, "os", os)
            committer.commit([committable])

    meddled = Meddled(at, by_another)
    monkeypatch.setattr(local, "os", meddled)
    committer.commit([committable])
    assert len(meddled.calls) > at or at == 4, "the other one came too late to matter"
    assert (tmp_path / "part.parquet").read_bytes() == b"rows"
    assert list((tmp_path / PENDING).iterdir()) == []
