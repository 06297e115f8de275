"""Folders on local disk: made when asked for, gone after the attempt, and after a kill removed by the next process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rayflow.core.ids import Attempt, SubtaskId
from rayflow.errors import ConfigError, StorageError
from rayflow.runtime.scratch import ProcessFolder, Scratch, remove_abandoned


def scratch(base: Path, attempt: int = 1) -> Scratch:
    return Scratch(str(base), "a job / ü", SubtaskId("chain/1", 2), Attempt(attempt))


def test_folders_are_made_lazily_differ_and_go_with_the_attempt(tmp_path: Path) -> None:
    one, other = scratch(tmp_path), scratch(tmp_path, 2)
    assert not one.used
    assert not list(tmp_path.iterdir())
    first, second, third = one.folder("rocks"), one.folder("rocks"), other.folder("rocks")
    assert len({first, second, third}) == 3
    assert all(p.is_dir() and not list(p.iterdir()) and tmp_path in p.parents for p in (first, second, third))
    (first / "sub").mkdir()
    (first / "sub" / "000001.sst").write_bytes(b"x")
    one.close()
    one.close()
    assert not first.exists()
    assert not second.exists()
    assert third.is_dir()


def test_the_last_attempt_to_close_leaves_nothing_and_a_later_one_begins_anew(tmp_path: Path) -> None:
    one, other = scratch(tmp_path), scratch(tmp_path, 2)
    one.folder("rocks")
    folder = other.folder("rocks")
    one.close()
    assert folder.is_dir()
    other.close()
    assert not list(tmp_path.iterdir())
    assert scratch(tmp_path, 3).folder("rocks").is_dir()


def test_a_place_that_cannot_be_used_is_a_config_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=f"local_dir.*{file}.*on every node"):
        scratch(file).folder("rocks")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, name: str) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ProcessFolder, "make", full)
    with pytest.raises(StorageError, match="No space left.*make room"):
        scratch(tmp_path).folder("rocks")


KILLED = """
import os, signal, sys
from pathlib import Path
from rayflow.core.ids import Attempt, SubtaskId
from rayflow.runtime.scratch import Scratch
path = Scratch(sys.argv[1], "a job / ü", SubtaskId("chain/1", 2), Attempt(1)).folder("rocks")
(path / "000001.sst").write_bytes(b"x" * 1000)
print(path, flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    mine = scratch(tmp_path).folder("rocks")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        assert theirs.is_dir()
        of_job = mine.parent.parent
        assert theirs.parent.parent == of_job
        remove_abandoned(of_job)
        assert (theirs / "000001.sst").exists(), "its process lives"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait() == -signal.SIGKILL
    remove_abandoned(of_job)
    assert not theirs.parent.exists()
    assert mine.is_dir()
    assert str(os.getpid()) in mine.parent.name


def test_the_last_process_of_a_job_removes_what_killed_ones_left(tmp_path: Path) -> None:
    mine = scratch(tmp_path)
    mine.folder("rocks")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], input="\n", stdout=subprocess.PIPE, text=True, check=False
    )
    theirs = Path(killed.stdout.strip())
    assert killed.returncode == -signal.SIGKILL
    assert (theirs / "000001.sst").exists()
    mine.close()
    assert not list(tmp_path.iterdir())
